"""Rewards: gradients by enumeration, two ways to the same log-probabilities, trl's numbers, killed runs, bad input."""
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_llm.checkpoints import load_checkpoint, save_checkpoint
from transformer_llm import cli
from transformer_llm.cli import main
from transformer_llm.decoding import Decoder
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.lora import add_lora, load_lora, merged, quantise_base, switch_lora, with_adapters
from transformer_llm.reinforcement import (
    END,
    RULES,
    TASKS,
    Policy,
    ReinforceTrainer,
    Rollouts,
    Rule,
    Sampler,
    SolvedTrainer,
    advantages,
    answer_log_probs,
    exact,
    gym_task,
    kl_estimate,
    load_task,
    make_task,
    pass_at,
    policy_loss,
    value_of,
)
from transformer_llm.tokenizer import CharTokenizer
from transformer_llm.training import TrainingConfig
from transformer_llm.runs import load_any
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import reward_runs

CONFIG = TrainingConfig(
    max_steps=6, batch_size=32, learning_rate=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0,
    eval_every=3, checkpoint_every=2, log_every=1, device="cpu",
)  # fmt: skip
SHAPES = {
    "rotary, grouped, normed": dict(n_kv_heads=1, qk_norm=True, activation="relu2"),
    "GPT-2": GPT2_STYLE,
    "alibi": dict(position="alibi"),  # the decoder has no single steps for it
}


@pytest.fixture
def echo(monkeypatch):
    "A task that a small model learns in seconds: say the digit again; prompts of two lengths."
    monkeypatch.setitem(RULES, "echo", Rule(lambda p, answer: answer == p[-2], lambda p: p[-2]))
    monkeypatch.setitem(RULES, "one digit", Rule(lambda p, answer: float(len(answer) == 1)))
    prompts = [f"{digit}=" for digit in range(6)] + [f"+{digit}=" for digit in range(6)]
    return make_task("echo", prompts, held_out=2, characters="0123456789", longest=3)


