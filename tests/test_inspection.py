"""Recording and changing: against a forward pass written out, and TransformerLens; on fast paths; pages; refusals."""
import base64
import importlib.util
import io
import json
import re

import pytest
import torch
from torch import nn

from browser import browser, skip_reason, watch
from transformer_llm.cli import main
from transformer_llm.decoding import Decoder, PackedGPT
from transformer_llm.feedforward import silu
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.inspection import (
    PLACES,
    activation_names,
    attribute,
    change,
    check_open,
    head_writes,
    inspection_page,
    lens,
    patch_estimate,
    patch_grid,
    path_patch,
    record,
    substitute,
)
from transformer_llm.lora import add_lora
from transformer_llm.performance import FastTrainer, checkpoint_activations
from transformer_llm.sprint import FIXED, SprintGPT
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer
from transformer_llm.training import TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

SHAPE = dict(vocab_size=50, context_length=16, d_model=32, n_layers=3, n_heads=4)
GPT2 = dict(norm="layernorm", position="learned", activation="gelu_tanh", bias=True)
KINDS = {
    "Llama": dict(n_kv_heads=2),
    "GPT-2": GPT2,
    "post-norm": dict(norm_placement="post", position="sinusoidal", tied_embeddings=False),
    "OLMo 2": dict(norm_placement="output", qk_norm=True, qk_norm_whole=True),
    "ALiBi, a window": dict(position="alibi", window=3, qk_norm=True, output_bias=True),
    "untied, interleaved": dict(tied_embeddings=False, rope_interleaved=True, activation="relu2"),
}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def toy(kind: str = "Llama", seed: int = 0, **changes) -> GPT:
    "A small model with weights large enough for every part to matter, in evaluation mode."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(SHAPE | KINDS[kind] | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def untouched(model: nn.Module) -> bool:
    "Whether nothing hangs on any module."
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    own = any(name in vars(m) for m in model.modules() for name in ("attend", "add_feedforward"))
    return not hooks and not own and not any(PLACES.get(m) for m in model.modules())


@torch.no_grad()
def written_out(model: GPT, ids: torch.Tensor, at: str = "", function=None) -> dict[str, torch.Tensor]:
    "Llama's forward pass in plain products, from the weights alone, with one value changed on the way."
    c, found = model.config, {}

    def passes(name, value):
        found[name] = function(value) if name == at else value
        return found[name]

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    x = passes("token_embedding", model.token_embedding.weight[ids])
    rotate = model.rotary.at(torch.arange(ids.shape[1]))
    shut = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for n, block in enumerate(model.blocks):
        name, attention, network = f"blocks.{n}", block.attention, block.feedforward
        x = passes(f"{name}.before", x)
        seen = passes(f"{name}.attention_norm", norm(x, block.attention_norm.weight))
        q, k, v = (passes(f"{name}.attention.{part}", seen @ getattr(attention, part).weight.T)
                   for part in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (heads.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for heads in (q, k, v))
        q, k = rotate(q, k)
        q, k, v = (passes(f"{name}.attention.{kind}", value) for kind, value in zip("qkv", (q, k, v)))
        shared = c.n_heads // c.n_kv_heads
        scores = q @ k.repeat_interleave(shared, 1).transpose(-2, -1) / c.head_dim**0.5
        scores = passes(f"{name}.attention.scores", scores)
        weights = passes(f"{name}.attention.weights", scores.masked_fill(shut, -torch.inf).softmax(-1))
        heads = passes(f"{name}.attention.heads", weights @ v.repeat_interleave(shared, 1))
        a = passes(f"{name}.attention.o_proj", heads.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T)
        x = passes(f"{name}.between", x + passes(f"{name}.attention", a))
        seen = passes(f"{name}.feedforward_norm", norm(x, block.feedforward_norm.weight))
        gate = passes(f"{name}.feedforward.gate", seen @ network.gate.weight.T)
        up = passes(f"{name}.feedforward.up", seen @ network.up.weight.T)
        hidden = passes(f"{name}.feedforward.hidden", silu(gate) * up)
        f = passes(f"{name}.feedforward.down", hidden @ network.down.weight.T)
        x = passes(f"{name}.after", x + passes(f"{name}.feedforward", f))
    passes("logits", passes("final_norm", norm(x, model.final_norm.weight)) @ model.token_embedding.weight.T)
    return found


# --- record and change against the forward pass written out --------------------------------------------------------


def test_every_recorded_value_is_that_of_the_forward_pass_written_out():
    model = toy()
    wanted = written_out(model, IDS)
    with record(model, "*") as seen:
        model(IDS)
    assert list(seen) == activation_names(model) and set(seen) == set(wanted)
    for name, value in seen.items():
        assert largest_difference(value, wanted[name]) < 2e-5, name
    assert untouched(model)


@pytest.mark.parametrize("name", activation_names(toy()))
def test_every_change_is_that_of_the_forward_pass_written_out(name):
    model = toy()
    function = lambda x: x.flip(-1) * 0.7 + 0.1
    with change(model, name, function):
        changed = model(IDS)
    assert largest_difference(changed, written_out(model, IDS, name, function)["logits"]) < 5e-5
    assert not torch.equal(changed, model(IDS)) and untouched(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_changes_nothing_and_recording_only_takes_the_plain_path_where_it_must(kind):
    model = toy(kind)
    plain, names = model(IDS), activation_names(model)
    fused = [name for name in names if not name.endswith(("scores", "weights"))]
    with change(model, fused, lambda x: x), record(model, *fused):
        assert torch.equal(model(IDS), plain)
    with change(model, fused, lambda x: x + 1, positions=[], units=[]):
        assert torch.equal(model(IDS), plain)
    with record(model, "*") as seen:
        assert largest_difference(model(IDS), plain) < 1e-5
    assert list(seen) == names
    weights = seen.stack("blocks.*.attention.weights")
    assert largest_difference(weights, torch.stack(model.attention_maps(IDS))) < 1e-5
    assert torch.equal(model(IDS), plain) and untouched(model)


def test_a_padded_text_records_and_changes_its_real_tokens():
    model, mask = toy(), torch.ones(2, 9).bool()
    mask[0, :3] = False
    with record(model, "blocks.*.attention.weights") as seen:
        logits = model(IDS, attention_mask=mask)
    assert largest_difference(logits[:, 3:], model(IDS, attention_mask=mask)[:, 3:]) < 1e-5
    weights = seen["blocks.1.attention.weights"]
    assert weights[0, :, :, :3].abs().max() == 0 and weights[1, :, 1:, 0].min() > 0


def test_scores_can_be_changed_without_seeing_the_future():
    model = toy()
    with change(model, "blocks.*.attention.scores", lambda x: 0 * x), record(model, "*.weights") as seen:
        model(IDS)
    even = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    assert largest_difference(seen["blocks.2.attention.weights"], even.expand(2, 4, 9, 9)) < 1e-6


def test_selections_leave_the_rest_to_the_bit():
    model = toy()
    with record(model, "blocks.1.*") as before:
        model(IDS)
    options = dict(positions=slice(-2, None), heads=[0, -1], units=3)
    with change(model, "blocks.1.attention.heads", 5.0, **options), record(model, "blocks.1.*") as after:
        model(IDS)
    old, new = (seen["blocks.1.attention.heads"] for seen in (before, after))
    chosen = torch.zeros(old.shape, dtype=torch.bool)
    for head in (0, 3):
        chosen[:, head, -2:, 3] = True
    assert torch.equal(new[chosen], torch.full_like(new[chosen], 5.0)) and torch.equal(new[~chosen], old[~chosen])
    two = torch.tensor(2.0)
    with change(model, "blocks.1.feedforward.hidden", two, positions=0), record(model, "*.hidden") as seen:
        model(IDS)
    assert (seen["blocks.1.feedforward.hidden"][:, 0] == 2).all()


def test_a_recording_sees_what_the_model_went_on_with_whichever_came_first():
    model = toy()
    with record(model, "blocks.0.after") as outer:
        with change(model, "blocks.0.after", lambda x: x + 1):
            with record(model, "blocks.0.after", "blocks.1.before") as inner:
                model(IDS)
    assert torch.equal(outer["blocks.0.after"], inner["blocks.0.after"])
    assert torch.equal(outer["blocks.0.after"], inner["blocks.1.before"])
    with change(model, "blocks.0.after", lambda x: x + 1), change(model, "blocks.0.after", lambda x: 2 * x):
        twice = model(IDS)
    with change(model, "blocks.0.after", lambda x: 2 * (x + 1)):
        assert torch.equal(twice, model(IDS))
    assert untouched(model)


def test_a_recording_is_a_copy_and_a_function_gets_one():
    model = toy()
    plain = model(IDS)

    def spoils(x):
        x.zero_()
        return x

    with record(model, "blocks.0.after", "blocks.1.before") as seen:
        model(IDS)
        kept = seen["blocks.0.after"].clone()
        with change(model, "blocks.1.before", spoils, positions=0):
            model(IDS)
        assert torch.equal(seen["blocks.0.after"], kept) and (seen["blocks.1.before"][:, 0] == 0).all()
    seen["blocks.0.after"].zero_()
    assert torch.equal(model(IDS), plain)


def test_gradients_flow_through_a_recorded_graph():
    model = toy()
    with record(model, "blocks.1.before", graph=True) as seen:
        loss = model(IDS).square().sum()
    slope, = torch.autograd.grad(loss, [seen["blocks.1.before"]])
    step = 1e-2 * torch.randn(slope.shape, generator=torch.Generator().manual_seed(0))
    wide = model.double()
    with change(wide, "blocks.1.before", lambda x: x + step.double()):
        up = wide(IDS).square().sum()
    with change(wide, "blocks.1.before", lambda x: x - step.double()):
        down = wide(IDS).square().sum()
    assert (up - down).item() / 2 == pytest.approx((slope.double() * step).sum().item(), rel=1e-3)
    with record(model, "blocks.1.before") as seen:
        model(IDS)
    assert not seen["blocks.1.before"].requires_grad


@pytest.mark.parametrize("fails", ["in the model", "in the block", "in a change"])
def test_nothing_is_left_after_an_error(fails):
    model = toy()
    plain = model(IDS)
    with pytest.raises((ZeroDivisionError, InputError)):
        with record(model, "*"), change(model, "*", lambda x: 1 / 0 if fails == "in a change" else x):
            model(torch.zeros(1, 99, dtype=torch.long) if fails == "in the model" else IDS)
            raise ZeroDivisionError
    assert untouched(model) and torch.equal(model(IDS), plain)


def test_generating_goes_through_the_places_with_a_cache():
    model = toy()
    with change(model, "blocks.*.attention", 0.0), record(model, "blocks.0.attention.k") as seen:
        changed = generate(model, IDS, 4, temperature=0)
    assert seen["blocks.0.attention.k"].shape[2] == 12  # all keys, also the cached ones
    for block in model.blocks:
        block.attention.o_proj.weight.data.zero_()
    assert torch.equal(changed, generate(model, IDS, 4, temperature=0))


def test_models_with_adapters_and_of_chapter_12_are_open():
    model = toy()
    add_lora(model, 2, targets="*.q_proj", generator=1)
    with record(model, "blocks.0.attention.q_proj*") as seen:
        model(IDS)
    assert "blocks.0.attention.q_proj" in seen and seen["blocks.0.attention.q_proj"].shape == (2, 9, 32)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=2, **FIXED)
    sprint = SprintGPT(config, [(2, 64)]).eval()
    ids = IDS % config.vocab_size
    plain = sprint(ids)
    with record(sprint, "*.after") as seen:
        assert largest_difference(sprint(ids), plain) < 1e-5
    assert len(seen) == 2 and largest_difference(sprint(ids), plain) == 0


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [record, change])
def test_models_that_run_past_hooks_are_refused_by_name(what):
    model = toy()

    def refused(one, says):
        with pytest.raises(InputError, match=says), what(one, "*", *([0.0] if what is change else [])):
            pass

    refused(Decoder(model), f"{what.__name__} can't look into a Decoder")
    refused(PackedGPT(model), "a PackedGPT")
    with pytest.raises(InputError, match="a str"):
        check_open("smollm2", what.__name__)
    refused(torch.compile(model), "compiled model")
    compiled = toy()
    compiled.blocks[1].compile()
    refused(compiled, "compiled model")
    refused(checkpoint_activations(toy()), "blocks.0 while gradients are on")
    with torch.no_grad(), record(checkpoint_activations(toy()), "*.after"):
        pass


def test_fast_paths_refuse_a_recorded_model_and_a_decoder_made_before_is_noticed():
    model, early = toy(), None
    early = Decoder(model)
    data = torch.randint(50, (400,)), None
    settings = TrainingConfig(max_steps=2, batch_size=2, device="cpu", eval_every=0, checkpoint_every=0)
    for name in ("blocks.1.after", "blocks.1.between", "blocks.1.attention.weights"):
        with record(model, name) as seen:
            for fast in (Decoder, PackedGPT, lambda model: FastTrainer(model, data, settings, progress=False)):
                with pytest.raises(InputError, match="hook|of its own"):
                    fast(model)
            early(IDS)
            with pytest.raises(InputError, match="was not computed"):
                seen[name]
    with pytest.raises(InputError, match="was never made.*Decoder"):
        with change(model, "blocks.1.after", 0.0):
            early(IDS)
    Decoder(model)  # all is well again


@pytest.mark.parametrize("options, says", [
    (dict(name="blocks.*.atention"), r"'blocks\.\*\.atention'; the nearest is 'blocks\.\d\.attention'"),
    (dict(name=[]), "at least one name"),
    (dict(name="blocks.0.after", heads=0), "has no heads"),
    (dict(name="blocks.0.attention.k", heads=2), "2 heads, so heads=2"),
    (dict(name="blocks.0.after", positions=9), "9 positions, so positions=9"),
    (dict(name="blocks.0.feedforward.hidden", units=[10**6]), "units"),
    (dict(name="blocks.0.after", function=torch.zeros(3)), r"\(3,\), which doesn't fit \(2, 9, 32\)"),
    (dict(name="blocks.0.after", function=torch.zeros(5, 2, 9, 32)), "doesn't fit"),
    (dict(name="blocks.0.after", function=lambda x: None), "NoneType"),
    (dict(name="logits", function=lambda x: "a"), "not str"),
])
def test_a_change_that_cannot_be_made_is_one_sentence(options, says):
    model = toy()
    with pytest.raises(InputError, match=says) as error:
        with change(model, options.pop("name"), options.pop("function", 0.0), **options):
            model(IDS)
    assert str(error.value).endswith(".") and untouched(model)


def test_logits_with_a_loss_and_foreign_attention_are_refused():
    model = toy()
    with record(model, "logits") as seen:
        logits, _ = model(IDS, IDS)
    assert torch.equal(seen["logits"], logits)
    with pytest.raises(InputError, match="without targets"), change(model, "logits", 0.0):
        model(IDS, IDS)
    model.blocks[0].attention.attend = lambda q, k, v, mask, causal: q
    with pytest.raises(InputError, match="attend of its own"), record(model, "blocks.0.attention.heads"):
        pass
    del model.blocks[0].attention.attend
    model.blocks[1].add_feedforward = lambda x: x
    with pytest.raises(InputError, match="add_feedforward of its own"), record(model, "*"):
        pass
    del model.blocks[1].add_feedforward
    assert untouched(model)


def test_reading_what_was_not_recorded():
    model = toy()
    with record(model, "blocks.*.after") as seen:
        assert "nothing" in repr(seen) and len(seen) == 0
        model.hidden_states(IDS)
    assert len(seen) == 3 and "blocks.0.after" in repr(seen) and "logits" not in seen
    with pytest.raises(InputError, match="isn't recorded"):
        seen["logits"]
    with pytest.raises(InputError, match="isn't recorded"):
        seen.stack("*.between")


# --- lens, attribution, patching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "post-norm"])
def test_contributions_sum_to_the_logit(kind):
    model = toy(kind)
    for against in (None, torch.tensor([4, 9])):
        for heads in {False, kind != "OLMo 2"}:
            found = attribute(model, IDS, torch.tensor([3, 7]), against=against, heads=heads, position=5)
            wanted = model(IDS)[:, 5].gather(-1, torch.tensor([[3], [7]]))[:, 0]
            wanted = wanted - model(IDS)[:, 5].gather(-1, against[:, None])[:, 0] if against is not None else wanted
            assert largest_difference(found.total, wanted) < 1e-5
            assert found.error < 1e-4 and len(found.largest(3)) == 3


def test_a_stream_that_is_no_sum_is_refused():
    with pytest.raises(InputError, match="'post'"):
        attribute(toy("post-norm"), IDS, torch.tensor([3, 7]))
    with pytest.raises(InputError, match="by head"):
        attribute(toy("OLMo 2"), IDS, torch.tensor([3, 7]), heads=True)
    with pytest.raises(InputError, match="evaluation mode"):
        attribute(toy(dropout=0.1).train(), IDS, torch.tensor([3, 7]))


def test_the_lens_ends_with_what_the_model_says():
    for kind in KINDS:
        model = toy(kind)
        assert lens(model, IDS).shape == (4, 2, 50)
        assert largest_difference(lens(model, IDS, 4)[-1], model(IDS)[:, 4]) < 1e-5


def score(logits):
    return logits[:, 3] - logits[:, 7]


def test_patching_everything_gives_the_source_and_the_grid_agrees_with_one_change():
    model, source, target = toy(), IDS[:1], IDS[1:]
    names, effects = patch_grid(model, source, target, score, "blocks.*.before", "blocks.2.attention.heads")
    assert names == ["blocks.0.before", "blocks.1.before", "blocks.2.before", "blocks.2.attention.heads"]
    with record(model, "blocks.1.before") as seen:
        model(source)
    with change(model, "blocks.1.before", seen):
        assert largest_difference(model(target), model(source)) < 1e-5
    with change(model, "blocks.1.before", seen, positions=4):
        alone = score(model(target)[:, -1])
    low, high = score(model(target)[:, -1]), score(model(source)[:, -1])
    row = names.index("blocks.1.before")
    assert largest_difference(effects[row, 4], (alone - low) / (high - low)) < 1e-5
    rows, by_head = patch_grid(model, source, target, score, "blocks.1.attention.heads", positions=[8], heads=True)
    assert rows == [f"blocks.1.attention.heads {head}" for head in range(4)] and by_head.shape == (4, 1, 1)


def test_the_estimate_is_the_slope_of_the_real_effect():
    model, source, target = toy().double(), IDS[:1], IDS[1:]
    low, high = score(model(target)[:, -1]), score(model(source)[:, -1])
    with record(model, "blocks.1.before") as there:
        model(source)
    with record(model, "blocks.1.before") as here:
        model(target)
    part = 1e-4
    little = here["blocks.1.before"] + part * (there["blocks.1.before"] - here["blocks.1.before"])
    guess = patch_estimate(model, source, target, score, "blocks.1.before", "blocks.1.attention.weights")
    for position in (2, 8):
        with change(model, "blocks.1.before", little, positions=position):
            real = (score(model(target)[:, -1]) - low) / (high - low) / part
        assert largest_difference(guess["blocks.1.before"][:, position], real) < 1e-2 * real.abs().max().clamp(min=0.1)
    assert guess["blocks.1.attention.weights"].shape == (1, 4, 9)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_a_path_is_what_changing_one_reader_by_hand_gives(kind):
    model, source, target = toy(kind), IDS[:1], IDS[1:]
    low, high = score(model(target)[:, -1]), score(model(source)[:, -1])
    wrote = []
    for ids in (source, target):
        with record(model, "blocks.0.attention.heads") as seen:
            model(ids)
        wrote.append(head_writes(model.blocks[0].attention, seen["blocks.0.attention.heads"])[0][2])
    delta = wrote[0] - wrote[1]
    with change(model, "blocks.2.after", lambda x: x + delta):
        direct = (score(model(target)[:, -1]) - low) / (high - low)
    assert largest_difference(path_patch(model, source, target, score, 0, 2), direct) < 1e-5
    block = model.blocks[1]
    with record(model, "blocks.1.between") as seen:
        model(target)
    x = seen["blocks.1.between"]
    given = block.feedforward(block.feedforward_norm(x + delta)) - block.feedforward(block.feedforward_norm(x))
    with change(model, "blocks.2.after", lambda x: x + given):
        through = (score(model(target)[:, -1]) - low) / (high - low)
    assert largest_difference(path_patch(model, source, target, score, 0, 2, "blocks.1.feedforward"), through) < 1e-5


def test_patching_refuses_what_has_no_meaning():
    model = toy()
    for function, says in (
        (lambda: patch_grid(model, IDS, IDS[:, :4], score, "*.before"), "same length"),
        (lambda: patch_grid(model, IDS, IDS, score, "*.before"), "is the same"),
        (lambda: path_patch(model, IDS[:1], IDS[1:], score, 1, 0, "blocks.0.feedforward"), "doesn't read"),
        (lambda: path_patch(model, IDS[:1], IDS[1:], score, 3, 0), "layer"),
        (lambda: path_patch(model, IDS[:1], IDS[1:], score, 0, 4), "head"),
        (lambda: path_patch(toy("OLMo 2"), IDS[:1], IDS[1:], score, 0, 0), "norm_placement='pre'"),
        (lambda: substitute({"a": IDS}, "median"), "median"),
        (lambda: substitute({"a": IDS[:1]}, "other"), "two texts"),
    ):
        with pytest.raises(InputError, match=says):
            function()


# --- TransformerLens -----------------------------------------------------------------------------------------------

THEIRS = {  # our name: theirs, and how their axes become ours
    "before": "hook_resid_pre", "between": "hook_resid_mid", "after": "hook_resid_post",
    "attention": "hook_attn_out", "feedforward": "hook_mlp_out",
    "attention.q": "attn.hook_q", "attention.k": "attn.hook_k", "attention.v": "attn.hook_v",
    "attention.heads": "attn.hook_z", "attention.weights": "attn.hook_pattern",
    "attention.scores": "attn.hook_attn_scores",
    "feedforward.up": "mlp.hook_pre", "feedforward.hidden": "mlp.hook_post",
}
SPREAD = ("attention.q", "attention.k", "attention.v", "attention.heads")  # theirs: batch, seq, heads, head_dim


def their_model(ours: GPT, directory):
    "The same weights in TransformerLens, nothing folded."
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    ours.save_pretrained(directory)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()
    return TransformerBridge.boot_transformers(str(directory), hf_model=loaded).eval()


@pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None,
                    reason="transformer_lens is not installed (optional: pip install transformer-lens)")
