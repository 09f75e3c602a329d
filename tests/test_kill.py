"""`kill -9` at random moments, then --resume: not one bit of the result may differ, and a valid checkpoint is always
there.

One run is killed 20 times, each time at a random moment: while it starts, or some steps and milliseconds on. Then it is
left to finish and compared with a run that nobody touched. Such a small run spends most of its time writing
checkpoints,
so many kills hit the middle of one; `pytest -s` prints the moments and how many.
"""
import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

KILLS = 20
STEPS = 500
SEED = 20261


def train(arguments: list[str], log: str) -> None:
    "The command in a process of its own, with its words in a file."
    import sys

    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)
    import threading

    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # the usual one outlives a killed process
    torch.set_num_threads(1)
    from transformer_llm.cli import main

    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def processes():
    "A way to start processes: from a server that has imported PyTorch once, where the system has that."
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "transformer_llm.cli",
            "transformer_llm.training",
            "transformer_llm.dataset",
            "transformer_llm.tokenizer",
            "torch._dynamo",
        ]
    )
    return context


def start(processes, arguments: list[str], log: Path):
    "Start the command."
    process = processes.Process(target=train, args=(arguments, str(log)))
    process.start()
    return process


def checkpoints(out: Path) -> list[str]:
    "The names of the checkpoints that stand in a run's folder."
    return sorted(path.parent.name for path in out.glob("step-*/checkpoint.json"))


def half_done(out: Path) -> set:
    "What a process was writing or removing in a run's folder when it ended."
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob(".step-*.part")}


def newest(out: Path) -> int:
    "The step of the newest checkpoint, -1 if there is none."
    return max((int(name.split("-")[1]) for name in checkpoints(out)), default=-1)


def wait_for(process, out: Path, step: int) -> bool:
    "Wait until a run has a checkpoint of this step or a later one; False if its process ends before."
    while newest(out) < step:
        if not process.is_alive():
            return False
        time.sleep(0.001)
    return True


def test_killed_twenty_times_and_equal_to_the_bit(processes, tmp_path):
    from transformer_llm.checkpoints import load_checkpoint

    text, log, draw = tmp_path / "text.txt", tmp_path / "log.txt", random.Random(SEED)
    words = "the cat sat on a mat and saw one red hat".split()
    text.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(200)), encoding="utf-8")
    settings = [
        "train",
        "--model_size",
        "demo",
        "--text_file",
        str(text),
        "--max_steps",
        str(STEPS),
        "--batch_size",
        "4",
        "--context_length",
        "16",
        "--dropout",
        "0.1",
        "--checkpoint_every",
        "3",
        "--eval_every",
        "50",
        "--device",
        "cpu",
        "--seed",
        "7",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    process, began = start(processes, [*settings, "--out", str(whole)], log), time.monotonic()
    assert wait_for(process, whole, 0), log.read_text(encoding="utf-8")
    starting = time.monotonic() - began  # seconds until the first checkpoint
    process.join()
    assert process.exitcode == 0, log.read_text(encoding="utf-8")

    moments, in_a_save = [], 0
    while len(moments) < KILLS:
        step, before = newest(killed), half_done(killed)
        process = start(processes, [*settings, "--out", str(killed)] if step < 0 else resume(killed), log)
        if draw.random() < 0.25:  # while it starts or continues
            delay, moment = draw.uniform(0, starting), f"the start from step {step}" if step >= 0 else "the start"
        else:  # while it trains and saves: some steps on, and some milliseconds
            target = max(step, 0) + draw.randint(1, 30)
            assert wait_for(process, killed, target), f"ended before step {target}: {log.read_text(encoding='utf-8')}"
            delay, moment = draw.uniform(0, 0.03), f"step {target}"
        time.sleep(delay)
        process.kill()
        process.join()
        moments.append(f"{moment} + {1000 * delay:.0f} ms")
        in_a_save += bool(half_done(killed) - before)
        if step >= 0 or checkpoints(killed):
            assert load_checkpoint(killed).step >= step  # verifies every hash of the newest
            assert 1 <= len(checkpoints(killed)) <= 3
    print(f"\nseed {SEED}: {KILLS} kills at {', '.join(moments)}; {in_a_save} of them in the middle of a checkpoint")
    assert newest(killed) < STEPS, "the run was over before the last kill; give it more steps"

    process = start(processes, resume(killed), log)
    process.join()
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
    compare(whole, killed)


def resume(out: Path) -> list[str]:
    "The words that continue a run."
    return ["train", "--resume", "--out", str(out)]


def compare(whole: Path, killed: Path) -> None:
    "Weights, optimizer, generators and history of two finished runs are equal to the bit."
    last = f"step-{STEPS:07d}"
    for name in ("model.safetensors", "training_state.safetensors", "config.json", "tokenizer.json"):
        assert (whole / last / name).read_bytes() == (killed / last / name).read_bytes(), name
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in (whole, killed)
    ]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in run] for run in rows
    ]
    assert timeless[0] == timeless[1]
    assert not list(killed.glob(".*.part"))
