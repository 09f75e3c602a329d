"""Fast steps: equal to the plain form in values and gradients, the same work at every step, memory as predicted, runs
that resume.
"""
import copy
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_llm import performance
from transformer_llm.attention import attention_plain, causal_mask
from transformer_llm.embeddings import rotary_angles
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.performance import (
    FastTrainer,
    FusedAdamW,
    WorkingCopy,
    _BatchedAttention,
    _Gate,
    _Heads,
    _MemoryCounter,
    _RMSNorm,
    batched_attention,
    checkpoint_activations,
    chunked_cross_entropy,
    fastest_dtype,
    gradient_norm,
    matmul_peak,
    measure_peak_memory,
    peak_training_memory,
    utilisation,
)
from transformer_llm.sprint import SprintTrainer
from transformer_llm.training import AdamW, Trainer, TrainingConfig, TrainingError, clip_gradients, cross_entropy
from transformer_llm.transformer import GPT, GPTConfig, flops_per_token

BASE = dict(vocab_size=61, context_length=96, d_model=32, n_layers=2, n_heads=4)
KINDS = {
    "llama": {},
    "grouped": dict(n_kv_heads=2),
    "one_kv_head_qk_norm": dict(n_kv_heads=1, qk_norm=True, activation="relu2"),
    "gpt2": dict(norm="layernorm", bias=True, activation="gelu_tanh", position="learned"),
    "alibi": dict(position="alibi", activation="gelu"),
    "sinusoidal_post": dict(position="sinusoidal", norm_placement="post"),
    "output_norm_whole": dict(norm_placement="output", qk_norm=True, qk_norm_whole=True),
    "window": dict(window=20, position="none"),
    "wide_window": dict(window=500),
    "untied": dict(tied_embeddings=False, output_bias=True),
    "interleaved": dict(rope_interleaved=True),
    "wide_heads": dict(head_dim=16, bias=True, n_kv_heads=2),
    "qkv_bias": dict(qkv_bias=True),
    "scaled_rotary": dict(rope_scaling=dict(kind="linear", factor=4.0)),
    "one_layer": dict(n_layers=1, n_heads=1),
}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**BASE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def batch(batch_size=3, seq=80, vocab=61, seed=1, ignored=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (batch_size, seq + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :ignored] = -100
    return ids[:, :-1], targets


def grads(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def plain_gradients(model, *batches):
    model.zero_grad()
    losses = [cross_entropy(model(inputs), targets) for inputs, targets in batches]
    sum(losses).backward()
    return sum(losses).item(), grads(model)


def fast_gradients(model, working, *batches):
    model.zero_grad()
    total = 0.0
    for inputs, targets in batches:
        loss = working.loss(inputs, targets)
        loss.backward()
        total += loss.item()
    return total, grads(model)


def apart(a, b):
    a, b = (torch.cat([g.flatten() for g in tensors]) for tensors in (a, b))
    return ((a - b).norm() / a.norm()).item()


# Equality
# --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_the_plain_model(kind, checkpointing):
    model, data = make(**KINDS[kind]), batch()
    loss, wanted = plain_gradients(model, data)
    for dtype, off, share in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-3, 0.05)):
        got, found = fast_gradients(model, WorkingCopy(model, dtype, checkpointing=checkpointing), data)
        assert abs(got - loss) < off
        assert apart(wanted, found) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_gradients_of_several_batches_add_up(kind, dtype):
    model, batches = make(**KINDS[kind]), [batch(seed=seed) for seed in (1, 2, 3)]
    _, wanted = plain_gradients(model, *batches)
    working = WorkingCopy(model, dtype)
    _, found = fast_gradients(model, working, *batches)
    assert apart(wanted, found) < (1e-5 if dtype == torch.float32 else 0.03)
    _, again = fast_gradients(model, working, *batches)  # nothing is left from before
    assert largest_difference(found, again) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_orders_of_calls(dtype):
    model, first, second = make(), batch(seed=1), batch(seed=2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    _, wanted = plain_gradients(model, first, second)
    working = WorkingCopy(model, dtype)
    model.zero_grad()  # two forward passes before one backward pass
    (working.loss(*first) + working.loss(*second)).backward()
    assert apart(wanted, grads(model)) < tolerance
    model.zero_grad(set_to_none=False)  # zeroed, not taken away
    for one in (first, second):
        working.loss(*one).backward()
    assert apart(wanted, grads(model)) < tolerance
    model.zero_grad()
    working.loss(*first)  # dropped without a backward pass
    with torch.no_grad():
        working.loss(*second)
    (3 * working.loss(*first)).backward()
    _, single = plain_gradients(make(), first)
    assert apart([3 * g for g in single], grads(model)) < tolerance


def test_a_step_between_two_steps_changes_the_copy_only_after_refresh():
    model, data = make(), batch()
    working = WorkingCopy(model, torch.float32)
    before = working.loss(*data).item()
    with torch.no_grad():
        model.blocks[0].attention.q_proj.weight *= 3
    assert working.loss(*data).item() == before
    working.refresh()
    assert abs(working.loss(*data).item() - cross_entropy(model(data[0]), data[1]).item()) < 1e-5


def test_a_gradient_that_somebody_kept_is_not_overwritten():
    model, data = make(), batch()
    working = WorkingCopy(model, torch.float32)
    fast_gradients(model, working, data)
    weight = model.blocks[0].attention.q_proj.weight
    other = model.blocks[0].attention.k_proj.weight
    kept = other.grad.clone()
    first = weight.grad.clone()
    weight.grad = None  # one of three that are packed together
    working.loss(*data).backward()
    assert largest_difference(other.grad, 2 * kept) < 1e-6
    assert largest_difference(weight.grad, first) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_somebody_put_there_is_added_to(dtype):
    model, data = make(), batch()
    working = WorkingCopy(model, dtype)
    _, single = fast_gradients(model, working, data)
    model.zero_grad()
    mine = [torch.full_like(parameter, 0.5) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), mine):
        parameter.grad = grad.clone()
    working.loss(*data).backward()
    assert largest_difference([g + m for g, m in zip(single, mine)], grads(model)) < 1e-6


