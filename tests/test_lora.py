"""Adapters: what they compute, against formulas and against peft; files both ways; refusals; runs that are killed."""
import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from test_checkpoints import assert_equal_bits
from transformer_llm.checkpoints import load_model
from transformer_llm.decoding import Decoder, quantise_rows
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import generate
from transformer_llm.lora import (
    Int8Linear,
    LoRALinear,
    LoRATrainer,
    LowRank,
    active_adapter,
    adapted_layers,
    adapter_names,
    add_lora,
    linear_layers,
    load_adapted,
    load_lora,
    lora_training_memory,
    merge_lora,
    merged,
    quantise_base,
    remove_lora,
    save_lora,
    switch_lora,
    with_adapters,
)
from transformer_llm.performance import FastTrainer
from transformer_llm.training import Trainer, TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=97, context_length=24, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=80,
                  init_std=0.1)
GPT2 = GPTConfig(vocab_size=97, context_length=24, d_model=48, n_layers=2, n_heads=6, norm="layernorm",
                 position="learned", activation="gelu_tanh", bias=True, init_std=0.1)
IDS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
ALL = "blocks.*"
KINDS = {
    "Llama": SHAPE,
    "interleaved": SHAPE.replace(rope_interleaved=True),
    "GPT-2": GPT2,
    "of no family": SHAPE.replace(activation="relu2", qk_norm=True, output_bias=True),
}


def fresh(config: GPTConfig = SHAPE, seed: int = 1) -> GPT:
    torch.manual_seed(seed)
    return GPT(config).eval()


def trained(model: GPT, name: str | None = None, seed: int = 2) -> GPT:
    "As if an adapter had been trained: B is no longer zero."
    source = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for one, adapter in layer.adapters.items():
            if name in (None, one):
                adapter.B.data.copy_(0.1 * torch.randn(adapter.B.shape, generator=source))
    return model


def weights(model: GPT) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loss_of(model, ids=IDS) -> torch.Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# What an adapter computes

def test_a_new_adapter_changes_nothing_to_the_bit_and_alone_can_be_trained():
    model = fresh()
    wanted = model(IDS)
    add_lora(model, 4)
    assert torch.equal(model(IDS), wanted)
    loss_of(model).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if ".adapters.default." in name}
    assert len(with_gradient) == 2 * 2 * 7  # A and B, two layers, seven matrices each
    assert model.num_parameters(trainable_only=True) == sum(
        4 * (layer.in_features + layer.out_features) for layer in linear_layers(model).values()
    )


