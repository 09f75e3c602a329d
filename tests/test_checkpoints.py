"""Checkpoints that are damaged, foreign or half written; runs that stop and go on; accumulation; pruning."""
import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformer_llm import checkpoints, training
from transformer_llm.checkpoints import (
    Note,
    checkpoint_folders,
    find_checkpoint,
    load_checkpoint,
    load_model,
    remove_leftovers,
    save_checkpoint,
    verify_checkpoint,
)
from transformer_llm.dataset import TokenData
from transformer_llm.foundations import InputError
from transformer_llm.tokenizer import CharTokenizer
from transformer_llm.training import (
    Metrics,
    Trainer,
    TrainingConfig,
    TrainingError,
    accumulate_gradients,
    cross_entropy,
    schedule_factor,
)
from transformer_llm.transformer import GPT, GPTConfig

TEXT = "the cat sat on the mat, and the dog sat on the cat. " * 40
TOKENIZER = CharTokenizer.train(TEXT)
TOKENS = torch.tensor(TOKENIZER.encode(TEXT))
SHAPE = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=16, d_model=16, n_layers=2, n_heads=2, dropout=0.1)
CONFIG = TrainingConfig(
    max_steps=24,
    batch_size=4,
    accumulation=2,
    optimizer="muon",
    learning_rate=3e-3,
    warmup_steps=4,
    eval_every=7,
    log_every=5,
    checkpoint_every=6,
    device="cpu",
)
FILES = (
    "checkpoint.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "training_state.json",
    "training_state.safetensors",
)


def fresh_model() -> GPT:
    torch.manual_seed(1)
    return GPT(SHAPE)


def token_data() -> TokenData:
    return TokenData.from_tokens(TOKENS[:1800], TOKENS[1800:])


def make_trainer(directory, config=CONFIG, **options) -> Trainer:
    return Trainer(
        fresh_model(), token_data(), config, run_directory=directory, tokenizer=TOKENIZER, progress=False, **options
    )


def weights(trainer: Trainer) -> dict:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def untimed(history: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_second")}
        for record in history
    ]


def sign_again(folder: Path) -> None:
    "Make the list of files fit what is there, as someone with bad intentions would."
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
                         for p in sorted(folder.iterdir()) if p.name != "checkpoint.json"}
    (folder / "checkpoint.json").write_bytes(checkpoints.canonical(manifest))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run that was never stopped."
    trainer = make_trainer(tmp_path_factory.mktemp("finished"))
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    "A copy of its last checkpoint, to be damaged."
    source = find_checkpoint(finished.run_directory)
    return Path(shutil.copytree(source, tmp_path / source.name))


def refused(path) -> str:
    "The sentence that refuses a checkpoint, both for its model and for going on."
    with pytest.raises(InputError) as error:
        load_model(path)
    with pytest.raises(InputError):
        Trainer.resume(path, token_data(), progress=False)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


class Stop(Exception):
    "Ends a run from inside."


def stop_at(step: int):
    def stop(trainer, record):
        if record["step"] >= step:
            raise Stop
    return stop


# Damage