class Shifted(GPT):
    "A model whose embedding also sees the token before."

    def _start(self, ids, attention_mask, positions, cache):
        x, mask, rotate = super()._start(ids, attention_mask, positions, cache)
        return x + F.pad(x[:, :-1], (0, 0, 1, 0)), mask, rotate


def test_a_subclass_with_another_beginning_works_unchanged():
    torch.manual_seed(0)
    model, data = Shifted(GPTConfig(**BASE)), batch()
    loss, wanted = plain_gradients(model, data)
    got, found = fast_gradients(model, WorkingCopy(model, torch.float32), data)
    assert abs(got - loss) < 1e-5 and apart(wanted, found) < 1e-5


def test_dropout_is_refused():
    with pytest.raises(InputError, match="dropout=0.1; train it with Trainer"):
        WorkingCopy(GPT(GPTConfig(**BASE, dropout=0.1)))


def test_logits_are_the_models():
    model, (inputs, _) = make(output_bias=True), batch()
    with torch.no_grad():
        assert largest_difference(WorkingCopy(model, torch.float32).logits(inputs), model(inputs)) < 1e-4


def test_all_targets_ignored_gives_zero_and_no_gradient():
    model, (inputs, targets) = make(), batch()
    loss, found = fast_gradients(model, WorkingCopy(model, torch.float32), (inputs, torch.full_like(targets, -100)))
    assert loss == 0 and all(bool((g == 0).all()) for g in found)


