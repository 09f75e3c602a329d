"""Attention and positions on tensors of the wrong rank, and rotary angles as pretrained models were trained with."""
import itertools

import pytest
import torch
from jaxtyping import config as shape_checks

from transformer_llm.attention import (
    KVCache,
    MultiHeadAttention,
    attention_fused,
    attention_plain,
    attention_weights,
    causal_mask,
    expand_kv,
    padding_mask,
)
from transformer_llm.decoding import Decoder
from transformer_llm.embeddings import (
    RopeScaling,
    Rotary,
    alibi_bias,
    apply_rotary,
    rotary_angles,
    yarn_attention_factor,
)
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.performance import WorkingCopy, batched_attention
from transformer_llm.sprint import SprintGPT
from transformer_llm.transformer import GPT, GPTConfig


# Wrong ranks
# -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def unchecked():
    "As users run the library: without the check of annotations."
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


@pytest.mark.parametrize("attention", [attention_weights, attention_plain, attention_fused, batched_attention])
def test_attention_refuses_other_ranks_by_the_names_of_the_axes(attention, unchecked):
    "On three axes, `attention_fused` with `causal=True` gave other values than on four."
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    call = (lambda *x: attention(*x[:2])) if attention is attention_weights else attention
    call(q, k, v)
    for wrong in ((q[0], k[0], v[0]), (q[None], k, v), (q, k[0], v)):
        with pytest.raises(InputError, match=r"(queries|keys) must have the axes \(batch, heads, (queries|keys), head"):
            call(*wrong)
    with pytest.raises(InputError, match="don't fit together"):
        call(q, k[:1], v[:1])
    if attention is not attention_weights:
        with pytest.raises(InputError, match=r"values must have the axes"):
            call(q, k, v[0])
        with pytest.raises(InputError, match="don't fit together"):
            call(q, k, v[:1])


@pytest.mark.parametrize("attention", [attention_weights, attention_plain, attention_fused])
def test_a_mask_that_would_enlarge_the_scores_is_refused(attention, unchecked):
    q, k = torch.randn(2, 1, 4, 5, 8)
    given = (q, k) if attention is attention_weights else (q, k, k)
    for shape in ((5,), (5, 5), (1, 5), (4, 5, 5), (1, 1, 1, 5), (1, 4, 5, 5)):
        attention(*given, torch.ones(shape, dtype=torch.bool))
    for shape in ((2, 1, 1, 5), (1, 1, 1, 5, 5), (5, 4), (3, 5, 5)):
        with pytest.raises(InputError, match=r"mask of shape .* \(batch, heads, queries, keys\)"):
            attention(*given, torch.ones(shape, dtype=torch.bool))


def test_a_boolean_mask_is_not_added_to_scores(unchecked):
    "In `batched_attention` True counted as one."
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(InputError, match="added"):
        batched_attention(q, k, v, causal_mask(5))


def test_neighbours_refuse_other_ranks_too(unchecked):
    with pytest.raises(InputError, match=r"axes \(batch, heads, keys, head_dim\)"):
        expand_kv(torch.ones(2, 3, 4), 4)
    for x in (torch.ones(5, 16), torch.ones(1, 2, 5, 16)):
        with pytest.raises(InputError, match=r"axes \(batch, seq, d_model\)"):
            MultiHeadAttention(16, 4)(x)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(2, 1, 5, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"attention_mask must have the axes \(batch, keys\)"):
            padding_mask(mask)
    cache = KVCache(2, 3, 8, 4)
    for shape in ((2, 3), (2, 3, 4), (1, 3, 1, 4), (2, 3, 1, 1)):
        with pytest.raises(InputError, match="cache has shape"):
            cache.update(torch.ones(shape), torch.ones(shape))
    with pytest.raises(InputError, match="n_queries must be at most n_keys=3"):
        alibi_bias(2, 5, 3)


def test_rotary_refuses_what_it_would_broadcast(unchecked):
    "x (2, 5, 8) with positions (2, 5) came back as (2, 2, 5, 8)."
    rotary = Rotary(8)
    x = torch.randn(2, 3, 5, 8)
    for positions in (torch.arange(5), torch.arange(5)[None], torch.arange(5).repeat(2, 1)):
        assert rotary(x, x, positions)[0].shape == x.shape
    wrong = (
        (x[:, 0], torch.arange(5).repeat(2, 1)),
        (x[:, 0], torch.arange(5)),
        (x, torch.arange(1)),
        (x, torch.arange(5).repeat(3, 1)),
        (x, torch.arange(5).repeat(2, 3, 1)),
    )
    for x, positions in wrong:
        with pytest.raises(InputError, match=r"axes \(batch, heads, seq, head_dim\), and positions \(seq\)"):
            rotary(x, x, positions)
    with pytest.raises(InputError, match="positions"):
        apply_rotary(torch.ones(2, 5, 8), *rotary_angles(torch.arange(5).repeat(2, 1), 8))