def test_a_checkpoint_has_these_files_and_loads(finished, checkpoint):
    assert tuple(sorted(p.name for p in checkpoint.iterdir())) == FILES
    model, tokenizer = load_model(checkpoint)
    assert not model.training and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert_equal_bits(model.state_dict(), weights(finished))


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_refused(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (checkpoint / name).write_bytes(content[:length])
        assert name in refused(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_refused(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    for place in (0, 9, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1):
        for bit in (1, 32, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            (checkpoint / name).write_bytes(changed)
            with pytest.raises(InputError):
                load_checkpoint(checkpoint)
    refused(checkpoint)


def test_every_byte_of_the_list_of_files_counts(checkpoint):
    content = (checkpoint / "checkpoint.json").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 + place % 127
        (checkpoint / "checkpoint.json").write_bytes(changed)
        with pytest.raises(InputError):
            verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", FILES[1:])
def test_missing_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    assert name in refused(checkpoint)
    if name != "tokenizer.json":  # a model needs none
        sign_again(checkpoint)
        assert name in refused(checkpoint)


def test_unknown_file_is_refused(checkpoint):
    (checkpoint / "notes.txt").write_text("hello")
    assert "notes.txt" in refused(checkpoint)


def test_hidden_notes_of_a_file_manager_do_no_harm(checkpoint):
    (checkpoint / ".DS_Store").write_bytes(b"seen")
    load_model(checkpoint)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version_is_refused(checkpoint, version):
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").write_bytes(checkpoints.canonical({**manifest, "format_version": version}))
    assert "format version" in refused(checkpoint)


def test_a_checkpoint_under_another_steps_name_is_refused(checkpoint):
    other = checkpoint.rename(checkpoint.with_name("step-0000099"))
    assert "damaged" in refused(other)


# Content that does not fit, though its hashes do

def change_tensors(checkpoint: Path, file: str, change) -> str:
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, checkpoint / file)
    sign_again(checkpoint)
    with pytest.raises(InputError) as error:
        Trainer.resume(checkpoint, token_data(), progress=False)
    assert file in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.safetensors"])
def test_tensors_that_do_not_fit_are_refused(checkpoint, file):
    name = next(iter(load_file(checkpoint / file)))
    original = (checkpoint / file).read_bytes()
    cases = {
        "lacks": lambda tensors: tensors.pop(name),
        "unknown": lambda tensors: tensors.update(stranger=torch.zeros(2)),
        "should be": lambda tensors: tensors.update({name: torch.zeros(3, 5)}),
        "float16": lambda tensors: tensors.update({name: tensors[name].to(torch.float16)}),
    }
    for words, change in cases.items():
        (checkpoint / file).write_bytes(original)
        assert words in change_tensors(checkpoint, file, change)


@pytest.mark.parametrize("file, change, words", [
    ("config.json", lambda d: d.update(n_wings=2), "n_wings"),
    ("config.json", lambda d: d.update(d_model=32, head_dim=16, d_ff=64), "model.safetensors"),
    ("training.json", lambda d: d["training"].update(magic=1), "magic"),
    ("training.json", lambda d: d.pop("data"), "training.json"),
    ("training_state.json", lambda d: d.update(step=3), "training_state.json"),
])
def test_settings_that_do_not_fit_are_refused(checkpoint, file, change, words):
    values = json.loads((checkpoint / file).read_text())
    change(values)
    (checkpoint / file).write_text(json.dumps(values))
    sign_again(checkpoint)
    with pytest.raises(InputError, match=words):
        Trainer.resume(checkpoint, token_data(), progress=False)


class Bomb:
    "Unpickling this would create a file."

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_pickle_is_never_loaded(checkpoint, tmp_path, name):
    place = tmp_path / "exploded"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(place)))
    sign_again(checkpoint)
    with pytest.raises(InputError):
        load_model(checkpoint) if name != "training_state.safetensors" else load_checkpoint(checkpoint)
    assert not place.exists()
    source = Path(checkpoints.__file__).read_text(encoding="utf-8")
    assert "torch.load" not in source and "import pickle" not in source


def test_where_there_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="no checkpoint"):
            load_model(path)


def test_a_damaged_newest_checkpoint_names_the_one_before(finished, tmp_path):
    "Given itself, it is refused; a run falls back to the one before, and says which was skipped and why."
    run = shutil.copytree(finished.run_directory, tmp_path / "run")
    before, newest = checkpoint_folders(run)
    (newest / "config.json").write_text("{")
    with pytest.raises(InputError, match=before.name):
        load_model(newest)
    with pytest.warns(Note, match=f"{newest.name} is skipped.*{before.name} is used: .*config.json is damaged"):
        model, _ = load_model(run)
    assert_equal_bits(model.state_dict(), load_model(before)[0].state_dict())
    (newest / "config.json").unlink()
    (newest / "config.json").mkdir()
    with pytest.warns(Note, match=f"{newest.name} is skipped.*config.json is not a regular file;.*[^.][.]$"):
        load_model(run)


# Stopping and going on

@pytest.mark.parametrize("step", [5, 7, 15, 21])
def test_resumed_run_equals_the_unbroken_one_to_the_bit(finished, tmp_path, step):
    stopped = make_trainer(tmp_path, on_step=stop_at(step))
    with pytest.raises(Stop):
        stopped.train()
    torch.manual_seed(123)  # nothing may depend on what the process did before
    resumed = Trainer.resume(tmp_path, token_data(), progress=False)
    assert resumed.step == step // 6 * 6
    resumed.train()
    assert_equal_bits(weights(finished), weights(resumed))
    assert untimed(resumed.history) == untimed(finished.history)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == resumed.history
    ours, theirs = [load_checkpoint(run).tensors for run in (tmp_path, finished.run_directory)]
    assert_equal_bits(ours, theirs)