def test_the_branch_of_a_gpu_runs_on_shapes_alone():
    with torch.device("meta"):
        model = GPT(GPTConfig(**BASE))
        ids = torch.zeros(2, 80, dtype=torch.long)
    working = WorkingCopy(model, torch.bfloat16)
    loss = working.loss(ids, ids)
    loss.backward()
    assert loss.shape == () and all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_transformers_gpt2_has_the_same_loss_and_gradients():
    pytest.importorskip("transformers")
    from transformer_llm.peers import hf_gpt2

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2", vocab_size=61, context_length=96, d_model=32, n_layers=2, n_heads=4))
    theirs, (inputs, targets) = hf_gpt2(model).train(), batch()
    loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    working = WorkingCopy(model, torch.float32)
    got, _ = fast_gradients(model, working, (inputs, targets))
    assert abs(got - loss.item()) < 1e-5
    block, other = model.blocks[1], theirs.transformer.h[1]
    pairs = [
        (model.token_embedding.weight.grad, theirs.transformer.wte.weight.grad),
        (block.feedforward.up.weight.grad, other.mlp.c_fc.weight.grad.T),
        (block.attention.o_proj.weight.grad, other.attn.c_proj.weight.grad.T),
        (block.feedforward_norm.weight.grad, other.ln_2.weight.grad),
        (
            torch.cat(
                [p.weight.grad for p in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)]
            ),
            other.attn.c_attn.weight.grad.T,
        ),
    ]
    for ours, right in pairs:
        assert largest_difference(ours, right) < 1e-5


# Pieces
# ----------------------------------------------------------------------------------------------------------------

def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_each_backward_pass_is_the_derivative_of_its_forward_pass():
    check = torch.autograd.gradcheck
    angles = tuple(angle.double() for angle in rotary_angles(torch.arange(5), 4))
    assert check(lambda x, g: _RMSNorm.apply(x, g, 1e-5, torch.double), (double(2, 3, 6), double(6)))
    assert check(_Gate.apply, (double(2, 3, 8),))
    for interleaved in (False, True):
        assert check(lambda x, pairs=interleaved: _Heads.apply(x, (2, 1, 4), angles, pairs), (double(2, 5, 16),))
    assert check(lambda x: _Heads.apply(x, (2, 1, 4), None, False), (double(2, 5, 16),))
    for block in (1, 2, 3, 5):
        assert check(
            lambda q, k, v, block=block: _BatchedAttention.apply(q, k, v, None, block),
            (double(2, 4, 5, 3), double(2, 2, 5, 3), double(2, 2, 5, 3)),
        )
    targets = torch.tensor([1, -100, 0, 3, 2])
    assert check(
        lambda h, w, b: chunked_cross_entropy(h, w, targets, b, chunk=2), (double(5, 3), double(4, 3), double(4))
    )


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(1, 140),
    st.sampled_from([2, 8]),
    st.integers(1, 150),
)
def test_attention_in_blocks_is_attention(batch_size, heads, seq, head_dim, block):
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (
        3 * torch.randn(batch_size, n, seq, head_dim, generator=generator) for n in (heads[0], heads[1], heads[1])
    )
    wanted = attention_plain(q, k, v, causal=True)
    assert largest_difference(batched_attention(q, k, v, block=block), wanted) < 1e-4
    closed = torch.zeros(seq, seq).masked_fill(~causal_mask(seq), -math.inf)
    assert largest_difference(batched_attention(q, k, v, closed), wanted) < 1e-4


