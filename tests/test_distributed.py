"""Several processes (chapter 21) against one: in loss, weights, resume, bytes, and in what is refused.

Two processes are started twice in all: once for all cases of `parallel_cases.py`, once for the command line.
"""
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import parallel_cases as cases
import pytest
import torch

from transformer_llm import cli
from transformer_llm.checkpoints import Note, load_model
from transformer_llm.distributed import (
    TRAINERS,
    bytes_sent,
    joined,
    merge_shards,
    my_rows,
    torch_release,
)
from transformer_llm.foundations import InputError, read_json, write_json
from transformer_llm.training import Trainer

NAMES = ("equal_to_one", "in_bfloat16", "bytes_counted", "hidden_states", "saved_in_parts", "two_one_two", "refused",
         "unwritable", "lost")
LIMIT = 400  # seconds until two processes on a busy machine are taken for stuck
PAIRS = [(way, case) for way in TRAINERS for case in cases.CASES]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def start_two(*command: str) -> list[tuple[int, str]]:
    "Start a Python command as processes 0 and 1 of 2; exit code and output of each."
    port, started = free_port(), []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        if os.name == "nt":
            env["USE_LIBUV"] = "0"
        started.append(subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env=env, text=True))
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"two processes didn't end within {LIMIT} seconds")
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    "What the cases wrote, by name, and the folder they wrote it to; judged by that, not by how the processes ended."
    folder = tmp_path_factory.mktemp("two")
    ended = start_two(str(Path(cases.__file__)), str(folder), *NAMES)
    found = {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}
    missing = [name for name in NAMES[:-1] if f"{name}-0" not in found]
    assert not missing, f"{missing} wrote nothing: {ended}"
    return found | {"folder": folder}


@pytest.fixture(scope="module")
def one() -> dict:
    "The same runs on one process."
    return {case: cases.summary(cases.trained(Trainer, case)) for case in cases.CASES}


