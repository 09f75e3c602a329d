"""Make data/sprint.json, the runs that chapter 12 shows.

    python book/sprint_runs.py [PART ...]

PART is one of final, ladder, again, leave_out, rates, without_table, counts; the first three also with names, as in
ladder=tuned,linear. Each run is written as soon as it is there, and one that is there already is not made again (delete
the file to begin anew). Let nothing else run on the machine meanwhile.
"""
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import torch

from transformer_llm.dataset import load_shakespeare
from transformer_llm.foundations import read_json, write_json
from transformer_llm.sprint import NGRAMS, PLAIN, RECIPES, TUNED, count_loss, evaluate_all, read_characters, run_recipe
from transformer_llm.training import Muon

ROOT = Path(__file__).parents[1]
FILE = ROOT / "data" / "sprint.json"
THREADS = 2
SEEDS = {name: 3 for name in RECIPES} | {"five-minutes": 1, "minute": 1, "minute-plain": 1}
GRID = [round(20 * 1.15**i) for i in range(34)]  # numbers of steps that the ladder tries

# Each rung changes the one before it: (name, about, changes, the first number of steps to try).
RUNGS = [
    ("tuned", "the reference, tuned", {}, 1150),
    ("linear", "the rate falls in a line to zero", dict(training=dict(schedule="linear", min_lr_fraction=0.0)), 1150),
    (
        "muon",
        "Muon moves the matrices",
        dict(training=dict(optimizer="muon", muon_learning_rate=0.03, weight_decay=0.0)),
        500,
    ),
    ("rotary", "rotary positions", dict(model=dict(position="rotary", rope_interleaved=True, rope_base=100.0)), 330),
    ("zero", "what is added starts at zero", dict(model=dict(zero_init_residual=True)), 330),
    ("qk-norm", "queries and keys are normalised", dict(model=dict(qk_norm=True)), 285),
    ("relu2", "RMSNorm and ReLU²", dict(model=dict(norm="rmsnorm", activation="relu2")), 285),
    (
        "output",
        "an output matrix of its own, from zero; larger embeddings and rates; fewer passes",
        dict(
            model=dict(tied_embeddings=False, init_std=0.3),
            sprint=True,
            training=dict(learning_rate=0.02, muon_learning_rate=0.06, grad_clip=0.0),
        ),
        330,
    ),
    ("shift", "the previous token's embedding is mixed in", dict(token_shift=True), 280),
    (
        "small",
        "one layer of half the width, and 40 windows a step",
        dict(model=PLAIN.model, training=PLAIN.training.to_dict(), momentum=PLAIN.momentum),
        150,
    ),
    (
        "ngrams",
        "a table of hashed pairs to fives, and half the width",
        dict(model=NGRAMS.model, training=NGRAMS.training.to_dict(), ngrams=NGRAMS.ngrams),
        30,
    ),
]

# Rates of the matrices' optimizer that `rates` tries; all else is the plain recipe's.
RATES = {"muon": (0.015, 0.03, 0.06, 0.1, 0.15), "adamw": (0.003, 0.006, 0.01, 0.015, 0.025)}

LEFT_OUT = [
    ("everything", {}),
    ("AdamW in Muon's place", dict(training=dict(optimizer="adamw", learning_rate=0.01))),
    ("constant rate", dict(training=dict(schedule="constant"))),
    ("no zero start", dict(model=dict(zero_init_residual=False))),
    ("no previous token", dict(token_shift=False)),
    ("embeddings of size 0.02", dict(model=dict(init_std=0.02))),
    ("rotary base 10,000", dict(model=dict(rope_base=10000.0))),
    ("rates ten times larger", dict(training=dict(learning_rate=0.5, muon_learning_rate=0.6))),
]


def load() -> dict:
    return (
        read_json(FILE)
        if FILE.exists()
        else {"machine": machine(), "final": [], "ladder": [], "leave_out": [], "without_table": [], "counts": []}
    )