def test_a_later_key_changes_nothing_and_gets_no_gradient():
    q, k, v = (torch.randn(1, 2, 150, 8, requires_grad=True) for _ in range(3))
    batched_attention(q, k, v)[:, :, :70].sum().backward()
    assert bool((k.grad[:, :, 70:] == 0).all()) and bool((v.grad[:, :, 70:] == 0).all())


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 50), st.integers(1, 45), st.booleans(), st.floats(0.1, 30), st.integers(1, 50)
)
def test_loss_in_chunks_is_the_loss(tokens, vocab, chunk, bias, size, cached_rows):
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = size * torch.randn(tokens, 4, generator=generator), torch.randn(vocab, 4, generator=generator)
    shift = torch.randn(vocab, generator=generator) if bias else None
    targets = torch.randint(vocab, (tokens,), generator=generator).where(
        torch.rand(tokens, generator=generator) < 0.8, -100
    )
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, shift) if leaf is not None]
    wanted = cross_entropy(F.linear(hidden, weight, shift), targets)
    gradients = torch.autograd.grad(wanted, leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(performance, "CACHED_ROWS", cached_rows)
        found = chunked_cross_entropy(hidden, weight, targets, shift, chunk=chunk)
    assert abs(found - wanted) <= 1e-4 * max(1, wanted.item())
    assert largest_difference(gradients, torch.autograd.grad(found, leaves)) < 1e-4 * max(1, size)


def test_the_loss_is_finite_for_huge_logits():
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1]))
    loss.backward()
    assert abs(loss.item() - 2e4) < 1 and bool(hidden.grad.isfinite().all())


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=4),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([None, math.inf, math.nan]),
)
def test_the_norm_of_rows_is_the_norm(shapes, size, poison):
    "Of numbers, vectors, matrices and stacks of them; what is no number shows."
    # the last has no gradient
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] + [torch.nn.Parameter(torch.zeros(2))]
    for parameter in parameters[:-1]:
        parameter.grad = size * torch.randn(parameter.shape)
    if poison is not None:
        parameters[0].grad.view(-1)[0] = poison
    wanted, found = clip_gradients(parameters, 0.0), gradient_norm(parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0, equal_nan=True)
    assert gradient_norm(parameters[-1:]) == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adamw_is_adamw(weight_decay):
    models = [make() for _ in range(2)]
    pairs = [
        kind(model.parameters(), lr=0.01, weight_decay=weight_decay) for kind, model in zip((AdamW, FusedAdamW), models)
    ]
    for step in range(30):
        for model, optimizer in zip(models, pairs):
            torch.manual_seed(step)
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = None if number == 3 and step % 2 else torch.randn_like(parameter)
            optimizer.step()
    assert largest_difference(models[0].parameters(), models[1].parameters()) < 1e-5
    assert [s["step"] for s in pairs[0].state.values()] == [s["step"] for s in pairs[1].state.values()]


# Work that is the same at every step
# -----------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def trainer_of(kind=FastTrainer, dtype="float32", changes=None, **settings_):
    torch.manual_seed(0)
    config = GPTConfig(**BASE | (changes or {}))
    ids = torch.randint(config.vocab_size, (3_000,), generator=torch.Generator().manual_seed(7))
    options = dict(batch_size=4, warmup_steps=2, learning_rate=3e-3, max_steps=30, dtype=dtype) | settings_
    run_directory = options.pop("run_directory", None)
    return kind(
        GPT(config), (ids[:2_500], ids[2_500:]), TrainingConfig(**options), progress=False, run_directory=run_directory
    )


