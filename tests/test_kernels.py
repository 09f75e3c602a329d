"""A token in one call: equal to the plain model with the same rounded weights, for every configuration, batch and kind.

Nothing is timed. The compiled functions are shared by all tests of this file.
"""
import contextlib
import copy
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("numba")

from transformer_llm import decoding, kernels
from transformer_llm.cli import main
from transformer_llm.decoding import Decoder, quantise_rows, speculative
from transformer_llm.foundations import InputError
from transformer_llm.generation import beam_search, generate
from transformer_llm.kernels import from_blocks, gguf_blocks, in_blocks, quantise_groups
from transformer_llm.model_files import GGUFFile
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig

BASE = GPTConfig(vocab_size=50, context_length=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.2)
CONFIGS = {
    "llama": {},
    "gpt2": GPT2_STYLE,
    "nano": dict(activation="relu2", qk_norm=True, n_kv_heads=4),
    "interleaved": dict(rope_interleaved=True, bias=True),
    "sinusoidal": dict(position="sinusoidal", tied_embeddings=False),
    "no positions": dict(position="none", output_bias=True, activation="gelu", norm="layernorm"),
    "whole norm": dict(qk_norm=True, qk_norm_whole=True),
    "one key head": dict(n_kv_heads=1, head_dim=16),
    "odd sizes": dict(d_model=36, head_dim=6, d_ff=50, vocab_size=61),
    "qkv bias": dict(qkv_bias=True),
    "linear": dict(rope_scaling=dict(kind="linear", factor=2.0)),
    "llama3": dict(rope_scaling=dict(kind="llama3", factor=4.0, original_context_length=16)),
    "yarn": dict(rope_scaling=dict(kind="yarn", factor=4.0, original_context_length=8)),
    "window": dict(window=5),
    "alibi": dict(position="alibi", n_heads=4),
    "post": dict(norm_placement="post"),
    "output": dict(norm_placement="output", qk_norm=True, qk_norm_whole=True),
    "post, layer norm": dict(norm_placement="post", norm="layernorm", bias=True),
}
KINDS = [torch.float32, torch.bfloat16, "int8", "int4"]


@pytest.fixture(autouse=True)
def small_models_stay_in_their_kind(monkeypatch):
    monkeypatch.setattr(decoding, "WIDE", 0)