def test_values_and_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 6), torch.randn(3, 10)
    layer, alpha, rank = LoRALinear(linear), 5.0, 3
    layer.adapters["one"] = LowRank(10, 6, rank, alpha).draw()
    layer.active = "one"
    A, B = layer.adapters["one"].A, layer.adapters["one"].B
    B.data.normal_()
    assert torch.allclose(layer(x), x @ (linear.weight + alpha / rank * B @ A).T + linear.bias, atol=1e-6)
    g = torch.randn(3, 6)  # the loss's gradient with respect to the output
    (layer(x) * g).sum().backward()
    assert torch.allclose(B.grad, alpha / rank * g.T @ (x @ A.T), atol=1e-5)
    assert torch.allclose(A.grad, alpha / rank * B.T @ (g.T @ x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_the_same_and_is_plain(kind):
    model = trained(add_lora(fresh(KINDS[kind]), 4, targets=ALL))
    before = copy.deepcopy(weights(model))
    wanted = model(IDS)
    plain = merged(model)
    for name, layer in adapted_layers(model).items():
        x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(3))
        y = layer(x)
        assert largest_difference(plain.get_submodule(name)(x), y) < 1e-6 * y.abs().max(), name
    assert largest_difference(plain(IDS), wanted) < 1e-5  # rounded differently in each of 14 layers
    assert_equal_bits(weights(model), before)  # the copy took nothing away
    assert {name: type(part) for name, part in plain.named_modules()} == {
        name: type(part) for name, part in fresh(KINDS[kind]).named_modules()
    }
    assert all(p.requires_grad for p in plain.parameters())
    Decoder(plain)  # reads matrices, and refuses what is no plain GPT
    assert torch.equal(generate(plain, IDS[:, :4], 6, temperature=0), generate(model, IDS[:, :4], 6, temperature=0))
    merge_lora(model)
    assert_equal_bits(weights(model), weights(plain))


def test_merging_into_bfloat16_rounds_once():
    model = trained(add_lora(fresh().bfloat16(), 4))
    layer = adapted_layers(model)["blocks.0.attention.q_proj"]
    layer.adapters["default"].float()
    wanted = layer.base.weight.float() + layer.adapters["default"].change()
    assert torch.equal(merged(model).blocks[0].attention.q_proj.weight, wanted.bfloat16())


def test_several_adapters_are_switched_removed_and_do_not_mix():
    model = fresh()
    was_trainable = model.token_embedding.weight.requires_grad_(False)  # one that the user froze stays frozen
    plain = model(IDS)
    trained(add_lora(model, 4, name="a", targets="blocks.*.attention.[qv]_proj"), "a", 3)
    with_a = model(IDS)
    trained(add_lora(model, 2, name="b", targets=["blocks.1.*", "blocks.*.q_proj"]), "b", 4)
    with_b = model(IDS)
    assert adapter_names(model) == ["a", "b"] and active_adapter(model) == "b"
    trainable = lambda: {name.split(".adapters.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    for name, wanted in (("a", with_a), (None, plain), ("b", with_b), ("a", with_a)):
        switch_lora(model, name)
        assert torch.equal(model(IDS), wanted)
        assert trainable() == ({name} if name else set())
    with pytest.raises(InputError, match="the adapters a, b, and merging a would change"):
        merge_lora(model)
    assert largest_difference(merged(model, "b")(IDS), with_b) < 2e-6
    assert torch.equal(model(IDS), with_a)
    remove_lora(model, "a")
    assert active_adapter(model) is None and torch.equal(model(IDS), plain)
    remove_lora(model)
    assert torch.equal(model(IDS), plain)
    assert not adapted_layers(model) and not was_trainable.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "token_embedding.weight")
    Decoder(model)


# On eight bits

def test_a_base_in_eight_bits_is_the_rounded_matrix_and_keeps_no_other():
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 7), torch.randn(2, 5, 12, requires_grad=True)
    layer = Int8Linear.of(linear)
    rows, scale = quantise_rows(linear.weight.detach())
    wanted = F.linear(x, rows * scale, linear.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    g = torch.randn(2, 5, 7)
    (layer(x) * g).sum().backward()
    assert torch.allclose(x.grad, g @ (rows * scale), atol=1e-5)
    saved = layer(x).grad_fn.next_functions  # the sum with the bias; behind it the product
    assert all(t.dtype in (torch.int8, torch.float32) and t.numel() < 2 * rows.numel() for node, _ in saved
               for t in getattr(node, "saved_tensors", ()))
    assert {t.dtype for t in saved[0][0].saved_tensors if t.numel() == rows.numel()} == {torch.int8}
    assert torch.equal(layer.restored().weight, rows * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_eight_bits_train_merge_and_refuse_the_fast_paths(kind):
    model = quantise_base(fresh(KINDS[kind]))
    assert largest_difference(model(IDS), fresh(KINDS[kind])(IDS)) < 0.2
    trained(add_lora(model, 4))
    plain = merged(model)
    assert largest_difference(plain(IDS), model(IDS)) < 2e-6
    loss_of(model).backward()
    reference = [torch.zeros(())]
    for layer in adapted_layers(model).values():  # the same gradients beside the restored matrices
        layer.base = layer.base.restored()
        reference += [layer.adapters["default"].A.grad.clone(), layer.adapters["default"].B.grad.clone()]
        layer.adapters["default"].zero_grad()
    loss_of(model).backward()
    found = [torch.zeros(())] + [g for layer in adapted_layers(model).values()
                                 for g in (layer.adapters["default"].A.grad, layer.adapters["default"].B.grad)]
    assert largest_difference(found, reference) < 1e-6
    with pytest.raises(InputError, match="blocks.0.attention.q_proj is a Int8Linear"):
        Decoder(quantise_base(fresh(KINDS[kind])))


@pytest.mark.parametrize("int8", [False, True])
def test_predicted_memory_holds_what_15_2_counts_and_refuses_trained_weights_in_eight_bits(int8):
    model = GPT(SHAPE)
    layers = linear_layers(model).values()
    pairs = sum(4 * (one.in_features + one.out_features) for one in layers)
    matrices = sum(one.weight.numel() for one in layers)
    scales = sum(one.out_features for one in layers) if int8 else 0
    frozen = 4 * model.num_parameters() - (3 * matrices if int8 else 0) + 4 * scales
    small, large = (lora_training_memory(SHAPE, 4, batch, 24, int8=int8) for batch in (1, 3))
    per_sequence = (large - small) / 2
    assert small - per_sequence == frozen + 12 * pairs  # the pairs and two moments; gradients come when activations go
    assert lora_training_memory(SHAPE, None, 1, 1) == 20 * model.num_parameters()  # (15.2), and the optimizer's copy
    with pytest.raises(InputError, match="can't be trained"):
        lora_training_memory(SHAPE, None, 1, int8=True)


# peft, both ways

@pytest.fixture(scope="module")
def peft():
    import peft

    return peft


def theirs_of(config: GPTConfig, folder: Path):
    "The same model in transformers, by way of a saved one."
    fresh(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(folder)


def settings_of(peft, kind: str, **more):
    names = ["c_attn", "c_fc"] if kind == "GPT-2" else ["q_proj", "k_proj", "down_proj"]
    return peft.LoraConfig(target_modules=names, fan_in_fan_out=kind == "GPT-2", task_type="CAUSAL_LM", **more)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
@pytest.mark.parametrize("more", [
    dict(r=4, lora_alpha=8),
    dict(r=3, lora_alpha=5, use_rslora=True),
    dict(r=4, lora_alpha=8, rank_pattern={"q_proj|c_fc": 2}, alpha_pattern={"q_proj|c_fc": 3}),
    dict(r=4, lora_alpha=8, layers_to_transform=[1]),
])
def test_what_peft_writes_is_read_and_gives_the_same_values_and_gradients(peft, tmp_path, kind, more):
    theirs, ours = theirs_of(KINDS[kind], tmp_path / "model")
    theirs = peft.get_peft_model(theirs, settings_of(peft, kind, **more))
    source = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    theirs.save_pretrained(tmp_path / "adapter")
    load_lora(ours, tmp_path / "adapter")
    assert largest_difference(ours(IDS), theirs(IDS).logits) < 1e-5
    F.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    loss_of(ours).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    layers = adapted_layers(ours)
    if kind == "GPT-2":  # one pair there for queries, keys and values
        for number in {name.split(".")[1] for name in layers}:
            three = [layers[f"blocks.{number}.attention.{letter}_proj"].adapters["default"] for letter in "qkv"]
            path = f"base_model.model.transformer.h.{number}.attn.c_attn"
            assert torch.allclose(sum(part.A.grad for part in three), gradients[f"{path}.lora_A.default.weight"],
                                  atol=1e-6)
            assert torch.allclose(torch.cat([part.B.grad for part in three]),
                                  gradients[f"{path}.lora_B.default.weight"], atol=1e-6)
        return
    names = {"attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj",
             "feedforward.down": "mlp.down_proj"}
    assert len(gradients) == 2 * len(layers)
    for place, layer in layers.items():
        _, number, rest = place.split(".", 2)
        path = f"base_model.model.model.layers.{number}.{names[rest]}"
        for letter in "AB":
            wanted = gradients[f"{path}.lora_{letter}.default.weight"]
            assert torch.allclose(getattr(layer.adapters["default"], letter).grad, wanted, atol=1e-6), (place, letter)


@pytest.mark.parametrize("kind", ["Llama", "interleaved", "GPT-2"])
@pytest.mark.parametrize("targets", [ALL, "blocks.*.attention.[qv]_proj", "blocks.1.*"])
def test_what_we_write_peft_reads(peft, tmp_path, kind, targets):
    theirs, ours = theirs_of(KINDS[kind], tmp_path / "model")
    ours = fresh(KINDS[kind])  # with its own order of rotary pairs
    trained(add_lora(ours, 3, 5.0, targets=targets))
    save_lora(ours, tmp_path / "adapter", base_model="somebody/else")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    assert largest_difference(theirs(IDS).logits, ours(IDS)) < 1e-5
    F.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    loss_of(ours).backward()
    if kind == "Llama":
        wanted = [p.grad for name, p in theirs.named_parameters() if "lora_A" in name]
        found = [layer.adapters["default"].A.grad for layer in adapted_layers(ours).values()]
        assert abs(sum(g.square().sum() for g in found) - sum(g.square().sum() for g in wanted)) < 1e-6
    again = load_lora(fresh(KINDS[kind]), tmp_path / "adapter")
    assert largest_difference(again(IDS), ours(IDS)) < 1e-5


def test_peft_reads_the_book_s_own_names_on_the_book_s_own_model(peft, tmp_path):
    config = KINDS["of no family"]
    ours = trained(add_lora(fresh(config), 3, targets="blocks.*.[uq]*"))
    save_lora(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(config), tmp_path / "adapter")
    assert largest_difference(theirs(IDS), ours(IDS)) < 1e-6
    wrapped = peft.get_peft_model(fresh(config), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    wrapped.save_pretrained(tmp_path / "from peft")
    assert largest_difference(load_lora(fresh(config), tmp_path / "from peft")(IDS), wrapped(IDS)) < 1e-5


# Refusals

def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


@pytest.mark.parametrize("options, words", [
    (dict(rank=60), "rank must be at most 48, the smaller side of blocks.0.attention.q_proj (48 × 48), not 60"),
    (dict(rank=20, targets="*.k_proj"), "at most 16, the smaller side of blocks.0.attention.k_proj (16 × 48), not 20"),
    (dict(rank=0), "rank must be a whole number of at least 1"),
    (dict(alpha=0), "alpha must be a number"),
    (dict(targets="blocks.*.atention.*"), "no linear layer's name fits 'blocks.*.atention.*'; there are blocks.*.att"),
    (dict(targets=["blocks.*", "nothing"]), "no linear layer's name fits 'nothing'"),
    (dict(targets="token_embedding"), "token_embedding can't have an adapter"),
    (dict(targets="*"), "lm_head can't have an adapter"),
    (dict(targets="lm_head"), "lm_head can't have an adapter"),
    (dict(name="a.b"), "a word of letters"),
    (dict(name="values"), "a word of letters"),
    (dict(name="old"), "already has an adapter old"),
])
def test_add_lora_refuses_in_one_sentence_and_changes_nothing(options, words):
    model = add_lora(fresh(SHAPE.replace(tied_embeddings=False)), 2, name="old", targets="*.q_proj")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(InputError) as error:
        add_lora(model, **options)
    assert words in sentence(error)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_fast_paths_name_the_module_and_plain_runs_say_why():
    model, data = add_lora(fresh(), 2), (torch.randint(97, (200,)), None)
    with pytest.raises(InputError, match="blocks.0.attention.q_proj is a LoRALinear") as error:
        Decoder(model)
    sentence(error)
    for kind in (FastTrainer, with_adapters(FastTrainer)):
        with pytest.raises(InputError, match="blocks.0.attention.q_proj is a LoRALinear") as error:
            kind(model, data, TrainingConfig(device="cpu"), progress=False)
        sentence(error)
    with pytest.raises(InputError, match="blocks.0.attention.q_proj is a LoRALinear"):
        model.save_pretrained("nowhere")
    with pytest.raises(InputError, match="has no adapters; add one"):
        LoRATrainer(fresh(), data, TrainingConfig(device="cpu"), progress=False)
    switch_lora(model, None)
    with pytest.raises(InputError, match="no adapter is active; it has default"):
        LoRATrainer(model, data, TrainingConfig(device="cpu"), progress=False)


def written(folder: Path, config: GPTConfig = SHAPE) -> Path:
    save_lora(trained(add_lora(fresh(config), 3)), folder)
    return folder


def change_settings(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes, words", [
    (dict(peft_type="IA3"), "must be of the kind 'LORA', not 'IA3'"),
    (dict(use_dora=True), "sets use_dora to True"),
    (dict(bias="all"), "sets bias to 'all'"),
    (dict(init_lora_weights="pissa"), "sets init_lora_weights to 'pissa', which changes the base"),
    (dict(modules_to_save=["lm_head"]), "sets modules_to_save"),
    (dict(r=5), "says rank 5"),
    (dict(r="many"), "r must be a whole number"),
    (dict(lora_alpha=None), "lora_alpha must be a number"),
    (dict(rank_pattern=[1]), "rank_pattern must give a number for each pattern"),
    (dict(use_rslora="no"), "use_rslora must be true or false, not 'no'"),
    (dict(rank_pattern={"(": 1}), "rank_pattern holds a name that is no regular expression"),
])
def test_settings_that_mean_something_else_are_refused(tmp_path, changes, words):
    folder = written(tmp_path / "adapter")
    change_settings(folder, **changes)
    with pytest.raises(InputError) as error:
        load_lora(fresh(), folder)
    assert words in sentence(error)


def test_adapters_of_other_models_and_damaged_ones_are_refused_and_nothing_changes(tmp_path):
    folder = written(tmp_path / "adapter")
    for model, words in (
        (fresh(SHAPE.replace(d_model=96, head_dim=8)), "as a matrix of 48 × 80, and here it is 96 × 80"),
        (fresh(SHAPE.replace(n_layers=1)), "this one has no layer model.layers.1"),
        (fresh(GPT2), "this one has no layer model.layers.0.mlp.down_proj"),
        (fresh(seed=9), "other weights of the same sizes"),
    ):
        with pytest.raises(InputError, match="is for another model") as error:
            load_lora(model, folder)
        assert words in sentence(error) and not adapted_layers(model)
    load_lora(fresh(seed=9), folder, other_base=True)
    load_lora(fresh().bfloat16(), folder)  # the same model in another type: nothing to compare
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    for change, words in (
        ({**tensors, "model.norm.weight": torch.ones(4)}, "no matrix of an adapter"),
        ({name: t for name, t in tensors.items() if name != first}, "don't belong together"),
        ({}, "holds no adapter"),
        ({**tensors, first: torch.full_like(tensors[first], torch.nan)}, "hold NaN or infinity"),
    ):
        save_file(change, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=words) as error:
            load_lora(fresh(), folder)
        sentence(error)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="truncated, damaged or not a safetensors file"):
        load_lora(fresh(), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        load_lora(fresh(), folder)
    with pytest.raises(InputError, match="has no adapter_config.json"):
        load_lora(fresh(), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_lora(fresh(), tmp_path / "nowhere")


def test_a_folder_is_replaced_only_if_asked_and_only_an_adapter(tmp_path):
    folder = written(tmp_path / "adapter")
    model = trained(add_lora(fresh(), 2))
    with pytest.raises(InputError, match="not empty"):
        save_lora(model, folder)
    save_lora(model, folder, overwrite=True)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="mine.txt, which is not part of a saved adapter"):
        save_lora(model, folder, overwrite=True)


# Runs

DATA = (torch.randint(97, (900,), generator=torch.Generator().manual_seed(1)),
        torch.randint(97, (120,), generator=torch.Generator().manual_seed(2)))
CONFIG = TrainingConfig(max_steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2, eval_every=4, log_every=2,
                        checkpoint_every=2, keep_checkpoints=9, device="cpu")


class Stopped(Exception):
    pass


def stop_at(step: int):
    def stop(trainer, record):
        if record["step"] == step:
            raise Stopped

    return stop


def two_adapters(eight_bits: bool = False, seed: int = 1) -> GPT:
    model = fresh(SHAPE.replace(dropout=0.1), seed)
    if eight_bits:
        quantise_base(model)
    add_lora(model, 4, name="a", generator=1)
    add_lora(model, 2, name="b", targets="*.q_proj", generator=2)
    switch_lora(model, "a")
    return model


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_trains_the_active_adapter_only_and_goes_on_to_the_bit(tmp_path, eight_bits, optimizer):
    config, model = CONFIG.replace(optimizer=optimizer), two_adapters(eight_bits)
    before = copy.deepcopy(weights(model))
    whole = LoRATrainer(model, DATA, config, run_directory=tmp_path / "whole", progress=False)
    whole.train()
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".adapters.a." in name and not name.endswith("alpha")}
    parted = LoRATrainer(two_adapters(eight_bits), DATA, config, run_directory=tmp_path / "parted", progress=False,
                         on_step=stop_at(5))
    with pytest.raises(Stopped):
        parted.train()
    resumed = LoRATrainer.resume(tmp_path / "parted", DATA, progress=False)
    assert resumed.step == 4 and active_adapter(resumed.model) == "a"
    resumed.train()
    assert_equal_bits(weights(resumed.model), weights(model))
    loaded, tokenizer = load_adapted(tmp_path / "parted")
    assert tokenizer is None and active_adapter(loaded) == "a" and not loaded.training
    assert torch.equal(loaded(IDS), model.eval()(IDS))


def test_runs_with_and_without_adapters_are_not_mixed_up(tmp_path):
    LoRATrainer(two_adapters(), DATA, CONFIG, run_directory=tmp_path / "with", progress=False).train()
    Trainer(fresh(), DATA, CONFIG, run_directory=tmp_path / "without", progress=False).train()
    way_out = "holds a model with adapters .* load_adapted .* LoRATrainer.resume"
    for wrong in (lambda: load_model(tmp_path / "with"), lambda: Trainer.resume(tmp_path / "with", DATA)):
        with pytest.raises(InputError, match=way_out) as error:
            wrong()
        sentence(error)
    for wrong in (LoRATrainer.resume, load_adapted):
        with pytest.raises(InputError, match="no adapter") as error:
            wrong(tmp_path / "without")
        sentence(error)
    with pytest.raises(InputError, match="adapters.a.A, unlike a model of its configuration") as error:
        Trainer(two_adapters(), DATA, CONFIG, run_directory=tmp_path / "other", progress=False)
    sentence(error)


RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_lora import CONFIG, DATA, two_adapters
from transformer_llm.lora import LoRATrainer
print("ready", flush=True)
LoRATrainer(two_adapters(), DATA, CONFIG.replace(max_steps=400), run_directory={folder!r}, progress=False).train()
"""


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    folder = tmp_path / "killed"
    code = RUN.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not list(folder.glob("step-000000[2468]/checkpoint.json")) and not list(folder.glob("step-00000[1-9]*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = LoRATrainer.resume(folder, DATA, progress=False)
    begun = resumed.step
    assert 0 < begun < 400
    resumed.config = resumed.config.replace()
    last = begun + 4
    while resumed.step < last:
        resumed.train_step()
    whole = LoRATrainer(two_adapters(), DATA, CONFIG.replace(max_steps=400), progress=False)
    while whole.step < last:
        whole.train_step()
    assert_equal_bits(weights(resumed.model), weights(whole.model))


def test_stored_runs_have_three_seeds_each_and_no_best_rate_at_the_edge():
    stored = json.loads((Path(__file__).parents[1] / "data" / "lora.json").read_text(encoding="utf-8"))
    for part, where in (("ranks", "rank"), ("places", "pattern")):
        by_case: dict = {}
        for run in stored[part]:
            by_case.setdefault((run["task"], run[where]), {}).setdefault(run["rate"], {})[run["seed"]] = run["loss"]
        assert len(by_case) == {"ranks": 8, "places": 4}[part]
        for case, rates in by_case.items():
            assert all(set(seeds) == {0, 1, 2} for seeds in rates.values()), case
            best = min(rates, key=lambda rate: sum(rates[rate].values()))
            assert min(rates) < best < max(rates), (case, best)


# The command line

@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    "A tiny model with a chat template, as transformers keeps one, and a file of questions and answers."
    from test_finetuning import CHATML, SPECIAL
    from transformer_llm.tokenizer import BPETokenizer

    folder = tmp_path_factory.mktemp("talker")
    texts = ["who are you? the cat. user assistant system\n"] * 3
    tokenizer = BPETokenizer.train(texts, 290, special_tokens=SPECIAL, fewer=True)
    config = SHAPE.replace(vocab_size=tokenizer.vocab_size, context_length=96)
    fresh(config).save_pretrained(folder / "model", tokenizer, chat_template=CHATML, eos_token="<|im_end|>")
    records = [{"instruction": f"who are you {i}?", "output": f"the cat {i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def answer(capsys, *flags) -> str:
    from transformer_llm.cli import main

    assert main(["chat", *flags, "--prompt", "who are you 3?", "--max_new_tokens", "6", "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_finetune_chat_and_merge_on_the_command_line(talker, tmp_path, capsys):
    from transformer_llm.cli import main

    model, run, flags = str(talker / "model"), tmp_path / "run", ["--data", str(talker / "pairs.jsonl")]
    flags += ["--lora", "2", "--batch_size", "4", "--learning_rate", "0.05", "--checkpoint_every", "2"]
    assert main(["finetune", "--model", model, *flags, "--max_steps", "4", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "of which" in said and "are trained" in said and f"{run / 'adapter'}, " in said
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["base_model_name_or_path"] == model
    plain = answer(capsys, "--model", model)
    adapted = answer(capsys, "--model", model, "--adapter", str(run / "adapter"))
    assert adapted != plain
    assert answer(capsys, "--model", str(run)) == adapted
    assert answer(capsys, "--model", model, "--adapter", str(run / "adapter"), "--dtype", "float32") == adapted
    merge = ["adapter", "merge", "--model", model, "--adapter", str(run / "adapter"), "--out", str(tmp_path / "merged")]
    assert main(merge) == 0
    capsys.readouterr()
    assert answer(capsys, "--model", str(tmp_path / "merged")) == adapted
    assert main(merge) == 2 and "not empty" in capsys.readouterr().err
    assert main(["finetune", "--out", str(run), "--resume", "--max_steps", "8"]) == 0
    whole = tmp_path / "whole"
    assert main(["finetune", "--model", model, *flags, "--max_steps", "8", "--out", str(whole)]) == 0
    capsys.readouterr()
    resumed, never_stopped = (load_adapted(folder)[0] for folder in (run, whole))
    assert weights(resumed).keys() == weights(never_stopped).keys()
    assert any(".adapters.default." in name for name in weights(resumed))


def test_bad_input_on_the_command_line_is_one_sentence_and_exit_2(talker, tmp_path, capsys):
    from transformer_llm.cli import main

    model, data = str(talker / "model"), ["--data", str(talker / "pairs.jsonl"), "--device", "cpu"]
    other, out = written(tmp_path / "other"), str(tmp_path / "m")
    for command, words in (
        (["finetune", "--model", model, *data, "--lora", "99", "--out", str(tmp_path / "a")], "rank must be at most"),
        (["finetune", "--model", model, *data, "--lora", "0", "--out", str(tmp_path / "a")], "--lora"),
        (["chat", "--model", model, "--adapter", str(other), "--prompt", "hi"], "is for another model"),
        (["chat", "--model", model, "--adapter", str(tmp_path), "--prompt", "hi"], "has no adapter_config.json"),
        (["adapter", "merge", "--model", model, "--adapter", str(other), "--out", out], "is for another model"),
    ):
        try:
            code = main(command)
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr().err.strip()
        assert code == 2 and words in said and "Traceback" not in said and len(said.splitlines()) <= 2, said
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())