def test_matrix_products_of_a_step():
    for layers in (1, 3):
        trainer = trainer_of(changes=dict(n_layers=layers))
        trainer.train_step()
        with Calls() as calls:
            trainer.train_step()
        blocks = math.ceil(96 / 64)
        # forward, and two backward; two forward, and four backward
        linear, attention = layers * 4 * 3, layers * blocks * 6
        assert (
            sum(name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm") for name in calls.names)
            == linear + attention + 3 + 2 * layers + 1
        )  # one chunk, and what each norm sums
        assert calls.names.count("_fused_adamw_") == 2  # matrices, vectors
        assert not [name for name in calls.names if name.startswith("_foreach_copy")][1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_operation_of_a_step_is_a_slow_one(dtype):
    "An embedding's plain gradient is a table of zeros; scatter in 16 bits goes through a copy in 32 and back."
    trainer = trainer_of(dtype=dtype, changes=dict(position="learned"))
    trainer.train_step()
    with Calls() as calls:
        trainer.train_step()
    assert calls.names.count("index_add_") == 2  # tokens, positions
    assert not {"embedding_dense_backward", "scatter", "scatter_", "scatter_add_"} & set(calls.names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocations_are_the_same_at_every_step_and_none_are_for_weights(dtype):
    trainer = trainer_of(dtype=dtype)
    with _MemoryCounter() as counter:
        seen, kept = [], []
        for _ in range(5):
            before = len(counter.created)
            trainer.train_step()
            seen.append(sorted(counter.created[before:]))
            kept.append(counter.now)
    assert seen[2] == seen[3] == seen[4]
    assert kept[2] == kept[3] == kept[4]
    places = [parameter.grad.data_ptr() for parameter in trainer.model.parameters() if parameter.ndim == 2]
    trainer.train_step()
    assert places == [parameter.grad.data_ptr() for parameter in trainer.model.parameters() if parameter.ndim == 2]
    working = trainer.copy
    with _MemoryCounter() as counter:
        for tensor in [*trainer.model.parameters(), *(packed.value for packed in working.packed)]:
            counter._see(tensor.untyped_storage())
        before = len(counter.created)
        working.refresh()
    assert counter.created[before:] == []


def test_a_step_moves_less_memory_with_the_loss_in_chunks():
    model, data = make(vocab_size=2000), batch(8, 96, 2000)
    plain = measure_peak_memory(lambda: cross_entropy(model(data[0]), data[1]).backward())
    model.zero_grad()
    working = WorkingCopy(model, torch.float32, chunk=64)
    working.loss(*data).backward()
    assert measure_peak_memory(lambda: working.loss(*data).backward()) < plain / 2


# The trainer
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_follows_the_plain_trainer(optimizer, accumulation):
    runs = {}
    for kind, dtype in ((Trainer, "float32"), (FastTrainer, "float32"), (FastTrainer, "bfloat16")):
        trainer = trainer_of(kind, dtype, optimizer=optimizer, accumulation=accumulation)
        runs[kind, dtype] = [trainer.train_step()[0] for _ in range(30)] + [trainer.evaluate()]
    plain, fast, mixed = (torch.tensor(values) for values in runs.values())
    assert plain[-2] < plain[0] - 0.05
    assert (fast - plain).abs().max() < (
        1e-3 if optimizer == "adamw" else 0.02
    )  # the plain Muon may iterate in bfloat16
    assert (mixed - plain).abs().max() < 0.03


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumes_to_the_bit(tmp_path, dtype, optimizer):
    whole = trainer_of(
        dtype=dtype, optimizer=optimizer, max_steps=8, checkpoint_every=4, eval_every=2, run_directory=tmp_path / "run"
    )
    whole.train()
    again = FastTrainer.resume(tmp_path / "run" / "step-0000004", whole.data, progress=False)
    assert again.step == 4
    losses = [again.train_step()[0] for _ in range(4)]
    assert largest_difference(whole.model.parameters(), again.model.parameters()) == 0
    assert again.evaluate() == whole.evaluate() and all(map(math.isfinite, losses))


def test_checkpoints_are_the_trainers(tmp_path):
    fast = trainer_of(max_steps=4, checkpoint_every=2, run_directory=tmp_path / "fast")
    fast.train()
    plain = Trainer.resume(tmp_path / "fast", fast.data, progress=False, max_steps=6)
    assert type(plain.optimizers[0]) is AdamW and plain.step == 4
    plain.train()
    back = FastTrainer.resume(tmp_path / "fast", fast.data, progress=False, max_steps=8)
    back.train()
    assert back.step == 8 and type(back.optimizers[0]) is FusedAdamW


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    trainer = trainer_of(max_steps=20, log_every=1, run_directory=tmp_path / "run")
    trainer.on_step = lambda trainer, record: os.kill(os.getpid(), signal.SIGINT) if trainer.step == 3 else None
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "run" / "step-0000003" / "checkpoint.json").exists()


def test_a_loss_that_is_no_number_stops_the_run():
    trainer = trainer_of()
    with torch.no_grad():
        trainer.model.blocks[0].feedforward.down.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="Training stopped at step 1"):
        trainer.train_step()


def test_evaluation_is_the_plain_one_and_changes_nothing():
    fast, plain = trainer_of(), trainer_of(Trainer)
    before = copy.deepcopy(fast.model.state_dict())
    assert abs(fast.evaluate() - plain.evaluate()) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in fast.model.state_dict().items())