def test_resuming_from_an_older_checkpoint_forgets_what_came_after(finished, tmp_path):
    run = Path(shutil.copytree(finished.run_directory, tmp_path / "run"))
    older = checkpoint_folders(run)[0]
    resumed = Trainer.resume(older, token_data(), progress=False)
    assert len(checkpoint_folders(run)) == 2  # nothing is deleted before training goes on
    resumed.train()
    assert_equal_bits(weights(finished), weights(resumed))
    assert untimed(resumed.history) == untimed(finished.history)


def test_a_longer_run_can_be_asked_for(finished, tmp_path):
    run = shutil.copytree(finished.run_directory, tmp_path / "run")
    assert Trainer.resume(run, token_data(), progress=False, max_steps=30).train()[-1]["step"] == 30
    assert Trainer.resume(run, token_data(), progress=False).train()[-1]["step"] == 30  # nothing left to do


def test_other_data_is_refused(finished):
    with pytest.raises(InputError, match="same data"):
        Trainer.resume(finished.run_directory, TokenData.from_tokens(TOKENS[:900], TOKENS[900:1000]), progress=False)
    with pytest.raises(InputError, match="in memory"):
        Trainer.resume(finished.run_directory, progress=False)


def test_ctrl_c_saves_and_the_run_goes_on_exactly(finished, tmp_path):
    import signal

    def interrupt(trainer, record):
        if record["step"] == 10:
            signal.raise_signal(signal.SIGINT)

    stopped = make_trainer(tmp_path, on_step=interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = Trainer.resume(tmp_path, token_data(), progress=False)
    assert resumed.step == 10
    resumed.train()
    assert_equal_bits(weights(finished), weights(resumed))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("stop", ["exception", "ctrl-c"])
def test_mixed_precision_resumes_to_the_bit(tmp_path, stop):
    import signal

    def end(trainer, record):
        if record["step"] == 15:
            if stop == "exception":
                raise Stop
            signal.raise_signal(signal.SIGINT)

    config = CONFIG.replace(dtype="bfloat16", eval_batches=1)  # with Muon, dropout and accumulation
    whole = make_trainer(None, config)
    whole.train()
    with pytest.raises((Stop, KeyboardInterrupt)):
        make_trainer(tmp_path, config, on_step=end).train()
    resumed = Trainer.resume(tmp_path, token_data(), progress=False)
    assert resumed.step == (12 if stop == "exception" else 15)
    resumed.evaluate()  # draws nothing
    resumed.train()
    assert_equal_bits(weights(whole), weights(resumed))
    assert untimed(resumed.history) == untimed(whole.history)


def test_a_checkpoint_by_another_way(finished, tmp_path, monkeypatch):
    "A run behind a link, a checkpoint behind a link, a checkpoint as the working directory, a renamed one."
    run = Path(shutil.copytree(finished.run_directory, tmp_path / "run"))
    older, newest = checkpoint_folders(run)
    ways = [(newest, newest)]
    if os.name != "nt":
        (tmp_path / "link").symlink_to(run, target_is_directory=True)
        (tmp_path / "best").symlink_to(newest, target_is_directory=True)
        ways += [(tmp_path / "link", newest), (tmp_path / "best", newest)]
    monkeypatch.chdir(older)
    for path, folder in [*ways, (Path("."), older)]:
        resumed = Trainer.resume(path, token_data(), progress=False)
        assert resumed.run_directory.resolve() == run.resolve() and resumed.step == int(folder.name[5:])
    resumed.train()
    assert_equal_bits(weights(finished), weights(resumed))
    load_checkpoint(older)  # nothing was written into it
    monkeypatch.chdir(tmp_path)
    (run / newest.name).rename(run / "favourite")
    assert_equal_bits(load_model("run/favourite")[0].state_dict(), weights(finished))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    make_trainer("~/run", CONFIG.replace(max_steps=2)).train()
    assert (tmp_path / "run" / "step-0000002").is_dir() and load_checkpoint("~/run").step == 2
    for path in ("~/run", "~/run/step-0000002"):
        assert Trainer.resume(path, token_data(), progress=False).run_directory == tmp_path / "run"


def test_a_run_is_not_overwritten(finished):
    with pytest.raises(InputError, match="already holds a run"):
        make_trainer(finished.run_directory).train()
    with pytest.raises(InputError, match="already"):
        save_checkpoint(finished.run_directory, 24, fresh_model())


def test_a_line_of_the_history_that_was_cut_off(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.add({"step": 1, "loss": 2.0})
    metrics.add({"step": 2, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    metrics.read(2)
    assert [record["step"] for record in metrics.records] == [1, 2]
    content = (tmp_path / "metrics.jsonl").read_bytes()
    second = content.index(b"\n") + 1
    for cut in range(second, content.index(b"\n", second) + 1):  # wherever the second line is cut off
        (tmp_path / "metrics.jsonl").write_bytes(content[:cut])
        metrics.read(9)
        assert [record["step"] for record in metrics.records] == ([1, 2] if content[cut - 1 : cut] == b"}" else [1])
    metrics.read(1)
    metrics.rewrite()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


# Writing

def test_only_the_newest_are_kept(tmp_path):
    for keep in (1, 2, 3):
        run = tmp_path / str(keep)
        make_trainer(run, CONFIG.replace(keep_checkpoints=keep)).train()
        assert [int(p.name[5:]) for p in checkpoint_folders(run)] == [12, 18, 24][-keep:]
        assert not list(run.glob(".*"))


def test_leftovers_of_a_killed_process_are_removed(finished, tmp_path):
    run = Path(shutil.copytree(finished.run_directory, tmp_path / "run"))
    for name in (".step-0000030.new.part", ".step-0000006.old.part"):
        shutil.copytree(checkpoint_folders(run)[0], run / name)
    assert len(checkpoint_folders(run)) == 2  # they don't count as checkpoints
    (run / "step-0000040").mkdir()
    assert find_checkpoint(run).name == "step-0000024"
    remove_leftovers(run)
    assert not list(run.glob(".*"))


def fails_with(number: int):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")]
)
@pytest.mark.parametrize(
    "place", ["checkpoints.sync_file", "checkpoints.sha256_of", "os.rename", "foundations.os.fsync"]
)
def test_a_disk_that_refuses_leaves_the_last_good_checkpoint(finished, tmp_path, monkeypatch, number, words, place):
    trainer = make_trainer(tmp_path / "run", CONFIG.replace(max_steps=6))
    trainer.train()
    before = {p.name for p in trainer.run_directory.iterdir()}
    trainer.step = 7
    target = place if place.startswith("os.") else f"transformer_llm.{place}"
    monkeypatch.setattr(target, fails_with(number))
    with pytest.raises(InputError, match=words) as error:
        trainer.save()
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert {p.name for p in trainer.run_directory.iterdir()} == before
    assert load_checkpoint(trainer.run_directory).step == 6
    assert trainer.save().name == "step-0000007"


def test_no_place_for_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        make_trainer(tmp_path / "file" / "run").train()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission"):
        make_trainer(tmp_path / "run").train()


# Numbers

def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    def break_a_weight(trainer, record):
        if record["step"] == 15:
            next(trainer.model.parameters()).data.fill_(float("nan"))

    trainer = make_trainer(tmp_path, on_step=break_a_weight)
    with pytest.raises(TrainingError, match="step 16.*step-0000012"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(tmp_path).weights.values())
    with pytest.raises(TrainingError):  # and broken weights are never saved
        trainer.save()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_no_number_moves_nothing(value):
    trainer = make_trainer(None)
    trainer.train_step()
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * value)  # the loss itself stays finite
    before = weights(trainer)
    with pytest.raises(TrainingError, match="step 2: the loss is [0-9]"):
        trainer.train_step()
    assert_equal_bits(before, weights(trainer))
    assert trainer.step == 1 and all(
        t.isfinite().all() for t in checkpoints.optimizer_tensors(trainer.model, trainer.optimizers).values()
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_accumulation_equals_the_large_batch(parts):
    model = fresh_model().eval()
    ids = TOKENS[: 8 * 16].view(8, 16)
    targets = TOKENS[1 : 8 * 16 + 1].view(8, 16).clone()
    for row in range(8):
        targets[row, 2 * row + 1 :] = -100  # a different number of targets in each row
    targets[3] = -100  # and one row without any
    loss = cross_entropy(model(ids), targets)
    loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    summed = accumulate_gradients(model, list(zip(ids.chunk(parts), targets.chunk(parts))))
    torch.testing.assert_close(summed, loss.detach())
    for p, gradient in zip(model.parameters(), whole):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_loss_without_any_target_is_zero_and_has_a_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_equals_torch(reduction, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(7, 11) * 30).to(dtype)
    targets = torch.tensor([0, 10, -100, 3, 3, -100, 5])
    wide = logits.double() if dtype == torch.float64 else logits.float()
    torch.testing.assert_close(
        cross_entropy(logits, targets, reduction=reduction),
        torch.nn.functional.cross_entropy(wide, targets, reduction=reduction),
    )


def test_evaluation_reads_every_target_once_and_changes_nothing(tmp_path):
    trainer = make_trainer(None)
    ids = token_data().val[None]
    whole = sum(
        cross_entropy(
            trainer.model.eval()(ids[:, start : start + 16][:, : ids.shape[1] - 1 - start]),
            ids[:, start + 1 : start + 17],
            reduction="sum",
        ).item()
        for start in range(0, ids.shape[1] - 1, 16)
    )
    trainer.model.train()
    state = torch.get_rng_state()
    assert trainer.evaluate() == pytest.approx(whole / (ids.shape[1] - 1), rel=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and trainer.model.training
    assert trainer.evaluate(2) != trainer.evaluate()


def test_few_evaluation_batches_are_spread_over_the_whole_text(monkeypatch):
    trainer = make_trainer(None)
    n_all = len(list(training.sequential_batches(trainer.data.val, CONFIG.batch_size, 16)))
    for wanted in range(1, n_all + 3):
        seen = []
        plain = trainer._logits
        monkeypatch.setattr(trainer, "_logits", lambda ids, seen=seen, plain=plain: seen.append(ids) or plain(ids))
        trainer.evaluate(wanted)
        monkeypatch.undo()
        every = [ids for ids, _ in training.sequential_batches(trainer.data.val, CONFIG.batch_size, 16)]
        places = [next(i for i, ids in enumerate(every) if torch.equal(ids, batch)) for batch in seen]
        assert len(places) == min(wanted, n_all) and places[0] == 0
        gaps = [b - a for a, b in zip(places, [*places[1:], n_all])]
        assert max(gaps) - min(gaps) <= 1


def test_gradients_that_are_not_there_have_no_norm():
    assert training.clip_gradients([torch.zeros(2, requires_grad=True)], 1.0) == 0


def test_evaluating_and_logging_more_often_does_not_change_the_run(finished):
    other = make_trainer(None, CONFIG.replace(eval_every=2, log_every=1))
    other.train()
    assert_equal_bits(weights(finished), weights(other))


@pytest.mark.parametrize("schedule", training.SCHEDULES)
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 10), (5, 10), (10, 10), (50, 3)])
def test_schedules_stay_between_zero_and_one(schedule, warmup, steps):
    config = TrainingConfig(schedule=schedule, warmup_steps=warmup, max_steps=steps)
    assert all(0 < schedule_factor(step, config) <= 1 for step in range(steps))


@pytest.mark.parametrize("decay", [0.2, 0.8, 1.0])
def test_wsd_has_no_jump(decay):
    config = TrainingConfig(schedule="wsd", warmup_steps=40, max_steps=100, decay_fraction=decay, min_lr_fraction=0.0)
    factors = [schedule_factor(step, config) for step in range(100)]
    assert factors[40] == 1.0 and all(abs(a - b) < 1 / 15 for a, b in zip(factors, factors[1:]))


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_steps", 0),
        ("batch_size", 0),
        ("accumulation", -1),
        ("context_length", 0),
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("min_lr_fraction", 1.5),
        ("betas", (0.9, 1.0)),
        ("grad_clip", -1),
        ("eval_batches", 0),
        ("keep_checkpoints", 0),
        ("seed", -1),
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("device", "tpu"),
        ("dtype", "float16"),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=field):
        TrainingConfig(**{field: value})


