"""The plan of a run on many GPUs: its counts against the model itself, its arithmetic by hand, and what it refuses."""
import pytest
import torch

from transformer_llm.cli import main
from transformer_llm.foundations import InputError
from transformer_llm.planning import (
    LLAMA3_SHAPES,
    Layout,
    Machine,
    count_parameters,
    data_bytes,
    kept_per_token,
    plan,
    plan_memory,
    planned_config,
    predict,
    tensor_bytes,
)
from transformer_llm.transformer import GPT, PRESETS, GPTConfig, activations_per_token, flops_per_token

SMALL = GPTConfig(vocab_size=1000, context_length=128, d_model=64, n_layers=4, n_heads=8, n_kv_heads=8, d_ff=256)
LLAMA = planned_config("llama3-8b")


@pytest.mark.parametrize("name", [*PRESETS, "llama3-8b"])
def test_parameters_are_those_of_the_model(name):
    config = planned_config(name)
    with torch.device("meta"):
        model = GPT(config)
    assert count_parameters(config) == (model.num_parameters(), sum(p.numel() for p in model.blocks[0].parameters()))


def test_shapes_have_the_sizes_in_their_names():
    for name in LLAMA3_SHAPES:
        billions = count_parameters(planned_config(name))[0] / 1e9
        assert billions == pytest.approx(int(name.removeprefix("llama3-")[:-1]), rel=0.01)


def test_bytes_by_hand():
    n = 1000
    assert data_bytes(n, Layout(4, sharded=False, micro=3, accumulation=5)) == 2 * 3 / 4 * n * 4  # summed once a step
    assert data_bytes(n, Layout(4)) == 3 / 4 * n * (2 + 2 + 4)
    assert data_bytes(n, Layout(4, accumulation=5)) == 5 * data_bytes(n, Layout(4))
    assert data_bytes(n, Layout(1)) == data_bytes(n, Layout(1, sharded=False)) == 0
    assert data_bytes(n, Layout(4, tensor=2)) == data_bytes(n, Layout(4)) / 2
    stream = 2 * 3 * 128 * 64  # bytes of micro · tokens · width in 16 bits
    assert tensor_bytes(SMALL, Layout(2, 4, micro=3), 128, "none") == 4 * 4 * 2 * 3 / 4 * stream
    assert tensor_bytes(SMALL, Layout(8), 128, "none") == 0


def test_bytes_are_those_of_chapter_21():
    "Where chapter 21 counts the bytes of real exchanges in 32 bits, the formula has the same shares."
    distributed = pytest.importorskip("transformer_llm.distributed")
    if not hasattr(distributed, "bytes_sent"):
        pytest.skip("chapter 21 has no bytes_sent")
    ours = data_bytes(8000, Layout(8, sharded=False))
    assert ours == distributed.bytes_sent("ddp", 8, weight_bytes=4 * 8000)


def test_kept_numbers():
    assert kept_per_token(SMALL, "none") == activations_per_token(SMALL)
    assert kept_per_token(SMALL, "none") > kept_per_token(SMALL, "selective") > kept_per_token(SMALL, "full")
    longer = SMALL.replace(n_layers=5)
    per_layer = kept_per_token(longer, "selective") - kept_per_token(SMALL, "selective")
    assert per_layer == 2 * 64 + 2 * 64 + 2 * 256 + 2 * 64 + 64  # q and heads, k and v, gate and up, o and down, input
    assert kept_per_token(longer, "full") - kept_per_token(SMALL, "full") == 64


def test_memory_by_hand():
    n, layer = count_parameters(SMALL)
    memory = plan_memory(SMALL, Layout(4, tensor=2, micro=3), 100, "none")
    assert memory["state"] == 16 * n / 8 and memory["gathered"] == 4 * layer / 2
    assert memory["activations"] == 2 * 300 * activations_per_token(SMALL) / 2
    whole = plan_memory(SMALL, Layout(4, sharded=False), 100, "none")
    assert whole["state"] == 16 * n and whole["gathered"] == 0


def test_time_by_hand():
    machine = Machine(gpus=16, flops=1e12, bandwidth=1e9, bandwidth_inside=1e10)
    option = predict(SMALL, machine, Layout(16, micro=2), 128, "none")
    assert option.compute == pytest.approx(2 * 128 * flops_per_token(SMALL, 128, training=True) / 1e12)
    assert option.data_exchange == pytest.approx(15 / 16 * count_parameters(SMALL)[0] * 8 / 1e9)
    assert option.seconds == max(option.compute, option.data_exchange)
    assert option.tokens_per_gpu == pytest.approx(2 * 128 / option.seconds)
    again = predict(SMALL, machine, Layout(16, micro=2), 128, "full")
    assert again.compute == pytest.approx(option.compute * 4 / 3)
    inside = predict(SMALL, machine, Layout(8, micro=2), 128, "none")
    assert inside.data_exchange < option.data_exchange / 5


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_layouts_fit_and_cover_the_batch(gpus):
    machine = Machine(gpus=gpus)
    options = plan(LLAMA, machine)
    assert [o.seconds for o in options] == sorted(o.seconds for o in options)
    for o in options:
        assert o.memory <= machine.memory and o.layout.data * o.layout.tensor == gpus
        assert o.layout.data * o.layout.micro * o.layout.accumulation == 2 * gpus and o.tokens == 2 * gpus * 8192
    names = [o.layout.name for o in options]
    assert f"ddp {gpus}" not in names  # 8 billion parameters take 120 GiB


def test_published_figures_are_near():
    "Tables 1 and 3 of torchtitan, where a plan's assumptions hold; page 73 shows all and the differences."
    for gpus, speeds, sizes in ((8, (5762, 6667), (77.0, 82.4)), (128, (5605, 6514), (62.0, 67.0))):
        option = predict(LLAMA, Machine(gpus=gpus), Layout(gpus, micro=2))
        assert speeds[0] < option.tokens_per_gpu < 1.1 * speeds[1]  # above uncompiled code
        assert sizes[0] < option.memory / 2**30 < sizes[1]


def test_refusals():
    with pytest.raises(InputError, match="No layout fits: each GPU needs at least"):
        plan(planned_config("llama3-405b"), Machine(gpus=8))
    with pytest.raises(InputError, match="batch of 3 sequences can't be divided among 16 GPUs"):
        plan(SMALL, Machine(gpus=16), 3)
    with pytest.raises(InputError, match="A plan also knows llama3-8b"):
        planned_config("llama9")
    with pytest.raises(InputError, match="recompute must be one of"):
        plan(SMALL, Machine(), recompute="half")
    with pytest.raises(InputError, match="bandwidth must be"):
        Machine(bandwidth=0)


def test_command(capsys):
    assert main(["plan", "--model", "llama3-8b", "--gpus", "128", "--bandwidth", "12.5"]) == 0
    said = capsys.readouterr().out
    assert "fsdp 128" in said and "Assumed:" in said and "12.5 GB/s between nodes" in said
    assert main(["plan", "--model", "llama3-70b", "--recompute", "full"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{gpus:5}  " in "\n" + said for gpus in (8, 16, 1024)) and "No layout fits" in said
    for words in (["--gpus", "0"], ["--gpus", "8", "--bandwidth", "0"], ["--gpus", "16", "--batch-size", "3"],
                  ["--gpus", "8", "--memory", "1"], ["--gpus", "8", "--recompute", "half"]):
        assert main(["plan", "--model", "llama3-8b", *words]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and not said.out