@torch.no_grad()
def test_values_and_changes_are_those_of_transformer_lens(tmp_path):
    ours = toy("GPT-2")
    theirs = their_model(ours, tmp_path / "gpt2")
    with record(ours, "*") as seen:
        logits = ours(IDS)
    said, cache = theirs.run_with_cache(IDS)
    assert largest_difference(logits, said) < 1e-5
    for n in range(3):
        for name, other in THEIRS.items():
            mine, their = seen[f"blocks.{n}.{name}"], cache[f"blocks.{n}.{other}"]
            if name in SPREAD:
                their = their.transpose(1, 2)
            if name == "attention.scores":  # theirs are masked
                mine, their = mine.tril(), their.tril()
            assert largest_difference(mine, their) < 1e-5, (n, name)
    for name, hook in (("blocks.1.attention.heads", "blocks.1.attn.hook_z"), ("blocks.0.after",
                       "blocks.0.hook_resid_post"), ("blocks.2.attention.weights", "blocks.2.attn.hook_pattern")):
        with change(ours, name, lambda x: 0.5 * x + 0.1):
            mine = ours(IDS)
        their = theirs.run_with_hooks(IDS, fwd_hooks=[(hook, lambda x, hook: 0.5 * x + 0.1)])
        assert largest_difference(mine, their) < 1e-5, name
        assert largest_difference(mine, logits) > 1e-3, name


