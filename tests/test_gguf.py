"""GGUF files that the book writes: read back as the same model, run by llama.cpp, and nothing half-written."""
import errno
import importlib.util
import os
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from transformer_llm.cli import main
from transformer_llm.embeddings import RopeScaling
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.gguf_files import GGUF_KINDS, export_gguf, gguf_family, gguf_pattern
from transformer_llm.model_files import open_gguf
from transformer_llm.pretrained import chat_settings, load_pretrained, load_pretrained_tokenizer
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig

TEXT = "the cat sat on the mat, and the dog ate the cat's hat: 1234 5678.\nNaïve café, ☃ und Straße; 東京 " * 30
TOKENIZER = BPETokenizer.train(TEXT, 300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
SHAPE = dict(vocab_size=310, context_length=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96)
LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=16)
MODELS = {  # architecture, and what the model has of it
    "llama": ("llama", {}),
    "untied": ("llama", dict(tied_embeddings=False)),
    "neighbours turn": ("llama", dict(rope_interleaved=True)),
    "wide heads": ("llama", dict(head_dim=32)),
    "linear": ("llama", dict(rope_scaling=RopeScaling("linear", factor=4.0))),
    "llama3": ("llama", dict(rope_scaling=LLAMA3)),
    "qwen2": ("qwen2", dict(qkv_bias=True)),
    "qwen3": ("qwen3", dict(qk_norm=True)),
    "qwen3, neighbours turn": ("qwen3", dict(qk_norm=True, rope_interleaved=True)),
    "olmo2": ("olmo2", dict(norm_placement="output", qk_norm=True, qk_norm_whole=True, tied_embeddings=False)),
    "gpt2": ("gpt2", GPT2_STYLE | dict(n_kv_heads=4)),
}
TEXTS = [
    "the cat's hat", "  two  spaces\n\n and\ttabs \r\n", "Naïve café ☃ 東京 1234567", "ABC'LL don't", "", " ",
    "🦊\u0301x", "<|im_start|>user\nthe mat<|im_end|>\n", "price: $5.99 (−3%)", "\x00\x7f", "a" * 50,
]


def make_model(**changes) -> GPT:
    "A model whose logits are far from zero and from each other, with weights of 16 bits."
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.12
            parameter.copy_((noise + ("norm.weight" in name)).half().float())
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {name: make_model(**changes) for name, (_, changes) in MODELS.items()}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))


def logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None])[0]


