"""Make data/circuits.json, the runs with further seeds that chapter 19 shows beside its own.

    python book/circuits_runs.py [PART ...]

PART is one of growth, one_layer, addition. Each result is written as soon as it is there, and one that is there already
is not made again (delete it from the file to begin anew). All parts use the functions of the chapter's lesson, on one
core, for less than two minutes; other processes may run beside them.
"""
import ast
import json
import sys
import time

import torch
from stored import ROOT, Stored

RUNS = Stored("circuits.json")
SEEDS = {"growth": (2,), "one_layer": (1, 2), "addition": (1, 2)}


def definitions() -> dict:
    "The imports, functions and classes of the lesson's cells up to its recap, without what the cells do besides."
    names: dict = {"__name__": "lesson"}
    cells = json.loads((ROOT / "nbs" / "19_circuits.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and "## Recap" in source:
            return names
        if cell["cell_type"] != "code" or "default_exp" in source:
            continue
        kept = [node for node in ast.parse(source).body if is_definition(node)]
        exec(compile(ast.Module(kept, []), "lesson", "exec"), names)
    raise SystemExit("Chapter 19 has no recap.")


def is_definition(node: ast.stmt) -> bool:
    "Whether a statement makes a name without running the lesson: also the few short constants of the sums."
    constants = {"signs", "pairs", "order", "held_out"}
    if isinstance(node, ast.Assign):
        made = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        return bool(made & constants)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def keep(part: str, seed: int, run: object) -> None:
    RUNS.set(part, RUNS.load().get(part, {}) | {str(seed): run})
    print(part, seed, flush=True)


def growth(names: dict, n_layers: int, seed: int) -> list[list[float]]:
    "Step, loss and the best score of each kind, every ten steps."
    return [[step, *(round(value, 4) for value in rest)]
            for step, *rest in names["summary"](names["grow"](n_layers, seed)[1])]


def addition(names: dict, seed: int) -> dict:
    "The share of right digits, and each head's effect where the tens are predicted."
    adder = names["learn_to_add"](seed)
    effects = names["patch_grid"](adder, "blocks.0.attention.heads", [6])[:, 0]
    return {"right": [round(share, 4) for share in names["right_digits"](adder)],
            "gathered": [round(effect, 4) for effect in effects.tolist()]}


if __name__ == "__main__":
    start = time.process_time()
    torch.set_num_threads(1)
    lesson = definitions()
    lesson["test"] = lesson["repeated"](16, 32, torch.Generator().manual_seed(1000))
    lesson["first"], lesson["second"] = lesson["carry_pairs"](200)
    makers = {"growth": lambda seed: growth(lesson, 2, seed), "one_layer": lambda seed: growth(lesson, 1, seed),
              "addition": lambda seed: addition(lesson, seed)}
    for part in sys.argv[1:] or makers:
        if part not in makers:
            sys.exit(f"There is no part {part}; choose from {', '.join(makers)}.")
        for seed in SEEDS[part]:
            if str(seed) not in RUNS.load().get(part, {}):
                keep(part, seed, makers[part](seed))
    print(f"{time.process_time() - start:.0f} s of processor time")
