"""The training step and its seams; runs that are stopped, moved, damaged, locked, of other types, or not to be
believed."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from test_checkpoints import assert_equal_bits, sign_again, untimed, weights
from transformer_llm import training
from transformer_llm.checkpoints import (
    Note,
    checkpoint_folders,
    find_checkpoint,
    load_checkpoint,
    load_model,
    lock_run,
    run_files,
    save_checkpoint,
)
from transformer_llm.dataset import TokenData, prepare_tokens
from transformer_llm.foundations import InputError
from transformer_llm.tokenizer import CharTokenizer
from transformer_llm.training import Interrupted, Trainer, TrainingConfig, find_learning_rate, suggest_learning_rate
from transformer_llm.transformer import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=12, context_length=8, d_model=16, n_layers=1, n_heads=2, dropout=0.1)
CONFIG = TrainingConfig(max_steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, eval_every=3, log_every=2,
                        checkpoint_every=2, keep_checkpoints=9, device="cpu")
TOKENS = torch.randint(12, (400,), generator=torch.Generator().manual_seed(0))


def fresh_model(**changes) -> GPT:
    torch.manual_seed(1)
    return GPT(SHAPE.replace(**changes))


def make_trainer(directory=None, config=CONFIG, kind=Trainer, model=None, data=None, **options) -> Trainer:
    data = TokenData.from_tokens(TOKENS[:300], TOKENS[300:]) if data is None else data
    model = fresh_model() if model is None else model
    return kind(model, data, config, run_directory=directory, progress=False, **options)


def resume(path, kind=Trainer, data=None, **options) -> Trainer:
    data = TokenData.from_tokens(TOKENS[:300], TOKENS[300:]) if data is None else data
    return kind.resume(path, data, progress=False, **options)


# The step's seams

class Masked(Trainer):
    "Supervised fine-tuning: only the answer's tokens are targets."

    def next_batch(self):
        inputs, targets = super().next_batch()
        first = torch.randint(1, 7, (len(targets), 1), generator=self.generator)
        return inputs, targets.masked_fill(torch.arange(8) < first, -100)


def answer_log_p(model, ids, mask):
    log_p = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (log_p * mask[:, 1:]).sum(1)


class Preferring(Trainer):
    "Two forward passes, each by the model and by a frozen copy of it."

    def __init__(self, *args, reference: GPT, **options):
        super().__init__(*args, **options)
        self.reference = reference.eval()

    def next_batch(self):
        places = torch.randint(len(self.data["chosen"]), (4,), generator=self.generator)
        return {name: part[places] for name, part in self.data.items()}

    def loss(self, batch):
        better, worse = (answer_log_p(self.model, batch[name], batch["mask"]) for name in ("chosen", "rejected"))
        with torch.no_grad():
            base = [answer_log_p(self.reference, batch[name], batch["mask"]) for name in ("chosen", "rejected")]
        return -F.logsigmoid(better - base[0] - worse + base[1]).mean(), len(better)


class Rewarded(Trainer):
    "The model writes, and what it wrote is rewarded for each token 3."

    def next_batch(self):
        ids = torch.zeros(4, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(5):
                p = self.model(ids)[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(p, 1, generator=self.generator)], 1)
        return ids

    def loss(self, batch):
        reward = (batch == 3).float().sum(1)
        log_p = answer_log_p(self.model, batch, torch.ones_like(batch))
        return -((reward - reward.mean()) * log_p).mean(), len(batch)


def pairs() -> dict:
    draw = lambda seed: torch.randint(12, (20, 8), generator=torch.Generator().manual_seed(seed))
    return {"chosen": draw(1), "rejected": draw(2), "mask": (torch.arange(8) > 2).long().repeat(20, 1)}


KINDS = {
    "supervised": (Masked, lambda: None, dict),
    "preference": (Preferring, pairs, lambda: dict(reference=fresh_model())),
    "reward": (Rewarded, lambda: (TOKENS, None), dict),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_another_loss_is_one_override_and_the_rest_comes_with_it(tmp_path, name, accumulation):
    "Trained, recorded, checkpointed and resumed bit for bit."
    kind, data, options = KINDS[name]
    config = CONFIG.replace(accumulation=accumulation)
    whole = make_trainer(tmp_path / "whole", config, kind, data=data(), **options())
    before = weights(whole)
    whole.train()
    assert any(not torch.equal(before[key], value) for key, value in weights(whole).items())
    assert [record["step"] for record in whole.history] == [2, 3, 4, 6] and whole.saved_step == 6
    assert (whole.history[-1]["val_loss"] is None) == (name != "supervised")
    with pytest.raises(KeyError):
        make_trainer(tmp_path / "parted", config, kind, data=data(), on_step=stop_at(5), **options()).train()
    torch.manual_seed(99)
    again = resume(tmp_path / "parted", kind, data(), **options())
    assert again.step == 4
    again.train()
    assert_equal_bits(weights(whole), weights(again))
    assert untimed(whole.history) == untimed(again.history)


def stop_at(step: int):
    def stop(trainer, record):
        if record["step"] == step:
            raise KeyError(step)
    return stop


def test_a_step_calls_its_seams_in_this_order():
    calls = []

    class Noted(Trainer):
        pass

    def noted(name):
        def call(self, *args):
            calls.append(name)
            return getattr(Trainer, name)(self, *args)
        return call

    seams = ("next_batch", "loss", "backward", "clip", "update", "after_step")
    for name in seams:
        setattr(Noted, name, noted(name))
    trainer = make_trainer(None, CONFIG.replace(max_steps=1, eval_every=0), Noted, data=(TOKENS, None))
    trainer.train()
    assert calls == list(seams)
    calls.clear()
    trainer.config = trainer.config.replace(accumulation=2)
    trainer.train_step()
    assert calls == ["next_batch", "loss", "backward"] * 2 + ["clip", "update"]


@pytest.mark.parametrize("counts", [(1, 7, 3), (0, 5), (4, 0, 0), (2, 2)])
def test_batches_of_different_numbers_of_targets_make_one_large_batch(counts):
    "And the loss that a step returns is the mean over all of them."
    draw = torch.Generator().manual_seed(3)
    batches = []
    for count in counts:
        ids = torch.randint(12, (1, 9), generator=draw)
        targets = ids[:, 1:].clone()
        targets[:, count:] = -100
        batches.append((ids[:, :-1], targets))

    class Given(Trainer):
        def next_batch(self):
            return batches[self.turn()]

        def turn(self):
            self.turns = getattr(self, "turns", -1) + 1
            return self.turns

        def update(self):
            self.gradients = [p.grad.clone() for p in self.model.parameters()]

    config = CONFIG.replace(accumulation=len(counts), grad_clip=0.0)
    trainer = make_trainer(None, config, Given, fresh_model(dropout=0.0))
    loss, _ = trainer.train_step()
    model = fresh_model(dropout=0.0)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    whole = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for p, gradient in zip(model.parameters(), trainer.gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("found", [torch.zeros(()), (torch.zeros(2), 2), (torch.zeros(()), -1), None, (1.0, 2)])
def test_a_loss_that_does_not_say_what_it_is_the_mean_of_is_refused(found):
    class Wrong(Trainer):
        def loss(self, batch):
            return found

    with pytest.raises(InputError, match="Wrong.loss must return|number of targets"):
        make_trainer(None, kind=Wrong).train_step()


def test_a_subclass_says_what_it_is_measured_on():
    class Measured(Masked):
        def validation_batches(self, n_batches=None):
            return [(TOKENS[None, :8], TOKENS[None, 1:9])]

    trainer = make_trainer(None, kind=Measured, data=(TOKENS, None), model=fresh_model(dropout=0.0))
    with torch.no_grad():
        loss = F.cross_entropy(trainer.model(TOKENS[None, :8])[0], TOKENS[1:9])
    assert trainer.evaluate() == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.train()[-1]["val_loss"] is not None


def test_on_step_is_called_at_each_step_and_on_record_at_each_record():
    steps, records = [], []
    trainer = make_trainer(None, on_step=lambda trainer, record: steps.append(record),
                           on_record=lambda trainer, record: records.append(record))
    trainer.train()
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert records == trainer.history and [record["step"] for record in records] == [2, 3, 4, 6]
    assert records[0]["loss"] == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    assert steps[2]["val_loss"] == records[1]["val_loss"] is not None


def test_a_muon_run_records_both_rates():
    config = CONFIG.replace(optimizer="muon", muon_learning_rate=0.05, schedule="constant")
    for record in make_trainer(None, config).train():
        assert record["lr"] == pytest.approx(3e-3) and record["muon_lr"] == pytest.approx(0.05)
    assert "muon_lr" not in make_trainer(None).train()[-1]


# Signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, name):
    number = getattr(signal, name, None)
    if number is None or signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("no such signal here")
    before = signal.getsignal(number)
    config = CONFIG.replace(checkpoint_every=0)
    trainer = make_trainer(tmp_path, config,
                           on_step=lambda trainer, record: trainer.step == 3 and signal.raise_signal(number))
    with pytest.raises(Interrupted, match=r"step 3, which is saved; .*Trainer\.resume\(") as stopped:
        trainer.train()
    assert (stopped.value.signal, stopped.value.step, stopped.value.saved) == (number, 3, True)
    assert isinstance(stopped.value, KeyboardInterrupt) and signal.getsignal(number) is before
    again = resume(tmp_path)
    again.train()
    whole = make_trainer(None, config)
    whole.train()
    assert_equal_bits(weights(whole), weights(again))


def test_the_second_signal_claims_no_step_that_was_not_saved(tmp_path):
    def twice(trainer, record):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    not_saved = "step 3, which is not saved; the newest checkpoint is from step 2"
    with pytest.raises(Interrupted, match=not_saved) as stopped:
        make_trainer(tmp_path, on_step=twice).train()
    assert not stopped.value.saved and find_checkpoint(tmp_path).name == "step-0000002"
    with pytest.raises(Interrupted, match="nothing is saved"):
        make_trainer(None, on_step=twice).train()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    "Under nohup a run outlives its terminal; two kinds of signals at once, as a machine that goes down sends, are one."
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = lambda trainer, record: signal.raise_signal(signal.SIGHUP)
        assert make_trainer(None, on_step=hang_up).train()[-1]["step"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)

    def go_down(trainer, record):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(Interrupted, match="SIGTERM after step 1, which is saved"):
        make_trainer(tmp_path, on_step=go_down).train()


def test_a_terminal_that_went_away_stops_no_training(monkeypatch):
    from tqdm import tqdm

    def gone(*args, **options):
        raise OSError(5, "Input/output error")

    trainer = make_trainer(None)
    trainer.progress = True
    with monkeypatch.context() as patch:
        for name in ("update", "set_postfix", "close"):
            patch.setattr(tqdm, name, gone)
        assert trainer.train()[-1]["step"] == 6


# Models of every kind

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("position", ["rotary", "sinusoidal", "alibi", "learned"])
def test_models_of_every_type_are_saved_and_loaded(tmp_path, dtype, position):
    model = fresh_model(position=position).to(dtype).eval()
    save_checkpoint(tmp_path, 1, model)
    state = torch.get_rng_state()
    loaded, _ = load_model(tmp_path)
    assert torch.equal(state, torch.get_rng_state())  # no random number was drawn
    assert_equal_bits(model.state_dict(), loaded.state_dict())
    ids = TOKENS[None, :8]
    assert torch.equal(model(ids), loaded(ids)) and {p.dtype for p in loaded.parameters()} == {dtype}


def test_a_model_of_two_types(tmp_path):
    model = fresh_model()
    model.blocks[0].bfloat16()
    save_checkpoint(tmp_path, 1, model)
    assert_equal_bits(model.state_dict(), load_model(tmp_path)[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_trainer_of_another_type_resumes_to_the_bit(tmp_path, dtype):
    whole = make_trainer(tmp_path, model=fresh_model().to(dtype))
    whole.train()
    again = resume(tmp_path / "step-0000004")
    assert {p.dtype for p in again.model.parameters()} == {dtype}
    with pytest.warns(Note, match="set-aside"):
        again.train()
    assert_equal_bits(weights(whole), weights(again))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_frozen_parameters_resumes_to_the_bit(tmp_path, optimizer):
    def frozen():
        model = fresh_model()
        model.token_embedding.requires_grad_(False)
        model.blocks[0].attention.requires_grad_(False)
        return model

    config = CONFIG.replace(optimizer=optimizer)
    whole = make_trainer(tmp_path, config, model=frozen())
    before = whole.model.token_embedding.weight.clone()
    whole.train()
    again = resume(tmp_path / "step-0000002", run_directory=tmp_path / "other")
    again.train()
    assert_equal_bits(weights(whole), weights(again))
    assert torch.equal(before, again.model.token_embedding.weight)
    assert not again.model.blocks[0].attention.q_proj.weight.requires_grad


def test_a_checkpoint_is_read_under_another_default_type(tmp_path):
    whole = make_trainer(tmp_path)
    whole.train()
    torch.set_default_dtype(torch.float64)
    try:
        loaded, again = load_model(tmp_path)[0], resume(tmp_path / "step-0000004")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal_bits(weights(whole), loaded.state_dict())
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}


def test_compiled_models_are_saved_as_what_they_are(tmp_path):
    "And a checkpoint that an older version wrote of one is read."
    compiled = torch.compile(fresh_model(), backend="eager")
    save_checkpoint(tmp_path / "one", 1, compiled)
    assert_equal_bits(load_model(tmp_path / "one")[0].state_dict(), fresh_model().state_dict())
    trainer = make_trainer(tmp_path / "two", model=compiled)
    trainer.save()
    assert trainer._forward is compiled and isinstance(trainer.model, GPT)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "two" / "step-0000000" / "model.safetensors"))
    part = fresh_model()
    part.blocks[0] = torch.compile(part.blocks[0], backend="eager")
    save_checkpoint(tmp_path / "part", 1, part)
    assert_equal_bits(load_model(tmp_path / "part")[0].state_dict(), fresh_model().state_dict())

    whole = make_trainer(tmp_path / "old")
    whole.train()
    folder = tmp_path / "old" / "step-0000004"
    tensors = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": t for name, t in tensors.items()}, folder / "model.safetensors")
    tensors = load_file(folder / "training_state.safetensors")
    old_name = lambda name: name if name.startswith("generator") else re.sub(r"^(\w+\.\w+\.)", r"\1_orig_mod.", name)
    save_file({old_name(name): t for name, t in tensors.items()}, folder / "training_state.safetensors")
    sign_again(folder)
    again = resume(folder, run_directory=tmp_path / "new")
    again.train()
    assert_equal_bits(weights(whole), weights(again))


class Adapted(nn.Module):
    "A linear layer with a low-rank change beside it."

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted_model() -> GPT:
    model = fresh_model().requires_grad_(False)
    for name in ("q_proj", "v_proj"):
        setattr(model.blocks[0].attention, name, Adapted(getattr(model.blocks[0].attention, name)))
    return model


def test_a_model_that_could_not_be_loaded_again_is_refused_before_it_is_trained(tmp_path):
    "Without a run directory it trains; a trainer that knows how to make it saves and resumes it."
    with pytest.raises(InputError, match=r"This model \w+ blocks.0.attention.q_proj"):
        make_trainer(tmp_path, model=adapted_model())
    with pytest.raises(InputError, match="q_proj"):
        save_checkpoint(tmp_path, 1, adapted_model())
    assert not list(tmp_path.iterdir())
    before = fresh_model()(TOKENS[None, :8])
    trainer = make_trainer(None, model=adapted_model())
    trainer.train()
    assert largest(trainer.model.eval()(TOKENS[None, :8]), before.detach()) > 1e-4

    class AdapterTrainer(Trainer):
        @classmethod
        def make_model(cls, config):
            return adapted_model()

    whole = make_trainer(tmp_path / "run", kind=AdapterTrainer, model=adapted_model())
    whole.train()
    again = resume(tmp_path / "run" / "step-0000004", AdapterTrainer, run_directory=tmp_path / "new")
    again.train()
    assert_equal_bits(weights(whole), weights(again))


def largest(a, b) -> float:
    return (a - b).abs().max().item()


def test_only_a_gpt_is_saved_and_trained(tmp_path):
    with pytest.raises(InputError, match="must be a GPT, not Linear"):
        save_checkpoint(tmp_path, 1, nn.Linear(2, 2))
    with pytest.raises(InputError, match="must be a GPT, not Linear"):
        make_trainer(None, model=nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_matrices_tied_by_hand_are_refused(tmp_path):
    model = fresh_model(tied_embeddings=False)
    model.lm_head.weight = model.token_embedding.weight
    with pytest.raises(InputError, match="one parameter.*tied_embeddings"):
        make_trainer(tmp_path, model=model)


# Runs that moved, branched, or share their folder

def test_a_run_moved_with_its_tokens_goes_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijkl" * 60, encoding="utf-8")
    tokenizer = CharTokenizer.train("abcdefghijkl")
    for name, tokens in (("inside", "home/run/tokens"), ("beside", "home/tokens")):
        data = prepare_tokens(text, tokenizer, tmp_path / name / tokens, progress=False)
        whole = make_trainer(tmp_path / name / "home" / "run", data=data)
        whole.train()
        moved = (tmp_path / name).rename(tmp_path / f"{name} elsewhere") / "home" / "run"
        again = Trainer.resume(moved / "step-0000004", progress=False)
        with pytest.warns(Note, match="set-aside-1"):
            again.train()
        assert_equal_bits(weights(whole), weights(again))
        aside = Trainer.resume(moved / "set-aside-1", progress=False)
        assert aside.step == 6
        shutil.rmtree(again.data.directory)
        with pytest.raises(InputError, match="put them back"):
            Trainer.resume(moved, progress=False)


def test_going_on_from_an_older_checkpoint_keeps_the_newer_ones_and_says_so(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    newest, history = weights(trainer), untimed(trainer.history)
    older = resume(tmp_path / "step-0000002", learning_rate=1e-4)
    assert len(checkpoint_folders(tmp_path)) == 4
    with pytest.warns(Note, match="step 2; what came after it .step-0000004, step-0000006. is kept in .*set-aside-1"):
        older.train()
    aside = resume(tmp_path / "set-aside-1")
    assert aside.step == 6 and untimed(aside.history) == history
    assert_equal_bits(weights(aside), newest)
    other = resume(tmp_path / "step-0000002", run_directory=tmp_path / "other")
    other.train()
    assert [folder.name for folder in checkpoint_folders(tmp_path)][-1] == "step-0000006"
    assert not (tmp_path / "set-aside-2").exists() and find_checkpoint(tmp_path / "other").name == "step-0000006"
    with pytest.raises(InputError, match="already holds a run"):
        resume(tmp_path / "step-0000002", run_directory=tmp_path / "other").train()


def test_what_others_put_beside_a_runs_files_stays(tmp_path):
    config = CONFIG.replace(keep_checkpoints=1, checkpoint_every=1)
    (tmp_path / "step-0000003").mkdir()
    (tmp_path / "step-0000003" / "thesis.txt").write_text("mine")
    (tmp_path / ".step-notes.part").write_text("mine")

    def write(trainer, record):
        if trainer.step == 2:
            (tmp_path / "step-0000001" / "notes.txt").write_text("mine")

    make_trainer(tmp_path, config, on_step=write).train()
    assert (tmp_path / "step-0000003.aside-1" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "step-0000001" / "notes.txt").read_text() == "mine"
    assert (tmp_path / ".step-notes.part").exists()
    found = {path.name for path in run_files(tmp_path)}
    assert found == {"step-0000001", "step-0000006", "metrics.jsonl"}


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(tmp_path):
    make_trainer(tmp_path, CONFIG.replace(max_steps=1)).train()
    with pytest.raises(InputError, match="never overwritten"):
        make_trainer(tmp_path).save()


def test_an_incomplete_newest_checkpoint_is_skipped_aloud(tmp_path):
    make_trainer(tmp_path).train()
    (tmp_path / "step-0000006" / "checkpoint.json").unlink()
    with pytest.warns(Note, match="step-0000006 has no checkpoint.json and is skipped; .*step-0000004 is used"):
        assert load_checkpoint(tmp_path).step == 4
    for folder in tmp_path.glob("step-*"):
        (folder / "checkpoint.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="step-0000006 has no checkpoint.json"):
        load_model(tmp_path)


def test_a_folder_in_which_a_process_trains_is_refused_to_others_and_nothing_is_written(tmp_path):
    "A killed process leaves no lock behind, whatever its number."
    run = tmp_path / "run"
    hold = ("import sys, time; from transformer_llm.checkpoints import lock_run; lock = lock_run(sys.argv[1]); "
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            before = sorted(path.name for path in run.iterdir())
            with pytest.raises(InputError, match=f"Process {other.pid} is training in .*run"):
                make_trainer(run).train()
            assert before == sorted(path.name for path in run.iterdir()) == [".lock"]
        finally:
            other.kill()
    assert (run / ".lock").exists()
    make_trainer(run).train()
    assert not (run / ".lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    (tmp_path / ".lock").write_text("1\n")  # a stale one, with the number of a process that lives
    for _ in range(5):
        (told, tell), (wait, end) = os.pipe(), os.pipe()
        children = []
        for _ in range(6):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(end)
                try:
                    lock = lock_run(tmp_path)
                    os.write(tell, b"1")
                    os.read(wait, 1)  # until all have tried
                    lock.release()
                except InputError:
                    os.write(tell, b"0")
                os._exit(0)
        said = b"".join(os.read(told, 1) for _ in children)
        os.close(end)
        for child in children:
            os.waitpid(child, 0)
        assert sorted(said) == sorted(b"000001")
        for pipe in (told, tell, wait):
            os.close(pipe)
    with lock_run(tmp_path), lock_run(tmp_path):  # once more in the same thread
        child = os.fork()
        if child == 0:  # a child holds nothing of its parent's
            try:
                lock_run(tmp_path)
                os._exit(0)
            except InputError:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_two_threads_do_not_share_a_folder(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with lock_run(tmp_path), ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match="Another thread"):
            pool.submit(lock_run, tmp_path).result()


def test_tensorboard_shows_each_record_once(tmp_path):
    "Also after a resume, and nothing of a run that was removed."
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def seen():
        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        return [(event.step, event.value) for event in board.Scalars("loss")]

    config = CONFIG.replace(tensorboard=True, log_every=1)
    with pytest.raises(KeyError):
        make_trainer(tmp_path, config, on_step=stop_at(5)).train()
    again = resume(tmp_path)
    again.train()
    expected = [(record["step"], pytest.approx(record["loss"])) for record in again.history]
    assert seen() == expected and len(expected) == 6
    for path in tmp_path.glob("step-*"):
        shutil.rmtree(path)
    time.sleep(1.1)  # the names of event files count seconds
    new = make_trainer(tmp_path, config.replace(max_steps=2, seed=4))
    new.train()
    assert seen() == [(record["step"], pytest.approx(record["loss"])) for record in new.history]


# The same data

def test_tokens_that_changed_are_noticed(tmp_path):
    make_trainer(tmp_path).train()
    other = TOKENS.clone()
    other[7] = (other[7] + 1) % 12
    for data in ((other[:300], TOKENS[300:]), (TOKENS[:300], TOKENS[300:].flip(0))):
        with pytest.raises(InputError, match="same data"):
            resume(tmp_path, data=data)
    for kind in (torch.int32, torch.uint8):  # the same tokens in another type
        resume(tmp_path, data=(TOKENS[:300].to(kind), TOKENS[300:].to(kind)))


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("damage", ["flipped bit", "zeros"])
def test_prepared_tokens_that_changed_are_noticed(tmp_path, name, damage):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijkl" * 60, encoding="utf-8")
    data = prepare_tokens(text, CharTokenizer.train("abcdefghijkl"), tmp_path / "tokens", progress=False)
    make_trainer(tmp_path / "run", CONFIG.replace(max_steps=1), data=data).train()
    content = bytearray((tmp_path / "tokens" / name).read_bytes())
    if damage == "zeros":
        content = bytes(len(content))
    else:
        content[10] ^= 1
    del data
    (tmp_path / "tokens" / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        Trainer.resume(tmp_path / "run", progress=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_tokens_of_any_whole_type_train(dtype):
    assert make_trainer(None, data=(TOKENS[:300].to(dtype), TOKENS[300:].to(dtype))).train()[-1]["step"] == 6


@pytest.mark.parametrize("data, words", [
    ((TOKENS.float(), None), "training tokens"), ((TOKENS - 1, None), "training tokens"), (TOKENS, "pair of token"),
    ((TOKENS, TOKENS + 1), "vocab_size"), ((TOKENS[None], None), "row"), (["a", "b"], "TokenData"),
])
def test_data_that_are_no_tokens_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        make_trainer(None, data=data)


def test_a_subclasses_own_data_are_compared_too(tmp_path):
    make_trainer(tmp_path, kind=Preferring, data=pairs(), reference=fresh_model()).train()
    with pytest.raises(InputError, match="same data"):
        resume(tmp_path, Preferring, pairs() | {"rejected": pairs()["chosen"]}, reference=fresh_model())


def test_a_longer_run_says_that_its_rate_changes(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.warns(Note, match="max_steps 12 instead of 6 stretches the schedule: .* continues at .* instead of"):
        resume(tmp_path, max_steps=12)
    with pytest.warns(Note, match="max_steps 3 leaves nothing to train"):
        resume(tmp_path, max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(tmp_path)
    with pytest.raises(InputError, match="Unknown training setting max_step;"):
        resume(tmp_path, max_step=3)


# What is not to be believed

@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    trainer = make_trainer(tmp_path_factory.mktemp("run"), CONFIG.replace(max_steps=1))
    trainer.train()
    return find_checkpoint(trainer.run_directory)


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def change_json(folder: Path, name: str, change) -> None:
    values = json.loads((folder / name).read_text())
    values = change(values) or values
    (folder / name).write_text(json.dumps(values))
    sign_again(folder)


def one_sentence(action) -> str:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize("changes, words", [
    (dict(n_layers=10**6), "too few for the 1,000,000 layers"),
    (dict(vocab_size=10**8), "token_embedding.weight"),
    (dict(d_model=10**15, head_dim=2), "model.safetensors|configuration"),
    (dict(d_ff=10**18), "model.safetensors|configuration"),
    (dict(position="sinusoidal", context_length=10**9), "context_length"),
])
def test_a_configuration_larger_than_its_weights_is_refused_before_memory_is_taken(checkpoint, changes, words):
    resource = pytest.importorskip("resource")
    change_json(checkpoint, "config.json", lambda values: values | changes)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for action in (load_model, resume):
        assert any(word in one_sentence(lambda action=action: action(checkpoint)) for word in words.split("|"))
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


WRONG = {
    "config.json": [True, 5, [], "x", {"d_model": "wide"}, {"rope_scaling": 5}, {"vocab_size": None}, {"dropout": [1]}],
    "training.json": [True, 5, [], {"training": 5, "data": {}}, {"training": {}, "data": []},
                      {"training": {"betas": 5}, "data": {}}, {"training": {"max_steps": "many"}, "data": {}},
                      {"training": {"device": ["cpu"]}, "data": {}}, {"training": {}, "data": {"directory": 5}},
                      {"training": {}, "data": {"seal": 5}}, {"training": {}, "data": {}, "frozen": "all"},
                      {"training": {}, "data": {}, "frozen": ["nothing"]}, {"training": {}, "data": {}, "frozen": [5]}],
    "training_state.json": [True, 5, [], {"seconds": "long"}, {"seconds": None}, {"loss_sum": [1]},
                            {"loss_count": True}, {"seconds": math.inf}, {"step": True}, {"format_version": "1"}],
}


def spoil(folder: Path, name: str, wrong) -> None:
    def change(values):
        if not isinstance(wrong, dict):
            return wrong or [0]
        if name == "training.json" and all(isinstance(wrong[key], dict) for key in ("training", "data")):
            merged = {key: values[key] | wrong[key] for key in ("training", "data")}
            return merged | ({"frozen": wrong["frozen"]} if "frozen" in wrong else {})
        return wrong if name == "training.json" else values | wrong

    change_json(folder, name, change)


def test_notes_with_right_hashes_and_wrong_types_are_refused_in_a_sentence(finished, tmp_path):
    "In a process without the shape check, which would find some of them first."
    folders = []
    for name, values in WRONG.items():
        for number, wrong in enumerate(values):
            folders.append(Path(shutil.copytree(finished, tmp_path / f"{name} {number}" / finished.name)))
            spoil(folders[-1], name, wrong)
    code = """