# ---- reading our own file back


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_the_same_model_comes_back(models, ids, tmp_path, name, kind):
    model = models[name]
    again = load_pretrained(export_gguf(model, tmp_path / "m.gguf", TOKENIZER, kind=kind))
    assert open_gguf(tmp_path / "m.gguf").value("general.architecture") == MODELS[name][0]
    if model.config.rope_interleaved:  # read as halves: another order of the rows, the same function
        assert largest_difference(logits(again, ids), logits(model, ids)) < 2e-5
        return
    if name == "llama3":  # a file has each pair's divisor instead of the rule
        assert largest_difference(logits(again, ids), logits(model, ids)) < 2e-5
    else:
        eps = again.config.norm_eps
        assert abs(eps - 1e-5) < 1e-12 and again.config == model.config.replace(norm_eps=eps)
    theirs = dict(again.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_come_back_as_their_numbers(models, tmp_path, kind):
    "An independent reference for Llama: the matrix packed as it is, since blocks don't reach over rows."
    model = models["untied"]
    again = dict(load_pretrained(export_gguf(model, tmp_path / "m.gguf", TOKENIZER, kind=kind)).named_parameters())
    form = GGMLQuantizationType[kind.upper()]
    for name, parameter in model.named_parameters():
        wanted = parameter.detach().numpy()
        if wanted.ndim == 2:
            wanted = dequantize(quantize(wanted, form), form)
            assert not np.array_equal(wanted, parameter.detach().numpy())
        assert np.array_equal(again[name].detach().numpy(), wanted), name


@pytest.mark.parametrize("settings", [
    dict(pattern="gpt2"), dict(pattern="smollm"), dict(pattern="llama3", ignore_merges=True), dict(pattern="llama3"),
    dict(pattern="qwen2", normalization="NFC"), dict(pattern="qwen2"),
])
def test_tokenizer_comes_back(models, tmp_path, settings):
    t = TOKENIZER
    named = t.special_tokens | {"<think>": 300}
    tokenizer = BPETokenizer(t.vocab, t.merges, t.special_tokens, added_tokens=named, **settings)
    path = export_gguf(models["llama"], tmp_path / "m.gguf", tokenizer)
    again = load_pretrained_tokenizer(path)
    assert (again.pattern, again.ignore_merges, again.normalization, again.prefix) == (
        tokenizer.pattern, tokenizer.ignore_merges, tokenizer.normalization, tokenizer.prefix)
    assert again.special_tokens == tokenizer.special_tokens and "<think>" in again.added_tokens
    for text in [*TEXTS, "hm <think> so"]:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_prefix_template_and_ends_come_back(models, tmp_path):
    t = TOKENIZER
    tokenizer = BPETokenizer(t.vocab, t.merges, t.special_tokens, prefix=[t.special_tokens["<|im_start|>"]])
    ends = [t.special_tokens["<|im_end|>"], t.special_tokens["<|endoftext|>"]]
    path = export_gguf(models["llama"], tmp_path / "m.gguf", tokenizer, chat_template="{{ messages }}",
                       eos_token="<|endoftext|>", stop_tokens=ends)
    settings = chat_settings(path)
    assert settings.template == "{{ messages }}" and set(settings.stop_tokens) == set(ends)
    assert (settings.bos_token, settings.eos_token) == ("<|im_start|>", "<|endoftext|>")
    assert load_pretrained_tokenizer(path).prefix == tokenizer.prefix


# ---- llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    if importlib.util.find_spec("cyllama") is None:
        pytest.skip("llama.cpp isn't here: the package cyllama is installed on Linux on x86-64 only")
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    return llama_cpp


class Theirs:
    "A file as llama.cpp reads it, with keys and values in 32 bits."

    def __init__(self, library, path):
        class Model(library.LlamaModel):
            n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which the package asks for

        parameters = library.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self.library, self.model = library, Model(str(path), parameters)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        parameters = self.library.LlamaContextParams()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
        parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0
        context = self.library.LlamaContext(self.model, parameters)
        batch = self.library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for position, token in enumerate(ids.tolist()):
            batch.add(token, position, [0], True)
        context.decode(batch)
        return torch.tensor([context.get_logits_ith(i) for i in range(len(ids))])


def greedy(logits_of, ids: torch.Tensor, n: int) -> list[int]:
    for _ in range(n):
        ids = torch.cat([ids, logits_of(ids)[-1].argmax()[None]])
    return ids.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_our_logits(llama_cpp, models, ids, tmp_path, name):
    "In 32 bits, but for GPT-2's GELU, which llama.cpp looks up in a table of numbers of 16 bits."
    theirs = Theirs(llama_cpp, export_gguf(models[name], tmp_path / "m.gguf", TOKENIZER, kind="f32"))
    ours, given = logits(models[name], ids), theirs.logits(ids)
    difference = largest_difference(given, ours)
    print(f"\n{name}: largest difference {difference:.1e} of logits with a spread of {ours.std():.2f}")
    assert difference < (1e-2 if name == "gpt2" else 1e-4)
    assert torch.equal(given.argmax(-1), ours.argmax(-1))


def test_llama_cpp_greedy_answers_are_ours(llama_cpp, models, ids, tmp_path):
    for name in ("untied", "olmo2"):
        theirs = Theirs(llama_cpp, export_gguf(models[name], tmp_path / f"{name}.gguf", TOKENIZER, kind="f16"))
        ours = greedy(lambda part: logits(models[name], part), ids[:8], 24)
        assert greedy(theirs.logits, ids[:8], 24) == ours and len(set(ours[8:])) > 3


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_llama_cpp_rounds_no_more_than_its_arithmetic(llama_cpp, models, ids, tmp_path, kind):
    """llama.cpp rounds what enters a matrix to 16 bits (f16), or to blocks of 8 bits (q8_0, q4_0). The same rounding of
    our model's inputs is the witness: its error has the size of llama.cpp's.
    """
    path = export_gguf(models["llama"], tmp_path / "m.gguf", TOKENIZER, kind=kind)
    again = load_pretrained(path)
    exact, given = logits(again, ids), Theirs(llama_cpp, path).logits(ids)

    def rounded(module, inputs):
        form = GGMLQuantizationType[{"f16": "F16"}.get(kind, "Q8_0")]
        return (torch.from_numpy(dequantize(quantize(inputs[0].numpy(), form), form).copy()),)

    if kind != "f32":
        for module in again.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded)
        again.final_norm.register_forward_hook(lambda module, inputs, output: rounded(module, (output,))[0])
    ours = logits(again, ids)
    error = (given - exact).square().mean().sqrt()
    print(f"\n{kind}: llama.cpp is off by {error:.1e} (root mean square), our rounding by "
          f"{(ours - exact).square().mean().sqrt():.1e}, the two differ by {(given - ours).square().mean().sqrt():.1e}")
    if kind == "f32":
        assert error < 1e-5
    else:
        assert 0.5 < error / (ours - exact).square().mean().sqrt() < 2


