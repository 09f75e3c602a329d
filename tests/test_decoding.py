"""Fast generation: the decoder writes what the plain form writes, in eight bits what its own numbers say, and
speculation keeps the distribution.

Nothing here is timed: calls, allocations, tokens and distributions don't depend on noise.
"""
import copy
import math
import re
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_llm import decoding
from transformer_llm.decoding import (
    Decoder,
    FloatMatrix,
    HalvedMatrix,
    Int8Matrix,
    PackedGPT,
    PackedMatrix,
    WideCache,
    bytes_per_token,
    fastest,
    memory_bandwidth,
    pack,
    quantise_rows,
    speculative,
    speed_bound,
    verify,
)
from transformer_llm.foundations import InputError
from transformer_llm.generation import beam_search, filter_logits, generate, left_pad, stream
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig

BASE = GPTConfig(vocab_size=50, context_length=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.2)
STEPPED = {
    "llama": {},
    "gpt2": GPT2_STYLE,
    "nano": dict(activation="relu2", qk_norm=True, n_kv_heads=4),
    "interleaved": dict(rope_interleaved=True, bias=True),
    "sinusoidal": dict(position="sinusoidal", tied_embeddings=False),
    "no positions": dict(position="none", output_bias=True),
    "whole norm": dict(qk_norm=True, qk_norm_whole=True),
    "one key head": dict(n_kv_heads=1, head_dim=6),
    "qkv bias": dict(qkv_bias=True),
    "stretched": dict(rope_scaling=dict(kind="linear", factor=2.0)),
}
PACKED_ONLY = {
    "window": dict(window=5),
    "alibi": dict(position="alibi"),
    "post": dict(norm_placement="post"),
    "output": dict(norm_placement="output"),
}
SETTINGS = {
    "greedy": dict(temperature=0),
    "sampled": {},
    "cold": dict(temperature=0.5),
    "top-k": dict(top_k=4),
    "top-p": dict(top_p=0.7),
    "min-p": dict(min_p=0.1),
    "penalty": dict(repetition_penalty=1.4),
    "stops": dict(stop_tokens=(1, 7, 30)),
    "everything": dict(temperature=0.9, top_k=9, top_p=0.9, repetition_penalty=1.1, stop_tokens=[2]),
}


def make(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(BASE.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not zeros and ones
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts(rows=2, length=6, seed=1):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


# The same tokens
# -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*STEPPED, *PACKED_ONLY])
def test_logits_are_the_models(name):
    model = make(**(STEPPED | PACKED_ONLY)[name])
    ids = prompts(3, 11)
    for form in (PackedGPT(model), Decoder(model)):
        torch.testing.assert_close(form(ids), model(ids).detach(), atol=2e-5, rtol=1e-4)
        cache, plain = form.new_cache(3, 20), model.new_cache(3, 20)
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:9], ids[:, 9:10]):
            torch.testing.assert_close(form(part, cache=cache), model(part, cache=plain).detach(), atol=2e-5, rtol=1e-4)
        assert [layer.length for layer in cache] == [10, 10]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_tokens_for_the_same_seed(unchecked, setting, rows):
    """Past the context length as well, where the window slides twice.

    A setting begins where the model ends: all settings meet three models, all models two settings.
    """
    options, models = SETTINGS[setting], STEPPED | PACKED_ONLY
    for name in models if setting in ("greedy", "everything") else ("llama", "gpt2", "window"):
        changes = models[name]
        model = make(**changes)
        decoder = Decoder(model)
        for length in (1, 6, 32):
            plain = generate(model, prompts(rows, length), 40, generator=5, **options)
            assert torch.equal(decoder.generate(prompts(rows, length), 40, generator=5, **options), plain), (
                name,
                length,
            )
            assert torch.equal(generate(decoder, prompts(rows, length), 40, generator=5, **options), plain), (
                name,
                length,
            )


def test_generators_and_the_global_seed_are_used_alike():
    model = make()
    decoder, own, other = Decoder(model), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(3):  # the generators go on alike
        assert torch.equal(
            decoder.generate(prompts(), 7, generator=own), generate(model, prompts(), 7, generator=other)
        )
    torch.manual_seed(8)
    plain = generate(model, prompts(), 9)
    torch.manual_seed(8)
    assert torch.equal(decoder.generate(prompts(), 9), plain)