def assert_same_run(found: dict, wanted: dict, learning_rate: float = cases.SETTINGS.learning_rate) -> None:
    assert [row["step"] for row in found["records"]] == [row["step"] for row in wanted["records"]]
    for row, other in zip(found["records"], wanted["records"]):
        for name in ("loss", "val_loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], abs=1e-6), (row["step"], name)
        assert row["lr"] == other["lr"]
    # AdamW divides a gradient by its own size, so rounding of one near zero moves a weight by a share of the rate
    for name, weight in wanted["weights"].items():
        assert (found["weights"][name] - weight).abs().max() < 0.01 * learning_rate, name


@pytest.mark.parametrize("way,case", PAIRS)
def test_two_processes_equal_one(two, one, way, case):
    assert_same_run(two["equal_to_one-0"][f"{way} {case}"], one[case])


@pytest.mark.parametrize("way,case", PAIRS)
def test_both_processes_hold_the_same_weights(two, way, case):
    first, second = (two[f"equal_to_one-{rank}"][f"{way} {case}"]["weights"] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", TRAINERS)
def test_mixed_precision_is_that_of_one_process(two, way):
    trainer = Trainer(cases.model_of({}), cases.DATA, cases.SETTINGS.replace(dtype="bfloat16"), progress=False)
    wanted = trainer.train()
    losses = [row["loss"] for row in two["in_bfloat16-0"][way]]
    assert losses == pytest.approx([row["loss"] for row in wanted], abs=2e-3)  # bfloat16 keeps 8 bits
    full = Trainer(cases.model_of({}), cases.DATA, cases.SETTINGS, progress=False).train()
    assert losses != pytest.approx([row["loss"] for row in full], abs=1e-6)


def test_bytes_counted_equal_the_formula(two):
    found, config = two["bytes_counted-0"], cases.model_of({}).config
    for way in ("ddp", "fsdp"):
        assert found[way]["sent"] == bytes_sent(way, 2, found[way]["weight_bytes"]) > 0
    stream = cases.SETTINGS.batch_size * config.context_length * config.d_model * 4
    assert found["tp"]["sent"] == bytes_sent("tp", 2, activation_bytes=stream, n_layers=config.n_layers) > 0


def test_memory_kept_is_the_share(two):
    found = two["bytes_counted-0"]
    assert found["ddp"]["kept"] == found["ddp"]["weight_bytes"]
    assert found["fsdp"]["kept"] * 2 == found["fsdp"]["weight_bytes"]
    matrices = sum(p.numel() * 4 for name, p in cases.model_of({"vocab_size": 38}).named_parameters()
                   if name.startswith("blocks.") and p.ndim == 2)
    assert found["tp"]["kept"] == found["tp"]["weight_bytes"] - matrices // 2


def test_hidden_states_of_a_divided_model(two):
    assert two["hidden_states-0"]["difference"] < 1e-6


@pytest.mark.parametrize("way,optimizer", zip(TRAINERS, ("muon", "adamw", "muon")))
def test_two_then_one_then_two(two, way, optimizer):
    found = two["two_one_two-0"][way]
    trainer = Trainer(cases.model_of({}), cases.DATA, cases.SETTINGS.replace(optimizer=optimizer), progress=False)
    trainer.train()
    assert_same_run(found, cases.summary(trainer))
    assert ["after step 2, which is saved" in found["ends"][0], "after step 3, which is saved" in found["ends"][1]] == [
        True, True]
    assert "step-0000004" in found["files"] and not [name for name in found["files"] if name.startswith("shards")]
    model, _ = load_model(two["folder"] / f"run-{way}")
    assert all(torch.equal(weight, found["weights"][name]) for name, weight in model.state_dict().items())


def test_a_signal_for_one_process_stops_both_after_the_same_step(two):
    assert "after step 2, which is saved" in two["saved_in_parts-0"]["end"]
    assert "stopped by SIGTERM after step 2" in two["saved_in_parts-1"]["end"]
    assert {"shards-0000001", "shards-0000002", "step-0000000"} <= set(two["saved_in_parts-0"]["files"])


@pytest.fixture()
def parts(two, tmp_path) -> Path:
    "A copy of the run that two processes left in parts."
    return Path(shutil.copytree(two["folder"] / "parts", tmp_path / "parts"))


def test_parts_are_merged_or_named(parts):
    with pytest.warns(Note, match="shards-0000002 is newer, but in parts"):
        load_model(parts)
    assert merge_shards(parts) == parts / "step-0000002"
    assert merge_shards(parts) is None
    trainer = Trainer.resume(parts, cases.DATA, progress=False)
    trainer.train()
    wanted = Trainer(cases.model_of({}), cases.DATA, cases.SETTINGS, progress=False)
    wanted.train()
    assert_same_run(cases.summary(trainer), cases.summary(wanted))


@pytest.mark.parametrize("harm,sentence", [
    (lambda folder: next(folder.glob("*.distcp")).unlink(), "lacks its part"),
    (lambda folder: next(folder.glob("*.distcp")).write_bytes(b"else"), "is damaged"),
    (lambda folder: write_json(folder / "shards.json", read_json(folder / "shards.json") | {"torch": "1.0"}),
     f"was written with torch 1.0, and this is torch {torch_release()}"),
], ids=["missing", "damaged", "other torch"])
def test_parts_that_cannot_be_read_are_refused(parts, harm, sentence, capsys):
    harm(parts / "shards-0000002")
    assert cli.main(["train", "--resume", "--out", str(parts)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_refusals_are_the_same_on_both(two):
    found = two["refused-0"]
    assert found == two["refused-1"]
    assert "batch_size 1 can't be shared equally by 2 processes" in found["rows"]
    assert "dropout 0, not 0.1" in found["dropout"]
    assert "splits n_heads 1 over 2 processes" in found["heads"]
    assert "no such file or folder" in found["first"]  # only process 0 tried


def test_a_process_that_cannot_write_stops_both(two):
    assert two["unwritable-0"]["error"] == two["unwritable-1"]["error"]
    assert ".shards-0000001.new.part" in two["unwritable-0"]["error"]


def test_a_lost_process_is_named_and_not_waited_for(two):
    assert not (two["folder"] / "error-1.txt").exists()
    said, text = (two["folder"] / "error-0.txt").read_text(encoding="utf-8").split(" ", 1)
    assert said == "True" and text.startswith("Process 0 lost the others")


def test_one_process_says_what_is_refused(tmp_path):
    "More processes than sequences, by the command line: both end with 2, one of them with a sentence."
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 60, encoding="utf-8")
    command = ["-m", "transformer_llm", "train", "--parallel", "ddp", "--model_size", "demo", "--batch_size", "1"]
    command += ["--max_steps", "2", "--device", "cpu", "--text_file", str(text), "--out", str(tmp_path / "run")]
    ended = start_two(*command)
    assert [code for code, _ in ended] == [2, 2]
    assert sum(output.count("can't be shared equally by 2 processes") for _, output in ended) == 1
    assert sum(len(output.splitlines()) for _, output in ended) == 1


@pytest.fixture()
def alone(monkeypatch) -> int:
    "The variables that torchrun sets, for a group of one, in this process; gives the port."
    port = free_port()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    return port


def test_a_port_in_use(alone, capsys):
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("", alone))
        place.listen()
        assert cli.main(["train", "--parallel", "ddp", "--device", "cpu"]) == 2
    assert f"Port {alone} is in use by another program" in capsys.readouterr().err


def test_others_that_never_come(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Not all of the 2 processes came"), joined("cpu", seconds=2):
        pass


def test_parallel_without_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["train", "--parallel", "fsdp"]) == 2
    assert "torchrun --nproc_per_node 2 -m transformer_llm" in capsys.readouterr().err


def test_several_processes_without_parallel(alone, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train"]) == 2
    assert "3 processes were started, and each would train the same run" in capsys.readouterr().err


@pytest.mark.parametrize("rows,processes", [(4, 2), (5, 2), (1, 3), (6, 4)])
def test_rows_of_all_processes_are_the_batch(rows, processes):
    inputs = torch.arange(rows * 3).view(rows, 3)
    shares = [my_rows((inputs, inputs + 1), rank, processes) for rank in range(processes)]
    assert len({share.shape for share, _ in shares}) == 1
    kept = torch.cat([share[(targets != -100).any(1)] for share, targets in shares])
    assert torch.equal(kept, inputs)