def test_llama_cpp_reads_our_tokenizer(llama_cpp, models, tmp_path):
    t = TOKENIZER
    for settings in (dict(pattern="gpt2"), dict(pattern="smollm"), dict(pattern="llama3", ignore_merges=True),
                     dict(pattern="llama3"), dict(pattern="qwen2")):
        tokenizer = BPETokenizer(t.vocab, t.merges, t.special_tokens, **settings)
        theirs = Theirs(llama_cpp, export_gguf(models["llama"], tmp_path / "m.gguf", tokenizer, overwrite=True))
        vocab = theirs.model.get_vocab()
        for text in TEXTS:
            assert vocab.tokenize(text, True, True) == tokenizer.encode(text), (settings, text)
        assert vocab.token_eos() == tokenizer.special_tokens["<|endoftext|>"] and not vocab.is_eog(11)


def test_llama_cpp_puts_the_prefix(llama_cpp, models, tmp_path):
    t = TOKENIZER
    first = t.special_tokens["<|im_start|>"]
    tokenizer = BPETokenizer(t.vocab, t.merges, t.special_tokens, prefix=[first])
    theirs = Theirs(llama_cpp, export_gguf(models["llama"], tmp_path / "m.gguf", tokenizer))
    assert theirs.model.get_vocab().tokenize("the cat", True, True) == [first, *tokenizer.encode("the cat")]


def test_llama_cpp_runs_a_model_without_a_tokenizer(llama_cpp, models, ids, tmp_path):
    theirs = Theirs(llama_cpp, export_gguf(models["llama"], tmp_path / "m.gguf", kind="f32"))
    assert largest_difference(theirs.logits(ids), logits(models["llama"], ids)) < 1e-4


def test_rows_in_the_other_order_are_noticed(llama_cpp, models, ids, tmp_path, monkeypatch):
    "The comparison above can fail: without the change of rows, it does."
    monkeypatch.setattr("transformer_llm.gguf_files.half_to_interleaved", lambda rows, heads: rows)
    theirs = Theirs(llama_cpp, export_gguf(models["llama"], tmp_path / "m.gguf", TOKENIZER, kind="f32"))
    assert largest_difference(theirs.logits(ids), logits(models["llama"], ids)) > 0.1


# ---- refusals


@pytest.mark.parametrize("changes, sentence", [
    (dict(window=16), "window=16 has no place"),
    (dict(bias=True), "bias=True has no place"),
    (GPT2_STYLE | dict(n_kv_heads=4, activation="gelu"), "activation='gelu' has no place"),
    (dict(rope_scaling=LLAMA3, qkv_bias=True), "qwen2: rope_scaling='llama3'"),
    (dict(rope_scaling=LLAMA3, qk_norm=True), "qwen3: rope_scaling='llama3'"),
    (dict(rope_scaling=RopeScaling("yarn", factor=4.0, original_context_length=16)), "rope_scaling='yarn'"),
    (dict(rope_scaling=RopeScaling("dynamic", factor=2.0, original_context_length=64)), "rope_scaling='dynamic'"),
    (dict(norm_placement="output", qk_norm=True, qk_norm_whole=True), "tied_embeddings=True has no place"),
    (dict(activation="relu2"), "activation='relu2' has no counterpart"),
    (dict(position="alibi"), "position='alibi' has no counterpart"),
])
def test_configurations_that_have_no_place(changes, sentence):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        gguf_family(GPTConfig(**SHAPE | changes))


