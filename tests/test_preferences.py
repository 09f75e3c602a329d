"""Preferences: pairs in any form, losses equal to other people's, refusals, and runs that are killed."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from test_checkpoints import assert_equal_bits
from transformer_llm.checkpoints import load_checkpoint
from transformer_llm.finetuning import IGNORE, Batch, ChatFormat, Example, make_example
from transformer_llm.foundations import InputError
from transformer_llm.preferences import (
    AnswerScores,
    Objective,
    Pair,
    PreferenceData,
    PreferenceTrainer,
    RewardModel,
    RewardTrainer,
    answer_logprobs,
    bradley_terry_loss,
    dpo_loss,
    hold_out_pairs,
    join_pairs,
    load_preferences,
    measure_preferences,
    pair_logprobs,
    pair_rewards,
    preference_loss,
    prepare_pairs,
    prepare_preferences,
    read_preference,
    read_preferences,
    save_preferences,
    whole_texts,
)
from transformer_llm.training import TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=24, context_length=16, d_model=32, n_layers=2, n_heads=2)
CONFIG = TrainingConfig(max_steps=8, batch_size=3, warmup_steps=2, eval_every=4, checkpoint_every=2, log_every=1,
                        keep_checkpoints=9, device="cpu")
USER, GOOD, BAD = ({"role": role, "content": said} for role, said in (
    ("user", "What is 2+2?"), ("assistant", "4"), ("assistant", "5")))


def fresh_model(**changes) -> GPT:
    torch.manual_seed(1)
    return GPT(SHAPE.replace(**changes))


def random_pairs(n: int, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(1, SHAPE.vocab_size, (k,), generator=generator).tolist()
    pairs = []
    for i in range(n):
        question, answers = draw(2 + i % 3), (draw(1 + i % 4), draw(3 + (i + 2) % 5))
        pairs.append(Pair(*(make_example(question + a, [False] * len(question) + [True] * len(a)) for a in answers)))
    return pairs


def make_data(model: GPT | None = None, **objective) -> PreferenceData:
    pairs = random_pairs(14)
    return prepare_preferences(model or fresh_model(), pairs[:10], pairs[10:], Objective(**objective))


# Pairs from files
# ------------------------------------------------------------------------------------------------------

ASKED = USER["content"]
FORMS = [
    {"prompt": ASKED, "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": GOOD, "rejected": BAD, "margin": 2},
    {"prompt": ASKED, "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0},
    {"messages": [USER], "chosen": "4", "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"instruction": "What is", "input": "2+2?", "chosen": "4", "rejected": "5"},
    {"instruction": ASKED, "input": "", "chosen": "4", "rejected": "5"},
    {"conversations": [{"from": "human", "value": ASKED}],
     "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
]


@pytest.mark.parametrize("record", FORMS, ids=range(len(FORMS)))
def test_every_form_is_the_same_pair(record):
    one = read_preference(record)
    asked = "What is\n2+2?" if record.get("input") else ASKED
    assert one.question == ({"role": "user", "content": asked},)
    assert (one.chosen.answer, one.rejected.answer) == ("4", "5")


def test_a_system_message_stands_first():
    for record in FORMS:
        if not {"instruction", "prompt", "messages", "conversations"} & set(record):
            continue
        one = read_preference({**record, "system": "Be brief."})
        assert [message["role"] for message in one.question] == ["system", "user"]


REFUSED = [
    ([], "not an object"),
    ({"prompt": ASKED, "chosen": "4"}, "no rejected"),
    ({"prompt": ASKED, "chosen": "4", "rejected": "4"}, "same answer"),
    ({"prompt": ASKED, "instruction": ASKED, "chosen": "4", "rejected": "5"}, "both prompt and instruction"),
    ({"chosen": "4", "rejected": "5"}, "text without a question"),
    ({"prompt": ASKED, "chosen": "", "rejected": "5"}, "no text"),
    ({"prompt": ASKED, "chosen": 4, "rejected": "5"}, "must be a text, a message or a list"),
    ({"prompt": [], "chosen": "4", "rejected": "5"}, "must be a text, a message or a list"),
    ({"prompt": [GOOD], "chosen": "4", "rejected": "5"}, "user's is due"),
    ({"prompt": ASKED, "chosen": USER, "rejected": "5"}, "assistant's is due"),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "2+3?"}, BAD]}, "different questions"),
    ({"prompt": "2+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "another question"),
    ({"prompt": [{"role": "judge", "content": "x"}], "chosen": "4", "rejected": "5"}, "the roles are"),
]


@pytest.mark.parametrize("record, phrase", REFUSED, ids=range(len(REFUSED)))
def test_other_records_are_refused_with_their_line(record, phrase, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (FORMS[0], record)) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=phrase) as refusal:
        read_preferences(path)
    assert str(refusal.value).startswith(f"Line 2 of {path}")


def test_a_file_that_is_no_jsonl_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS, indent=1), encoding="utf-8")
    with pytest.raises(InputError, match=r"Line 1 of .* is no JSON object"):
        read_preferences(path)


def test_no_question_is_on_both_sides():
    records = [{"prompt": f"{i % 7}?", "chosen": "yes", "rejected": f"no {i}"} for i in range(40)]
    train, val = hold_out_pairs([read_preference(record) for record in records], 0.3, seed=2)
    asked = [{one.question[0]["content"] for one in part} for part in (train, val)]
    assert len(train) + len(val) == 40 and len(asked[1]) == 2 and not asked[0] & asked[1]


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|"
    "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)


def test_tokens_and_targets_on_the_last_answer_only():
    from transformer_llm.tokenizer import CharTokenizer

    tokenizer = CharTokenizer.train("".join(map(chr, range(32, 127))))
    conversation = [USER, GOOD, {**USER, "content": "And 3+3?"}]
    one = read_preference({"prompt": conversation, "chosen": "6", "rejected": "seven"})
    pairs = prepare_pairs([one], ChatFormat(tokenizer, TEMPLATE), 64)
    learned = [tokenizer.decode([i for i in example.targets.tolist() if i != IGNORE]) for example in pairs[0]]
    assert learned == ["6|", "seven|"]
    with pytest.raises(InputError, match=r"None of the 1 pairs fits into a window of 20 tokens; the shortest takes"):
        prepare_pairs([one], ChatFormat(tokenizer, TEMPLATE), 20)
    with pytest.raises(InputError, match="no pair"):
        prepare_pairs([], ChatFormat(tokenizer, TEMPLATE), 20)
    long = read_preference({"prompt": "2+2?", "chosen": "4", "rejected": "5" * 80})
    assert len(prepare_pairs([one, long], ChatFormat(tokenizer, TEMPLATE), 64)) == 1


# Log-probabilities and losses
# ------------------------------------------------------------------------------------------------------

def test_padding_and_neighbours_change_nothing():
    model, pairs = fresh_model(), random_pairs(9)
    alone = torch.cat([pair_logprobs(model, [pair]) for pair in pairs])
    assert torch.allclose(pair_logprobs(model, pairs, batch_size=4), alone, atol=1e-5)
    batch = join_pairs(pairs)
    wider = Batch(F.pad(batch.inputs, (0, 2), value=7), F.pad(batch.targets, (0, 2), value=IGNORE))
    for narrow, wide in zip(answer_logprobs(model, batch), answer_logprobs(model, wider)):
        assert torch.allclose(narrow.float(), wide.float(), atol=1e-5)


def test_a_reference_ignores_dropout_and_leaves_the_mode_alone():
    model, pairs = fresh_model(dropout=0.5), random_pairs(5)
    model.train()
    assert torch.equal(pair_logprobs(model, pairs), pair_logprobs(model, pairs)) and model.training


def test_an_answer_without_targets_has_no_probability():
    pair = random_pairs(1)[0]
    silent = Example(pair.chosen.inputs, torch.full_like(pair.chosen.targets, IGNORE))
    with pytest.raises(InputError, match="no target"):
        answer_logprobs(fresh_model(), join_pairs([Pair(silent, pair.rejected)]))
    with pytest.raises(InputError, match="answer without a target"):
        prepare_preferences(fresh_model(), [Pair(silent, pair.rejected)])


def test_gradients_push_the_difference_by_equation_16_7():
    "Autograd on the four log-probabilities against the formula, in double precision."
    generator = torch.Generator().manual_seed(3)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 6, generator=generator, dtype=torch.double).unbind()
    for beta in (0.05, 0.5, 3.0):
        a, b = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        dpo_loss(a, b, ref_chosen, ref_rejected, beta).backward()
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        assert torch.allclose(a.grad, -beta * torch.sigmoid(-margin) / 6) and torch.allclose(b.grad, -a.grad)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
def test_finite_differences_agree(kind):
    generator = torch.Generator().manual_seed(4)
    logprobs = (-3 * torch.rand(8, generator=generator, dtype=torch.double)).requires_grad_()
    lengths = torch.tensor([1, 2, 3, 4, 2, 2, 5, 1])
    reference = -3 * torch.rand(4, 2, generator=generator, dtype=torch.double)
    objective = Objective(kind, beta=0.7, margin=0.3 if kind == "simpo" else 0.0, supervised=0.2)
    assert torch.autograd.gradcheck(lambda x: preference_loss(AnswerScores(x, lengths), reference, objective), logprobs)


def test_swapping_the_sides_mirrors_the_margin():
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    forward, backward = bradley_terry_loss(*scores), bradley_terry_loss(*scores.flip(0))
    assert torch.isclose(backward - forward, (scores[0] - scores[1]).mean(), atol=1e-6)


@pytest.mark.parametrize("objective, phrase", [
    (Objective("orpo"), "kind must be one of"),
    (Objective(beta=0.0), "beta must be"),
    (Objective(beta=math.nan), "beta must be"),
    (Objective("dpo", margin=1.0), "margin is SimPO's"),
    (Objective(supervised=-1.0), "supervised must be"),
])
def test_objectives_out_of_range_are_refused(objective, phrase):
    with pytest.raises(InputError, match=phrase):
        prepare_preferences(fresh_model(), random_pairs(2), [], objective)


# trl, as an independent witness
# ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory):
    "A model in two forms, ours and transformers', and one batch of pairs in two forms, ours and trl's."
    pytest.importorskip("trl", reason="trl is not installed; pip install trl")
    from transformers import AutoModelForCausalLM

    from transformer_llm.export import save_pretrained
    from transformer_llm.tokenizer import CharTokenizer

    folder = tmp_path_factory.mktemp("trl")
    models = []
    for name in ("model", "reference"):
        model = fresh_model(tied_embeddings=False)
        if name == "reference":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        save_pretrained(model, folder / name, tokenizer=CharTokenizer.train("abcdefghijklmnopqrstuvwx"))
        models.append((model, AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)))
    pairs = random_pairs(6)
    batch = join_pairs(pairs)
    ids = torch.cat([batch.inputs, torch.zeros_like(batch.inputs[:, :1])], dim=1)
    learned = torch.cat([torch.zeros_like(batch.inputs[:, :1]), (batch.targets != IGNORE).long()], dim=1)
    ids[:, 1:][batch.targets != IGNORE] = batch.targets[batch.targets != IGNORE]
    lengths = torch.tensor([len(example.inputs) + 1 for side in zip(*pairs) for example in side])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    theirs = {"input_ids": ids, "attention_mask": real.long(), "completion_mask": learned}
    return folder, models, pairs, theirs


def their_loss(folder: Path, models, batch: dict, **settings):
    "The loss of trl's own trainer on a batch, and the gradients of the model."
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(output_dir=str(folder / "out"), use_cpu=True, report_to="none", bf16=False, fp16=False,
                       gradient_checkpointing=False, **settings)
    (_, model), (_, reference) = models
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"))
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)
    model.zero_grad()
    model.eval()  # no dropout on either side
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective, settings", [
    (Objective("dpo", beta=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
    (Objective("dpo", beta=2.0), {"loss_type": ["sigmoid"], "beta": 2.0}),
    (Objective("ipo", beta=0.3), {"loss_type": ["ipo"], "beta": 0.3}),
    (Objective("dpo", beta=0.1, supervised=0.5),
     {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1}),
], ids=["dpo", "dpo-large-beta", "ipo", "supervised"])
def test_loss_and_gradients_are_trls(trl_batch, objective, settings):
    folder, models, pairs, batch = trl_batch
    theirs, their_gradients = their_loss(folder, models, dict(batch), **settings)
    (ours, _), (reference, _) = models
    ours.zero_grad()
    loss = preference_loss(answer_logprobs(ours, join_pairs(pairs)), pair_logprobs(reference, pairs), objective)
    loss.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5 * max(1, abs(theirs.item()))
    for mine, name in (
        ("token_embedding.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("final_norm.weight", "model.norm.weight"),
        ("blocks.1.attention.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("blocks.0.feedforward.down.weight", "model.layers.0.mlp.down_proj.weight"),
    ):
        gradient = ours.get_parameter(mine).grad
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(gradient, their_gradients[name], rtol=1e-4, atol=1e-6), mine


# The scorer
# ------------------------------------------------------------------------------------------------------

def test_a_scorer_reads_the_last_real_token():
    model = RewardModel.from_gpt(fresh_model())
    pairs = random_pairs(6)
    assert torch.equal(pair_rewards(model, pairs), torch.zeros(6, 2))
    torch.nn.init.normal_(model.reward_head.weight)
    together = pair_rewards(model, pairs)
    for pair, row in zip(pairs, together):
        for example, reward in zip(pair, row):
            following = example.targets.where(example.targets != IGNORE, example.inputs.roll(-1))
            whole = torch.cat([example.inputs[:1], following])
            hidden = model.hidden_states(whole[None])[0, -1]
            assert torch.isclose(reward, (hidden @ model.reward_head.weight[0]), atol=1e-4)


def test_what_follows_the_answer_is_not_read():
    "A template may write something behind the token that ends the answer."
    ids = [3, 4, 5, 6, 9]
    example = make_example(ids, [False, False, True, True, False])
    texts, lengths = whole_texts(Batch(example.inputs[None], example.targets[None]))
    assert lengths.tolist() == [4] and texts[0, :4].tolist() == [3, 4, 5, 6]


def test_a_scorer_is_made_from_its_model_and_from_nothing_else():
    model = fresh_model()
    scorer = RewardModel.from_gpt(model)
    assert all(torch.equal(tensor, scorer.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"extra\.weight"):
        RewardModel.from_gpt(model)


def test_a_scorer_learns_and_loads(tmp_path):
    data = make_data()
    config = CONFIG.replace(max_steps=60, learning_rate=3e-3, checkpoint_every=0, eval_every=0)
    trainer = RewardTrainer(RewardModel.from_gpt(fresh_model()), data, config, run_directory=tmp_path, progress=False)
    trainer.train()
    rewards = pair_rewards(trainer.model, data.train)
    assert (rewards[:, 0] > rewards[:, 1]).all()
    again = RewardTrainer.resume(tmp_path, data, progress=False)
    assert torch.equal(pair_rewards(again.model, data.train), rewards)
    with pytest.raises(InputError, match="must be a RewardModel"):
        RewardTrainer(fresh_model(), data, config)


# Trainers
# ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
def test_the_margin_grows(kind):
    model = fresh_model()
    data = make_data(model, kind=kind)
    config = CONFIG.replace(max_steps=30, learning_rate=3e-3, eval_every=0)
    reference = pair_logprobs(model, data.train)
    PreferenceTrainer(model, data, config, progress=False).train()
    report = measure_preferences(model, data.train, reference)
    assert report.accuracy > 0.9 and report.rejected < report.chosen
    assert torch.equal(data.train_reference, reference)


def test_evaluation_is_the_loss_on_the_held_out_pairs():
    model = fresh_model()
    data = make_data(model)
    trainer = PreferenceTrainer(model, data, CONFIG.replace(max_steps=3), progress=False)
    trainer.train()
    scores = answer_logprobs(model, join_pairs(data.val))
    assert math.isclose(trainer.evaluate(), preference_loss(scores, data.val_reference).item(), rel_tol=1e-5)


def test_an_epoch_draws_each_pair_once():
    trainer = PreferenceTrainer(fresh_model(), make_data(), CONFIG.replace(batch_size=5), progress=False)
    drawn = []
    for trainer.step in range(2):
        drawn += trainer.next_batch().reference.tolist()
    assert sorted(drawn) == sorted(trainer.data.train_reference.tolist())


def test_data_that_do_not_fit_are_refused():
    data, model = make_data(), fresh_model()
    for other, phrase in (
        ((data.train, data.val), "must be a PreferenceData"),
        (data._replace(train=[]), "no pair to train on"),
        (data._replace(train_reference=data.train_reference[1:]), "two finite numbers"),
        (data._replace(val_reference=data.val_reference * math.nan), "two finite numbers"),
        (data._replace(train=[*data.train[:-1], Pair(data.train[0].chosen, data.train[0].chosen)]), "same tokens"),
        (data._replace(objective=Objective("kto")), "kind must be one of"),
    ):
        with pytest.raises(InputError, match=phrase):
            PreferenceTrainer(model, other, CONFIG)
    with pytest.raises(InputError, match="more than the window of 4"):
        PreferenceTrainer(model, data, CONFIG.replace(context_length=4))
    with pytest.raises(InputError, match="vocab_size is 4"):
        PreferenceTrainer(fresh_model(vocab_size=4), data, CONFIG)
    with pytest.raises(InputError, match="compile=True"):
        PreferenceTrainer(model, data, CONFIG.replace(compile=True))
    with pytest.raises(InputError, match="hold some out"):
        measure_preferences(model, [], torch.zeros(0, 2))


def test_a_file_of_preferences_comes_back_bit_for_bit_or_not_at_all(tmp_path):
    data, path = make_data(kind="ipo", beta=0.25), tmp_path / "preferences.safetensors"
    save_preferences(data, path)
    again = load_preferences(path)
    assert again.objective == data.objective
    assert all(torch.equal(getattr(again, name), getattr(data, name)) for name in ("train_reference", "val_reference"))
    for name in ("train", "val"):
        assert len(getattr(again, name)) == len(getattr(data, name))
        for one, other in zip(getattr(again, name), getattr(data, name)):
            assert all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged"):
        load_preferences(path)
    with pytest.raises(InputError, match="no such file|No such file|does not exist"):
        load_preferences(tmp_path / "nothing")


def test_no_other_objective_reference_or_pairs_on_resuming(tmp_path):
    data = make_data()
    PreferenceTrainer(fresh_model(), data, CONFIG, run_directory=tmp_path, progress=False).train()
    for other in (
        data._replace(objective=Objective(beta=0.2)),
        data._replace(train_reference=data.train_reference + 0.01),
        data._replace(train=data.train[::-1]),
    ):
        with pytest.raises(InputError, match="resume with the same data"):
            PreferenceTrainer.resume(tmp_path, other)


def run_to_its_end(kind: str, run: str, data: str, seconds_per_step: str = "0") -> None:
    "Begin the run, or continue it."
    data, trainer = load_preferences(data), PreferenceTrainer if kind == "prefer" else RewardTrainer
    if Path(run).exists():
        trainer.resume(run, data, progress=False).train()
        return
    model = fresh_model(dropout=0.1)
    model = model if kind == "prefer" else RewardModel.from_gpt(model)
    slow = lambda trainer, record: time.sleep(float(seconds_per_step))
    config = CONFIG.replace(max_steps=40, accumulation=2)
    trainer(model, data, config, run_directory=run, progress=False, on_step=slow).train()


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_preferences import run_to_its_end
run_to_its_end(*sys.argv[2:])
"""