# --- the page ------------------------------------------------------------------------------------------------------

LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz <>&\"'/()=;\n")


def lettered(kind: str = "Llama", **changes) -> GPT:
    return toy(kind, vocab_size=LETTERS.vocab_size, **changes)


def picture_of(page: str) -> torch.Tensor:
    from matplotlib.image import imread

    return torch.tensor(imread(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', page)[1])), format="png"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_holds_the_maps_that_the_model_used(kind):
    model = lettered(kind)
    ids = LETTERS.encode("a cat sat")
    page = inspection_page(model, LETTERS, "a cat sat", name="a toy")
    drawn = (1 - picture_of(page).unflatten(0, (4, 9)).unflatten(2, (3, 9)).permute(2, 0, 1, 3)) ** 2
    used = torch.stack(model.attention_maps(torch.tensor([ids])))[:, 0]
    assert largest_difference(drawn, used) < 1 / 255
    shares = model(torch.tensor([ids]))[0, -1].softmax(-1).topk(10).values
    assert all(f"{share:.1%}" in page for share in shares.tolist())
    assert page.count("<tr>") == 10 + 1 + 1 + 4 and untouched(model)


def test_a_hostile_prompt_stays_text_and_nothing_is_fetched():
    text = "</script><b>a & 'b'\" (x);\n</b>"
    page = inspection_page(lettered(context_length=64), LETTERS, text, name="<i>&")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>" not in page and "<i>" not in page and "&lt;i&gt;&amp;" in page
    without = re.sub(r"base64,[^\"]+", "", page)  # in which any letters may follow one another
    assert not re.search(r"""(src|href)=["'](?!data:image/png)|https?:|//[a-z]|@import|url\(""", without)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert re.search(r'<img [^>]*alt="Attention maps of 3 layers of 4 heads', page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["tokens"][0] == "<" and len(data["tokens"]) == len(text) and "↵" in data["tokens"]


def test_prompts_that_cannot_be_shown():
    model = lettered(context_length=16)
    for prompt, says in (("", "empty"), ("a" * 17, "17 tokens, but the model reads at most 16")):
        with pytest.raises(InputError, match=says):
            inspection_page(model, LETTERS, prompt)
    with pytest.raises(InputError, match="at most 256"):
        inspection_page(lettered(context_length=400), LETTERS, "a" * 300)
    with pytest.raises(InputError, match="no tokenizer"):
        inspection_page(model, None, "a")


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A run of this book, and a tiny GPT-2 as Hugging Face keeps it."
    from transformer_llm.training import Trainer

    home = tmp_path_factory.mktemp("models")
    data = torch.tensor(LETTERS.encode("the cat sat on a mat " * 40)), None
    settings = TrainingConfig(max_steps=2, batch_size=2, device="cpu", eval_every=0, checkpoint_every=2)
    Trainer(lettered(context_length=16), data, settings, run_directory=home / "run", tokenizer=LETTERS,
            progress=False).train()
    pieces = BPETokenizer.train("the cat sat on a mat " * 40, vocab_size=270)
    toy("GPT-2", vocab_size=pieces.vocab_size).save_pretrained(home / "gpt2", pieces)
    return {"run": home / "run", "gpt2": home / "gpt2"}


def test_inspect_writes_a_page_and_refuses_in_one_sentence(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        code = main(["inspect", *map(str, words)])
        return code, *capsys.readouterr()

    run = folders["run"]
    code, out, err = call("--checkpoint", run, "--prompt", "a cat")
    assert code == 0 and out.startswith("inspection.html: ") and (tmp_path / "inspection.html").exists(), err
    code, out, err = call("--checkpoint", folders["gpt2"], "--prompt", "the cat <sat>", "--output", "deep/page.html")
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert code == 0 and "3 layers of 4 heads" in page and "&lt;sat&gt;" in page, err
    code, out, err = call("--checkpoint", run, "--prompt", "a cat", "--names", "*.attention.weights")
    assert code == 0 and "blocks.2.attention.weights" in out and "1 × 4 × 5 × 5" in out, err
    before = (tmp_path / "inspection.html").read_bytes()
    for words, says in (
        (["--checkpoint", run, "--prompt", "a cat"], "already exists; use --overwrite"),
        (["--checkpoint", run, "--prompt", ""], "--prompt is empty"),
        (["--checkpoint", run, "--prompt", "a" * 17, "--out", "b.html"], "17 tokens"),
        (["--checkpoint", tmp_path / "nowhere", "--prompt", "a", "--out", "b.html"], "nowhere"),
        (["--checkpoint", run, "--prompt", "a", "--names", "*.atention"], "No activation"),
        (["--checkpoint", run, "--prompt", "a", "--out", tmp_path, "--overwrite"], "is a folder"),
        (["--prompt", "a"], "--checkpoint"),
    ):
        code, _, err = call(*words)
        assert code == 2 and says in err and err.count("\n") == 1 and err.endswith(".\n"), (words, err)
    assert (tmp_path / "inspection.html").read_bytes() == before and not (tmp_path / "b.html").exists()
    code, _, _ = call("--checkpoint", run, "--prompt", "the cat", "--overwrite")
    assert code == 0 and (tmp_path / "inspection.html").read_bytes() != before


@pytest.mark.browser
@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
def test_the_page_works_from_the_disk_in_a_browser(tmp_path):
    text = "a cat <b> & sat"
    ids = LETTERS.encode(text)
    model = lettered()
    used = torch.stack(model.attention_maps(torch.tensor([ids])))[:, 0]
    (tmp_path / "page.html").write_text(inspection_page(model, LETTERS, text, "a toy"), encoding="utf-8")
    with browser() as chromium:
        for scheme in ("light", "dark"):
            page = chromium.new_page(color_scheme=scheme)
            notes = watch(page)
            page.goto((tmp_path / "page.html").as_uri())
            page.wait_for_selector("#enlarged:not([hidden])")
            page.select_option("#layer", "2")
            page.select_option("#head", "1")
            rows = page.locator("#most tr").all_inner_texts()
            assert len(rows) == len(ids)
            box = page.locator("#maps").bounding_box()
            page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.3)  # the third of three layers
            assert [page.input_value(name) for name in ("#layer", "#head")] == ["2", "1"]
            for row, weights in zip(rows, used[2, 1]):
                assert float(row.split()[-1]) == pytest.approx(weights.max().item(), abs=0.011), row
            address = (tmp_path / "page.html").as_uri()  # all that it asked for is itself
            assert not notes.errors and not notes.failed and notes.outside == [f"GET {address}"], notes
            colours = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert colours == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")
            page.close()
        still = chromium.new_page(java_script_enabled=False)
        still.goto((tmp_path / "page.html").as_uri())
        assert still.locator("#maps").is_visible() and not still.locator("#enlarged").is_visible()