def test_tokenizers_that_would_be_read_differently(models, tmp_path):
    t, model = TOKENIZER, models["llama"]
    small = {token: i for token, i in t.vocab.items() if token != b"\x00"}
    tokenizers = {
        "character tokenizer": CharTokenizer.train(TEXT),
        "no special token that ends": BPETokenizer.train(TEXT, 290, special_tokens=[]),
        "without all 256 bytes": BPETokenizer(small, t.merges, t.special_tokens),
        "pattern='cl100k'": BPETokenizer(t.vocab, t.merges, t.special_tokens, pattern="cl100k"),
        "begins with": BPETokenizer(t.vocab, t.merges, t.special_tokens, prefix=list(t.special_tokens.values())[:2]),
        "without merges": BPETokenizer.train(TEXT, 257),
    }
    for sentence, tokenizer in tokenizers.items():
        with pytest.raises(InputError, match=sentence):
            export_gguf(model, tmp_path / "m.gguf", tokenizer)
    with pytest.raises(InputError, match="room for 3 tokens"):
        export_gguf(model, tmp_path / "m.gguf", t, stop_tokens=[1, 2, 3])
    assert list(tmp_path.iterdir()) == [] and gguf_pattern(t) == "gpt-2"


def test_numbers_that_have_no_place(tmp_path):
    model = make_model()
    for value, sentence in ((70_000.0, "f16 ends at 65,504"), (float("nan"), "NaN or infinite")):
        with torch.no_grad():
            model.blocks[1].feedforward.up.weight[3, 5] = value
        with pytest.raises(InputError, match=sentence):
            export_gguf(model, tmp_path / "m.gguf", TOKENIZER)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="d_ff is 90, which is not a multiple of 32"):
        export_gguf(make_model(d_ff=90), tmp_path / "m.gguf", TOKENIZER, kind="q8_0")


def test_a_full_disk_leaves_the_old_file(models, tmp_path, monkeypatch):
    path = export_gguf(models["llama"], tmp_path / "m.gguf", TOKENIZER)
    before = path.read_bytes()
    with pytest.raises(InputError, match="already exists"):
        export_gguf(models["llama"], path, TOKENIZER)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformer_llm.gguf_files.os.fsync", full)
    with pytest.raises(InputError, match="Can't write"):
        export_gguf(models["qwen3"], path, TOKENIZER, overwrite=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_header_by_hand(models, tmp_path):
    "What the file begins with, read by struct alone, and where its tensors lie."
    path = export_gguf(models["gpt2"], tmp_path / "m.gguf", TOKENIZER)
    magic, version, n_tensors, _ = struct.unpack("<4sIQQ", path.read_bytes()[:24])
    assert (magic, version) == (b"GGUF", 3)
    assert n_tensors == 2 + 2 + 2 * 12  # embeddings, last norm, and in a layer 4 matrices, 4 biases and 2 norms
    file = open_gguf(path)
    assert file.tensors["position_embd.weight"].tensor_type.name == "F32"
    assert file.tensors["blk.0.attn_qkv.weight"].shape == (192, 64)


# ---- the command


def test_command(models, tmp_path, capsys):
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    export_gguf(models["llama"], source, TOKENIZER, kind="f32", chat_template="{{ messages }}")
    command = ["export", "--checkpoint", str(source), "--gguf", str(target)]
    assert main([*command, "--type", "q8_0"]) == 0
    assert open_gguf(target).tensors["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    assert chat_settings(target).template == "{{ messages }}"
    wrong = {
        "already exists": command,
        "--type works only with --gguf": ["export", "--checkpoint", str(source), "--hf", str(tmp_path / "x"),
                                         "--type", "f16"],
        "--with_cache works only with --onnx": [*command, "--overwrite", "--with_cache"],
        "type must be one of": [*command, "--type", "q5_1"],
        "not allowed with": [*command, "--hf", str(tmp_path / "x")],
    }
    for sentence, words in wrong.items():
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        assert sentence in said or sentence == "type must be one of", said