@pytest.mark.parametrize("kind", ["prefer", "reward"])
def test_a_killed_run_goes_on_to_the_bit(kind, tmp_path):
    whole, killed, data = (str(tmp_path / name) for name in ("whole", "killed", "preferences.safetensors"))
    save_preferences(make_data(fresh_model(dropout=0.1)), data)
    run_to_its_end(kind, whole, data)
    call = [sys.executable, "-c", KILLED, str(Path(__file__).parent), kind, killed, data, "0.1"]
    process = subprocess.Popen(call)
    while not Path(killed, "step-0000006", "checkpoint.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    assert load_checkpoint(killed).step < 40
    run_to_its_end(kind, killed, data)
    assert load_checkpoint(killed).step == load_checkpoint(whole).step == 40
    assert_equal_bits(load_checkpoint(whole).weights, load_checkpoint(killed).weights)


# Runs from files, and the command
# ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    "The folder of a very small model of characters."
    from transformer_llm.checkpoints import save_checkpoint
    from transformer_llm.tokenizer import CharTokenizer

    folder = tmp_path_factory.mktemp("speller")
    tokenizer = CharTokenizer.train("".join(map(chr, range(32, 127))) + "\n")
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=128, d_model=16, n_layers=1, n_heads=2)
    save_checkpoint(folder, 0, GPT(config), tokenizer=tokenizer)
    return folder


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"What is {i}+1?", "chosen": str(i + 1), "rejected": f"It is {i + 2}."} for i in range(30)]
    records += [records[0], {"prompt": "Long?", "chosen": "x" * 200, "rejected": "no"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(*words) -> int:
    from transformer_llm.cli import main

    return main(["prefer", *map(str, words)])


def test_the_command_says_what_it_used_and_what_came_of_it(speller, pairs_file, tmp_path, capsys):
    base = ["--checkpoint", speller, "--data", pairs_file, "--max_steps", 12, "--learning_rate", 0.003]
    assert command(*base, "--device", "cpu", "--out", tmp_path / "run", "--beta", 0.3, "--supervised", 0.1) == 0
    told = capsys.readouterr().out
    assert "32 read, 1 left out as copies, 1 left out, longer than the window of 128" in told
    assert "27 to train on, 3 to validate" in told and "DPO, beta 0.3, supervised 0.1" in told
    assert "in order" in told and "of 3 held-out pairs" in told and "against the start" in told
    assert load_preferences(tmp_path / "run" / "preferences.safetensors").objective.beta == 0.3


def test_a_run_in_two_parts_is_the_run_in_one(speller, pairs_file, tmp_path, capsys):
    base = ["--checkpoint", speller, "--data", pairs_file, "--learning_rate", 0.003, "--device", "cpu",
            "--warmup_steps", 2, "--kind", "simpo", "--margin", 0.5, "--checkpoint_every", 4, "--eval_every", 6]
    assert command(*base, "--max_steps", 12, "--out", tmp_path / "whole") == 0

    class Stopped(Exception):
        pass

    from transformer_llm import preferences

    def stop(self, record):
        if record["step"] == 7:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences.PreferenceTrainer, "after_step", stop)
        with pytest.raises(Stopped):
            command(*base, "--max_steps", 12, "--out", tmp_path / "parted")
    capsys.readouterr()
    assert command("--resume", "--out", tmp_path / "parted") == 0
    assert "SimPO, beta 0.1, margin 0.5" in capsys.readouterr().out
    assert_equal_bits(*(load_checkpoint(tmp_path / name).weights for name in ("whole", "parted")))


def test_mistakes_at_the_command_line_are_one_sentence(speller, pairs_file, tmp_path, capsys):
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text(json.dumps({"messages": [USER, GOOD]}) + "\n", encoding="utf-8")
    base, out = ["--checkpoint", speller, "--data", pairs_file], ["--out", tmp_path / "run"]
    for words, phrase in (
        (["--checkpoint", speller], "Say what to learn from"),
        (["--data", pairs_file, *out], "either --model or --checkpoint"),
        (["--checkpoint", speller, "--data", dialogues, *out], "no chosen"),
        (["--checkpoint", speller, "--data", tmp_path / "nothing.jsonl", *out], "nothing.jsonl"),
        ([*base, *out, "--margin", "1"], "margin is SimPO's"),
        ([*base, *out, "--kind", "orpo"], "kind"),
        ([*base, *out, "--beta", "0"], "beta"),
        ([*base, *out, "--context_length", "20"], "fits into a window of 20 tokens"),
        ([*out, "--resume"], "holds no run of preferences"),
    ):
        assert command(*words) == 2, words
        told = capsys.readouterr()
        assert phrase in told.err and told.err.count("\n") == 1, told.err
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("step-*"))


