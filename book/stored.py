"""Results of long runs, kept in a file of data/ for the chapters that show them; what the scripts *_runs.py share."""
import os
import platform
from pathlib import Path

import torch

from transformer_llm.foundations import read_json, write_json

ROOT = Path(__file__).parents[1]


def machine() -> dict:
    "What the runs were made on."
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class Stored:
    "Lists of runs by part, in one file. Each run is written as soon as it is there, so a script can be stopped."

    def __init__(self, name: str):
        self.path = ROOT / "data" / name

    def load(self) -> dict:
        return read_json(self.path) if self.path.exists() else {"machine": machine()}

    def set(self, part: str, result: object) -> None:
        "Put this in the place of the part."
        write_json(self.path, self.load() | {part: result})

    def keep(self, part: str, run: dict, unprinted: tuple[str, ...] = ()) -> None:
        "Add a run to the part."
        self.set(part, [*self.load().get(part, []), run])
        print(part, {name: value for name, value in run.items() if name not in unprinted}, flush=True)

    def has(self, part: str, wanted: dict) -> bool:
        "Whether the part holds a run with these values among its own."
        return any(wanted.items() <= run.items() for run in self.load().get(part, []))
