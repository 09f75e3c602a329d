"""What chapter 12 can't try on its own page: every way into the model, hashes at their edges, bad input, and what a
finished run must hold.
"""
import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_llm.dataset import read_text, split_text
from transformer_llm.foundations import InputError
from transformer_llm.generation import generate
from transformer_llm.sprint import (
    DOCUMENTED,
    NGRAMS,
    PLAIN,
    RECIPES,
    RememberingCache,
    RowAdagrad,
    SprintGPT,
    SprintTrainer,
    character_ids,
    count_loss,
    evaluate_all,
    load_sprint,
    ngram_rows,
    read_characters,
    run_recipe,
    save_sprint,
)
from transformer_llm.checkpoints import load_model, save_checkpoint
from transformer_llm.training import TrainingError
from transformer_llm.transformer import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))
import sprint_runs

SHAPE = dict(
    vocab_size=11,
    context_length=24,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_ff=24,
    position="rotary",
    rope_interleaved=True,
    activation="relu2",
    qk_norm=True,
    tied_embeddings=False,
)


def small_model(ngrams=((2, 144), (3, 50)), token_shift=True, **changes) -> SprintGPT:
    "A random model with opinions, its additions included."
    torch.manual_seed(3)
    model = SprintGPT(GPTConfig(**SHAPE | changes), ngrams, token_shift)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0.0, 0.3)
    return model.eval()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the dog barks at the cat, and the cat looks at the dog\n\n" * 120, encoding="utf-8")
    return path


def tiny(recipe, **training):
    return recipe.change(
        recipe.name,
        "small",
        model=dict(context_length=16, d_model=16, n_layers=1, n_heads=2, d_ff=16),
        training=dict(max_steps=4, batch_size=4, warmup_steps=1) | training,
    )


@pytest.mark.parametrize("ngrams", [(), ((2, 144),), ((3, 7), (5, 1000)), ((7, 33),)])
@pytest.mark.parametrize("token_shift", [False, True])
def test_every_way_through_the_model_agrees(ngrams, token_shift):
    model = small_model(ngrams, token_shift)
    ids = torch.randint(11, (3, 24), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    ways = {
        "blocks of GPT": model.unembed(GPT.hidden_states(model, ids, positions=torch.arange(24))),
        "mask of ones": model(ids, attention_mask=torch.ones(3, 24, dtype=torch.bool)),
    }
    for size in (1, 5, 24):
        cache = model.new_cache(3)
        ways[f"cache, {size} at a time"] = torch.cat([model(part, cache=cache) for part in ids.split(size, 1)], 1)
    for name, other in ways.items():
        assert torch.allclose(logits, other, atol=2e-4), name
    pad = torch.zeros(3, 4, dtype=torch.int64)
    mask = torch.cat((pad.bool(), torch.ones(3, 20, dtype=torch.bool)), 1)
    assert torch.allclose(
        model(torch.cat((pad, ids[:, :20]), 1), attention_mask=mask)[:, 4:], logits[:, :20], atol=2e-4
    ), "padding on the left"


def test_gradients_agree_with_the_blocks_of_gpt():
    model, ids = small_model(), torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(1))
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.lm_head.weight]
    fast, plain = (
        torch.autograd.grad(h.sin().sum(), weights)
        for h in (model.hidden_states(ids), GPT.hidden_states(model, ids, positions=torch.arange(20)))
    )
    for a, b in zip(fast, plain):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_no_token_sees_a_later_one():
    model, ids = small_model(), torch.randint(11, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 11
    assert torch.equal(model(ids)[:, :12], model(changed)[:, :12]) and not torch.allclose(
        model(ids)[:, 12:], model(changed)[:, 12:]
    )


def test_a_cache_can_be_cropped_and_reordered():
    model, ids = small_model(), torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache(2)
    model(ids, cache=cache)
    for layer in cache:
        layer.crop(9)
    assert torch.allclose(model(ids[:, 9:12], cache=cache), model(ids[:, :12])[:, 9:], atol=2e-4)
    for layer in cache:
        layer.reorder(torch.tensor([1, 1, 0]))
    rows = ids[[1, 1, 0]]
    assert torch.allclose(model(rows[:, 12:13], cache=cache), model(rows[:, :13])[:, 12:], atol=2e-4)
    assert isinstance(cache[0], RememberingCache)
    with pytest.raises(InputError, match="new_cache"):
        model(ids[:, :3], cache=GPT.new_cache(model, 2))


def test_generation_is_the_same_with_and_without_a_cache_and_beyond_the_context():
    model = small_model()
    for length in (10, 40):
        a, b = (
            generate(model, torch.tensor([[1, 2, 3]]), length, temperature=0.0, use_cache=cached)
            for cached in (True, False)
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "field, value",
    [
        ("position", "learned"),
        ("rope_interleaved", False),
        ("norm", "layernorm"),
        ("activation", "gelu"),
        ("dropout", 0.1),
        ("qk_norm", False),
        ("bias", True),
        ("norm_placement", "post"),
    ],
)
def test_a_configuration_that_it_cannot_build_is_named(field, value):
    with pytest.raises(InputError, match=field):
        SprintGPT(GPTConfig(**SHAPE | {field: value}))
    with pytest.raises(InputError, match="order"):
        SprintGPT(GPTConfig(**SHAPE), ngrams=((1, 10),))


@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_rows_of_ngrams(vocab_size, order, length, data):
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length))
    exact = (vocab_size + 1) ** order
    found = ngram_rows(torch.tensor([ids]), [(order, exact)], vocab_size)[0, :, 0].tolist() if exact < 2**60 else None
    padded = [-1] * (order - 1) + ids
    for t in range(length) if found else ():
        group = padded[t : t + order][::-1]
        assert found[t] == sum((i + 1) * (vocab_size + 1) ** j for j, i in enumerate(group))
    rows = ngram_rows(torch.tensor([ids]), [(2, 13), (order + 1, 17)], vocab_size)
    assert (
        rows.shape == (1, length, 2)
        and (0 <= rows[..., 0]).all()
        and (rows[..., 0] < 13).all()
        and (13 <= rows[..., 1]).all()
        and (rows[..., 1] < 30).all()
    )


