"""Make data/kill.json, the table of killed runs that chapter 21 shows.

    python book/kill_runs.py [ROWS]

Each row is a run of 24 steps. Two processes begin, and one of them kills itself (SIGKILL) in a random step; torchrun
starts both again. At step 10 one process goes on alone, and at step 17 two do. All of it is the command `train`; this
script only notes, in each process, which tokens it reads and what the loss is, and compares that with a run of one
process that nothing happened to. A row takes half a minute on two idle cores. A row that is there already isn't made
again (delete it from the file to begin anew), and a row that differs is kept as it was.
"""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stored import ROOT, Stored

RUNS = Stored("kill.json")
ROWS, LIMIT = 10, 600  # rows, and seconds that a start may take
LEGS = ((2, 10), (1, 17), (2, 24))  # processes, and the step up to which they train
WAYS = ("ddp", "fsdp", "tp")
SETTINGS = ["--model_size", "demo", "--batch_size", "8", "--checkpoint_every", "3", "--eval_every", "12", "--schedule",
            "constant", "--warmup_steps", "0", "--device", "cpu"]


def noting(folder: Path, victim: int, kill_step: int) -> None:
    "Let this process's trainers note tokens and losses, and die in the middle of a step if it is the victim."
    from transformer_llm.distributed import ParallelTrainer
    from transformer_llm.training import Trainer

    rank = int(os.environ.get("RANK", 0))
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def write(name: str, step: int, value: object) -> None:
        with open(folder / f"{name}-{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, value]) + "\n")

    for kind in (Trainer, ParallelTrainer):
        draw, train_step = kind._draw, kind.train_step

        def noted_draw(self, draw=draw, kind=kind):
            batch = draw(self)
            if kind is Trainer and isinstance(self, ParallelTrainer):
                return batch  # the whole batch; its rows are noted by the other one
            if rank == 0 or getattr(self, "shares_rows", False):
                write("tokens", self.step, [row.numpy().tobytes().hex() for row in batch[0]])
            if first_start and rank == victim and self.step == kill_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

        def noted_step(self, train_step=train_step, kind=kind):
            loss, norm = train_step(self)
            if rank == 0 and (kind is ParallelTrainer) == isinstance(self, ParallelTrainer):
                write("losses", self.step - 1, loss)
            return loss, norm

        kind._draw, kind.train_step = noted_draw, noted_step


def work(folder: str, victim: str, kill_step: str, *command: str) -> int:
    "What each process does: the command line, noted."
    from transformer_llm.cli import main

    noting(Path(folder), int(victim), int(kill_step))
    return main(list(command))


def start(processes: int, folder: Path, victim: int, kill_step: int, *command: str) -> None:
    "One leg of a run; what counts is what it wrote."
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                   "--max_restarts", "1"]
    python += [__file__, "work", str(folder), str(victim), str(kill_step), "train", *command]
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        subprocess.run(python, stdout=output, stderr=output, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def read_notes(folder: Path, name: str) -> dict[int, list]:
    "All that was noted for each step, by the order of ranks; a step made twice is there twice."
    found: dict[int, list] = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with_step = json.loads(line)
            found.setdefault(with_step[0], []).append(with_step[1])
    return found


def undisturbed(folder: Path, tokens: Path) -> tuple[dict, dict]:
    "The rows of tokens and the loss of each step, of one process that nothing happened to."
    folder.mkdir()
    start(1, folder, -1, -1, "--text_file", str(tokens), "--out", str(folder / "run"), "--max_steps", "24", *SETTINGS)
    rows = {step: noted[0] for step, noted in read_notes(folder, "tokens").items()}
    return rows, {step: noted[0] for step, noted in read_notes(folder, "losses").items()}


def same_rows(noted: list[list[str]], wanted: list[str]) -> bool:
    "Whether what was read for a step is the wanted batch, once or several times, in parts or whole."
    read = [row for part in noted for row in part]
    return set(read) == set(wanted) and len(read) >= len(wanted)


def digest(noted: dict[int, list]) -> str:
    "A hash of all rows that were read, in the order of the steps."
    steps = ("".join(sorted({row for part in noted[step] for row in part})) for step in sorted(noted))
    return hashlib.sha256("|".join(steps).encode()).hexdigest()[:16]


def killed_run(folder: Path, tokens: Path, number: int, rows: dict, losses: dict) -> dict:
    "One row of the table."
    chance = random.Random(number)
    way, victim, kill_step = WAYS[number % 3], chance.randrange(2), chance.randrange(1, 10)
    folder.mkdir()
    began = time.perf_counter()
    out = ["--text_file", str(tokens), "--out", str(folder / "run"), *SETTINGS]
    for leg, (processes, step) in enumerate(LEGS):
        further = ["--resume"] if leg else []
        further += ["--parallel", way] if processes > 1 else []
        start(processes, folder, victim if leg == 0 else -1, kill_step, *out, "--max_steps", str(step), *further)
    read, found = read_notes(folder, "tokens"), read_notes(folder, "losses")
    whole = set(read) == set(found) == set(rows)
    same = whole and all(same_rows(read[step], rows[step]) for step in rows)
    return {
        "row": number, "parallel": way, "victim": victim, "kill_step": kill_step,
        "tokens_identical": same, "tokens": digest(read),
        "steps_twice": sum(len(noted) > 1 for noted in found.values()),
        "loss_difference": max(abs(loss - losses[step]) for step in found for loss in found[step]) if whole else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(count: int = ROWS) -> None:
    sys.path.insert(0, str(ROOT))
    from transformer_llm.runs import prepare

    with tempfile.TemporaryDirectory() as place:
        tokens = Path(place) / "tokens"
        prepare(ROOT / "data" / "simple_patterns.txt", tokens, tokenizer="char")
        rows, losses = undisturbed(Path(place) / "undisturbed", tokens)
        if len(losses) != LEGS[-1][1]:
            raise SystemExit((Path(place) / "undisturbed" / "output.txt").read_text(encoding="utf-8"))
        RUNS.set("undisturbed", {"tokens": digest({step: [read] for step, read in rows.items()}), "loss": losses[23]})
        for number in range(count):
            if RUNS.has("runs", {"row": number}):
                continue
            result = killed_run(Path(place) / str(number), tokens, number, rows, losses)
            if not result["tokens_identical"]:
                print((Path(place) / str(number) / "output.txt").read_text(encoding="utf-8"))
            RUNS.keep("runs", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        sys.exit(work(*sys.argv[2:]))
    main(*map(int, sys.argv[1:2]))