# Rotary angles
# -----------------------------------------------------------------------------------------------------------

def their_rotary(head_dim, base, length=64, **rope):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters=dict(rope_type="default", rope_theta=base) | rope,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("base", [100.0, 10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
def test_angles_are_those_of_pretrained_models_to_the_bit(base):
    "base ** -(2i / head_dim) rounds otherwise: cosines were off by 4.9e-4 at position 6,796, base 500,000."
    positions = torch.tensor([0, 1, 6_796, 131_071])
    for head_dim in (2, 8, 64, 80, 96, 128, 256):
        cos, sin = their_rotary(head_dim, base)(torch.ones(1), positions[None])
        ours = rotary_angles(positions, head_dim, base)
        assert torch.equal(ours[0], cos[0, :, : head_dim // 2])
        assert torch.equal(ours[1], sin[0, :, : head_dim // 2])


def test_the_fast_paths_use_the_same_frequencies():
    config = GPTConfig(vocab_size=9, context_length=32, d_model=48, n_heads=1, n_layers=1, rope_base=500_000.0)
    wanted = rotary_angles(torch.arange(32), 48, 500_000.0)
    model = GPT(config)
    assert all(map(torch.equal, WorkingCopy(model, torch.float32)._angles(32), wanted))
    cache = Decoder(model).new_cache(1)
    assert torch.equal(torch.stack(cache.sin), wanted[1])
    fixed = dict(activation="relu2", qk_norm=True, rope_interleaved=True)
    turns = SprintGPT(config.replace(**fixed)).turns[:, 0]
    assert largest_difference(torch.view_as_real(turns).unbind(-1), wanted) < 1e-6


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
VARIANTS = {
    "linear": (dict(rope_type="linear", factor=3.0), RopeScaling("linear", 3.0)),
    "llama3": (
        LLAMA3 | dict(factor=8.0, original_max_position_embeddings=8192),
        RopeScaling("llama3", 8.0, original_context_length=8192),
    ),
    "llama3 by 5": (
        LLAMA3 | dict(factor=5.0, original_max_position_embeddings=64),
        RopeScaling("llama3", 5.0, original_context_length=64),
    ),
    "yarn": (YARN, RopeScaling("yarn", 4.0, original_context_length=64)),
    "yarn, long": (
        YARN | dict(factor=40.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0),
        RopeScaling("yarn", 40.0, original_context_length=4096, beta_fast=16.0, beta_slow=2.0),
    ),
    "yarn, not truncated": (
        YARN | dict(truncate=False, original_max_position_embeddings=4096),
        RopeScaling("yarn", 4.0, original_context_length=4096, truncate=False),
    ),
    "yarn, attention_factor": (
        YARN | dict(attention_factor=1.5),
        RopeScaling("yarn", 4.0, original_context_length=64, attention_factor=1.5),
    ),
    "yarn, mscale": (
        YARN | dict(mscale=0.707, mscale_all_dim=1.0),
        RopeScaling(
            "yarn", 4.0, original_context_length=64, attention_factor=yarn_attention_factor(4.0, 0.707, 1.0)
        ),
    ),
    "dynamic": (dict(rope_type="dynamic", factor=4.0), RopeScaling("dynamic", 4.0, original_context_length=64)),
    "dynamic by 1.1": (dict(rope_type="dynamic", factor=1.1), RopeScaling("dynamic", 1.1, original_context_length=64)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_angles_are_those_of_transformers_to_the_bit(variant):
    rope, scaling = VARIANTS[variant]
    for head_dim, base, length in itertools.product((8, 64, 96), (10_000.0, 500_000.0), (40, 64, 65, 200)):
        cos, sin = their_rotary(head_dim, base, **rope)(torch.ones(1), torch.arange(length)[None])
        ours = rotary_angles(torch.arange(length), head_dim, base, scaling)
        assert torch.equal(ours[0], cos[0, :, : head_dim // 2])
        assert torch.equal(ours[1], sin[0, :, : head_dim // 2])


def pair_of_models(variant, length=96):
    "Our tiny Llama and theirs, with the same weights."
    from transformers import LlamaConfig, LlamaForCausalLM

    rope, scaling = VARIANTS[variant]
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=41)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            max_position_embeddings=64,
            rope_parameters=dict(rope_theta=10_000.0) | rope,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
        )
    ).eval()
    ours = GPT(
        GPTConfig(
            vocab_size=41, context_length=length, d_model=32, n_layers=2, n_heads=2, d_ff=48, rope_scaling=scaling
        )
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.2)
        ours.token_embedding.weight.copy_(theirs.model.embed_tokens.weight)
        ours.final_norm.weight.copy_(theirs.model.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers):
            block.attention_norm.weight.copy_(layer.input_layernorm.weight)
            block.feedforward_norm.weight.copy_(layer.post_attention_layernorm.weight)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.attention, name).weight.copy_(getattr(layer.self_attn, name).weight)
            for name in ("gate", "up", "down"):
                getattr(block.feedforward, name).weight.copy_(getattr(layer.mlp, f"{name}_proj").weight)
    return ours, theirs


@pytest.mark.parametrize("variant", ["linear", "llama3 by 5", "yarn", "yarn, mscale", "dynamic"])
def test_a_tiny_llama_with_each_kind_of_scaling(variant):
    ours, theirs = pair_of_models(variant)
    for length in (50, 96):
        ids = torch.randint(41, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            wanted = theirs(ids, use_cache=False).logits
            assert largest_difference(wanted, ours(ids)) < 1e-5
            assert largest_difference(wanted, WorkingCopy(ours, torch.float32).logits(ids)) < 1e-4
    prompt = ids[:1, :10]
    wanted = generate(ours, prompt, 30, temperature=0, use_cache=False)
    assert torch.equal(generate(ours, prompt, 30, temperature=0), wanted)
    assert torch.equal(Decoder(ours).generate(prompt, 30, temperature=0), wanted)


def test_a_cache_is_refused_where_dynamic_scaling_would_turn_its_keys_again():
    ours, theirs = pair_of_models("dynamic")
    prompt = torch.randint(41, (1, 60), generator=torch.Generator().manual_seed(1))
    for write in (lambda: generate(ours, prompt, 9, temperature=0), lambda: Decoder(ours).generate(prompt, 9)):
        with pytest.raises(InputError, match="dynamic.*use_cache=False"):
            write()
    whole = generate(ours, prompt, 9, temperature=0, use_cache=False)
    with torch.no_grad():
        ids = prompt
        for _ in range(9):
            ids = torch.cat([ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(whole, ids)
    within = GPT(ours.config.replace(context_length=64)).eval()
    assert generate(within, prompt, 9, temperature=0).shape == (1, 69)  # the window slides: never more than 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(kind="longrope"), "kind must be one of"),
        (dict(kind="yarn"), "needs original_context_length"),
        (dict(kind="dynamic", factor=2.0), "needs original_context_length"),
        (dict(kind="yarn", original_context_length=0), "original_context_length"),
        (dict(kind="yarn", original_context_length=64, beta_slow=40.0), "beta_slow must be below beta_fast=32"),
        (dict(kind="yarn", original_context_length=64, attention_factor=0.0), "attention_factor"),
        (dict(kind="yarn", original_context_length=64, truncate=1), "truncate must be True or False"),
        (dict(kind="linear", factor=0.5), "factor"),
    ],
)
def test_scaling_is_validated_by_name(unchecked, fields, words):
    with pytest.raises(InputError, match=words):
        GPTConfig(rope_scaling=fields)


def test_a_scaling_survives_its_dictionary():
    for _, scaling in VARIANTS.values():
        config = GPTConfig(rope_scaling=scaling)
        assert GPTConfig.from_dict(config.to_dict()) == config
    old = dict(kind="linear", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
    assert RopeScaling.from_dict(old | dict(divisors=[])) == RopeScaling("linear", 4.0)
    with pytest.raises(InputError, match="head_dim of at least 4"):
        GPTConfig(d_model=8, n_heads=4, rope_scaling=dict(kind="dynamic", original_context_length=8))
    with pytest.raises(InputError, match="rope_base above 1"):
        GPTConfig(rope_base=1.0, rope_scaling=dict(kind="yarn", original_context_length=8))