def test_a_model_too_small_for_the_tokens_or_a_text_too_short():
    with pytest.raises(InputError, match="vocab_size"):
        Trainer(GPT(SHAPE.replace(vocab_size=5)), token_data(), CONFIG, progress=False)
    with pytest.raises(InputError, match="window"):
        Trainer(fresh_model(), (TOKENS[:16], None), CONFIG, progress=False)


def test_a_run_without_validation_text():
    trainer = Trainer(fresh_model(), (TOKENS, None), CONFIG.replace(max_steps=3), progress=False)
    assert trainer.train()[-1]["val_loss"] is None
    with pytest.raises(InputError, match="val_fraction"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "changes", [dict(dtype="bfloat16"), dict(schedule="wsd", grad_clip=0.0), dict(optimizer="adamw", context_length=7)]
)
def test_settings_train(changes):
    history = make_trainer(None, CONFIG.replace(max_steps=20, **changes)).train()
    assert history[-1]["loss"] < history[0]["loss"]


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    make_trainer(tmp_path, CONFIG.replace(max_steps=2, tensorboard=True)).train()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    "Files and folders that this package was writing; nothing else."
    for name in (".metrics.jsonl.a1b2.part", ".command.json.x.part", ".loss.png.y.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".step-0000300.q.part").mkdir()
    (tmp_path / ".step-0000300.q.part" / "model.safetensors").write_text("half")
    (tmp_path / "notes.part").write_text("mine")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.part"]