def test_a_compiled_model_takes_the_plain_step(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    trainer, plain = trainer_of(compile=True, dtype="bfloat16"), trainer_of(Trainer, "bfloat16")
    assert compiled == [trainer.model] and type(trainer.optimizers[0]) is FusedAdamW
    for _ in range(3):
        assert abs(trainer.train_step()[0] - plain.train_step()[0]) < 1e-3
    assert abs(trainer.evaluate() - plain.evaluate()) < 1e-3


# Memory
# ----------------------------------------------------------------------------------------------------------------

MEMORY = {
    "llama": ({}, 4),
    "large_batch": ({}, 16),
    "large_vocabulary": (dict(vocab_size=4096), 4),
    "qk_norm_relu2": (dict(qk_norm=True, activation="relu2"), 8),
    "gpt2": (dict(norm="layernorm", bias=True, activation="gelu_tanh", position="learned"), 8),
    "grouped_untied": (dict(n_kv_heads=2, tied_embeddings=False, context_length=256), 4),
    "alibi": (dict(position="alibi"), 8),
    "wide": (dict(d_model=256, n_layers=2, output_bias=True), 2),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MEMORY)
def test_memory_is_predicted_within_15_percent(kind, dtype, checkpointing):
    changes, batch_size = MEMORY[kind]
    config = GPTConfig(**dict(vocab_size=500, context_length=128, d_model=64, n_layers=4, n_heads=4) | changes)

    def run():
        trainer = FastTrainer(
            GPT(config),
            (torch.zeros(1_000, dtype=torch.long), None),
            TrainingConfig(batch_size=batch_size, dtype=dtype),
            checkpointing=checkpointing,
            progress=False,
        )
        for _ in range(2):  # the optimizer's state is there from the second step on
            trainer.train_step()

    counted = measure_peak_memory(run)
    assert kind != "llama" or counted == measure_peak_memory(run)
    assert abs(peak_training_memory(config, batch_size, dtype=dtype, checkpointing=checkpointing) / counted - 1) < 0.15


def test_measured_memory_of_a_known_case():
    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b * 2 + b.view(10, 100).sum()

    assert measure_peak_memory(run) == 3 * 4000 + 4 or measure_peak_memory(run) == 3 * 4000


@pytest.mark.parametrize("kind", ["llama", "gpt2", "window"])
def test_checkpointed_activations_of_the_plain_model(kind):
    model, data = make(**KINDS[kind]), batch()
    _, wanted = plain_gradients(model, data)
    full = measure_peak_memory(lambda: plain_gradients(model, data))
    kinds = [type(block) for block in model.blocks]
    assert checkpoint_activations(checkpoint_activations(model)) is model  # twice is once
    _, found = plain_gradients(model, data)
    assert largest_difference(wanted, found) < 1e-6
    assert measure_peak_memory(lambda: plain_gradients(copy.deepcopy(model), data)) < full
    with torch.no_grad():
        ids = generate(model, data[0][:1, :5], 10, temperature=0)
    checkpoint_activations(model, on=False)
    assert [type(block) for block in model.blocks] == kinds
    assert torch.equal(ids, generate(model, data[0][:1, :5], 10, temperature=0))


def test_checkpointed_activations_in_the_plain_trainer():
    plain, other = trainer_of(Trainer), trainer_of(Trainer)
    checkpoint_activations(other.model)
    for _ in range(3):
        assert plain.train_step() == pytest.approx(other.train_step(), abs=1e-5)


# What the machine can do
# -----------------------------------------------------------------------------------------------

def test_peak_and_utilisation():
    assert matmul_peak(seconds=0, size=64) > 1e6
    assert fastest_dtype(seconds=0) in ("float32", "bfloat16")
    config = GPTConfig(**BASE)
    assert utilisation(1000, config, 1e9) == pytest.approx(1000 * flops_per_token(config, training=True) / 1e9)
    assert utilisation(1000, config, 1e9, seq=10) < utilisation(1000, config, 1e9)
    for call in (
        lambda: utilisation(1, config, 0),
        lambda: matmul_peak(seconds=-1),
        lambda: chunked_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), chunk=0),
        lambda: WorkingCopy(make(), chunk=0),
        lambda: batched_attention(*(torch.ones(1, 1, 2, 2),) * 3, block=0),
    ):
        with pytest.raises(InputError):
            call()


