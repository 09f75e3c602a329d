"""Circuits: scores of heads, removals, patches, composition, and the stored runs of chapter 19."""
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_llm import circuits
from transformer_llm.circuits import (
    Removals,
    composition,
    copied_ids,
    copy_loss,
    copying,
    fold,
    head_patch_grid,
    head_scores,
    induction_scores,
    matched_heads,
    mean_outputs,
    previous_token_scores,
    remove_one_head,
    without,
)
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.inspection import record
from transformer_llm.transformer import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
TINY = dict(vocab_size=40, context_length=32, d_model=32, n_layers=3, n_heads=4, init_std=0.3)
KINDS = {
    "groups": dict(n_kv_heads=2),
    "gpt2": dict(norm="layernorm", position="learned", activation="gelu_tanh", bias=True),
    "window": dict(window=8, qk_norm=True),
    "alibi": dict(position="alibi"),
    "output": dict(norm_placement="output", qk_norm_whole=True),
    "post": dict(norm_placement="post"),
    "wide": dict(head_dim=12, n_kv_heads=1),
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY | changes)).eval()


@pytest.fixture
def ids():
    return copied_ids(3, 8, 40, torch.Generator().manual_seed(0))


def test_copied_ids_are_different_and_come_twice():
    ids = copied_ids(50, 9, 30, torch.Generator().manual_seed(0), lowest=12)
    assert torch.equal(ids[:, :9], ids[:, 9:]) and ids.min() >= 12 and ids.max() < 30
    assert all(len(set(row[:9])) == 9 for row in ids.tolist())
    assert len({tuple(row) for row in ids.tolist()}) == 50
    for wrong, word in (((0, 4, 9), "n must"), ((1, 10, 9), "length"), ((1, 1, 9), "length")):
        with pytest.raises(InputError, match=word):
            copied_ids(*wrong)


def test_scores_equal_loops():
    weights = torch.rand(2, 3, 4, 12, 12).tril()
    for index in ((0, 0, 0), (1, 2, 3)):
        one = weights[index]
        assert previous_token_scores(weights)[index] == pytest.approx(
            sum(one[t, t - 1].item() for t in range(1, 12)) / 11, abs=1e-6)
        assert induction_scores(weights)[index] == pytest.approx(
            sum(one[t, t - 5].item() for t in range(6, 12)) / 6, abs=1e-6)


def test_perfect_heads_score_one_and_nothing_else():
    previous, induction = torch.zeros(10, 10), torch.zeros(10, 10)
    for t in range(1, 10):
        previous[t, t - 1] = 1
    for t in range(5, 10):
        induction[t, t - 4] = 1
    assert previous_token_scores(previous) == 1 and induction_scores(previous) == 0
    assert induction_scores(induction) == 1 and previous_token_scores(induction) == 0