import json, sys, torch
from transformer_llm.training import Trainer
tokens = torch.randint(12, (400,), generator=torch.Generator().manual_seed(0))
said = []
for path in sys.argv[1:]:
    try:
        Trainer.resume(path, (tokens[:300], tokens[300:]), progress=False)
        said.append([path, "nothing", ""])
    except Exception as error:
        said.append([path, type(error).__name__, str(error)])
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == len(folders)
    for path, kind, sentence in said:
        assert kind == "InputError" and sentence.endswith(".") and "\n" not in sentence, (path, kind, sentence)


@pytest.mark.parametrize("change", [
    lambda d: d.update(step="1"), lambda d: d.update(step=True), lambda d: d.update(step=-1),
    lambda d: d.update(format_version=True), lambda d: d.update(format_version=[1]), lambda d: d.update(files=5),
    lambda d: d["files"].update({"config.json": 5}), lambda d: d["files"].update({"config.json": {"bytes": "x"}}),
    lambda d: d["files"].update({"../x": {}}),
])
def test_a_list_of_files_with_wrong_types_is_refused_in_a_sentence(checkpoint, change):
    from transformer_llm.checkpoints import canonical

    folder = checkpoint.rename(checkpoint.with_name("favourite"))
    manifest = json.loads((folder / "checkpoint.json").read_text())
    change(manifest)
    (folder / "checkpoint.json").write_bytes(canonical(manifest))
    one_sentence(lambda: load_model(folder))