def test_nothing_of_the_peers_is_imported():
    import sys

    assert "transformers" not in vars(performance) and performance.__name__ in sys.modules


@pytest.mark.parametrize("accumulation", [1, 3])
def test_unequal_batches_weigh_as_their_targets_do(accumulation):
    trainers = [trainer_of(kind, accumulation=accumulation) for kind in (Trainer, FastTrainer)]
    for trainer in trainers:
        next_batch, kept = trainer.next_batch, iter(range(5, 500, 40))
        trainer.next_batch = lambda draw=next_batch, kept=kept: masked(draw(), next(kept))
    for _ in range(3):
        assert trainers[0].train_step() == pytest.approx(trainers[1].train_step(), rel=1e-4)


def masked(batch, first):
    inputs, targets = batch
    targets = targets.clone()
    targets.view(-1)[:first] = -100
    return inputs, targets


def test_a_step_is_written_once_and_its_seams_are_overridden():
    "`FastTrainer` and `SprintTrainer` each wrote the whole step again."
    import inspect

    assert "optimizer.step" not in inspect.getsource(FastTrainer)
    assert SprintTrainer.train_step is Trainer.train_step
    for kind in (FastTrainer, SprintTrainer):
        assert kind.next_batch is Trainer.next_batch or kind is SprintTrainer
        assert kind.loss is not Trainer.loss and kind.clip is not Trainer.clip and kind.backward is Trainer.backward


def test_a_compiled_run_needs_no_working_copy(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    trainer = trainer_of(compile=True)
    assert trainer.copy is None and type(trainer.optimizers[0]) is FusedAdamW
    assert trainer.train_step() == pytest.approx(trainer_of(Trainer).train_step(), rel=1e-4)
    assert math.isfinite(trainer.evaluate())


def test_pages_prepare_the_texts_that_they_read():
    "Chapter 11 read Shakespeare's file, which only other chapters made."
    folder = Path(__file__).parent.parent / "nbs"
    for page in [*folder.glob("*.ipynb"), *folder.glob("exercises/*.ipynb")]:
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            found = re.search(r"(Path|open)\([^()]*shakespeare\.txt", "".join(cell["source"]))
            assert cell["cell_type"] != "code" or found is None, f"{page.name}: {found[0]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fast_trainer_keeps_float32_weights(dtype):
    model = GPT(GPTConfig(vocab_size=20, context_length=8, d_model=16, n_layers=1, n_heads=2)).to(dtype)
    with pytest.raises(InputError, match=f"float32 weights, but token_embedding.weight is {dtype}"):
        FastTrainer(model, (torch.arange(100) % 20, None), TrainingConfig(max_steps=1, device="cpu"), progress=False)


def test_gradients_are_divided_by_hand_where_a_fused_step_may_ignore_their_scale(monkeypatch):
    "On MPS, on a tensor that only says where it is: no Apple processor is needed to see what is called."
    called = []
    monkeypatch.setattr(torch, "_foreach_div_", lambda gradients, divisor: called.append(("divided", divisor)))
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *given, grad_scale, **more: called.append(("scale", grad_scale)))
    group = dict(lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8)
    with FakeTensorMode():
        weight = torch.empty(3, 2, device="mps")
        state = dict(step=0, average=weight, average_square=weight)
        FusedAdamW._step_group(SimpleNamespace(divisor=2.0), group, [weight], [weight], [state])
    assert called == [("divided", 2.0), ("scale", None)]


def test_a_product_on_a_gpu_is_timed_from_one_wait_to_the_next(monkeypatch):
    "Calls to a GPU return before the work is done, and one product between two waits would mostly be waiting."
    events = []
    monkeypatch.setattr(performance, "wait_for", lambda device: events.append("wait"))
    monkeypatch.setattr(torch, "mm", lambda *matrices, out: events.append("product"))
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.ones(1).expand(size))
    monkeypatch.setattr(torch, "empty_like", lambda a: SimpleNamespace(device=torch.device("cuda")))
    performance.time_of_product(torch.float32, 4, 0, "cuda")
    assert events == ["wait", *["product"] * 8, "wait"]