def machine() -> dict:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep(part: str, result: dict) -> None:
    runs = load()
    runs.setdefault(part, []).append(
        {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    )
    runs["ladder"].sort(key=lambda run: [name for name, *_ in RUNGS].index(run["name"]))
    write_json(FILE, runs)
    print(part, {key: value for key, value in result.items() if key != "curve"}, flush=True)


def busy() -> float | None:
    "Seconds that all processors together have worked since the machine started, where the system tells."
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def undisturbed(make) -> dict:
    """The run, made up to three times until other processes took under 5 % of the machine.

    The least disturbed one, with that share as `others`.
    """
    best = None
    for _ in range(3):
        before, own, start = busy(), time.process_time(), time.perf_counter()
        result = make()
        seconds = time.perf_counter() - start
        if before is not None:
            result["others"] = max(0.0, (busy() - before - (time.process_time() - own)) / (seconds * os.cpu_count()))
        if best is None or result.get("others", 0.0) < best.get("others", 0.0):
            best = result
        if best.get("others", 0.0) < 0.05 or seconds > 40:
            break
    return best


def once(part: str, name: str, make, **about) -> dict:
    "The run of this name and these particulars, made now unless it is there."
    for run in load().get(part, []):
        if run["name"] == name and all(run.get(key) == value for key, value in about.items()):
            return run
    keep(part, undisturbed(make) | {"name": name} | about)
    return load()[part][-1]


def final(path: Path, names=None) -> None:
    "Seeds outside, recipes inside: what disturbs the machine for a while disturbs all of them."
    for seed in range(3):
        for name in names or RECIPES:
            if seed < SEEDS[name]:
                once("final", name, partial(run_recipe, RECIPES[name], path, seed, threads=THREADS), seed=seed)


def target() -> float:
    losses = [run["val_loss"] for run in load()["final"] if run["name"] == "documented"]
    return sum(losses) / len(losses)


def rung(path: Path, name: str, about: str, recipe, steps: int, **more) -> dict:
    attempt = recipe.change(name, about, training=dict(max_steps=steps))
    make = lambda: run_recipe(attempt, path, 0, threads=THREADS, eval_every=max(1, steps // 12), eval_tokens=64 * 500)
    return once("ladder", name, make, steps=steps, about=about, **more)


def ladder(path: Path, names=None) -> None:
    recipe, goal = TUNED, target()
    for name, about, changes, guess in RUNGS:
        recipe = recipe.change(name, about, **changes)
        if names and name not in names:
            continue
        tried: dict[int, float] = {}
        place = min(range(len(GRID)), key=lambda i: abs(GRID[i] - guess))
        while True:
            tried[place] = rung(path, name, about, recipe, GRID[place])["val_loss"]
            place += -1 if tried[place] <= goal else 1
            if place in tried or not 0 <= place < len(GRID):
                break


def again(path: Path, names=None) -> None:
    """Each rung's shortest run that reached the mark once more, one rung after another: a machine that others use too
    isn't always equally fast.
    """
    recipe, goal = TUNED, target()
    for name, about, changes, _ in RUNGS:
        recipe = recipe.change(name, about, **changes)
        if not names or name in names:
            rung(
                path,
                name,
                about,
                recipe,
                min(run["steps"] for run in load()["ladder"] if run["name"] == name and run["val_loss"] <= goal),
                again=1,
            )


def leave_out(path: Path) -> None:
    for seed in range(3):
        for name, changes in LEFT_OUT:
            recipe = PLAIN.change(name, name, **changes)
            once("leave_out", name, partial(run_recipe, recipe, path, seed, threads=THREADS), seed=seed)


def race(path: Path, optimizer: str, rate: float, seed: int) -> float:
    "The final loss of the plain recipe with one optimizer for the matrices of its block, as in the chapter."
    data, tokenizer = read_characters(path)
    torch.manual_seed(seed)
    trainer = PLAIN.make_trainer(PLAIN.make_model(tokenizer.vocab_size), data, seed)
    place = next(i for i, one in enumerate(trainer.optimizers) if isinstance(one, Muon))
    groups = trainer.optimizers[place].param_groups
    if optimizer == "adamw":
        matrices = [matrix for group in groups for matrix in group["params"]]
        trainer.optimizers[place] = torch.optim.AdamW(matrices, betas=PLAIN.training.betas, weight_decay=0.0)
        groups = trainer.optimizers[place].param_groups
    for group in groups:
        group["top_lr"] = rate
    for _ in range(PLAIN.training.max_steps):
        trainer.train_step()
    return evaluate_all(trainer.model, data.val)


def rates(path: Path) -> None:
    "The plain recipe with Muon or AdamW on the matrices of its block and nothing else changed, at several rates."
    for seed in range(2):  # the chapter itself runs a third at the best rates
        for optimizer, tried in RATES.items():
            for rate in tried:
                done = [(run["name"], run["rate"], run["seed"]) for run in load().get("rates", [])]
                if (optimizer, rate, seed) not in done:
                    result = {"val_loss": race(path, optimizer, rate, seed)}
                    keep("rates", {"name": optimizer, "rate": rate, "seed": seed} | result)


def without_table(path: Path) -> None:
    "The recipes with n-grams, as they are but for the table: what it gives at equal steps."
    for name in ("ngrams", "under-1.60"):
        recipe = RECIPES[name].change(name, "without its table", ngrams=())
        once("without_table", name, partial(run_recipe, recipe, path, 0, threads=THREADS), seed=0)


def counts(path: Path) -> None:
    for order in range(1, 7):
        once("counts", f"{order}-grams", partial(count_loss, path, order), order=order)


if __name__ == "__main__":
    path = load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False)
    parts = {
        "final": final,
        "ladder": ladder,
        "again": again,
        "leave_out": leave_out,
        "rates": rates,
        "without_table": without_table,
        "counts": counts,
    }
    for argument in sys.argv[1:] or parts:
        part, _, names = argument.partition("=")
        parts[part](path, *([names.split(",")] if names else []))