@pytest.mark.parametrize("name, value", [("generator.batches", 255), ("generator.cpu", 255), ("AdamW.step", -3)])
def test_states_that_nothing_can_go_on_from_are_refused_in_a_sentence(checkpoint, name, value):
    tensors = load_file(checkpoint / "training_state.safetensors")
    for key in [key for key in tensors if key.startswith(name)]:
        tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, checkpoint / "training_state.safetensors")
    sign_again(checkpoint)
    assert "training_state.safetensors" in one_sentence(lambda: resume(checkpoint))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_announced(tmp_path, value):
    model = fresh_model()
    model.final_norm.weight.data[3] = value
    save_checkpoint(tmp_path, 1, model)
    with pytest.warns(Note, match="final_norm.weight holds numbers that are not finite"):
        load_model(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_only_regular_files_are_read(finished, tmp_path, name, kind):
    folder = Path(shutil.copytree(finished, tmp_path / finished.name))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    if name != "checkpoint.json":
        manifest = json.loads((folder / "checkpoint.json").read_text())
        manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
        from transformer_llm.checkpoints import canonical

        (folder / "checkpoint.json").write_bytes(canonical(manifest))
    assert name in one_sentence(lambda: load_model(folder)) or name == "checkpoint.json"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_history_that_is_a_pipe_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / finished.name)
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl" in one_sentence(lambda: resume(tmp_path))