def test_padded_prompts_beams_and_streams():
    model = make()
    decoder = Decoder(model)
    ids, mask = left_pad([[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    plain = generate(model, ids, 40, generator=2, attention_mask=mask)
    assert torch.equal(decoder.generate(ids, 40, generator=2, attention_mask=mask), plain)
    assert torch.equal(
        decoder.generate(ids, 9, generator=2, attention_mask=torch.ones_like(mask)),
        generate(model, ids, 9, generator=2),
    )
    assert torch.equal(beam_search(decoder, prompts(), 12, n_beams=3), beam_search(model, prompts(), 12, n_beams=3))
    assert torch.equal(
        torch.stack(list(stream(decoder, prompts(), 5, temperature=0)), 1),
        generate(model, prompts(), 5, temperature=0)[:, 6:],
    )


def test_what_is_returned_is_the_callers_own():
    decoder = Decoder(make())
    first = decoder.generate(prompts(), 20, temperature=0)
    kept = first.clone()
    decoder.generate(prompts(seed=9), 20, temperature=0)
    assert torch.equal(first, kept) and not first.is_inference() or torch.equal(first, kept)
    cache = decoder.new_cache(1)
    one = decoder(prompts(1, 1), cache=cache)
    saved = one.clone()
    decoder(prompts(1, 1, seed=4), cache=cache)
    assert torch.equal(one, saved)


def test_the_model_stays_as_it_was_and_the_decoder_does_not_follow_it():
    model = make()
    before, decoder = copy.deepcopy(model.state_dict()), Decoder(model)
    wanted = decoder.generate(prompts(), 20, temperature=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(decoder.generate(prompts(), 20, temperature=0), wanted)


def test_no_new_tokens_and_one():
    model = make()
    assert torch.equal(Decoder(model).generate(prompts(), 0), prompts())
    assert torch.equal(Decoder(model).generate(prompts(), 1, generator=0), generate(model, prompts(), 1, generator=0))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=2), "top_p"),
        (dict(min_p=-1), "min_p"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(ids=torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (dict(ids=torch.full((1, 3), 50)), "knows only 0 to 49"),
        (dict(ids=torch.zeros(1, 33, dtype=torch.long)), "context_length"),
    ],
)
def test_refusals_are_those_of_chapter_08(options, words):
    decoder, arguments = Decoder(make()), dict(ids=prompts(), max_new_tokens=3) | options
    with pytest.raises(InputError, match=words) as ours:
        decoder.generate(**arguments)
    with pytest.raises(InputError) as plain:
        generate(make(), **arguments)
    assert str(ours.value) == str(plain.value)


def test_other_refusals():
    with pytest.raises(InputError, match="dtype"):
        Decoder(make(), dtype="int3")
    with pytest.raises(InputError, match="dtype"):
        Decoder(make(), dtype=torch.float64)
    decoder = Decoder(make())
    cache = decoder.new_cache(1, 2)
    decoder(prompts(1, 2), cache=cache)
    with pytest.raises(InputError, match="can't take token 3"):
        decoder(prompts(1, 1), cache=cache)
    cache = decoder.new_cache(1, 40)
    decoder(prompts(1, 32), cache=cache)
    with pytest.raises(InputError, match="context_length is 32"):
        decoder(prompts(1, 1), cache=cache)


class LoRA(torch.nn.Module):
    "A linear layer with a product of two small matrices beside it."

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features, self.weight, self.bias = (
            linear.in_features, linear.out_features, linear.weight, linear.bias
        )
        self.a = torch.nn.Parameter(torch.randn(4, linear.in_features))
        self.b = torch.nn.Parameter(torch.randn(linear.out_features, 4))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("form", [PackedGPT, Decoder])
def test_a_model_that_is_not_plain_is_refused_by_name(form):
    "A replaced module would be ignored, or a hook: the decoder would compute another model without a word."
    model = make()
    attention = model.blocks[1].attention
    attention.q_proj, attention.v_proj = LoRA(attention.q_proj), LoRA(attention.v_proj)
    ids = prompts()
    plain = generate(model, ids, 5, temperature=0)
    with torch.no_grad():
        wanted = torch.cat([ids, model(plain[:, :-1]).argmax(-1)[:, 5:]], 1)
    assert torch.equal(plain, wanted)  # the model itself is right
    with pytest.raises(InputError, match=f"A {form.__name__}.*blocks.1.attention.q_proj"):
        form(model)
    for add in (
        lambda module: module.register_forward_hook(lambda module, args, out: out * 2),
        lambda module: module.register_forward_pre_hook(lambda module, args: args),
        lambda module: torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Tanh()),
    ):
        model = make()
        add(model.blocks[0].feedforward.down)
        with pytest.raises(InputError, match="blocks.0.feedforward.down"):
            form(model)
    hooked = make()
    handle = hooked.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(InputError, match="hook"):
        form(hooked)
    handle.remove()
    assert form(hooked)(ids).shape == (2, 6, 50)
    frozen = make().requires_grad_(False)
    assert torch.equal(form(frozen)(ids), form(make())(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "int8"], ids=str)
def test_logits_that_are_not_numbers_are_refused(dtype):
    for name in ("blocks.1.feedforward.down.weight", "final_norm.weight", "token_embedding.weight"):
        model = make()
        with torch.no_grad():
            model.get_parameter(name)[3 if "norm" in name else (3, 4)] = torch.nan
        decoder, ids = Decoder(model, dtype=dtype), torch.tensor([[1, 3]])
        for options in ({}, dict(temperature=0), dict(top_k=3, repetition_penalty=1.2), dict(stop_tokens=[1])):
            with pytest.raises(InputError, match="logits are not numbers"):
                decoder.generate(ids, 4, **options)
        with pytest.raises(InputError, match="logits are not numbers"):
            generate(decoder, ids, 4)
        for pair in ((decoder, Decoder(make())), (Decoder(make()), decoder)):
            for temperature in (0, 1.0):
                with pytest.raises(InputError, match="logits are not numbers"):
                    speculative(*pair, ids, 4, temperature=temperature)
    large = make()
    with torch.no_grad():
        large.final_norm.weight.mul_(60_000)
    if dtype == torch.float16:
        with pytest.raises(InputError, match="float16 ends at 65,504: use bfloat16"):
            Decoder(large, dtype=dtype).generate(prompts(), 4)
    else:
        assert Decoder(large, dtype=dtype).generate(prompts(), 4).shape == (2, 10)


def test_float64_is_refused_with_its_name():
    with pytest.raises(InputError, match="not torch.float64"):
        Decoder(make().double())


# Counts
# ----------------------------------------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def calls_for_a_token(model, length=5) -> Counter:
    cache = model.new_cache(1, 32)
    model(prompts(1, length), cache=cache, last_only=True)
    with Calls() as calls:
        model(prompts(1, 1), cache=cache, last_only=True)
    return calls.counts


@pytest.mark.parametrize("name", ["llama", "gpt2", "nano"])
def test_operator_calls_for_a_token(name):
    model = make(**STEPPED[name])
    plain, packed, stepped = (calls_for_a_token(form) for form in (model, PackedGPT(model), Decoder(model)))
    assert 2 * stepped.total() < plain.total() and stepped.total() < packed.total() < plain.total()
    products = sum(stepped[kind] for kind in ("mm", "addmm", "addmm_"))
    assert products == 4 * 2 + 1, stepped  # qkv, output, up and down of two layers, and the logits
    assert stepped["baddbmm"] == stepped["bmm"] == stepped["_softmax"] == 2


def test_calls_do_not_grow_with_the_text():
    decoder = Decoder(make())
    assert calls_for_a_token(decoder, 2) == calls_for_a_token(decoder, 29)


def test_calls_grow_by_the_same_number_with_each_layer():
    totals = [calls_for_a_token(Decoder(make(n_layers=layers))).total() for layers in (1, 2, 3)]
    assert totals[2] - totals[1] == totals[1] - totals[0] < 30


@torch.inference_mode()
def bytes_allocated(decoder, length) -> int:
    cache = decoder.new_cache(1, 256)
    decoder(torch.zeros(1, length, dtype=torch.long), cache=cache, last_only=True)
    token = torch.tensor([3])
    decoder.step(token, cache)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        decoder.step(token, cache)
    return sum(event.self_cpu_memory_usage for event in found.events() if event.self_cpu_memory_usage > 0)


def test_memory_for_a_token_grows_by_its_scores_only():
    config = BASE.replace(context_length=256)
    decoder = Decoder(GPT(config))
    early, late = bytes_allocated(decoder, 10), bytes_allocated(decoder, 210)
    scores = 2 * config.n_layers * config.n_heads * 200 * 4  # before and after the softmax, for 200 more keys
    assert 0 < early < 20_000 and 0 <= late - early <= 2 * scores


def test_storage_is_allocated_once():
    decoder = Decoder(make())
    decoder.generate(prompts(), 20, temperature=0)
    storage = decoder.workspace.kv.data_ptr()
    decoder.generate(prompts(seed=5), 18, temperature=0)
    assert decoder.workspace.kv.data_ptr() == storage
    decoder.generate(prompts(3), 18, temperature=0)
    assert decoder.workspace.batch_size == 3


# Other dtypes
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wide", [0, decoding.WIDE], ids=["in bfloat16", "rounded, in float32"])
def test_bfloat16_writes_what_the_plain_form_in_bfloat16_does(wide, monkeypatch):
    """Up to rounding: the logits differ by no more than bfloat16's own error, and where a choice is clear it is the
    same.
    """
    monkeypatch.setattr(decoding, "WIDE", wide)
    for name, changes in STEPPED.items():
        model = make(**changes)
        half, decoder = copy.deepcopy(model).to(torch.bfloat16), Decoder(model, dtype=torch.bfloat16)
        assert decoder.dtype == (torch.float32 if wide else torch.bfloat16)
        ids = prompts(2, 20)
        wanted, plain, got = model(ids).detach(), half(ids).detach().float(), decoder(ids).float()
        assert (got - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-3, name
        cache = decoder.new_cache(2)
        decoder(ids[:, :-1], cache=cache)
        step = decoder(ids[:, -1:], cache=cache).float()[:, 0]
        assert (step - wanted[:, -1]).abs().max() <= 3 * (plain - wanted).abs().max() + 1e-3, name
        assert decoder.generate(ids, 5, temperature=0).shape == (2, 25)


def test_a_small_bfloat16_model_is_the_rounded_one_in_float32():
    model = make()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    for given_model in (model, rounded):
        decoder = Decoder(given_model, dtype=torch.bfloat16)
        assert torch.equal(decoder(prompts()), Decoder(rounded, dtype=torch.float32)(prompts()))
    assert (
        rounded.token_embedding.weight.dtype == torch.bfloat16 and model.token_embedding.weight.dtype == torch.float32
    )  # neither is changed
    assert bytes_per_token(decoder, 0) == bytes_per_token(Decoder(model), 0)


def test_a_bfloat16_matrix_is_packed(monkeypatch):
    weight, bias, x = torch.randn(600, 512), torch.randn(600), torch.randn(3, 512, dtype=torch.bfloat16)
    matrix = pack([weight], [bias], torch.bfloat16)
    assert type(matrix) is (PackedMatrix if PackedMatrix.works() else FloatMatrix)
    wanted = F.linear(x, weight.bfloat16(), bias.bfloat16()).float()
    with torch.inference_mode():
        out, residual = torch.empty(3, 600, dtype=torch.bfloat16), torch.zeros(3, 600, dtype=torch.bfloat16)
        matrix.into(x, out)
        matrix.add_to(x, residual)
        for got in (matrix(x), out, residual, matrix(x[None])[0]):
            torch.testing.assert_close(got.float(), wanted, atol=0.3, rtol=0.02)
    monkeypatch.setattr(PackedMatrix, "works", staticmethod(lambda: False))
    assert type(pack([weight], [None], torch.bfloat16)) is FloatMatrix


@pytest.mark.parametrize("other", [True, False], ids=["by the other library", "without it"])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 33), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_two_halves_are_the_whole(other, batch, rows, columns, seed, biased, turned):
    """Any number of rows, odd and even, one included; x in any order of memory.

    Results new, in a given tensor, and added to one.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(batch, columns, generator=generator)
    x = x.t().contiguous().t() if turned else x
    bias = torch.randn(rows, generator=generator) if biased else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(decoding, "HALVES", 1 if other else 10**6)
        matrix, out, residual = HalvedMatrix(weight, bias), torch.full((batch, rows), math.nan), torch.ones(batch, rows)
        matrix.into(x, out)
        matrix.add_to(x, residual)
        found = matrix(x), out, residual - 1, matrix(x[None])[0], matrix(x[:1])
    for got in found:
        torch.testing.assert_close(got.double(), wanted[: len(got)], atol=1e-5 * columns, rtol=1e-5)
    assert matrix.n_bytes in (4 * rows * columns, 4 * (rows + 1) * columns)


def test_large_float32_matrices_are_halved_and_several_rows_fall_back(monkeypatch):
    large, narrow = torch.randn(256, 300), torch.randn(255, 300)
    assert (
        type(pack([large], [None], torch.float32)) is HalvedMatrix
        and type(pack([narrow], [None], torch.float32)) is FloatMatrix
    )
    assert type(pack([large], [None], torch.float16)) is FloatMatrix
    matrix, x, asked = pack([large], [None], torch.float32), torch.randn(3, 300), []

    def missing(*arguments):
        asked.append(len(arguments[0]))
        raise RuntimeError("not built in")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", missing)
    for batch in (1, 3):
        torch.testing.assert_close(matrix(x[:batch]), x[:batch] @ large.T, atol=1e-3, rtol=1e-4)
    assert asked == [3]


def test_a_model_with_halves_writes_what_the_plain_form_writes(monkeypatch):
    monkeypatch.setattr(decoding, "HALVES", 8)
    for name in ("llama", "gpt2", "interleaved", "no positions"):
        model = make(**STEPPED[name])
        decoder = Decoder(model)
        assert type(decoder.layers[0].up) is HalvedMatrix and type(decoder.head) is HalvedMatrix
        for rows in (1, 3):
            assert torch.equal(
                decoder.generate(prompts(rows), 20, generator=3), generate(model, prompts(rows), 20, generator=3)
            ), name


def test_the_cache_on_a_cpu_is_float32_whatever_the_weights_are(monkeypatch):
    monkeypatch.setattr(decoding, "WIDE", 0)
    decoder = Decoder(make(), dtype=torch.bfloat16)
    cache = decoder.new_cache(2)
    assert (
        decoder.dtype == torch.bfloat16
        and decoder.cache_dtype == cache.kv.dtype == cache[0].k.dtype == torch.float32
        and isinstance(cache[0], WideCache)
    )
    k = torch.randn(2, 2, 3, 8, dtype=torch.bfloat16)
    keys, values = cache[0].update(k, 2 * k)
    assert keys.dtype == torch.bfloat16 and torch.equal(keys, k) and torch.equal(values, 2 * k)
    assert bytes_per_token(decoder, 7) - bytes_per_token(decoder, 0) == 4 * 7 * 2 * decoder.config.n_layers * 2 * 8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]))
def test_eight_bit_rows_are_off_by_half_a_step_at_most(rows, columns, seed, size):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    whole, scale = quantise_rows(weight)
    assert whole.dtype == torch.int8 and whole.abs().max() <= 127
    assert scale.shape == (rows, 1) and ((whole * scale - weight).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("works", [True, False], ids=["in whole numbers", "without the kernel"])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_eight_bit_products_are_their_formula(works, batch, rows, columns, seed, biased, turned):
    """Each number up to the rounding of a few operations on its terms, one column included, which torch's kernel gets
    wrong without a word.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(batch, columns, generator=generator)
    x[0, 0] = 0
    x = x.t().contiguous().t() if turned else x  # the same numbers, a column behind the other
    bias = torch.randn(rows, generator=generator) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        if not works:
            patch.setattr(Int8Matrix, "works", staticmethod(lambda: False))
        matrix, zero = Int8Matrix(weight, bias), Int8Matrix(weight)(torch.zeros(2, columns))
    whole, scale = quantise_rows(x)
    scales, shift = (
        scale.double() * matrix.scale.double(),
        torch.zeros(rows, dtype=torch.double) if bias is None else bias.double(),
    )
    wanted = whole.double() @ matrix.rows.double().T * scales + shift
    terms = whole.double().abs() @ matrix.rows.double().abs().T * scales + shift.abs()
    out, residual = torch.empty(batch, rows), torch.ones(batch, rows)
    matrix.into(x, out)
    matrix.add_to(x, residual)
    roundings = 4 * torch.finfo(torch.float32).eps
    for got in (matrix(x), out, matrix(x[None])[0]):
        assert ((got.double() - wanted).abs() <= roundings * terms).all()
    assert ((residual.double() - 1 - wanted).abs() <= roundings * (terms + 1)).all()
    assert torch.equal(zero, torch.zeros(2, rows))


def test_the_kernel_for_whole_numbers_is_used_only_where_it_is_exact():
    assert Int8Matrix(torch.randn(4, 1)).weight.dtype == torch.float32
    for columns in (2, 64, 3000):  # the largest sums there are
        matrix = Int8Matrix(torch.ones(3, columns))
        assert matrix.weight.dtype == (torch.int8 if Int8Matrix.works() else torch.float32)
        torch.testing.assert_close(
            matrix(torch.ones(1, columns)), torch.full((1, 3), float(columns)), rtol=1e-6, atol=0
        )
        assert matrix.n_bytes == matrix.weight.nbytes + 4 * 3


@pytest.mark.parametrize("size", [(1, 8), (7, 16), (40, 24), (41, 24)])
@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_pieces_give_what_the_whole_gives(size, piece, monkeypatch):
    weight, bias, x = torch.randn(size), torch.randn(size[0]), torch.randn(1, size[1])
    whole = Int8Matrix(weight, bias)
    monkeypatch.setattr(decoding, "COLD", 1)
    monkeypatch.setattr(decoding, "PIECE", piece)
    cut = Int8Matrix(weight, bias)
    assert not whole.pieces and sum(words.numel() for words, _ in cut.pieces) * 8 == weight.numel() * Int8Matrix.works()
    assert (
        torch.equal(cut(x), whole(x))
        and torch.equal(cut(x.expand(3, -1)), whole(x.expand(3, -1)))
        and cut.n_bytes == whole.n_bytes
    )
    assert not Int8Matrix(torch.randn(4, 12)).pieces  # no whole number of words a row


def test_a_row_of_a_batch_does_not_depend_on_the_others():
    matrix, x = Int8Matrix(torch.randn(20, 30)), torch.randn(4, 30) * torch.tensor([1.0, 1e-3, 1e3, 1])[:, None]
    for i in range(4):
        assert torch.equal(matrix(x)[i], matrix(x[i : i + 1])[0])


def quantised_copy(model: GPT) -> GPT:
    "The plain model whose matrices are rounded to eight bits, and whose linear layers round what they read."
    rounded = copy.deepcopy(model)

    def back(x):
        whole, scale = quantise_rows(x.flatten(0, -2))
        return (whole * scale).view(x.shape)

    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and "position" not in name:
                parameter.copy_(back(parameter))
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (back(args[0]),))
    unembed = rounded.unembed
    rounded.unembed = lambda x: unembed(back(x))
    return rounded