def test_scores_refuse_what_is_no_map():
    for wrong in (torch.rand(3, 5), torch.rand(2, 2)):
        with pytest.raises(InputError, match="one pass without a cache"):
            previous_token_scores(wrong)
    with pytest.raises(InputError, match="7 tokens have no half"):
        induction_scores(torch.rand(7, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_head_scores_of_every_kind_of_model(kind, ids):
    model = tiny(**KINDS[kind])
    found, maps = head_scores(model, ids), model.attention_maps(ids)
    with record(model, "*.attention.heads") as seen, torch.no_grad():
        model(ids)
    for layer, weights in enumerate(maps):
        assert largest_difference(found.previous[layer], previous_token_scores(weights).mean(0)) < 1e-5
        assert largest_difference(found.induction[layer], induction_scores(weights).mean(0)) < 1e-5
        for head in range(4):  # sizes, one vector at a time
            gathered, o_proj = torch.zeros(3, 16, 4, model.config.head_dim), model.blocks[layer].attention.o_proj
            gathered[:, :, head] = seen[f"blocks.{layer}.attention.heads"][:, head]
            added = nn.functional.linear(gathered.flatten(2), o_proj.weight)[:, 1:]
            assert found.sizes[layer, head] == pytest.approx(added.norm(dim=-1).mean().item(), rel=1e-4)


def test_head_scores_refuse(ids):
    with pytest.raises(InputError, match="followed by their copy"):
        head_scores(tiny(), torch.arange(16)[None])
    with pytest.raises(InputError, match="window=4 tokens, so it can't look 7 back"):
        head_scores(tiny(window=4), ids)
    with pytest.raises(InputError, match="no attention layer"):
        head_scores(nn.Linear(2, 2), ids)
    found = head_scores(tiny(), ids)
    with pytest.raises(InputError, match="score"):
        found.best("largest")
    with pytest.raises(InputError, match="n must"):
        found.best("sizes", 13)
    assert len(set(found.best("sizes", 12))) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_removing_a_head_equals_zeroing_its_columns(kind, ids):
    model = tiny(**KINDS[kind])
    width = model.config.head_dim
    with torch.no_grad():
        plain, by_hand = model(ids), copy.deepcopy(model)
        for layer, head in ((0, 1), (0, 2), (2, 3)):
            by_hand.blocks[layer].attention.o_proj.weight[:, head * width : (head + 1) * width] = 0
        with without(model, [(0, 1), (2, 3), (0, 2)]):
            changed = model(ids)
        assert largest_difference(changed, by_hand(ids)) < 1e-4
        assert largest_difference(changed, plain) > 0.01
        assert largest_difference(model(ids), plain) == 0


def test_removing_all_heads_of_a_layer_equals_skipping_it(ids):
    model = tiny()
    names = "blocks.1.before", "blocks.1.between"
    with torch.no_grad(), without(model, [(1, head) for head in range(4)]), record(model, *names) as seen:
        model(ids)
    assert torch.equal(seen[names[0]], seen[names[1]])


def test_other_numbers_in_place_of_a_head(ids):
    model, others = tiny(), copied_ids(3, 8, 40, torch.Generator().manual_seed(1))
    with torch.no_grad(), record(model, "*.attention.heads") as theirs:
        model(others)
    means = mean_outputs(theirs)
    assert set(means) == {f"blocks.{n}.attention.heads" for n in range(3)}
    for instead, wanted in ((theirs, theirs), (means, means)):
        with torch.no_grad(), without(model, [(1, 2)], instead), record(model, "blocks.1.attention.heads") as seen:
            model(ids)
        name = "blocks.1.attention.heads"
        assert torch.equal(seen[name][:, 2], wanted[name][:, 2].expand(3, 16, 8))
    with torch.no_grad(), record(model, "blocks.1.attention.heads") as plain:
        model(ids)
    with torch.no_grad(), without(model, [(1, 2)], positions=5), record(model, "blocks.1.attention.heads") as seen:
        model(ids)
    different = (seen["blocks.1.attention.heads"] != plain["blocks.1.attention.heads"]).any(-1).any(0)
    assert different.nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize("wrong, sentence", [
    ([(3, 0)], "no head 0 in layer 3: the model has 3 layers of 4 heads"),
    ([(0, 4)], "no head 4 in layer 0"),
    ([(-1, 0)], "no head 0 in layer -1"),
    ([7], "pair of whole numbers"),
    ([(0, 1.5)], "pair of whole numbers"),
])
def test_heads_that_do_not_exist_are_refused(wrong, sentence, ids):
    model = tiny()
    with pytest.raises(InputError, match=sentence), without(model, wrong):
        model(ids)


def test_patch_grid_against_one_patch_by_hand():
    model = tiny(n_kv_heads=2)
    ids, other = (torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def measure(logits):
        return logits[:, -1, 3] - logits[:, -1, 5]

    grid = head_patch_grid(model, ids, other, measure)
    assert grid.shape == (3, 4, 9)
    with torch.no_grad():
        with record(model, "blocks.1.attention.heads") as theirs:
            end = measure(model(other)).mean()
        start = measure(model(ids)).mean()

        def swap(module, args):
            x = args[0].clone()  # batch, seq, all heads side by side
            x[:, 4, 16:24] = theirs["blocks.1.attention.heads"][:, 2, 4]
            return (x,)

        hook = model.blocks[1].attention.o_proj.register_forward_pre_hook(swap)
        mixed = measure(model(ids)).mean()
        hook.remove()
    assert grid[1, 2, 4] == pytest.approx(((mixed - start) / (end - start)).item(), abs=1e-4)
    assert head_patch_grid(model, ids, other, measure, part="v", positions=[2, 3]).shape == (3, 2, 2)
    last = head_patch_grid(model, ids, other, measure)[2, :, :8]
    assert last.abs().max() < 1e-5  # the last layer's heads reach the last logits only at the last place


def test_patch_grid_refuses():
    model, ids = tiny(), torch.randint(40, (2, 6))
    with pytest.raises(InputError, match="same shape"):
        head_patch_grid(model, ids, ids[:, :5], lambda logits: logits[:, -1, 0])
    with pytest.raises(InputError, match="no way to go a share of"):
        head_patch_grid(model, ids, ids, lambda logits: logits[:, -1, 0])
    with pytest.raises(InputError, match="part"):
        head_patch_grid(model, ids, ids, lambda logits: logits[:, -1, 0], part="weights")


def test_folding_leaves_the_model_alone_and_is_right():
    model = tiny(norm="layernorm", bias=True)
    block, x = model.blocks[0], torch.randn(6, 32)
    with torch.no_grad():
        block.attention_norm.weight.normal_()
        before = {name: p.clone() for name, p in model.named_parameters()}
        scale = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        folded = x / scale @ fold(block.attention.k_proj.weight, block.attention_norm).T
        wanted = (block.attention_norm(x) - block.attention_norm.bias) @ block.attention.k_proj.weight.T
    assert largest_difference(folded, wanted) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_composition_is_one_over_root_d_by_chance_and_larger_for_a_made_pair():
    model = tiny(d_model=64, head_dim=8, n_layers=2)
    first, second = model.blocks
    chance = composition(first, second)
    assert chance.shape == (4, 4) and (chance - 64**-0.5).abs().max() < 0.05
    with torch.no_grad():  # later head 2 reads its keys from what earlier head 1 writes
        written = first.attention.o_proj.weight[:, 8:16]
        second.attention.k_proj.weight[16:24] = written.T
    made = composition(first, second)
    assert made.argmax() == 2 * 4 + 1 and made[2, 1] > 0.3
    assert largest_difference(composition(first, second, "q"), composition(first, second, "q")) == 0
    with pytest.raises(InputError, match="norm_placement"):
        composition(*tiny(norm_placement="post").blocks[:2])
    with pytest.raises(InputError, match="qk_norm_whole"):
        composition(*tiny(qk_norm_whole=True, qk_norm=True).blocks[:2])
    with pytest.raises(InputError, match="part"):
        composition(first, second, "o")


def test_copying_of_a_head_that_copies_and_of_one_that_does_not():
    model = tiny(d_model=64, head_dim=64, n_heads=1, n_layers=1)
    attention = model.blocks[0].attention
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        attention.v_proj.weight.copy_(torch.eye(64))
        attention.o_proj.weight.copy_(torch.eye(64))
        assert copying(model, (0, 0), tokens) == 1
        attention.o_proj.weight.copy_(-torch.eye(64))
        assert copying(model, (0, 0), tokens) == 0
    with pytest.raises(InputError, match="no head 1 in layer 0"):
        copying(model, (0, 1), tokens)


def test_matched_heads_are_idle_near_in_size_and_different():
    layers, heads = 6, 4
    sizes = torch.arange(1.0, 25).view(layers, heads)
    previous, induction = torch.zeros(layers, heads), torch.zeros(layers, heads)
    previous[2, 1], induction[3, 2] = 0.9, 0.9
    scores = circuits.HeadScores(previous, induction, sizes)
    assert matched_heads(scores, [(2, 1)]) in ([(2, 2)], [(2, 0)])
    chosen = matched_heads(scores, [(2, 1), (3, 2), (2, 3)], among=4, generator=torch.Generator().manual_seed(0))
    assert len(set(chosen)) == 3 and not {(2, 1), (3, 2), (2, 3)} & set(chosen)
    draws = {matched_heads(scores, [(2, 1)], among=5, generator=torch.Generator().manual_seed(s))[0]
             for s in range(20)}
    assert len(draws) == 5
    assert all(abs(layer - 2) <= 1 for s in range(5) for layer, _ in matched_heads(
        scores, [(2, 1)], reach=1, among=12, generator=torch.Generator().manual_seed(s)))
    busy = circuits.HeadScores(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(InputError, match="no idle head"):
        matched_heads(busy, [(0, 0)], reach=1)


def test_the_experiment_removes_what_it_says():
    model = tiny()
    table = remove_one_head(model, length=8, draws=2, controls=1, seed=3)
    assert isinstance(table, Removals) and len(table.losses) == 2 and len(table.rows) == 4
    texts, generator = [], torch.Generator().manual_seed(3)
    for _ in range(2):
        texts.append(copied_ids(4, 8, 40, generator))
    row = table.rows[0]
    for ids, loss, rise in zip(texts, table.losses, row.rises):
        assert copy_loss(model, ids) == pytest.approx(loss)
        with without(model, row.heads):
            assert copy_loss(model, ids) - loss == pytest.approx(rise, abs=1e-6)
    text = str(table)
    assert "previous token" in text and f"{row.heads[0][0]}.{row.heads[0][1]}" in text
    assert f"{row.rises[1]:+.2f}" in text


def test_stored_runs_are_those_of_the_page():
    stored = json.loads((ROOT / "data" / "circuits.json").read_text(encoding="utf-8"))
    assert set(stored["growth"]) == {"2"} and set(stored["one_layer"]) == set(stored["addition"]) == {"1", "2"}
    for run in stored["growth"].values():
        assert [row[0] for row in run] == list(range(0, 251, 10)) and run[-1][3] > 0.8 and run[-1][1] < 0.3
    for run in stored["one_layer"].values():
        assert run[-1][3] < 0.2 and run[-1][1] > 2.5
    for run in stored["addition"].values():
        assert len(run["gathered"]) == 4 and len(run["right"]) == 3


def test_the_script_takes_its_functions_from_the_lesson():
    sys.path.insert(0, str(ROOT / "book"))
    try:
        import circuits_runs
    finally:
        sys.path.remove(str(ROOT / "book"))
    names = circuits_runs.definitions()
    assert {"grow", "summary", "learn_to_add", "patch_grid", "carry_pairs"} <= names.keys()
    names["test"] = names["repeated"](4, 32, torch.Generator().manual_seed(1000))
    model, looks = names["grow"](2, 0, steps=10)
    assert sum(p.numel() for p in model.parameters()) == 41_152 and [step for step, _, _ in looks] == [0, 10]
    found = head_scores(model, names["test"])  # the library takes the lesson's model as it is
    assert found.previous.shape == (2, 4)