def test_a_history_of_one_endless_line_is_refused_in_little_memory(finished, tmp_path):
    resource = pytest.importorskip("resource")
    shutil.copytree(finished, tmp_path / finished.name)
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(2**30)  # zeros that take no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "metrics.jsonl is damaged" in one_sentence(lambda: resume(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_no_learning_rate_is_found_for_a_model_that_is_no_number():
    model = fresh_model()
    model.final_norm.weight.data.fill_(math.nan)
    data = TokenData.from_tokens(TOKENS[:300], TOKENS[300:])
    assert "the loss is nan" in one_sentence(lambda: find_learning_rate(model, data, CONFIG, steps=5))
    for rates, losses in (([], []), ([1e-3], [math.nan])):
        suggest = partial(suggest_learning_rate, rates, losses)
        assert "no loss is a finite number" in one_sentence(suggest)
    assert suggest_learning_rate([1e-3, 1e-2, 1e-1], [2.0, math.nan, 1.0]) == pytest.approx(1e-2)
    assert training.schedule_factor(5, CONFIG) <= 1


def test_a_search_for_muons_rate_keeps_adamws_in_proportion(monkeypatch):
    seen = []

    def note(trainer):
        seen.append([o.param_groups[0]["top_lr"] for o in trainer.optimizers])
        return 1.0, 1.0

    monkeypatch.setattr(Trainer, "train_step", note)
    config = CONFIG.replace(optimizer="muon", muon_learning_rate=0.02, learning_rate=0.005)
    rates, _ = find_learning_rate(fresh_model(), (torch.arange(40) % 5, None), config, low=0.001, high=1.0, steps=4)
    assert len(rates) == 4 == len(seen)
    for rate, (adamw, muon) in zip(rates, seen):
        assert muon == pytest.approx(rate) and adamw == pytest.approx(rate / 4)