@pytest.mark.parametrize("name", STEPPED)
def test_eight_bits_write_what_the_plain_form_with_rounded_numbers_writes(name):
    model = make(**STEPPED[name] | dict(tied_embeddings=True))
    decoder, rounded = Decoder(model, dtype="int8"), quantised_copy(model)
    ids = prompts(2, 15)
    difference, lost = (decoder(ids) - rounded(ids)).abs(), (rounded(ids) - model(ids)).abs().max().item()
    assert (
        difference.median() < 1e-4 and difference.max() <= lost
    )  # a number that lies between two steps may fall to either side
    assert torch.equal(decoder.generate(ids, 30, temperature=0), generate(decoder, ids, 30, temperature=0))


def test_bytes_of_a_token():
    model = make(n_kv_heads=2)
    c = model.config
    numbers = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    cached = 2 * c.n_layers * 2 * c.head_dim * 7
    assert bytes_per_token(Decoder(model), 7) == 4 * (numbers + cached)
    rows = sum(len(p) for name, p in model.named_parameters() if p.ndim == 2)
    assert bytes_per_token(Decoder(model, dtype="int8"), 7) == numbers + 4 * rows + 4 * cached
    assert speed_bound(Decoder(model), 7, 8.0 * (numbers + cached)) == 2
    assert memory_bandwidth(2**22, 2) > 1e7