def make(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(BASE.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts(rows=2, length=6, seed=1):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rounded(model: GPT, kind) -> GPT:
    "The plain model with the weights that a decoder of this kind keeps."
    plain = copy.deepcopy(model)
    for name, parameter in plain.named_parameters():
        if kind == torch.bfloat16:
            # tables and norms are kept in bfloat16 too
            parameter.copy_(parameter.bfloat16().float())
        elif parameter.ndim == 2 and "position" not in name and kind == "int8":
            whole, scale = quantise_rows(parameter)
            parameter.copy_(whole * scale)
        elif parameter.ndim == 2 and "position" not in name and kind == "int4":
            bits = 8 if "embedding" in name or "head" in name else 4
            parameter.copy_(from_blocks(*quantise_groups(parameter, bits))[: len(parameter)])
    return plain


def fill(cache, past, length):
    "Give the decoder's cache what the plain model has read, so that only single tokens are compared."
    for own, theirs in zip(cache, past):
        own.update(theirs.k[:, :, :length], theirs.v[:, :, :length])


# Equality
# ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_is_the_plain_models(unchecked, name, kind):
    "Single tokens behind a prompt, one to four rows, from an empty cache to a full one."
    model = make(**CONFIGS[name])
    if kind == "int4" and name == "odd sizes":
        pytest.skip("refused: see test_refusals")
    decoder, plain = Decoder(model, dtype=kind, kernel=True), rounded(model, kind)
    whole = name in ("llama", "window")
    for rows in (1, 2, 3, 4) if whole else (1, 3):
        ids = prompts(rows, 32, seed=rows)
        cache, past = decoder.new_cache(rows), plain.new_cache(rows)
        steps = range(32) if whole and rows == 1 else (0, 1, 9, 31)
        with torch.no_grad():
            for t in steps:
                if cache[0].length < t:
                    for layer in (*cache, *past):
                        layer.reset()
                    plain(ids[:, :t], cache=past)
                    fill(cache, past, t)
                got, wanted = decoder(ids[:, t : t + 1], cache=cache), plain(ids[:, t : t + 1], cache=past)
                torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)
                assert [layer.length for layer in cache] == [t + 1] * 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_plain_python_is_the_same_function(kind):
    model = make(**GPT2_STYLE, n_layers=1)
    decoder = Decoder(model, dtype=kind, kernel=True)
    found = []
    for slow in (True, False):
        cache, work = decoder.new_cache(3), kernels.workspace(decoder.config, 3, 32)
        engine = kernels.TokenKernel(decoder)
        for t in range(2):
            engine.step(prompts(3)[:, t], cache.kv, t, work, slow=slow)
        found.append((work.logits[:3].copy(), work.choice.copy()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5, rtol=1e-4)
    assert np.array_equal(found[0][1], found[1][1])


def ties(model, ids, wanted, got):
    "Where two greedy texts part: the gap between the two tokens' logits in the plain model."
    at = int((wanted != got).any(0).nonzero()[0])
    logits = model(wanted[:, :at])[:, -1]
    return (logits.gather(1, wanted[:, at : at + 1]) - logits.gather(1, got[:, at : at + 1])).abs().max().item()


@pytest.mark.parametrize("name", ["llama", "gpt2", "window", "alibi", "post", "output"])
def test_greedy_and_sampled_texts(unchecked, name):
    "Past the context length as well, where the window slides; a text may only part at a tie."
    model = make(**CONFIGS[name])
    decoder = Decoder(model, kernel=True)
    for rows, options in ((1, dict(temperature=0)), (3, dict(temperature=0)), (2, {}), (1, dict(stop_tokens=[7]))):
        wanted = generate(model, prompts(rows), 40, generator=5, **options)
        for got in (
            decoder.generate(prompts(rows), 40, generator=5, **options),
            generate(decoder, prompts(rows), 40, generator=5, **options),
        ):
            assert torch.equal(got, wanted) or ties(model, prompts(rows), wanted, got) < 1e-5, name


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_write_the_same_greedy_text_by_both_loops(kind):
    decoder = Decoder(make(), dtype=kind, kernel=True)
    for rows in (1, 4):
        text = decoder.generate(prompts(rows), 20, temperature=0)
        assert torch.equal(text, generate(decoder, prompts(rows), 20, temperature=0))


def test_two_threads_give_what_one_gives(monkeypatch):
    "A row's sum belongs to one thread, so not even the last bit depends on their number."
    decoder = Decoder(make(), kernel=True)
    engine, found = kernels.TokenKernel(decoder), []
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 2)
    for threads in (1, 2):
        monkeypatch.setattr(kernels.torch, "get_num_threads", lambda threads=threads: threads)
        cache, work = decoder.new_cache(4), kernels.workspace(decoder.config, 4, 32)
        engine.step(prompts(4)[:, 0], cache.kv, 0, work)
        assert engine.sizes.threads == threads
        found.append(work.logits.copy())
    assert np.array_equal(*found)


def test_callers_in_several_threads_take_turns():
    decoders = [Decoder(make(seed), kernel=True) for seed in range(3)]
    wanted = [decoder.generate(prompts(1), 20, temperature=0) for decoder in decoders]
    found = [None] * 3

    def write(i):
        found[i] = decoders[i].generate(prompts(1), 20, temperature=0)

    threads = [threading.Thread(target=write, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, wanted))


def test_what_is_returned_is_the_callers_own():
    decoder = Decoder(make(), kernel=True)
    cache = decoder.new_cache(1)
    one = decoder(prompts(1, 1), cache=cache)
    saved = one.clone()
    decoder(prompts(1, 1, seed=4), cache=cache)
    assert torch.equal(one, saved)
    assert torch.equal(beam_search(decoder, prompts(), 12, n_beams=3), beam_search(make(), prompts(), 12, n_beams=3))
    large, small = make(), make(seed=4, n_layers=1, context_length=40)
    pair = [Decoder(model, kernel=True) for model in (large, small)]
    text, _ = speculative(*pair, prompts(1), 20, temperature=0)
    assert torch.equal(text, generate(large, prompts(1), 20, temperature=0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_that_are_not_numbers_are_refused(kind):
    for name in ("blocks.1.attention.q_proj.weight", "blocks.1.feedforward.down.weight", "final_norm.weight"):
        model = make()
        with torch.no_grad():
            model.get_parameter(name)[3 if "norm" in name else (3, 4)] = torch.nan
        decoder = Decoder(model, dtype=kind, kernel=True)
        cache, token = decoder.new_cache(1), prompts(1, 1)[0]
        with torch.inference_mode():
            decoder.kernel_step(token, cache)
            with pytest.raises(InputError, match="logits are not numbers"):
                decoder.take_likeliest(token, cache, torch.zeros(1, dtype=torch.long))
        with pytest.raises(InputError, match="logits are not numbers"):
            decoder.generate(prompts(1), 4, temperature=0)


# Four bits
# ----------------------------------------------------------------------------------------------------------------

def test_half_numbers_are_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    bits = bits[finite][::7]
    assert [kernels.half(b) for b in bits] == bits.view(np.float16).astype(np.float32).tolist()


@pytest.mark.parametrize("rows", [1, 32, 45])
def test_groups_are_off_by_half_a_step_and_keep_their_own_grid(rows):
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    weight[0, :32] = 0
    for bits, steps in ((4, 15), (8, 254)):
        numbers, words = quantise_groups(weight, bits)
        back = from_blocks(numbers, words)[:rows]
        groups, off = weight.unflatten(1, (2, 32)), (back - weight).unflatten(1, (2, 32)).abs().amax(-1)
        wide = groups.amax(-1) - groups.amin(-1) if bits == 4 else 2 * groups.abs().amax(-1)
        assert (off <= 0.51 * wide / steps * (2 if bits == 4 else 1) + 1e-3 * groups.abs().amax(-1)).all()
        assert torch.equal(from_blocks(*quantise_groups(back, bits))[:rows], back)
        assert numbers.shape == (-(-rows // 32), 2, 16 if bits == 4 else 32, 32)


def test_the_order_of_blocks_by_hand():
    whole = (torch.arange(33 * 64).view(33, 64) * 7) % 16
    step, offset = torch.rand(33, 2).half().float(), torch.rand(33, 2).half().float()
    back = from_blocks(*in_blocks(whole, step, offset, 4))[:33]
    for row, column in ((0, 0), (31, 15), (31, 16), (32, 63), (5, 40)):
        assert back[row, column] == whole[row, column] * step[row, column // 32] + offset[row, column // 32]


class FakeFile(GGUFFile):
    "What `gguf_blocks` needs of a file."

    label = "fake.gguf"

    def __init__(self, kind, weight):
        import gguf

        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(weight.numpy(), kind)
        self.wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
        self.tensors = {"w": type("Tensor", (), dict(tensor_type=kind, data=data, shape=tuple(weight.shape)))()}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_files_numbers_are_not_rounded_again(kind):
    "Read straight from the file, and found again from its float32 form; the package gguf is the reference."
    file = FakeFile(kind, torch.randn(40, 96, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(from_blocks(*gguf_blocks(file, "w"))[:40], file.wanted)
    assert torch.equal(from_blocks(*quantise_groups(file.wanted, 8 if kind == "Q8_0" else 4))[:40], file.wanted)


def test_another_type_of_a_file_is_refused():
    with pytest.raises(InputError, match="w of fake.gguf has the type Q5_0, not Q4_0, Q4_1 or Q8_0"):
        gguf_blocks(FakeFile("Q5_0", torch.randn(32, 32)), "w")


# Choice, refusal, counts
# ----------------------------------------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def test_operator_calls_for_a_token_do_not_depend_on_the_model():
    found = []
    for layers in (1, 3):
        decoder = Decoder(make(n_layers=layers), kernel=True)
        cache, token, out = decoder.new_cache(1), torch.tensor([3]), torch.zeros(1, dtype=torch.long)
        with torch.inference_mode():
            decoder.take_likeliest(token, cache, out)
            with Calls() as calls:
                assert decoder.take_likeliest(token, cache, out)
        found.append(calls.n)
    stepped, cache = Decoder(make(n_layers=3), kernel=False), decoder.new_cache(1)
    with torch.inference_mode(), Calls() as calls:
        stepped.token_logits(token, cache)
    assert found[0] == found[1] and 3 * found[1] < calls.n, (found, calls.n)


def test_the_kernel_is_chosen_by_itself(monkeypatch):
    tiny = Decoder(make())
    assert tiny.describe() == "float32, torch (the model is tiny)" and not tiny.has_kernel(1)
    monkeypatch.setattr(decoding, "KERNEL_FROM", 0)
    decoder = Decoder(make(), dtype="int8")
    assert decoder.describe() == "int8, compiled by Numba"
    assert decoder.has_kernel(4) and not decoder.has_kernel(5)
    assert Decoder(make(), kernel=False).describe() == "float32, torch (kernel=False)"
    assert torch.equal(
        decoder.generate(prompts(5), 9, temperature=0),
        Decoder(make(), dtype="int8", kernel=False).generate(prompts(5), 9, temperature=0),
    )  # more rows than the kernel takes
    assert "float16" in Decoder(make(), dtype=torch.float16).describe()


def test_without_numba_torch_decodes(monkeypatch):
    for module in (decoding, kernels):
        monkeypatch.setattr(module, "why_no_kernel", lambda: "numba is not installed")
    monkeypatch.setattr(decoding, "KERNEL_FROM", 0)
    decoder = Decoder(make(), dtype="int4")
    assert decoder.describe() == "int4, torch (numba is not installed)"
    plain = rounded(make(), "int4")
    ids = prompts(2, 9)
    torch.testing.assert_close(decoder(ids), plain(ids).detach(), atol=3e-5, rtol=1e-4)
    assert torch.equal(decoder.generate(ids, 12, temperature=0), generate(plain, ids, 12, temperature=0))
    with pytest.raises(InputError, match=r"numba is not installed: pip install 'transformer_llm\[kernels\]'"):
        Decoder(make(), kernel=True)


def test_nothing_loads_numba_before_it_is_needed():
    code = "import sys, transformer_llm.decoding, transformer_llm.kernels; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_refusals():
    for arguments, words in (
        (dict(kernel="yes"), "kernel must be True, False"),
        (dict(kernel=True, dtype=torch.float16), "impossible, because the weights are torch.float16"),
        (dict(dtype="int3"), 'or "int4", not'),
    ):
        with pytest.raises(InputError, match=words):
            Decoder(make(), **arguments)
    for changes, words in ((dict(head_dim=6), "n_heads · head_dim is 24"), (dict(d_ff=50), "d_ff is 50")):
        with pytest.raises(InputError, match=f'dtype="int4" needs multiples of 32, but {words}; use "int8"'):
            Decoder(make(**changes), dtype="int4")
    dynamic = make(rope_scaling=dict(kind="dynamic", factor=2.0, original_context_length=16))
    with pytest.raises(InputError, match="dynamic"):
        Decoder(dynamic, kernel=True)
    hooked = make()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hook"):
        Decoder(hooked, kernel=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_decoder_stays_where_it_was_made(kind):
    decoder = Decoder(make(), dtype=kind, kernel=False)
    for move in (lambda: decoder.to("meta"), decoder.double, decoder.half):
        with pytest.raises(InputError, match="stays where it was made"):
            move()
    assert decoder.to("cpu") is decoder and decoder.to(decoder.dtype) is decoder


@pytest.mark.parametrize("token", [-1, 50])
def test_a_token_that_there_is_not_is_refused_as_by_torch(token):
    decoder = Decoder(make(), kernel=True)
    for form in (decoder, make()):
        with pytest.raises(IndexError):
            form(torch.tensor([[token]]), cache=form.new_cache(1))


def test_a_full_cache_and_another_cache_go_the_usual_way():
    decoder = Decoder(make(), kernel=True)
    cache = decoder.new_cache(1, 2)
    decoder(prompts(1, 2), cache=cache)
    with pytest.raises(InputError, match="can't take token 3"):
        decoder(prompts(1, 1), cache=cache)
    assert decoder.kernel_step(torch.tensor([1, 2]), decoder.new_cache(1)) is None
    assert decoder.kernel_step(torch.tensor([1]), Decoder(make(n_layers=1)).new_cache(1)) is None


def test_prompt_and_kernel_share_their_weights():
    decoder = Decoder(make(d_model=512, n_heads=4, d_ff=512), dtype="int8", kernel=True)
    decoder.generate(prompts(1), 3, temperature=0)
    matrix = decoder.blocks[1].feedforward.up
    assert np.shares_memory(matrix.rows.numpy(), decoder.engine.model.up.numbers)
    assert decoder.engine.model.table is decoder.engine.model.head


def test_a_long_compilation_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "PATIENCE", 0.0)
    monkeypatch.setattr(kernels, "READY", set())
    slow = lambda *_: threading.Event().wait(0.3)
    monkeypatch.setattr(kernels, "compiled", lambda: slow)
    decoder = Decoder(make(), kernel=True)
    cache = decoder.new_cache(1)
    decoder.kernel_step(torch.tensor([1]), cache)
    decoder.kernel_step(torch.tensor([1]), cache)
    assert capsys.readouterr().err == "Compiling the decoder for weights in float32, once; it is kept on disk ...\n"


def test_info_says_whether_kernels_are_there(monkeypatch):
    for why, words in (("", "numba 0."), ("numba is not installed", "no: numba is not installed; pip install")):
        monkeypatch.setattr(kernels, "why_no_kernel", lambda why=why: why)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["info"]) == 0
        row = next(line for line in out.getvalue().splitlines() if line.startswith("kernels"))
        assert words in row


def test_torch_keeps_its_number_of_threads():
    "Numba's threads and torch's are one pool, whose size its start sets: it is set back (in a process of its own)."
    code = """
import torch
from transformer_llm.decoding import Decoder
from transformer_llm.transformer import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(vocab_size=50, context_length=32, d_model=16, n_layers=1, n_heads=2))
Decoder(model, kernel=True).generate(torch.zeros(1, 3, dtype=torch.long), 3)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["1"], done.stderr