class OnPairs(Trainer):
    "Trains on a table of inputs and one of targets, as fine-tuning does."

    def next_batch(self):
        rows = torch.randint(len(self.data[0]), (2,), generator=self.generator)
        return self.data[0][rows], self.data[1][rows]


def test_a_trainer_with_batches_of_its_own_may_have_a_pair_of_tables(tmp_path):
    table = torch.randint(12, (20, 9), generator=torch.Generator().manual_seed(2))
    pair = table[:, :-1], table[:, 1:]
    trainer = make_trainer(tmp_path, kind=OnPairs, data=pair, config=CONFIG.replace(max_steps=2, eval_every=0))
    trainer.train()
    resumed = OnPairs.resume(tmp_path, pair, progress=False, max_steps=3)
    resumed.train()
    assert resumed.step == 3 and resumed.data is pair
    assert "one row of token ids" in one_sentence(lambda: make_trainer(data=pair))


def test_tokens_prepared_anew_are_known_by_their_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join("abcdefghijkl"[i] for i in TOKENS.tolist()))
    tokenizer = CharTokenizer.train([text.read_text()])
    prepare_tokens(text, tokenizer, tmp_path / "tokens")
    meta = tmp_path / "tokens" / "meta.json"
    older = {name: value for name, value in json.loads(meta.read_text()).items() if name != "sha256"}
    older["fingerprint"] = "0" * len(older["fingerprint"])  # an older version's: no seal, and another fingerprint
    now = meta.read_text()
    meta.write_text(json.dumps(older))
    make_trainer(tmp_path / "run", data=TokenData.open(tmp_path / "tokens")).train()
    meta.write_text(now)
    assert Trainer.resume(tmp_path / "run", progress=False, max_steps=7).train()[-1]["step"] == 7
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    prepare_tokens(tmp_path / "other.txt", tokenizer, tmp_path / "tokens", overwrite=True)
    assert "doesn't hold the tokens that" in one_sentence(lambda: Trainer.resume(tmp_path / "run", progress=False))