# Speculation
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lookahead", [1, 3, 8])
def test_greedy_speculation_writes_the_models_own_text(lookahead):
    for name in ("llama", "gpt2", "window"):
        large, small = make(**(STEPPED | PACKED_ONLY)[name]), make(seed=4, n_layers=1, context_length=40)
        for model, draft in (
            (large, small),
            (Decoder(large), Decoder(small)),
            (large, large),
            (Decoder(large), Decoder(large, dtype="int8")),
        ):
            for n in (0, 1, 45):
                ids, went = speculative(model, draft, prompts(1), n, lookahead=lookahead, temperature=0)
                assert torch.equal(ids, generate(large, prompts(1), n, temperature=0)), (name, n)
                assert sum(went.kept) + len(went.kept) == n and all(
                    0 <= k <= p <= lookahead for k, p in zip(went.kept, went.proposed)
                )
        assert speculative(large, large, prompts(1), 20, lookahead=lookahead, temperature=0)[1].acceptance == 1


def test_verify_gives_exactly_the_large_models_distribution():
    "By enumeration of what is proposed, with a generator whose numbers are known: a grid of chances and of draws."
    p, q = (
        torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.double),
        torch.tensor([0.2, 0.5, 0.1, 0.2], dtype=torch.double),
    )
    after = torch.full((4,), 0.25, dtype=torch.double)
    total = 20_000
    generator = torch.Generator().manual_seed(0)
    counts, keeps = torch.zeros(4), 0
    for token, times in enumerate((q * total).round().long().tolist()):  # each token as often as the draft proposes it
        for _ in range(times):
            got = verify(torch.stack([p, after]), q[None], torch.tensor([token]), generator)
            counts[got[0]] += 1
            keeps += len(got) == 2
    assert (counts / total - p).abs().max() < 4 * math.sqrt(0.25 / total) and counts[3] == 0
    assert abs(keeps / total - torch.minimum(p, q).sum()) < 4 * math.sqrt(0.25 / total)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_speculative_texts_have_the_large_models_distribution(unchecked, temperature):
    # the window slides within the text
    config = GPTConfig(vocab_size=3, context_length=4, d_model=8, n_layers=1, n_heads=2, init_std=0.5)
    torch.manual_seed(1)
    large, draft = GPT(config).eval(), GPT(config).eval()
    prompt, length, draws = torch.tensor([[0, 2]]), 4, 3000

    def exact(model, text):
        probability, ids, first = 1.0, prompt[0].tolist(), 0
        for token in text:
            first = len(ids) - 2 if len(ids) - first > 4 else first
            logits = model(torch.tensor([ids[first:]]))[0, -1].double() / temperature
            probability *= logits.softmax(-1)[token].item()
            ids.append(token)
        return probability

    with torch.inference_mode():
        texts = list(product(range(3), repeat=length))
        wanted, other = (torch.tensor([exact(model, text) for text in texts]) for model in (large, draft))
    assert math.isclose(wanted.sum().item(), 1, rel_tol=1e-5)
    generator = torch.Generator().manual_seed(7)
    seen = Counter(
        tuple(
            speculative(large, draft, prompt, length, lookahead=3, temperature=temperature, generator=generator)[0][
                0, 2:
            ].tolist()
        )
        for _ in range(draws)
    )
    counts = torch.tensor([seen[text] for text in texts], dtype=torch.float)
    order = wanted.argsort(descending=True)
    groups = order.split(9)  # nine texts a group, so that none is rare

    def statistic(p):
        return sum(((counts[g].sum() - draws * p[g].sum()) ** 2 / (draws * p[g].sum())).item() for g in groups)

    assert statistic(wanted) < 27 < statistic(other)  # 8 degrees of freedom: 27 is passed once in a thousand


