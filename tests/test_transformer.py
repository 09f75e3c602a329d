"""The parts of the model: seams that a subclass overrides, and the check that a model is still the book's own."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from transformer_llm.attention import MultiHeadAttention, attention_weights, expand_kv
from transformer_llm.decoding import Decoder
from transformer_llm.embeddings import Rotary
from transformer_llm.feedforward import ACTIVATIONS, GATED, SwiGLU, is_gated, make_feedforward, n_matrices
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.performance import FastTrainer, WorkingCopy, checkpoint_activations, measure_peak_memory
from transformer_llm.sprint import SprintGPT
from transformer_llm.training import Trainer, TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig, check_plain

SIZES = dict(vocab_size=31, context_length=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)
KINDS = {
    "llama": {},
    "gpt2": dict(norm="layernorm", bias=True, activation="gelu_tanh", position="learned", output_bias=True),
    "post": dict(norm_placement="post", position="sinusoidal"),
    "output": dict(norm_placement="output", qk_norm=True, qk_norm_whole=True, tied_embeddings=False),
    "alibi": dict(position="alibi", activation="relu2", window=5),
    "scaled": dict(rope_scaling=dict(kind="linear", factor=2.0), qk_norm=True),
}


class Lora(nn.Module):
    "A linear layer with a low-rank addition, as adapters do it."

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / 4)
        self.b = nn.Parameter(torch.randn(linear.out_features, rank) / 4)

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def make(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# Seams of attention
# -----------------------------------------------------------------------------------------------------------

class Recorded(MultiHeadAttention):
    "Attention that keeps its weights and computes with them."

    def attend(self, q, k, v, mask, causal):
        self.seen = attention_weights(q, k, mask, causal=causal)
        return self.seen @ expand_kv(v, self.n_heads)


class Packed(MultiHeadAttention):
    "The three projections from one product."

    def qkv(self, x):
        parts = self.q_proj, self.k_proj, self.v_proj
        packed = torch.cat([part.weight for part in parts])
        return (x @ packed.T).split([part.out_features for part in parts], -1)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", [Recorded, Packed])
def test_one_overridden_seam_is_enough_for_another_attention(kind, window):
    torch.manual_seed(0)
    plain = MultiHeadAttention(16, 4, 2, window=window)
    other = copy.deepcopy(plain)
    other.__class__ = kind
    x, rotate = torch.randn(2, 7, 16), Rotary(4).at(torch.arange(7))
    assert largest_difference(plain(x, rotate=rotate), other(x, rotate=rotate)) < 1e-6
    if kind is Recorded:
        assert largest_difference(other.seen, plain.weights(x, rotate=rotate)) < 1e-6


def test_one_place_knows_the_gated_activations():
    for name in ACTIVATIONS:
        gated = isinstance(make_feedforward(4, 8, name, bias=False), SwiGLU)
        assert is_gated(name) == (name in GATED) == gated == (n_matrices(name) == 3)
    with pytest.raises(InputError, match="activation"):
        is_gated("swish")


def test_the_names_of_the_weights_and_their_order_stay():
    "Checkpoints hold the names, and the first weights are drawn in this order."
    attention = [f"attention.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")]
    attention += [f"attention.{part}_norm.weight" for part in "qk"]
    feedforward = [f"feedforward.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")]
    norms = [[f"{part}_norm.{kind}" for kind in ("weight", "bias")] for part in ("attention", "feedforward", "final")]
    block = [f"blocks.0.{name}" for name in norms[0] + attention + norms[1] + feedforward]
    tables = ["output_bias", "token_embedding.weight", "position_embedding.weight"]
    config = GPTConfig.preset("demo", n_layers=1, tied_embeddings=False, qk_norm=True)
    assert list(GPT(config).state_dict()) == [*tables, *block, *norms[2], "lm_head.weight"]


# Is it still the book's model?
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_what_the_configuration_makes_is_plain(kind):
    model = make(**KINDS[kind])
    assert check_plain(model, "A test") is model
    compiled = torch.compile(model)
    assert check_plain(compiled, "A test", gradients=True) is model
    model.blocks[0] = torch.compile(model.blocks[0])
    assert check_plain(model, "A test", gradients=True) is model
    model = checkpoint_activations(make(**KINDS[kind]))
    model.requires_grad_(False).train()
    assert check_plain(model.double(), "A test", gradients=True) is model
    assert check_plain(model.to("meta"), "A test") is model


def replace(model, name, make_new):
    parent, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), last, make_new(old))


def other_class(base):
    return type(f"My{base.__name__}", (base,), {})


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Subclass(torch.Tensor):
    pass


def keep_as(model, make_weight):
    linear = model.blocks[1].attention.v_proj
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = make_weight(weight)


def sub_parameter(weight):
    return nn.Parameter(weight.as_subclass(Subclass))


CHANGES = {
    "an adapter": (lambda m: replace(m, "blocks.1.attention.q_proj", Lora), r"blocks\.1\.attention\.q_proj is a Lora"),
    "a subclass": (
        lambda m: setattr(m.blocks[0].feedforward.down, "__class__", other_class(nn.Linear)),
        r"blocks\.0\.feedforward\.down is a MyLinear, but the configuration calls for a Linear",
    ),
    "another block": (
        lambda m: setattr(m.blocks[0], "__class__", other_class(type(m.blocks[0]))),
        r"blocks\.0 is a MyBlock",
    ),
    "another norm": (lambda m: replace(m, "final_norm", lambda old: nn.RMSNorm(16)), "final_norm is a RMSNorm"),
    "no norm": (lambda m: replace(m, "blocks.1.attention_norm", lambda old: nn.Identity()), "is a Identity"),
    "a hook": (
        lambda m: m.blocks[0].attention.register_forward_hook(lambda module, inputs, output: 2 * output),
        r"blocks\.0\.attention carries a hook",
    ),
    "a pre-hook": (lambda m: m.blocks[1].register_forward_pre_hook(lambda module, x: x), r"blocks\.1 carries a hook"),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m.blocks[0].attention.o_proj, "weight", Doubled()),
        r"blocks\.0\.attention\.o_proj is a ParametrizedLinear",
    ),
    "its own forward": (
        lambda m: setattr(m.blocks[0].feedforward, "forward", lambda x: x),
        r"blocks\.0\.feedforward has a forward of its own",
    ),
    "its own seam": (lambda m: setattr(m.blocks[0].attention, "attend", lambda *a: a[2]), "has a attend of its own"),
    "a buffer": (lambda m: keep_as(m, lambda weight: weight), r"v_proj has no weight"),
    "a subclass of tensor": (lambda m: keep_as(m, sub_parameter), r"v_proj keeps its weight as a Subclass"),
    "another size": (lambda m: keep_as(m, lambda weight: nn.Parameter(weight[:4])), r"v_proj has a weight of shape"),
    "a setting": (lambda m: setattr(m.blocks[1].attention, "window", 3), r"attention has window=3, but"),
    "an activation": (
        lambda m: setattr(m.blocks[1], "feedforward", make_feedforward(16, 48, "relu2", bias=False)),
        r"blocks\.1\.feedforward is a FeedForward, but the configuration calls for a SwiGLU",
    ),
    "fewer blocks": (lambda m: m.blocks.__delitem__(0), "has 1 blocks, but the configuration says n_layers=2"),
    "another head": (lambda m: setattr(m, "lm_head", nn.Linear(16, 31, bias=False)), "lm_head=Linear"),
    "another forward": (
        lambda m: setattr(m, "__class__", type("Mine", (GPT,), {"forward": lambda self, ids: None})),
        "it is a Mine, which has a forward of its own",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_by_name(change):
    model = make()
    make_change, words = CHANGES[change]
    make_change(model)
    with pytest.raises(InputError, match=words):
        check_plain(model, "A test")
    with pytest.raises(InputError, match=words):
        WorkingCopy(model, torch.float32)


GRADIENT_CHANGES = {
    "a backward hook": lambda m: m.blocks[0].register_full_backward_hook(lambda module, inputs, outputs: None),
    "a gradient's hook": lambda m: m.blocks[0].attention.q_proj.weight.register_hook(lambda grad: 0 * grad),
    "a hook after it": lambda m: m.token_embedding.weight.register_post_accumulate_grad_hook(lambda p: None),
    "dropout": lambda m: setattr(m.blocks[0].dropout, "p", 0.5),
}


@pytest.mark.parametrize("change", GRADIENT_CHANGES)
def test_what_matters_only_in_training_is_refused_only_there(change):
    model = make()
    GRADIENT_CHANGES[change](model)
    assert check_plain(model, "A test") is model
    with pytest.raises(InputError, match="A working copy.*(carries a hook|p=0.5)"):
        WorkingCopy(model, torch.float32)


def test_a_sprint_model_is_right_or_refused():
    config = GPTConfig(**SIZES | dict(n_kv_heads=4, activation="relu2", qk_norm=True, rope_interleaved=True))
    model = SprintGPT(config, ((2, 144), (3, 50)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 2 else None
    ids = torch.randint(31, (2, 16))
    assert largest_difference(WorkingCopy(model, torch.float32).logits(ids), model(ids)) < 1e-4
    for use in (lambda: check_plain(model, "A test"), lambda: Decoder(model)):
        with pytest.raises(InputError, match="it is a SprintGPT, which has a _start of its own"):
            use()


def test_a_subclass_that_only_adds_is_plain():
    model = make()
    model.__class__ = type("Mine", (GPT,), {"count": lambda self: 3})
    assert check_plain(model, "A test") is model and model.count() == 3
    with pytest.raises(InputError, match="it is a Linear, not a GPT"):
        check_plain(nn.Linear(2, 2), "A test")


# Fast paths on a changed model
# -----------------------------------------------------------------------------------------------------------

def adapted(**changes) -> GPT:
    "A model with two linear layers replaced by adapters."
    model = make(**changes)
    replace(model, "blocks.0.attention.q_proj", Lora)
    replace(model, "blocks.1.feedforward.up", Lora)
    return model


def merged(model) -> GPT:
    "The plain model that computes the same: the low-rank products added to the weights."
    plain = copy.deepcopy(model)
    for name in ("blocks.0.attention.q_proj", "blocks.1.feedforward.up"):
        adapter = plain.get_submodule(name)
        with torch.no_grad():
            adapter.linear.weight += adapter.b @ adapter.a
        replace(plain, name, lambda old: old.linear)
    return plain


def test_adapters_are_right_or_refused_in_every_path(tmp_path):
    model = adapted()
    plain = merged(model)
    ids = torch.randint(31, (1, 6), generator=torch.Generator().manual_seed(1))
    assert largest_difference(model(ids), plain(ids)) < 1e-5
    assert torch.equal(generate(model, ids, 9, temperature=0), generate(plain, ids, 9, temperature=0))
    for use in (lambda: FastTrainer(model, DATA, STEPS, progress=False), lambda: Decoder(model)):
        with pytest.raises(InputError, match=r"blocks\.0\.attention\.q_proj is a Lora"):
            use()
    trainer = Trainer(model, DATA, STEPS, progress=False)
    twin, batches = copy.deepcopy(model), []
    next_batch = trainer.next_batch
    trainer.next_batch = lambda: batches.append(next_batch()) or batches[-1]
    loss, _ = trainer.train_step()
    inputs, targets = batches[0]
    assert loss == pytest.approx(twin(inputs, targets)[1].item(), abs=1e-5)
    moved = dict(trainer.model.named_parameters())
    assert not torch.equal(moved["blocks.0.attention.q_proj.a"], twin.blocks[0].attention.q_proj.a)


DATA = tuple(torch.randint(31, (n,), generator=torch.Generator().manual_seed(7)) for n in (300, 100))
STEPS = TrainingConfig(max_steps=4, batch_size=2, warmup_steps=1, device="cpu")

LATER = {
    "an adapter": lambda m: replace(m, "blocks.1.attention.k_proj", Lora),
    "a hook": lambda m: m.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output),
    "a gradient's hook": lambda m: m.blocks[0].attention.q_proj.weight.register_hook(lambda grad: 0 * grad),
    "its own forward": lambda m: setattr(m.blocks[0].feedforward, "forward", lambda x: x),
    "a parametrization": CHANGES["a parametrization"][0],
}


@pytest.mark.parametrize("change", LATER)
def test_a_change_after_the_working_copy_was_made_is_noticed_at_the_next_step(change):
    trainer = FastTrainer(make(), DATA, STEPS, progress=False)
    trainer.train_step()
    LATER[change](trainer.model)
    with pytest.raises(InputError, match="A working copy"):
        trainer.train_step()


def test_new_weights_are_packed_again():
    model = make()
    working = WorkingCopy(model, torch.float32)
    ids = torch.randint(31, (1, 6), generator=torch.Generator().manual_seed(1))
    other = {name: torch.randn_like(weight) / 4 for name, weight in model.state_dict().items()}
    for assign in (False, True):
        other = {name: weight / 2 for name, weight in other.items()}
        model.load_state_dict(other, assign=assign)
        working.refresh()
        assert largest_difference(working.logits(ids), model(ids)) < 1e-4
    model.double()
    working.refresh()
    assert largest_difference(working.logits(ids), model(ids)) < 1e-4


def test_a_working_copy_keeps_only_inputs_where_the_model_does():
    model = make(context_length=64)
    ids = torch.randint(31, (4, 64), generator=torch.Generator().manual_seed(1))
    working = WorkingCopy(model, torch.float32)
    working.loss(ids, ids).backward()
    full = measure_peak_memory(lambda: working.loss(ids, ids).backward())
    checkpoint_activations(model)
    working.refresh()
    assert measure_peak_memory(lambda: working.loss(ids, ids).backward()) < full


def test_a_sprint_model_with_a_hook_takes_the_usual_way():
    config = GPTConfig(**SIZES | dict(n_kv_heads=4, activation="relu2", qk_norm=True, rope_interleaved=True))
    torch.manual_seed(0)
    model = SprintGPT(config)
    ids = torch.randint(31, (2, 16))
    before = model(ids)
    model.blocks[0].feedforward.register_forward_hook(lambda module, inputs, output: output + 1)
    hooked = model(ids)
    assert largest_difference(hooked, before) > 0.01
    assert largest_difference(hooked, model(ids, cache=model.new_cache(2))) < 1e-5
    again = copy.deepcopy(model)
    assert largest_difference(hooked, again(ids)) == 0
