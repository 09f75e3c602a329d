"""What is given away: transformers, tokenizers, onnxruntime and lm_eval read what the book writes, and nothing is
half-written.
"""
import copy
import errno
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as shape_checks
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from transformer_llm import export
from transformer_llm.cli import main
from transformer_llm.embeddings import RopeScaling
from transformer_llm.export import (
    export_onnx,
    family_of,
    hf_config,
    onnx_names,
    plan_shards,
    save_pretrained,
    token_roles,
)
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.pretrained import chat_settings
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig, PRESETS

ROOT = Path(__file__).parent.parent
TEXT = "the cat sat on the mat, and the dog ate the cat's hat: 1234 5678.\nNaïve café, ☃ und Straße; 東京 " * 30
BPE = BPETokenizer.train(TEXT, 300)
SHAPE = dict(vocab_size=300, context_length=32, d_model=32, n_layers=2, n_heads=4)
OLMO2 = dict(norm_placement="output", qk_norm=True, qk_norm_whole=True)
LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=16)
YARN = RopeScaling("yarn", factor=4.0, original_context_length=16)
DYNAMIC = RopeScaling("dynamic", factor=2.0, original_context_length=32)
MODELS = {  # family, and what the model has of it
    "gpt2": ("gpt2", GPT2_STYLE),
    "gpt2 with exact GELU, untied, narrow": (
        "gpt2",
        GPT2_STYLE | dict(activation="gelu", tied_embeddings=False, d_ff=40, norm_eps=1e-3),
    ),
    "llama": ("llama", {}),
    "llama with grouped queries, interleaved": ("llama", dict(n_kv_heads=2, rope_interleaved=True)),
    "llama with biases, wide heads, interleaved": (
        "llama",
        dict(bias=True, head_dim=12, rope_interleaved=True, rope_base=5e5, norm_eps=1e-3),
    ),
    "llama untied": ("llama", dict(tied_embeddings=False)),
    "llama scaled linearly": ("llama", dict(rope_scaling=RopeScaling("linear", factor=4.0))),
    "llama scaled by YaRN, interleaved": ("llama", dict(rope_scaling=YARN, rope_interleaved=True)),
    "llama scaled by YaRN, all fields": (
        "llama",
        dict(rope_scaling=replace(YARN, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=1.3)),
    ),
    "qwen3 scaled by length": ("qwen3", dict(qk_norm=True, rope_scaling=DYNAMIC)),
    "llama 3's scaling, interleaved": ("llama", dict(rope_scaling=LLAMA3, rope_base=5e5, rope_interleaved=True)),
    "llama whose window is no window": ("llama", dict(window=32)),
    "mistral": ("mistral", dict(window=7, n_kv_heads=1)),
    "mistral with heads that don't divide": ("mistral", dict(n_heads=3, head_dim=10)),
    "qwen2": ("qwen2", dict(qkv_bias=True, n_kv_heads=2, rope_interleaved=True, head_dim=10)),
    "qwen2 with a window": ("qwen2", dict(qkv_bias=True, window=6)),
    "qwen3": ("qwen3", dict(qk_norm=True, n_kv_heads=2, head_dim=6, rope_interleaved=True)),
    "qwen3 with a window, scaled": ("qwen3", dict(qk_norm=True, window=5, rope_scaling=LLAMA3)),
    "olmo2": ("olmo2", OLMO2 | dict(n_kv_heads=2, rope_interleaved=True)),
    "olmo2 with narrow heads, untied": ("olmo2", OLMO2 | dict(head_dim=6, tied_embeddings=False)),
}
# the largest one measured is 1.1e-5, where the rows of an interleaved model are added in another order
DIFFERENCE = 5e-5
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_model(seed: int = 0, **changes) -> GPT:
    "A model whose every parameter matters: norms and biases are random too."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def read_back(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sentence(error) -> str:
    "The one sentence of a refusal."
    message = str(error.value)
    assert "\n" not in message and message.endswith("." if "pip install" not in message else "onnxscript")
    return message


# transformers computes the same

@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(tmp_path, name):
    family, changes = MODELS[name]
    model = make_model(**changes)
    assert family_of(model.config) == family and model.save_pretrained(tmp_path / "m", BPE) == tmp_path / "m"
    theirs, ids = read_back(tmp_path / "m"), torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = largest_difference(theirs(ids).logits, model(ids))
    print(f"\n{name}: largest difference {difference:.1e} of logits up to {model(ids).abs().max():.1f}")
    assert difference < DIFFERENCE
    start = ids[:1, :5]
    options = dict(max_new_tokens=20, do_sample=False)
    written = theirs.generate(start, attention_mask=torch.ones_like(start), **options)
    assert (
        written.tolist() == generate(model, start, 20, temperature=0, stop_tokens=BPE.special_tokens.values()).tolist()
    )
    keys = safe_open(tmp_path / "m" / "model.safetensors", "pt")
    assert keys.metadata() == {"format": "pt"} and sorted(keys.keys()) == sorted(
        set(theirs.state_dict()) - (set() if "lm_head.weight" in keys.keys() else {"lm_head.weight"})
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_book_reads_it_back(tmp_path, name):
    model = make_model(**MODELS[name][1])
    save_pretrained(model, tmp_path / "m")
    back = GPT.from_pretrained(tmp_path / "m", dtype=None)
    for ours, theirs in zip(model.config.to_dict().items(), back.config.to_dict().items()):
        if ours[0] not in ("rope_interleaved", "window"):
            assert ours == theirs
    if not model.config.rope_interleaved:
        assert all(map(torch.equal, model.parameters(), back.parameters()))
    ids = torch.randint(300, (2, 32))
    assert largest_difference(model(ids), back(ids)) < DIFFERENCE
    save_pretrained(back, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "m")  # also from an interleaved model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_keep_their_type(tmp_path, dtype):
    model = make_model(**GPT2_STYLE).to(dtype)
    save_pretrained(model, tmp_path / "m")
    theirs, back = read_back(tmp_path / "m"), GPT.from_pretrained(tmp_path / "m", dtype=None)
    assert theirs.dtype == dtype and all(
        tensor.dtype == dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()
    )
    assert all(map(torch.equal, model.parameters(), back.parameters()))


def test_rotary_fields_are_read_by_new_and_by_old_transformers():
    c = hf_config(GPTConfig(**SHAPE, rope_base=5e5, rope_scaling=LLAMA3))
    assert c["rope_theta"] == 5e5 and c["rope_scaling"] == {
        k: v for k, v in c["rope_parameters"].items() if k != "rope_theta"
    }
    for missing in (("rope_parameters",), ("rope_theta", "rope_scaling"), ()):  # each version's fields alone, and both
        read = AutoConfig.for_model(**{name: value for name, value in copy.deepcopy(c).items() if name not in missing})
        assert read.rope_parameters == c["rope_parameters"], missing


def test_dropout_and_other_fields_of_training_are_written():
    assert hf_config(GPTConfig(**SHAPE, dropout=0.1, init_std=0.05))["attention_dropout"] == 0.1
    gpt2 = hf_config(GPTConfig(**SHAPE | GPT2_STYLE, dropout=0.1, init_std=3.0))
    assert gpt2["resid_pdrop"] == gpt2["embd_pdrop"] == gpt2["attn_pdrop"] == 0.1 and gpt2["initializer_range"] == 1.0


# Tokenizers

def pretrained_like(**options) -> BPETokenizer:
    "The trained tokenizer with the settings of another family."
    names = ["<|begin|>", "<|endoftext|>", "<|im_end|>"]
    return BPETokenizer(BPE.vocab, BPE.merges, {name: len(BPE.vocab) + i for i, name in enumerate(names)}, **options)


PREFIXED = pretrained_like(pattern="llama3", ignore_merges=True, prefix=(len(BPE.vocab),))
TOKENIZERS = {
    "gpt2": (BPE, {}),
    "smollm": (pretrained_like(pattern="smollm"), dict(n_kv_heads=2)),
    "llama3": (PREFIXED, {}),
    "qwen2": (pretrained_like(pattern="qwen2", normalization="NFC"), dict(qkv_bias=True)),
    "in GPT-2": (pretrained_like(), GPT2_STYLE),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request, tmp_path_factory):
    "Ours, and transformers' own reading of it beside a model."
    tokenizer, changes = TOKENIZERS[request.param]
    folder = save_pretrained(
        make_model(vocab_size=310, **changes), tmp_path_factory.mktemp("tokenizer") / "m", tokenizer
    )
    return tokenizer, AutoTokenizer.from_pretrained(folder)


ODD = st.text(
    st.one_of(
        st.sampled_from(list("  \n\t'sStTre.,0123456789e\u0301é東京☃\u200d\U0001f600")), st.characters(codec="utf-8")
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(text=st.one_of(ODD, st.builds(lambda a, b: f"{a}<|endoftext|>{b}", ODD, ODD)))
def test_token_ids_are_equal_on_any_text(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == [*ours.prefix, *ids]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_roles_of_special_tokens(tokenizers):
    ours, theirs = tokenizers
    begin = "<|begin|>" if ours.prefix else "<|endoftext|>"
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|endoftext|>", "<|endoftext|>", begin)
    assert theirs.eos_token_id == ours.special_tokens["<|endoftext|>"]


def test_characters(tmp_path):
    tokenizer = CharTokenizer.train(TEXT)
    model = make_model(vocab_size=tokenizer.vocab_size)
    theirs = AutoTokenizer.from_pretrained(save_pretrained(model, tmp_path / "m", tokenizer))
    for text in (TEXT[:200], " ", "\n\n  the", "", "☃東"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.decode(tokenizer.encode(text)) == text
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [None] * 3  # else token 2 ends every text
    assert read_back(tmp_path / "m").config.eos_token_id is None


def test_roles_can_be_given():
    tokenizer = pretrained_like()
    assert token_roles(None) == token_roles(CharTokenizer("ab")) == {}
    assert token_roles(tokenizer, "<|im_end|>") == dict(
        bos_token="<|im_end|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    assert token_roles(tokenizer, "<|im_end|>", "<|begin|>")["bos_token"] == "<|begin|>"
    assert (
        token_roles(BPETokenizer(BPE.vocab, BPE.merges, {"<a>": 299, "<b>": 300})) == {}
    )  # nothing says which ends a text
    with pytest.raises(InputError, match="bos_token must be one of"):
        token_roles(tokenizer, bos_token="<s>")


def test_chat_template_travels(tmp_path):
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
    save_pretrained(
        make_model(vocab_size=310), tmp_path / "m", pretrained_like(), chat_template=template, eos_token="<|im_end|>"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (
        theirs.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        == "user: the cat<|im_end|>"
    )
    assert (
        theirs.eos_token == "<|im_end|>"
        and read_back(tmp_path / "m").generation_config.eos_token_id == theirs.eos_token_id
    )


def test_the_command_hands_on_how_to_talk(tmp_path, capsys):
    """What the files of a model say about conversations is said by its copy too: template, roles, all tokens that end
    an answer.
    """
    tokenizer, template = (
        pretrained_like(),
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}",
    )
    stops = [tokenizer.special_tokens[name] for name in ("<|im_end|>", "<|begin|>")]
    save_pretrained(
        make_model(vocab_size=310),
        tmp_path / "a",
        tokenizer,
        chat_template=template,
        eos_token="<|im_end|>",
        bos_token="<|begin|>",
        stop_tokens=stops,
    )
    assert main(["export", "--checkpoint", str(tmp_path / "a"), "--hf", str(tmp_path / "b")]) == 0, capsys.readouterr()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (
        theirs.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        == "<|begin|>the cat<|im_end|>"
    )
    assert read_back(tmp_path / "b").generation_config.eos_token_id == stops
    assert chat_settings(tmp_path / "b").stop_tokens == tuple(stops)
    with pytest.raises(InputError, match="stop_tokens"):
        save_pretrained(make_model(vocab_size=310), tmp_path / "c", tokenizer, stop_tokens=[310])


def test_roles_that_the_tokenizer_does_not_know_are_left_out(tmp_path, capsys):
    save_pretrained(make_model(vocab_size=310), tmp_path / "a", pretrained_like(), eos_token="<|im_end|>")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"bos_token": "<s>", "eos_token": "</s>"}),
        encoding="utf-8",
    )
    assert main(["export", "--checkpoint", str(tmp_path / "a"), "--hf", str(tmp_path / "b")]) == 0, capsys.readouterr()


# Refused

def test_which_presets_can_be_given():
    able = {}
    for name in PRESETS:
        try:
            able[name] = family_of(GPTConfig.preset(name))
        except InputError:
            able[name] = None
    assert able == {"demo": None, "nano": None, "tiny": "llama", "small": "llama", "medium": "llama", "gpt2": "gpt2"}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(activation="relu2"), "nearest family is llama: activation='relu2'"),
        (dict(activation="gelu"), "llama: activation='gelu'"),
        (dict(GPT2_STYLE, activation="swiglu"), "gpt2: activation='swiglu'"),
        (dict(output_bias=True), "llama: output_bias=True"),
        (dict(GPT2_STYLE, output_bias=True), "gpt2: output_bias=True"),
        (dict(norm="layernorm"), "llama: norm='layernorm'"),
        (dict(norm_placement="post"), "llama: norm_placement='post'"),
        (dict(norm_placement="output"), "norm_placement='output'"),
        (dict(position="alibi"), "llama: position='alibi'"),
        (dict(position="sinusoidal"), "llama: position='sinusoidal'"),
        (dict(position="none"), "llama: position='none'"),
        (dict(GPT2_STYLE, position="sinusoidal"), "gpt2: position='sinusoidal'"),
        (dict(GPT2_STYLE, bias=False), "gpt2: bias=False has no counterpart there (GPT-2 has all biases"),
        (dict(GPT2_STYLE, n_kv_heads=2), "gpt2: n_kv_heads=2"),
        (dict(GPT2_STYLE, head_dim=4), "gpt2: head_dim=4"),
        (dict(GPT2_STYLE, window=8), "gpt2: window=8"),
        (dict(GPT2_STYLE, qk_norm=True), "gpt2: qk_norm=True"),
        (dict(bias=True, qkv_bias=False), "llama: qkv_bias=False"),
        (dict(bias=True, window=8), "llama: window=8"),
        (dict(bias=True, qk_norm=True), "llama: qk_norm=True"),
        (dict(bias=True, n_heads=3, head_dim=10), "llama: d_model=32"),
        (dict(qk_norm=True, qk_norm_whole=True), "qk_norm_whole=True"),
        (dict(OLMO2, window=8), "olmo2: window=8"),
        (dict(rope_scaling=RopeScaling("divisors", divisors=(1.0, 2.0, 3.0, 4.0))), "llama: rope_scaling='divisors'"),
        (
            dict(activation="relu2", output_bias=True),
            "activation='relu2' has no counterpart there (GPT-2's feed-forward network "
            "uses GELU and that of the others SwiGLU) and output_bias",
        ),
    ],
)
def test_a_configuration_without_a_family_is_refused(tmp_path, changes, words):
    model = make_model(**changes)
    with pytest.raises(InputError) as error:
        save_pretrained(model, tmp_path / "m")
    assert words in sentence(error) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, words", [
    (dict(max_shard_bytes=0), "max_shard_bytes must be a whole number of at least 1, not 0"),
    (dict(chat_template="{{ messages }}"), "give the tokenizer too"),
    (dict(tokenizer=pretrained_like()), "give the model's own tokenizer"),
    (dict(eos_token="</s>", tokenizer=BPE), "must be one of the tokenizer's special tokens"),
])
def test_bad_options_are_refused(tmp_path, options, words):
    with pytest.raises(InputError) as error:
        save_pretrained(make_model(vocab_size=max(300, BPE.vocab_size)), tmp_path / "m", **options)
    assert words in sentence(error) and not list(tmp_path.iterdir())