def small_model(task, seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    settings = dict(context_length=16, d_model=16, n_layers=2, n_heads=2, init_std=0.3) | changes
    return GPT(GPTConfig(vocab_size=len(task.characters), **settings))


def all_answers(vocab: int, end: int, longest: int) -> list[list[int]]:
    "Every answer: tokens up to the first end, or as many as there may be."
    found = []
    for tokens in itertools.product(range(vocab), repeat=longest):
        answer = list(tokens[: tokens.index(end) + 1]) if end in tokens else list(tokens)
        found += [answer] if answer not in found else []
    return found


def enumerated(task, model, prompt):
    "All answers to a prompt as rollouts, with each one's reward and, with a gradient, its probability."
    sampler = Sampler(model, task.tokenizer(), task)
    ids, answers = sampler.encode(prompt), all_answers(model.config.vocab_size, sampler.end, task.longest)
    rows = Rollouts.empty(1, len(answers), sampler.width)
    for row, answer in enumerate(answers):
        span = slice(len(ids), len(ids) + len(answer))
        rows.ids[row, : len(ids)], rows.ids[row, span] = torch.tensor(ids), torch.tensor(answer)
        rows.is_answer[row, span] = True
    log_probs = answer_log_probs(model(rows.ids[:, :-1]), rows.ids)
    own = rows.is_answer[:, 1:]
    probabilities = log_probs.where(own, 0.0).sum(1).exp()
    rewards = [task.judge(prompt, text) for text in rows.texts(task.tokenizer())]
    return log_probs, own, probabilities, torch.tensor(rewards), answers


@pytest.fixture
def two_tokens(monkeypatch):
    "Answers of at most two tokens, paid by what they begin and end with: 21 of them for five characters."
    monkeypatch.setitem(RULES, "odd", Rule(lambda p, answer: {"a": 1.0, "ab": 0.7, "": 0.2}.get(answer, 0.0)))
    return make_task("odd", ["x", "xx"], held_out=0, characters="ab", longest=2)


@pytest.mark.parametrize("baseline", [0.0, 0.4, 100.0])
def test_the_loss_has_the_gradient_of_the_expected_reward(two_tokens, baseline):
    model = small_model(two_tokens)
    log_probs, own, p, rewards, answers = enumerated(two_tokens, model, "xx")
    assert len(answers) == 1 + 3 * 4 and abs(p.sum().item() - 1) < 1e-5
    weights = list(model.parameters())
    right = torch.autograd.grad((p * rewards).sum(), weights, retain_graph=True)
    worth = (rewards - baseline) * p.detach() * len(answers)  # the mean over rows becomes the sum over all answers
    loss = policy_loss(log_probs, log_probs.detach(), worth, own, Policy(divide=False))
    found = torch.autograd.grad(-loss, weights)
    assert max(g.abs().max().item() for g in right) > 1e-2
    assert largest_difference(found, right) < 1e-6 * max(1.0, baseline)


def test_a_mean_over_tokens_is_another_gradient(two_tokens):
    model = small_model(two_tokens)
    log_probs, own, p, rewards, answers = enumerated(two_tokens, model, "xx")
    weights = list(model.parameters())
    right = torch.autograd.grad((p * rewards).sum(), weights, retain_graph=True)
    worth = rewards * p.detach() * len(answers)
    loss = policy_loss(log_probs, log_probs.detach(), worth, own, Policy(by_length=True))
    found = torch.autograd.grad(-loss, weights)
    assert largest_difference(found, right) > 1e-3


def test_answers_are_drawn_with_the_model_s_probabilities(two_tokens):
    model, draws = small_model(two_tokens), 20_000
    *_, p, rewards, answers = enumerated(two_tokens, model, "x")
    sampler = Sampler(model, two_tokens.tokenizer(), two_tokens)
    found = sampler.sample(["x"], draws, generator=torch.Generator().manual_seed(0))
    rows = [tuple(t for t, own in zip(*row) if own) for row in zip(found.ids.tolist(), found.is_answer.tolist())]
    counts = torch.tensor([rows.count(tuple(answer)) for answer in answers], dtype=torch.double)
    assert counts.sum() == draws
    statistic = ((counts - draws * p.detach()) ** 2 / (draws * p.detach())).sum().item()
    assert statistic < 40, f"{statistic:.0f}, where 12 is expected by chance"
    ended = [answer for answer in answers if answer[-1] == sampler.end]
    expected = sum(p[answers.index(a)].item() * rewards[answers.index(a)].item() for a in ended)
    assert abs(found.rewards.mean().item() - expected) < 0.02  # what doesn't end is worth nothing


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_and_training_agree(echo, shape):
    model = small_model(echo, **SHAPES[shape])
    sampler = Sampler(model, echo.tokenizer(), echo)
    prompts = [*echo.train, echo.train[0]]
    assert len({len(prompt) for prompt in prompts}) == 2
    found = sampler.sample(prompts, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs = answer_log_probs(model(found.ids[:, :-1]), found.ids)
    own = found.is_answer[:, 1:]
    assert largest_difference(log_probs[own], found.log_probs[:, 1:][own]) < 1e-5
    assert found.log_probs[:, 1:][own].min() < -0.5 and not found.log_probs[~found.is_answer].any()
    for row, prompt in enumerate(p for p in prompts for _ in range(8)):  # in the order asked, padded on the right
        text = "".join(echo.tokenizer().decode(found.ids[row, : len(prompt)].tolist()))
        assert text == prompt and found.is_answer[row].nonzero()[0].item() == len(prompt)
    distribution = model(found.ids[:, :-1]).log_softmax(-1)
    entropy = torch.special.entr(distribution.exp()).sum(-1)[own].mean()
    assert abs(entropy.item() - found.entropy.item()) < 1e-5


def adapted(model: GPT, seed=0, rank=2, alpha=8.0) -> GPT:
    "The model with an adapter that is no longer new: its B isn't zero."
    add_lora(model, rank, alpha, generator=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_and_training_agree_with_adapters(echo, shape, eight_bits):
    model = small_model(echo, **SHAPES[shape])
    model = adapted(quantise_base(model) if eight_bits else model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = Sampler(model, echo.tokenizer(), echo).sample(echo.train, 8, generator=torch.Generator().manual_seed(0))
    own = found.is_answer[:, 1:]
    with torch.no_grad():
        log_probs = answer_log_probs(model(found.ids[:, :-1]), found.ids)
        switch_lora(model, None)
        without = answer_log_probs(model(found.ids[:, :-1]), found.ids)
    assert largest_difference(log_probs[own], found.log_probs[:, 1:][own]) < 1e-5
    assert largest_difference(without[own], found.log_probs[:, 1:][own]) > 0.1  # the adapter speaks in the answers
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_could_not_hold_that_equality_and_is_refused(echo):
    model = small_model(echo)
    found = Sampler(model, echo.tokenizer(), echo).sample(echo.train, 8, generator=torch.Generator().manual_seed(0))
    own = found.is_answer[:, 1:]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        new = answer_log_probs(model(found.ids[:, :-1]), found.ids)[own]
    for drawing in (torch.float32, torch.bfloat16):
        old = answer_log_probs(Decoder(model, dtype=drawing)(found.ids[:, :-1]), found.ids)[own]
        assert largest_difference(new, old) > 1e-3
    with pytest.raises(InputError, match="dtype must be float32 .* in bfloat16 the probabilities"):
        ReinforceTrainer(model, echo, CONFIG.replace(dtype="bfloat16"), policy=Policy(group=8))
    with pytest.raises(InputError, match="weights must be float32 .* use model.float"):
        ReinforceTrainer(small_model(echo).to(torch.bfloat16), echo, CONFIG, policy=Policy(group=8))


def test_the_same_generator_gives_the_same_answers(echo):
    sampler = Sampler(small_model(echo), echo.tokenizer(), echo)
    one, two = (sampler.sample(echo.train, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    greedy = sampler.sample(echo.train, 2, greedy=True)
    assert torch.equal(greedy.ids[::2], greedy.ids[1::2])


@pytest.mark.parametrize("policy", [Policy(group=8), Policy(group=8, divide=False, by_length=True, clip=0.0)])
def test_rows_that_are_left_out_or_read_once_change_nothing(echo, policy):
    model = small_model(echo)
    trainer = ReinforceTrainer(model, echo, CONFIG, policy=policy, progress=False)
    batch = trainer.next_batch()
    batch = batch._replace(rewards=(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float())
    batch.rewards[0] = 0.0
    batch.rewards[1, :4], batch.rewards[1, 4:] = 1.0, 0.0
    loss, count = trainer.loss(batch)
    found = torch.autograd.grad(loss, list(model.parameters()))
    worth = advantages(batch.rewards, policy.divide).flatten()
    log_probs = answer_log_probs(model(batch.ids[:, :-1]), batch.ids)
    plain = policy_loss(log_probs, batch.log_probs[:, 1:], worth, batch.is_answer[:, 1:], policy)
    right = torch.autograd.grad(plain, list(model.parameters()))
    assert count == 32 and abs(loss.item() - plain.item()) < 1e-6
    assert max(g.abs().max().item() for g in right) > 1e-3 and largest_difference(found, right) < 1e-6
    assert len(batch.ids.unique(dim=0)) < len(batch.ids) or policy.by_length


def test_groups_that_agree_move_nothing(echo):
    model = small_model(echo)
    trainer = ReinforceTrainer(model, echo, CONFIG, policy=Policy(group=8), progress=False)
    batch = trainer.next_batch()
    loss, _ = trainer.loss(batch._replace(rewards=torch.ones(4, 8)))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert not any(g.any() for g in gradients) and trainer.measures["signal"] == 0.0


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_pass_at_counts_all_choices(rewards, k):
    share = sum(
        sum(any(row[i] for i in chosen) for chosen in itertools.combinations(range(6), k)) / math.comb(6, k)
        for row in rewards
    ) / len(rewards)
    assert abs(pass_at(torch.tensor(rewards).float(), k) - share) < 1e-9


def test_divergence_is_estimated_without_bias():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 7, generator=generator).double().log_softmax(-1)
    estimate = kl_estimate(log_p, log_q)
    assert bool((estimate >= 0).all())
    truth = (log_p.exp() * (log_p - log_q)).sum()
    assert abs((log_p.exp() * estimate).sum() - truth) < 1e-12 and truth > 0.1


def test_trl_has_the_same_advantages_and_losses():
    "Development only: trl is not among the requirements."
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    from trl.trainer.utils import nanstd

    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4, 6, generator=generator) < 0.5).float()
    rewards[1] = 1.0
    centred = rewards - rewards.mean(1, keepdim=True)
    theirs = centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)  # as _generate_and_score_completions has it
    assert largest_difference(advantages(rewards), theirs) < 1e-5
    assert largest_difference(advantages(rewards, False), centred) == 0
    new, old, reference = -torch.rand(3, 24, 5, generator=generator) * 2
    new.requires_grad_()
    counts = torch.arange(5) < torch.randint(1, 6, (24, 1), generator=generator)
    worth = advantages(rewards).flatten()
    for kind, kl in itertools.product(("grpo", "luspo"), (0.0, 0.3)):
        policy = Policy(by_length=kind == "grpo", clip=0.2, kl=kl)
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *args, **options: (new, torch.zeros(24, 5), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", beta=kl, loss_type=kind, epsilon_low=0.2, epsilon_high=0.2,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            use_vllm=False, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
            max_completion_length=5, _entropy_bonus_enabled=False, _metrics=MetricsOfTrl(),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        )  # fmt: skip
        inputs = dict(
            prompt_ids=torch.zeros(24, 2), prompt_mask=torch.ones(24, 2), completion_ids=torch.zeros(24, 5),
            completion_mask=counts.long(), advantages=worth, old_per_token_logps=old, ref_per_token_logps=reference,
        )  # fmt: skip
        theirs = grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
        ours = policy_loss(new, old, worth, counts, policy, reference)
        gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (ours, theirs)]
        assert abs(ours.item() - theirs.item()) < 1e-5, (kind, kl)
        assert largest_difference(*gradients) < 1e-6 and gradients[0].abs().max() > 1e-3


class MetricsOfTrl(dict):
    "Takes whatever trl's loss notes down."

    def __missing__(self, key):
        self[key] = MetricsOfTrl()
        return self[key]

    def append(self, value):
        "Forgotten."


def test_rewards_alone_teach_a_small_task(echo):
    model = small_model(echo, init_std=0.02)
    sampler = Sampler(model, echo.tokenizer(), echo)
    asked, source = lambda: list(echo.train), lambda: torch.Generator().manual_seed(9)
    before = sampler.sample(asked(), 32, generator=source()).rewards.mean().item()
    config = CONFIG.replace(max_steps=40, batch_size=128, learning_rate=1e-2, eval_every=0, checkpoint_every=0)
    history = ReinforceTrainer(model, echo, config, policy=Policy(group=16), progress=False).train()
    after = sampler.sample(asked(), 32, generator=source()).rewards.mean().item()
    assert before < 0.1 and after > before + 0.1
    assert {"reward", "entropy", "length", "signal", "clipped", "val_loss"} <= set(history[-1])


def test_written_answers_are_the_only_targets(echo):
    trainer = SolvedTrainer(small_model(echo), echo, CONFIG, progress=False)
    inputs, targets = trainer.next_batch()
    for row, answer in zip(inputs.tolist(), targets.tolist()):
        text, counted = echo.tokenizer().decode(row), [t for t in answer if t != -100]
        prompt = text[: text.index("=") + 1]
        assert echo.tokenizer().decode(counted) == echo.solve(prompt)
        assert [i for i, t in enumerate(answer) if t != -100][0] == len(prompt) - 1
    taught = small_model(echo, init_std=0.02)
    SolvedTrainer(taught, echo, CONFIG.replace(max_steps=150, learning_rate=1e-2), progress=False).train()
    assert exact(taught, echo.tokenizer(), echo, echo.train) == 1.0


POLICIES = {
    "once": Policy(group=8),
    "three updates and a reference": Policy(group=8, updates=3, kl=0.1),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_goes_on_to_the_bit(echo, tmp_path, name, stop, lora):
    task = echo._replace(rule="one digit")  # often right, so that there is something to learn
    kind = with_adapters(ReinforceTrainer) if lora else ReinforceTrainer
    fresh = lambda: adapted(small_model(echo)) if lora else small_model(echo)

    def run(folder, **options):
        trainer = kind(
            fresh(), task, CONFIG, policy=POLICIES[name], run_directory=folder, progress=False, **options
        )
        trainer.train()
        return trainer

    def interrupt(trainer, record):
        if record["step"] == stop:
            signal.raise_signal(signal.SIGINT)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_step=interrupt)
    again = kind.resume(tmp_path / "stopped", task, progress=False)
    assert again.step == stop and again.policy == POLICIES[name]
    again.train()
    for part in ("weights", "tensors"):
        one, two = (getattr(load_checkpoint(tmp_path / run), part) for run in ("whole", "stopped"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), part
    timeless = lambda history: [{k: v for k, v in r.items() if "second" not in k} for r in history]
    assert timeless(whole.history) == timeless(again.history)
    start, end = fresh().state_dict(), again.model.state_dict()
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    trained = {key for key, p in again.model.named_parameters() if p.requires_grad}
    assert moved == trained and (not lora or all(key.endswith((".A", ".B")) for key in moved))


def test_another_task_is_refused_on_resume(echo, tmp_path):
    ReinforceTrainer(small_model(echo), echo, CONFIG, policy=Policy(group=8), run_directory=tmp_path,
                     progress=False).train()
    other = echo._replace(train=echo.train[1:])
    with pytest.raises(InputError, match="resume with the same data"):
        ReinforceTrainer.resume(tmp_path, other, max_steps=8)
    with pytest.raises(InputError, match="was only in memory"):
        ReinforceTrainer.resume(tmp_path, max_steps=8)


def test_a_run_of_another_trainer_is_refused(echo, tmp_path):
    SolvedTrainer(small_model(echo), echo, CONFIG, run_directory=tmp_path, progress=False).train()
    with pytest.raises(InputError, match="holds no run of a ReinforceTrainer"):
        ReinforceTrainer.resume(tmp_path, echo)


def test_bad_input_is_refused_in_a_sentence(echo, monkeypatch):
    model, tokenizer = small_model(echo), echo.tokenizer()
    cases = [
        (lambda: ReinforceTrainer(model, echo, CONFIG.replace(batch_size=30)), "can't be cut into groups of 16"),
        (lambda: ReinforceTrainer(model, echo, CONFIG.replace(accumulation=2)), "larger batch_size instead"),
        (lambda: ReinforceTrainer(small_model(echo, dropout=0.1), echo, CONFIG), "set dropout to 0"),
        (lambda: ReinforceTrainer(model, "echo", CONFIG), "data must be a Task, not str"),
        (lambda: ReinforceTrainer(small_model(echo, context_length=4), echo, CONFIG), "context_length"),
        (lambda: Sampler(model, CharTokenizer([*echo.characters, "?"]), echo), "model's own tokenizer"),
        (lambda: Sampler(model, CharTokenizer(list("+=0123456789")), echo), "Character"),
        (lambda: Sampler(model, tokenizer, echo).sample([]), "no prompt"),
        (lambda: Policy(group=1), "group must be a whole number from 2"),
        (lambda: Policy(clip=1.5), "clip must be"),
        (lambda: Policy(kl=-1), "kl must be"),
        (lambda: load_task("chess"), "task must be one of addition"),
        (lambda: make_task("chess", ["a"]), "rule must be one of"),
        (lambda: make_task("echo", ["1="], held_out=1), "held_out must be"),
        (lambda: pass_at(torch.zeros(2, 4), 5), "k must be"),
        (lambda: policy_loss(*torch.zeros(2, 1, 1), torch.zeros(1), torch.ones(1, 1).bool(), Policy(kl=0.1)),
         "needs the reference"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
    monkeypatch.setitem(RULES, "only judged", Rule(lambda p, answer: 1.0))
    with pytest.raises(InputError, match="can't write one"):
        SolvedTrainer(model, echo._replace(rule="only judged"), CONFIG).next_batch()


def test_a_switch_is_on_or_off(unchecked):
    with pytest.raises(InputError, match="divide must be True or False, not 1"):
        Policy(divide=1)


def test_a_replaced_module_is_refused(echo):
    model = small_model(echo)
    model.blocks[0].feedforward.down = torch.nn.Sequential(model.blocks[0].feedforward.down)
    with pytest.raises(InputError):
        Sampler(model, echo.tokenizer(), echo).sample(echo.train)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_solved_and_judges(name):
    task = load_task(name)
    assert not set(task.train) & set(task.held_out) and task == load_task(name)
    for prompt in task.train[::50] + task.held_out[::20]:
        answer = task.solve(prompt)
        assert answer.endswith(END) and len(answer) <= task.longest and set(prompt + answer) <= set(task.characters)
        assert task.judge(prompt, answer[:-1]) == 1.0
        assert task.judge(prompt, answer[:-1] + "7") == 0.0 and task.judge(prompt, "") == 0.0


def test_a_task_of_reasoning_gym_without_the_package_names_the_way(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    way = "needs the package reasoning-gym, which is not installed; run: pip install reasoning-gym"
    with pytest.raises(InputError, match=way):
        gym_task("count_bits")
    out = tmp_path / "run"
    assert main(["reinforce", "--task", "reasoning-gym:count_bits", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert way in error and "Traceback" not in error and not out.exists()


def test_a_task_of_reasoning_gym_has_its_questions_and_its_scorer():
    gym = pytest.importorskip("reasoning_gym")
    task, other = gym_task("prime_factorization", 50, 3), gym_task("prime_factorization", 50, 4)
    assert task == gym_task("prime_factorization", 50, 3) and task.rule != other.rule
    data = gym.create_dataset("prime_factorization", size=50, seed=3)
    entries = {entry["question"]: entry for entry in data}
    assert {*task.train, *task.held_out} == set(entries) and len(task.held_out) == round(len(entries) / 5)
    scores = set()
    for prompt, entry in entries.items():
        answer = task.solve(prompt)
        assert answer == entry["answer"] + END and len(answer) <= task.longest
        assert set(prompt + answer) <= set(task.characters) and task.judge(prompt, answer[:-1]) == 1.0
        for tried in ("2", "2 × 2 × 3"):
            assert task.judge(prompt, tried) == data.score_answer(tried, entry)
            scores.add(task.judge(prompt, tried))
        with pytest.raises(ValueError):
            data.score_answer("2 × )", entry)
        assert task.judge(prompt, "2 × )") == 0.0
    assert 0 < max(scores) < 1
    with pytest.raises(InputError, match="has no data set 'chess'"):
        load_task("reasoning-gym:chess")


def test_a_run_on_a_task_of_reasoning_gym_goes_on(tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    task, base, out = load_task("reasoning-gym:count_bits"), tmp_path / "base", tmp_path / "run"
    save_checkpoint(base, 0, small_model(task, context_length=128), tokenizer=task.tokenizer())
    words = ["reinforce", "--task", "reasoning-gym:count_bits", "--checkpoint", str(base), "--batch_size", "32"]
    assert main([*words, "--max_steps", "1", "--out", str(out)]) == 0
    assert "4,000 prompts to train on, 1,000 held out" in capsys.readouterr().out
    assert main(["reinforce", "--out", str(out), "--resume", "--max_steps", "2"]) == 0
    assert "continued at step 1" in capsys.readouterr().out


@given(st.text("0123+-*", max_size=7))
def test_expressions_have_python_s_value(text):
    plain = re.fullmatch(r"\d{1,3}([+*-]\d{1,3})*", text)  # neither signs nor powers
    right = eval(re.sub(r"\b0+(?=\d)", "", text)) if plain else None
    assert value_of(text) == right


@pytest.fixture
def checkpoint(tmp_path):
    "A small model that has seen a few answers of the task of formats, as a checkpoint."
    task, folder = load_task("format"), tmp_path / "base"
    model = small_model(task, init_std=0.02)
    SolvedTrainer(model, task._replace(held_out=()), CONFIG.replace(max_steps=60, learning_rate=1e-2, eval_every=0),
                  progress=False).train()
    save_checkpoint(folder, 0, model, tokenizer=task.tokenizer())
    return folder


def test_the_command_trains_an_adapter_that_can_be_given_away(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(checkpoint, out, "--lora", "4", "--learning_rate", "0.01", "--max_steps", "4")) == 0
    said = capsys.readouterr().out
    assert "are trained" in said and "adapter" in said
    assert main(["reinforce", "--out", str(out), "--resume", "--max_steps", "6"]) == 0
    assert "continued at step 4" in capsys.readouterr().out
    start, end = load_checkpoint(checkpoint).weights, load_checkpoint(out).weights
    frozen = {name.replace(".base.", "."): tensor for name, tensor in end.items() if ".adapters." not in name}
    assert start.keys() == frozen.keys() and all(torch.equal(start[name], frozen[name]) for name in start)
    assert any(tensor.any() for name, tensor in end.items() if name.endswith(".B"))
    ids = torch.arange(8)[None]
    (base, _), (whole, _) = load_any(checkpoint), load_any(out)
    given = load_lora(copy.deepcopy(base), out / "adapter")
    assert largest_difference(merged(given)(ids), whole(ids)) < 1e-6
    assert largest_difference(base(ids), whole(ids)) > 1e-4
    for more, sentence in (
        (["--lora", "17"], "rank must be at most 16, the smaller side of blocks.0.attention.q_proj"),
        (["--dtype", "bfloat16"], "dtype must be float32 to learn from rewards"),
    ):
        assert main(command(checkpoint, tmp_path / "new", *more)) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error and not (tmp_path / "new").exists()
    assert main(["reinforce", "--out", str(tmp_path / "new"), "--lora", "99"]) == 2  # before a start is trained
    assert "rank must be at most" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["reinforce", "--out", str(out), "--resume", "--lora", "4"]) == 2
    assert "keeps its lora" in capsys.readouterr().err


def command(checkpoint, out, *more) -> list[str]:
    return ["reinforce", "--task", "format", "--checkpoint", str(checkpoint), "--batch_size", "32", "--max_steps", "60",
            "--out", str(out), *more]


@pytest.mark.parametrize("more", [(), ("--lora", "4")], ids=["all weights", "adapter"])
def test_a_killed_command_goes_on_to_the_bit(checkpoint, tmp_path, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(checkpoint, whole, *more)) == 0
    code = "import sys; from transformer_llm.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *command(checkpoint, killed, *more)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (killed / "step-0000050" / "checkpoint.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run was over before the kill"
    assert load_checkpoint(killed).step == 50
    assert main(["reinforce", "--out", str(killed), "--resume"]) == 0
    for part in ("weights", "tensors"):
        one, two = (getattr(load_checkpoint(run), part) for run in (whole, killed))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    start = load_checkpoint(checkpoint).weights
    ends = load_checkpoint(whole).weights
    assert any(not torch.equal(start[key], end) for key, end in ends.items() if key in start) != bool(more)
    assert any(end.any() for key, end in ends.items() if key.endswith(".B")) == bool(more)


def test_the_command_says_what_it_did_and_refuses_in_a_sentence(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(checkpoint, out, "--max_steps", "2")) == 0
    said = capsys.readouterr().out
    assert "7,100 prompts to train on, 1,000 held out" in said and "2 of 1 prompts × 32 answers" in said
    assert said.count("for greedy answers to held-out prompts") == 2 and "Next: transformer-llm generate" in said
    assert json.loads((out / "reinforce.json").read_text()) == {"task": "format"}
    assert main(["reinforce", "--out", str(out), "--resume"]) == 0
    assert "Nothing is left to train" in capsys.readouterr().out
    assert main(["reinforce", "--out", str(out), "--resume", "--max_steps", "3"]) == 0
    assert "continued at step 2" in capsys.readouterr().out
    for words, sentence in (
        (command(checkpoint, out), "already holds a run"),
        (command(checkpoint, tmp_path / "new", "--batch_size", "50"), "can't be cut into groups of 32"),
        (command(checkpoint, tmp_path / "new", "--task", "countdown"), "tokenizer knows"),
        (["reinforce", "--task", "chess"], "invalid choice: 'chess'"),
        (["reinforce", "--out", str(out), "--resume", "--seed", "3"], "keeps its seed"),
        (["reinforce", "--out", str(checkpoint), "--resume"], "reinforce.json"),
        (["reinforce", "--out", str(tmp_path / "none"), "--resume"], "none"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error, error
    assert not (tmp_path / "new").exists()


def test_the_command_knows_the_chapter_s_tasks():
    assert cli.REWARD_TASKS == tuple(TASKS)


def test_the_script_makes_no_run_twice_and_keeps_each_at_once(tmp_path):
    for _ in range(2):  # a second process finds the file
        runs, made = reward_runs.Runs(tmp_path / "rewards.json", None), []
        for seed in (0, 1):
            runs.once("main", "main", seed, "all as it is", lambda: made.append(1) or {"seconds": 1.23456, "curve": []})
    assert not made and [run["seed"] for run in runs.load()["runs"]] == [0, 1]
    assert runs.load()["runs"][0]["seconds"] == 1.2346 and runs.load()["machine"]["torch"] == torch.__version__


def test_the_script_s_runs_hold_what_the_chapter_reads(echo):
    model, runs = small_model(echo), SimpleNamespace(seconds=None)
    result = reward_runs.learn(runs, echo, model, CONFIG, Policy(group=8), echo._replace(rule="one digit"))
    assert [point["step"] for point in result["curve"]] == [3, 6] and result["stopped"] is None
    assert {"right", "reward", "entropy", "length", "signal", "seconds"} <= set(result["curve"][0])
    assert set(result["before"]) == {"right", "pass@1", "pass@16"} and result["cpu_seconds"] > 0