def test_the_table_moves_only_the_rows_that_were_looked_up():
    table = torch.nn.Parameter(torch.zeros(9, 4))
    optimizer = RowAdagrad([table], lr=0.1)
    (
        torch.nn.functional.embedding_bag(torch.tensor([[3], [3], [7]]), table, mode="sum", sparse=True)
        * torch.arange(1.0, 13).view(3, 4)
    ).sum().backward()
    optimizer.step()
    assert set(table.detach().abs().sum(1).nonzero().flatten().tolist()) == {3, 7}
    dense = torch.nn.Parameter(torch.zeros(9, 4))
    other = RowAdagrad([dense], lr=0.1)
    dense.grad = torch.zeros(9, 4)
    dense.grad[7] = torch.arange(9.0, 13)
    other.step()
    assert torch.allclose(dense[7], table[7], atol=1e-6)


@given(st.text(min_size=30, max_size=200).filter(lambda t: t.strip() and "\0" not in t and "\r" not in t))
@settings(max_examples=30, deadline=None)
def test_characters_are_read_as_the_tokenizer_reads_them(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    data, tokenizer = read_characters(path)
    train, val = split_text(read_text(path), 0.1)
    assert data.train.tolist() == tokenizer.encode(train) and data.val.tolist() == tokenizer.encode(val)
    assert sorted(set(train + val)) == tokenizer.characters and character_ids("aé😀").tolist() == [97, 233, 128512]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match="missing.txt"):
        read_characters(tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("abc\n\nabc\n")
    with pytest.raises(InputError, match="tokens"):
        run_recipe(tiny(PLAIN), tmp_path / "short.txt")


def test_evaluation_takes_each_token_once():
    model = small_model()
    tokens = torch.randint(11, (24 * 5 + 8,), generator=torch.Generator().manual_seed(5))
    total = 0.0
    for first in range(0, len(tokens) - 1, 24):
        inputs, targets = tokens[first : min(first + 24, len(tokens) - 1)], tokens[first + 1 : first + 25]
        total += float(torch.nn.functional.cross_entropy(model(inputs[None])[0], targets, reduction="sum").detach())
    assert evaluate_all(model, tokens, 2) == pytest.approx(total / (len(tokens) - 1), abs=1e-5)


@pytest.mark.parametrize("name", ["documented", "plain", "ngrams"])
def test_a_run_is_complete_and_repeatable(text_file, name):
    recipe = tiny(RECIPES[name])
    first, again, other = (
        run_recipe(recipe, text_file, seed, eval_every=2, eval_tokens=100, model_too=True) for seed in (0, 0, 1)
    )
    assert first["val_loss"] == again["val_loss"] != other["val_loss"]
    assert 0 < first["evaluation_seconds"] < first["seconds"] and [row[0] for row in first["curve"]] == [2, 4]
    assert first["tokens"] == 4 * 4 * 16 and first["parameters"] == first["model"].num_parameters()
    assert first["val_loss"] < math.log(first["tokenizer"].vocab_size) + 0.5


def test_a_sprint_learns_and_is_kept(text_file, tmp_path):
    result = run_recipe(tiny(NGRAMS, max_steps=40, batch_size=16), text_file, model_too=True)
    assert result["val_loss"] < 1.0
    save_sprint(result["model"], tmp_path / "run", result["tokenizer"])
    model, tokenizer = load_sprint(tmp_path / "run")
    ids = torch.tensor([tokenizer.encode("the dog")])
    assert torch.equal(model(ids), result["model"](ids)) and model.ngrams == NGRAMS.ngrams
    with pytest.raises(InputError, match="unknown"):
        load_model(tmp_path / "run")
    save_checkpoint(
        tmp_path / "plain", 0, GPT(GPTConfig(vocab_size=5, context_length=8, d_model=8, n_layers=1, n_heads=2))
    )
    with pytest.raises(InputError, match="load_model"):
        load_sprint(tmp_path / "plain")


def test_a_run_that_explodes_says_so(text_file):
    with pytest.raises(TrainingError, match="learning rate"):
        run_recipe(tiny(PLAIN, max_steps=60, learning_rate=1e30, muon_learning_rate=1e30), text_file)
    data, tokenizer = read_characters(text_file)
    with pytest.raises(InputError, match="save_sprint"):
        SprintTrainer(tiny(PLAIN).make_model(tokenizer.vocab_size), data, tiny(PLAIN).training, run_directory="runs")


def test_counts_are_probabilities(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 500 + "\n\n" + "ab" * 60 + "\n", encoding="utf-8")
    losses = [count_loss(path, order)["val_loss"] for order in (1, 2, 3)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and losses[1] < 0.1
    with pytest.raises(InputError, match="order"):
        count_loss(path, 0)


def test_the_documented_recipe_is_nanogpts():
    training, model = DOCUMENTED.training, DOCUMENTED.make_model(65)
    assert (training.max_steps, training.batch_size, training.learning_rate, training.betas) == (
        2000,
        12,
        1e-3,
        (0.9, 0.99),
    )
    assert (
        model.config.to_dict() | {}
        and model.num_parameters() == 65 * 128 + 64 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128
    )


def test_the_committed_runs_belong_to_the_recipes():
    runs = json.loads((ROOT / "data" / "sprint.json").read_text(encoding="utf-8"))
    for run in runs["final"]:
        recipe = RECIPES[run["name"]]
        assert (
            run["steps"] == recipe.training.max_steps
            and run["tokens"] == run["steps"] * recipe.training.batch_size * 64
        )
        assert (
            0 < run["evaluation_seconds"] < run["seconds"]
            and run["parameters"] == recipe.make_model(69).num_parameters()
        )
    assert (
        {"documented", "tuned", "plain", "ngrams", "under-1.60", "minute", "minute-plain", "five-minutes"}
        <= {run["name"] for run in runs["final"]}
        <= set(RECIPES)
    )
    assert all(
        sorted(run["seed"] for run in runs["final"] if run["name"] == name) == [0, 1, 2]
        for name in ("documented", "tuned", "plain", "ngrams", "under-1.60")
    )
    assert all(
        run["seconds"] < limit
        for name, limit in (("minute", 60), ("five-minutes", 300))
        for run in runs["final"]
        if run["name"] == name
    )
    mark = np.mean([run["val_loss"] for run in runs["final"] if run["name"] == "documented"])
    assert all(run["val_loss"] <= mark for run in runs["final"] if run["name"] in ("plain", "ngrams", "tuned"))
    assert all(run["val_loss"] < 1.6 and run["seconds"] < 60 for run in runs["final"] if run["name"] == "under-1.60")


def test_each_rung_of_the_ladder_changes_one_setting():
    before = sprint_runs.BEGINNING
    for rung, _, setting, value, tuned in sprint_runs.ONE_FACTOR:
        chosen = sprint_runs.settings_of(rung)
        changed = {name for name in chosen if chosen[name] != before[name]}
        assert changed == ({setting} if setting else set()), rung
        assert chosen == before if setting is None else chosen[setting] == value
        assert set(tuned) <= {"all", "matrices", "table"}
        before = chosen


def test_the_ladder_leads_from_the_documented_recipe_to_the_plain_one_with_n_grams():
    first, last = sprint_runs.BEGINNING, sprint_runs.settings_of(sprint_runs.ONE_FACTOR[-1][0])
    for choice, recipe in ((first, DOCUMENTED), (last, PLAIN)):
        training = recipe.training
        for name in ("schedule", "min_lr_fraction", "weight_decay", "grad_clip", "optimizer"):
            assert choice[name] == getattr(training, name), name
        assert (0.9, choice["beta2"]) == training.betas and choice["momentum"] == recipe.momentum
        small = {name: PLAIN.model[name] for name in ("d_model", "d_ff", "n_layers", "n_heads")}
        recipe = recipe.change("small", "in the plain recipe's size", model=small, ngrams=choice["ngrams"])
        torch.manual_seed(0)
        model, wanted = sprint_runs.model_of(choice, 69), recipe.make_model(69)
        drawn = dict(init_std=0.02, zero_init_residual=False, rope_interleaved=True)  # weights are compared below
        assert model.config == wanted.config.replace(**drawn)
        assert {name: p.shape for name, p in model.named_parameters()} == {
            name: p.shape for name, p in wanted.named_parameters()
        }
        assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), wanted.parameters()))
        for p, q in zip(model.parameters(), wanted.parameters()):
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.1)
    assert (last["ngrams"], last["token_shift"]) == (NGRAMS.ngrams, True)