# Shards

@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_shards(tmp_path, limit):
    model = make_model(**GPT2_STYLE)
    whole = load_file(save_pretrained(model, tmp_path / "whole") / "model.safetensors")
    folder = save_pretrained(model, tmp_path / "m", max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert (
        files
        == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        == sorted(p.name for p in folder.glob("*.safetensors"))
    )
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    for file in files:
        tensors = load_file(folder / file)
        assert safe_open(folder / file, "pt").metadata() == {"format": "pt"}
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
        assert all(
            index["weight_map"][name] == file and torch.equal(whole[name], tensor) for name, tensor in tensors.items()
        )
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        assert largest_difference(read_back(folder)(ids).logits, model(ids)) < DIFFERENCE
    assert all(map(torch.equal, GPT.from_pretrained(folder).parameters(), model.parameters()))


def test_plan_of_shards():
    assert plan_shards({"a": 5, "b": 5, "c": 1, "d": 20}, 10) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert plan_shards({"a": 5, "b": 5}, 10) == {"model.safetensors": ["a", "b"]}


# Folders

def test_a_folder_with_content_is_refused_and_replaced_on_demand(tmp_path):
    first, second = make_model(1), make_model(2)
    (tmp_path / "m").mkdir()
    save_pretrained(first, tmp_path / "m", BPE, max_shard_bytes=20_000)  # an empty folder is no obstacle
    before = contents(tmp_path / "m")
    with pytest.raises(InputError, match="not empty.*overwrite=True"):
        save_pretrained(second, tmp_path / "m")
    assert contents(tmp_path / "m") == before
    save_pretrained(second, tmp_path / "m", overwrite=True)
    assert sorted(contents(tmp_path / "m")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]  # nothing of the old one is left
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_is_no_model_is_never_replaced(tmp_path):
    model = make_model()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "m", tmp_path, Path(tmp_path.root)):
        with pytest.raises(InputError, match="would be lost; choose another folder"):
            save_pretrained(model, folder, overwrite=True)
    with pytest.raises(InputError, match="that is a file; give a folder"):
        save_pretrained(model, tmp_path / "m" / "notes.txt", overwrite=True)
    with pytest.raises(InputError, match="Can't write the model to"):
        save_pretrained(model, tmp_path / "m" / "notes.txt" / "below")
    assert contents(tmp_path / "m") == {"notes.txt": b"mine"} and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folders_that_are_named_in_other_ways(tmp_path, monkeypatch):
    model = make_model()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (
        save_pretrained(model, "deep/down") == Path("deep/down") and (tmp_path / "here/deep/down/config.json").exists()
    )
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "link")
    save_pretrained(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pretrained(model, "~/home")
    assert (tmp_path / "home" / "config.json").exists()


def fails_with(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return fail


def full_disk(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")]
)
@pytest.mark.parametrize(
    "place", ["os.fsync", "os.rename", "os.replace", "pathlib.Path.mkdir", "safetensors.torch.save_file"]
)
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path, monkeypatch, number, words, place):
    save_pretrained(make_model(1), tmp_path / "m", BPE)
    before = contents(tmp_path / "m")
    monkeypatch.setattr(place, full_disk if place.startswith("safetensors") else fails_with(number))
    with pytest.raises(InputError, match="disk is full" if place.startswith("safetensors") else words) as error:
        save_pretrained(make_model(2), tmp_path / "m", BPE, overwrite=True)
    sentence(error)
    with pytest.raises(InputError):
        save_pretrained(make_model(2), tmp_path / "new", BPE)
    monkeypatch.undo()
    assert contents(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
    save_pretrained(make_model(1), tmp_path / "m")
    before, rename, calls = contents(tmp_path / "m"), os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(InputError, match="Can't write the model"):
        save_pretrained(make_model(2), tmp_path / "m", overwrite=True)
    assert len(calls) == 3 and contents(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_killed_between_the_two_renames_the_old_model_comes_back(tmp_path):
    save_pretrained(make_model(1), tmp_path / "m")
    before = contents(tmp_path / "m")
    os.rename(tmp_path / "m", tmp_path / ".m.old.part")
    (tmp_path / ".m.new.part").mkdir()
    with pytest.raises(InputError, match="not empty"):
        save_pretrained(make_model(2), tmp_path / "m")
    assert contents(tmp_path / "m") == before


WRITER = """
from pathlib import Path
import torch
from transformer_llm.export import save_pretrained
from transformer_llm.transformer import GPT, GPTConfig
torch.set_num_threads(1)
while True:  # two models in turn, one of them in shards, until somebody ends it
    for seed, limit in ((1, 10**9), (2, 5_000)):
        torch.manual_seed(seed)
        save_pretrained(GPT(GPTConfig(**shape)), place, max_shard_bytes=limit, overwrite=True)
        with Path(place).with_name("count").open("a") as count:
            count.write("x")
"""


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs processes that can be killed"
)
def test_killed_while_writing(tmp_path):
    whole, halves, context, draw = [], 0, multiprocessing.get_context("forkserver"), random.Random(4)
    for seed, limit in ((1, 10**9), (2, 5_000)):
        torch.manual_seed(seed)
        whole.append(contents(save_pretrained(GPT(GPTConfig(**SHAPE)), tmp_path / str(seed), max_shard_bytes=limit)))
    context.set_forkserver_preload(["transformer_llm.export", "safetensors.torch", "torch._dynamo"])
    place, count = tmp_path / "place" / "m", tmp_path / "place" / "count"
    place.parent.mkdir()
    for _ in range(12):
        seen = count.stat().st_size if count.exists() else 0
        process = context.Process(target=exec, args=(WRITER, {"place": str(place), "shape": SHAPE}))
        process.start()
        while not count.exists() or count.stat().st_size < seen + 2:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        halves += place.with_name(".m.new.part").exists()
        if not place.exists():  # killed in the moment between two renames
            with pytest.raises(InputError, match="not empty"):
                save_pretrained(make_model(1), place)
        assert contents(place) in whole
    save_pretrained(make_model(1), place, overwrite=True)
    assert sorted(p.name for p in place.parent.iterdir()) == ["count", "m"]
    print(f"\n{halves} of 12 kills left half a folder under its hidden name")
    assert halves


# ONNX

GRAPHS = {
    "gpt2": GPT2_STYLE,
    "llama": dict(n_kv_heads=2, rope_interleaved=True, rope_scaling=LLAMA3, tied_embeddings=False),
    "qwen3": dict(qk_norm=True, window=5, head_dim=6, qkv_bias=True),
    "olmo2": OLMO2 | dict(rope_scaling=RopeScaling("linear", factor=2.0)),
    "post-norm and sines": dict(
        position="sinusoidal", norm_placement="post", norm="layernorm", activation="gelu", output_bias=True
    ),
    "alibi": dict(position="alibi", n_kv_heads=1, window=6, bias=True, activation="relu2"),
    "no positions, shortest context": dict(position="none", context_length=7),
}
BOTH = ("gpt2", "llama", "alibi")  # with and without a cache; the others with one, where an empty past is tried too


def empty_past(config: GPTConfig, batch: int) -> dict[str, np.ndarray]:
    return {
        name: np.zeros((batch, config.n_kv_heads, 0, config.head_dim), np.float32)
        for name in onnx_names(config, True)[0][1:]
    }


def in_pieces(session, config: GPTConfig, ids: torch.Tensor, lengths: list[int]) -> np.ndarray:
    "Logits of a text that is read in pieces."
    past, logits = empty_past(config, len(ids)), []
    for piece in ids.split(lengths, 1):
        out, *present = session.run(None, {"ids": piece.numpy(), **past})
        past = dict(zip(past, present))
        logits.append(out)
    return np.concatenate(logits, 1)


@pytest.mark.parametrize("name", GRAPHS)
def test_onnxruntime_computes_the_same(tmp_path, name):
    model = make_model(**GRAPHS[name])
    c, draw = model.config, torch.Generator().manual_seed(0)
    checked, wanted = (
        not shape_checks.jaxtyping_disable,
        {key: value.clone() for key, value in model.state_dict().items()},
    )
    kinds = ["cached", "whole"] if name in BOTH else ["cached"]
    for kind in kinds:
        assert export_onnx(model, tmp_path / f"{kind}.onnx", with_cache=kind == "cached") == tmp_path / f"{kind}.onnx"
    assert sorted(p.stem for p in tmp_path.iterdir()) == kinds and checked != shape_checks.jaxtyping_disable
    assert (
        all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
        and model.blocks[0].attention.causal
    )
    for graph in tmp_path.iterdir():
        assert not any(
            word in graph.read_bytes()
            for word in (b"transformer_llm/", b"site-packages", b"stack_trace", str(ROOT).encode())
        )
    cached, *whole = (onnxruntime.InferenceSession(tmp_path / f"{kind}.onnx") for kind in kinds)
    assert [put.name for put in cached.get_inputs()] == onnx_names(c, True)[0] and [
        put.name for put in cached.get_outputs()
    ] == onnx_names(c, True)[1]
    largest = 0.0
    for batch, length in ((1, 1), (1, 2), (3, 5), (4, c.context_length - 1), (2, c.context_length)):
        ids = torch.randint(300, (batch, length), generator=draw)
        with torch.no_grad():
            right = model(ids)
        outputs = [session.run(None, {"ids": ids.numpy()})[0] for session in whole]
        outputs += [in_pieces(cached, c, ids, [length]), in_pieces(cached, c, ids, [1] * length)]
        outputs += [
            in_pieces(cached, c, ids, [first, length - first]) for first in {1, length // 2, length - 1} - {0, length}
        ]
        largest = max([largest, *(largest_difference(torch.from_numpy(given), right) for given in outputs)])
    print(f"\n{name}: largest difference {largest:.1e} of logits up to {right.abs().max():.1f}")
    assert largest < 1e-4
    start, past = torch.randint(300, (1, 3), generator=draw), empty_past(c, 1)
    new, written = start.numpy(), start[0].tolist()
    for _ in range(c.context_length - 3):
        logits, *present = cached.run(None, {"ids": new, **past})
        past, new = dict(zip(past, present)), logits[:, -1:].argmax(-1)
        written.append(new.item())
    assert written == generate(model, start, c.context_length - 3, temperature=0)[0].tolist()


def test_large_weights_stand_in_a_second_file(tmp_path, monkeypatch):
    ids = torch.randint(300, (2, 9))
    # the second replaces the first
    for seed, limit, files in ((3, 1000, ["m.onnx", "m.onnx.data"]), (4, 10**9, ["m.onnx"])):
        monkeypatch.setattr(export, "ONE_FILE_BYTES", limit)
        model = make_model(seed, n_layers=1)
        export_onnx(model, tmp_path / "m.onnx")
        given = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"ids": ids.numpy()})[0]
        assert (
            sorted(p.name for p in tmp_path.iterdir()) == files
            and largest_difference(torch.from_numpy(given), model(ids)) < 1e-4
        )


def test_a_graph_that_can_not_be_written(tmp_path, monkeypatch):
    model = make_model(n_layers=1)
    (tmp_path / "m.onnx").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", fails_with(errno.EIO))
        with pytest.raises(OSError):
            export_onnx(model, tmp_path / "m.onnx")
    assert not shape_checks.jaxtyping_disable and contents(tmp_path) == {"m.onnx": b"old"}
    program = export.trace_onnx(model, False, 18)
    monkeypatch.setattr(export, "trace_onnx", lambda *args: program)
    for place, function, words in (
        ("os.fsync", fails_with(errno.ENOSPC), "disk is full"),
        ("os.replace", fails_with(errno.EROFS), "read-only"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, function)
            with pytest.raises(InputError, match=words) as error:
                export_onnx(model, tmp_path / "m.onnx")
        assert sentence(error) and contents(tmp_path) == {"m.onnx": b"old"}
    with pytest.raises(InputError, match="that is a folder; give a file"):
        export_onnx(model, tmp_path)
    for opset in (17, 99):
        with pytest.raises(InputError, match="opset must be"):
            export_onnx(model, tmp_path / "m.onnx", opset=opset)
    with pytest.raises(InputError, match=r"needs weights in float32, not bfloat16; give model\.float\(\)"):
        export_onnx(copy.deepcopy(model).bfloat16(), tmp_path / "m.onnx")
    for length, with_cache in ((2, False), (6, True)):
        with pytest.raises(InputError, match="context_length of at least"):
            export_onnx(make_model(context_length=length), tmp_path / "m.onnx", with_cache=with_cache)
    assert contents(tmp_path) == {"m.onnx": b"old"}


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_onnx_a_sentence_says_what_to_install(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(
        InputError, match=rf"needs the package {missing}, which is not installed; run: pip install onnx onnxscript"
    ) as error:
        export_onnx(make_model(n_layers=1), tmp_path / "m.onnx")
    assert sentence(error) and not list(tmp_path.iterdir())


# Neighbours

def test_nothing_else_is_needed_to_import_or_save(tmp_path):
    code = f"""
import sys
for name in "transformers tokenizers onnx onnxscript onnxruntime accelerate lm_eval gguf jinja2".split():
    sys.modules[name] = None  # importing it fails
from transformer_llm import GPT, GPTConfig
import transformer_llm.export
model = GPT(GPTConfig(vocab_size=9, context_length=8, d_model=8, n_layers=1, n_heads=2))
model.save_pretrained({str(tmp_path / "m")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "model.safetensors").exists()


LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")


@pytest.mark.skipif(LM_EVAL is None, reason="needs lm_eval on the path, or its program's name in LM_EVAL")
def test_lm_eval_runs_the_task_of_the_page(tmp_path):
    notebook = json.loads((ROOT / "nbs" / "89_export.ipynb").read_text(encoding="utf-8"))
    page = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "days.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1], encoding="utf-8")
    model, questions, right = make_model(), [], 0
    words = "the cat sat on a mat and saw one red hat".split()
    draw = random.Random(0)
    for _ in range(20):
        choices = draw.sample(words, 4)
        questions.append({"question": " ".join(draw.sample(words, 3)), "choices": choices, "answer": draw.randrange(4)})
        scores = []
        for choice in choices:
            before, after = BPE.encode(questions[-1]["question"]), BPE.encode(" " + choice)
            with torch.no_grad():
                logits = model(torch.tensor([before + after]))[0, len(before) - 1 : -1].log_softmax(-1)
            scores.append(logits.gather(1, torch.tensor(after)[:, None]).sum().item())
        right += scores.index(max(scores)) == questions[-1]["answer"]
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions), encoding="utf-8")
    save_pretrained(model, tmp_path / "days", BPE)
    command = re.search(r"^lm_eval (--model.*)$", page, re.M)[1].split()
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [LM_EVAL, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print("\n" + done.stdout)
    assert re.search(rf"\|days\s*\|.*\|acc\s*\|.*\|\s*{right / 20:.4g}0*\|", done.stdout), done.stdout


# a model that is more than its configuration says

class LowRank(torch.nn.Linear):
    "A linear layer with something added, as adapters have it."

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def changed_model(how: str) -> GPT:
    model = make_model()
    block = model.blocks[1]
    if how == "replaced":
        block.attention.q_proj = LowRank(32, 32, bias=False)
    elif how == "more weights":
        block.extra = torch.nn.Linear(32, 32)
    elif how == "hook":
        block.feedforward.down.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(block.feedforward.up, "weight", torch.nn.Tanh())
    elif how == "fewer blocks":
        del model.blocks[1]
    return model


@pytest.mark.parametrize("write", ["save_pretrained", "export_onnx"])
@pytest.mark.parametrize("how, match", [
    ("replaced", "blocks.1.attention.q_proj is a LowRank"),
    ("hook", "blocks.1.feedforward.down carries a hook"),
    ("parametrized", "blocks.1.feedforward.up"),
    ("fewer blocks", "1 blocks"),
])
def test_a_model_whose_modules_were_changed_is_refused(tmp_path, how, match, write):
    with pytest.raises(InputError, match=match) as error:
        getattr(export, write)(changed_model(how), tmp_path / "m")
    assert sentence(error).startswith(write) and not (tmp_path / "m").exists()


@contextmanager
def shapes_unchecked():
    "As for a user, who gets no check of types."
    before = shape_checks.jaxtyping_disable
    shape_checks.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        shape_checks.update("jaxtyping_disable", before)


def test_what_is_no_model_is_refused(tmp_path):
    with shapes_unchecked():
        for thing in (None, 5, torch.nn.Linear(2, 2)):
            with pytest.raises(InputError, match="not a GPT"):
                save_pretrained(thing, tmp_path / "m")
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE))
    with pytest.raises(InputError, match="meta"):
        save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_compiled_model_is_written_as_the_model_that_it_is(tmp_path):
    model = make_model()
    save_pretrained(model, tmp_path / "plain")
    save_pretrained(torch.compile(model), tmp_path / "compiled")
    assert contents(tmp_path / "plain") == contents(tmp_path / "compiled")
    inside = make_model()
    inside.blocks[0] = torch.compile(inside.blocks[0])
    save_pretrained(inside, tmp_path / "inside")
    assert contents(tmp_path / "plain") == contents(tmp_path / "inside")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_written_in_any_type_is_read_again_in_that_type(tmp_path, dtype):
    model = make_model().to(dtype)
    save_pretrained(model, tmp_path / "m", BPE)
    ours = GPT.from_pretrained(tmp_path / "m", dtype=None)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(model.parameters(), ours.parameters()))
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").parameters()} == {dtype}
    save_pretrained(ours, tmp_path / "again", BPE)
    assert contents(tmp_path / "m") == contents(tmp_path / "again")


def test_a_type_that_can_not_be_read_again_is_refused(tmp_path):
    model = make_model()
    model.blocks[0].attention.q_proj.weight.data = torch.zeros(32, 32).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="q_proj.weight has the type torch.float8_e4m3fn"):
        save_pretrained(model, tmp_path / "m")


def test_matrices_that_share_their_numbers_are_written_both(tmp_path):
    model = make_model(tied_embeddings=False)
    model.lm_head.weight = model.token_embedding.weight
    save_pretrained(model, tmp_path / "m")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert largest_difference(read_back(tmp_path / "m")(ids).logits, model(ids)) < DIFFERENCE
        assert torch.equal(GPT.from_pretrained(tmp_path / "m")(ids), model(ids))


@pytest.mark.parametrize("options, match", [
    (dict(tokenizer=5), "tokenizer must be .* not 5"),
    (dict(tokenizer="tokenizer.json"), "tokenizer must be"),
    (dict(tokenizer=BPE, chat_template=7), "chat_template must be a text, not 7"),
    (dict(stop_tokens=["x"]), "stop_tokens must be ids from 0 to 299, not 'x'"),
    (dict(stop_tokens=[True]), "stop_tokens .* not True"),
    (dict(stop_tokens=[2**70]), r"stop_tokens .* not 1.18e\+21|stop_tokens .* not 1180591620717411303424"),
])
def test_wrong_types_are_named(tmp_path, options, match):
    with shapes_unchecked(), pytest.raises(InputError, match=match) as error:
        save_pretrained(make_model(), tmp_path / "m", **options)
    sentence(error)
    assert not (tmp_path / "m").exists()


def test_every_end_of_an_answer_is_written(tmp_path):
    words = BPETokenizer.train(TEXT, 300, special_tokens=("<|endoftext|>", "<|im_end|>"))
    end, turn = words.special_tokens["<|endoftext|>"], words.special_tokens["<|im_end|>"]
    for i, (options, wanted) in enumerate([
        (dict(), (end,)),
        (dict(stop_tokens=[turn]), (turn, end)),
        (dict(stop_tokens=[end, turn]), (end, turn)),
        (dict(eos_token="<|im_end|>"), (turn,)),
    ]):
        save_pretrained(make_model(), tmp_path / str(i), words, **options)
        assert chat_settings(tmp_path / str(i)).stop_tokens == wanted
        read = transformers.GenerationConfig.from_pretrained(tmp_path / str(i)).eos_token_id
        assert read == (wanted[0] if len(wanted) == 1 else list(wanted))
    save_pretrained(make_model(), tmp_path / "bare", stop_tokens=[7])
    assert chat_settings(tmp_path / "bare").stop_tokens == (7,)


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_pretrained(make_model(), tmp_path / "m", BPE)
        save_pretrained(make_model(), tmp_path / "m", BPE, overwrite=True)
        export_onnx(make_model(), tmp_path / "m.onnx")
    finally:
        os.umask(before)
    rights = {path.name: path.stat().st_mode & 0o777 for path in [*(tmp_path / "m").iterdir(), tmp_path / "m.onnx"]}
    assert set(rights.values()) == {0o666 & ~umask}, rights
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("name", ["~nobody-of-that-name/m", "a\0b"])
def test_paths_that_can_not_be_are_a_sentence(name):
    for write in (save_pretrained, export_onnx):
        with pytest.raises(InputError):
            write(make_model(), name)