def test_adapters_learn_alone_from_the_reference_of_their_base(speller, pairs_file, tmp_path, capsys):
    from transformer_llm.checkpoints import load_model
    from transformer_llm.lora import load_lora

    out = tmp_path / "run"
    base = ["--checkpoint", speller, "--data", pairs_file, "--out", out, "--device", "cpu", "--lora"]
    assert command(*base, 99) == 2 and "rank must be at most 16" in capsys.readouterr().err and not out.exists()
    assert command(*base, 2, "--max_steps", 4, "--learning_rate", 0.01) == 0
    assert "are trained" in capsys.readouterr().out
    data, model = load_preferences(out / "preferences.safetensors"), load_model(speller)[0]
    assert torch.allclose(pair_logprobs(model, data.train), data.train_reference, atol=1e-5)
    adapted = load_lora(model, out / "adapter")
    report = measure_preferences(adapted, data.train, data.train_reference)
    assert report.accuracy > 0.5 and report.rejected < report.chosen
    assert command("--resume", "--out", out, "--max_steps", 6) == 0
    assert load_checkpoint(out).step == 6


def test_a_resumed_run_keeps_its_objective(speller, pairs_file, tmp_path, capsys):
    out = tmp_path / "run"
    base = ["--checkpoint", speller, "--data", pairs_file, "--out", out, "--device", "cpu"]
    assert command(*base, "--max_steps", 2) == 0
    assert command("--resume", "--out", out, "--beta", "0.5") == 2
    assert "leave out --beta" in capsys.readouterr().err
    assert command("--resume", "--out", out) == 0
    assert "Nothing is left to train" in capsys.readouterr().out
    assert command("--checkpoint", speller, "--data", pairs_file, "--out", out) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_brief_pairs_differ_in_length_alone():
    from transformer_llm.preferences import brief_preferences

    pairs = brief_preferences(60)
    assert all(one.chosen.answer in one.rejected.answer and len(one.rejected.answer) > len(one.chosen.answer) + 20
               for one in pairs)
    assert [one.question for one in brief_preferences(60)] == [one.question for one in pairs]


def test_a_plain_run_in_the_folder_leaves_nothing_of_it(speller, pairs_file, tmp_path):
    from transformer_llm.runs import check_free, remove_run

    out = tmp_path / "run"
    base = ["--checkpoint", speller, "--data", pairs_file, "--out", out, "--device", "cpu", "--max_steps", 1]
    assert command(*base) == 0
    for folder in out.glob("step-*"):  # as if it had been killed before its first checkpoint
        folder.rename(tmp_path / folder.name)
    (out / "metrics.jsonl").write_bytes(b"")
    (out / "loss.png").unlink(missing_ok=True)
    check_free(out)
    for folder in tmp_path.glob("step-*"):
        folder.rename(out / folder.name)
    remove_run(out)
    assert not (out / "preferences.safetensors").exists() and not (out / "finetune.json").exists()
    (out / "preferences.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(InputError, match="is not from a run"):
        check_free(out)