def test_speculation_is_repeatable_and_refuses_what_can_not_be():
    model, draft = make(), make(seed=2, n_layers=1)
    assert torch.equal(*(speculative(model, draft, prompts(1), 15, generator=4)[0] for _ in range(2)))
    for arguments, words in (
        (dict(lookahead=0), "lookahead"),
        (dict(temperature=-1), "temperature"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(draft=make(vocab_size=51)), "vocab_size"),
        (dict(draft=make(context_length=31)), "context_length"),
    ):
        with pytest.raises(InputError, match=words):
            speculative(**dict(model=model, draft=draft, ids=prompts(1), max_new_tokens=3) | arguments)


@pytest.mark.parametrize("changes", [dict(top_k=2), dict(top_p=0.6), dict(min_p=0.4, temperature=1.5)], ids=str)
def test_speculation_keeps_the_filtered_distribution(changes):
    "Tokens that the filters remove never come, and the others come as often as the large model says."
    large, draft = make(vocab_size=6), make(seed=3, vocab_size=6, n_layers=1)
    prompt = torch.tensor([[1, 4]])
    with torch.no_grad():
        p = filter_logits(large(prompt)[:, -1], **changes).softmax(-1)[0]
    generator, n = torch.Generator().manual_seed(5), 400
    drawn = [int(speculative(large, draft, prompt, 2, generator=generator, **changes)[0][0, 2]) for _ in range(n)]
    share = torch.bincount(torch.tensor(drawn), minlength=6) / n
    assert (share[p == 0] == 0).all() and ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_a_real_model_is_written_token_by_token_alike():
    pretrained = pytest.importorskip("transformer_llm.pretrained")
    try:
        model = pretrained.load_pretrained("smollm2")
    except InputError as error:
        pytest.skip(str(error))
    ids = torch.tensor([[504, 1789, 314, 260]])
    plain = generate(model, ids, 16, temperature=0)
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 16, temperature=0), plain)
    assert torch.equal(
        decoder.generate(ids, 16, generator=3, top_k=40), generate(model, ids, 16, generator=3, top_k=40)
    )
    assert torch.equal(speculative(decoder, Decoder(model, dtype="int8"), ids, 16, temperature=0)[0], plain)
    assert decoding.__all__