def test_a_rung_computes_the_same_by_the_shorter_way():
    chosen = sprint_runs.settings_of("gains of one")
    model = sprint_runs.model_of(chosen | {"ngrams": (), "token_shift": False}, 69)
    other = SprintGPT(model.config, (), False)
    other.load_state_dict(model.state_dict())
    assert type(model) is GPT
    ids = torch.randint(69, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.1)
        other.lm_head.weight.copy_(model.lm_head.weight)
        for a, b in zip(model.blocks, other.blocks):
            a.feedforward.down.weight.normal_(0.0, 0.1)
            b.feedforward.down.weight.copy_(a.feedforward.down.weight)
        assert torch.allclose(model.eval()(ids), other.eval()(ids), atol=1e-4)


def test_the_committed_ladder_is_complete_and_tuned():
    runs = json.loads((ROOT / "data" / "sprint.json").read_text(encoding="utf-8"))["one_factor"]
    tuned = {rung: names for rung, _, _, _, names in sprint_runs.ONE_FACTOR}
    complete = list(dict.fromkeys(run["name"] for run in runs if run["seed"] == 2))
    assert complete == list(tuned)[: len(complete)] and "token before" in complete, "a rung is missing"
    for rung in complete:
        group = [run for run in runs if run["name"] == rung]
        assert all(run["steps"] == sprint_runs.STEPS for run in group)
        chosen = next(run["rates"] for run in group if run["seed"] == 2)
        shown = {run["seed"]: run["val_loss"] for run in group if run["rates"] == chosen}
        assert set(shown) == {0, 1, 2}, rung
        tries = [run for run in group if run["seed"] == 0]
        assert all(shown[0] <= run["val_loss"] for run in tries if run["val_loss"] is not None)
        for name in tuned[rung]:  # the valley is closed on both sides
            tried = [run["rates"][name] for run in tries]
            assert min(tried) < chosen[name] < max(tried), (rung, name)


def test_nothing_of_a_peer_is_imported():
    tree = ast.parse((ROOT / "transformer_llm" / "sprint.py").read_text(encoding="utf-8"))
    names = {
        getattr(node, "module", None) or node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not any(name.startswith(("transformers", "tokenizers")) for name in names)