def test_rows_of_16_bits_are_multiplied_in_float32_where_a_processor_has_no_instructions_for_them(monkeypatch):
    monkeypatch.setattr(decoding, "lacks_16_bits", lambda x: True)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16(), torch.randn(5, 16).bfloat16()
    wanted = F.linear(x.float(), weight.float(), bias.float()).bfloat16()
    assert torch.equal(decoding.FloatMatrix(weight, bias)(x), wanted)


@pytest.mark.parametrize("columns", [1, 576, 1024, 1025, 5000])
def test_eight_bit_rows_are_multiplied_exactly_where_a_processor_has_no_instructions_for_them(monkeypatch, columns):
    "The largest sums there can be, and any others: the same whole numbers as from 64-bit ones."
    monkeypatch.setattr(decoding, "PIECE", 7 * columns)  # several pieces, the last one smaller
    generator = torch.Generator().manual_seed(0)
    for low in (127, -127):
        whole = torch.randint(low, 128, (decoding.MANY, columns), generator=generator).to(torch.int8)
        rows = torch.randint(low, 128, (24, columns), generator=generator).to(torch.int8)
        assert torch.equal(decoding.exact_product(whole, rows).long(), whole.long() @ rows.long().t())


def test_an_eight_bit_matrix_gives_the_same_by_either_product(monkeypatch):
    torch.manual_seed(0)
    matrix, x = decoding.Int8Matrix(torch.randn(24, 1100)), torch.randn(9, 1100)
    found = []
    for slow in (False, True):
        monkeypatch.setattr(decoding, "slow_in_8_bits", lambda: slow)
        found.append(matrix(x))
    assert torch.equal(*found)


def test_the_fastest_form_is_chosen_and_named(monkeypatch):
    "Eight bits for a model that is large enough where there is compiled code, the model itself where it is watched."
    model, said = make(), []
    assert fastest(model, say=said.append).kind == torch.float32
    monkeypatch.setattr(decoding, "WORTH_INT8", 1)
    monkeypatch.setattr(decoding, "why_no_kernel", lambda: "")
    assert fastest(model, say=said.append).kind == "int8" and fastest(model, exact=True).kind == torch.float32
    monkeypatch.setattr(decoding, "why_no_kernel", lambda: "numba is not installed")
    for native, kind in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(decoding, "native_bfloat16", lambda device, native=native: native)
        monkeypatch.setattr(decoding, "WIDE", 1)
        assert fastest(model).kind == kind
    model.blocks[0].attention.register_forward_hook(lambda *seen: None)
    assert fastest(model, say=said.append) is model
    assert all(line.startswith("Writing with chapter 13's decoder: ") for line in said[:2]) and len(said) == 3
    assert "float32" in said[0] and "int8" in said[1] and re.match("Writing with the plain model: .*hook", said[2])
