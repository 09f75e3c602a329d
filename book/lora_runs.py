"""Make data/lora.json, the runs that chapter 15 shows.

    python book/lora_runs.py [PART ...]

PART is one of ranks, places, lora, eight_bits. Each result is written as soon as it is there, and one that is there
already is not made again (delete it from the file to begin anew). `ranks` and `places` train the small model of the
chapter's lesson, with the lesson's own functions, for a few minutes of one core; other processes may run beside them.

`lora` and `eight_bits` fine-tune SmolLM2: each trains adapters of rank 8 on the 1,000 made-up tasks of chapter 14, with
the same held-out tasks and the same windows as `book/finetune_runs.py smollm2`, whose run of all weights stands beside
them on the page. The rate is ten times that run's. The runs are in runs/lora-smollm2 and
runs/lora-smollm2-eight_bits, and one that was stopped goes on. `--steps N` makes them shorter, and keeps nothing.
Minutes and memory count only if nothing else runs on the machine, and memory only for one of these two parts per call.
"""
import ast
import contextlib
import itertools
import json
import resource
import sys
import time
from functools import partial

import torch
from stored import ROOT, Stored

from transformer_llm.dataset import load_shakespeare, read_text
from transformer_llm.evaluation import score_text
from transformer_llm.finetuning import (
    FineTuneConfig,
    FineTuneTrainer,
    answers,
    continue_finetuning,
    format_of_run,
    hold_out,
    load_dialogues,
    start_finetuning,
    without_copies,
)
from transformer_llm.foundations import write_json
from transformer_llm.lora import add_lora, lora_training_memory, quantise_base, save_lora, with_adapters
from transformer_llm.runs import holds_run
from transformer_llm.transformer import GPT

RUNS = Stored("lora.json")
RANK, RATE = 8, 2e-4  # of SmolLM2's adapters
SEEDS, TASKS = (0, 1, 2), ("shouted", "cipher")
RATES = {1: (3e-3, 1e-2, 3e-2, 1e-1), 4: (3e-3, 1e-2, 3e-2, 1e-1), 16: (3e-3, 1e-2, 3e-2, 1e-1),
         None: (1e-3, 3e-3, 1e-2, 3e-2)}  # by rank; None: all weights
PLACES = {"blocks.*.attention.*": 8, "blocks.*.feedforward.*": 6}  # pattern: rank
PLACE_RATES = (1e-2, 3e-2, 1e-1)
LESSON = {"F", "mean", "tokens", "base", "LoRA", "train_all", "end", "match", "end_at"}


def defined(source: str) -> set[str]:
    "The names that a cell makes."
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def lesson() -> dict:
    "What the lesson's own cells make, run in their order until all of LESSON is there; the base is trained on the way."
    cells = json.loads((ROOT / "nbs" / "15_lora.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    with contextlib.chdir(ROOT / "nbs"):
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not LESSON <= names.keys() and defined(source) & LESSON:
                exec(compile(source, "lesson", "exec"), names)
    return names


def ranks(names: dict) -> None:
    "Ranks and all weights, each at four rates."
    for task, rank, seed in itertools.product(TASKS, RATES, SEEDS):
        for rate in RATES[rank]:
            wanted = dict(task=task, rank=rank, rate=rate, seed=seed)
            if not RUNS.has("ranks", wanted):
                RUNS.keep("ranks", wanted | {"loss": round(names["end"](**wanted), 5)})


def places(names: dict) -> None:
    "Adapters beside the matrices of attention or of the feed-forward layers, nearly as many numbers."
    for task, (pattern, rank), rate, seed in itertools.product(TASKS, PLACES.items(), PLACE_RATES, SEEDS):
        wanted = dict(task=task, pattern=pattern, rank=rank, rate=rate, seed=seed)
        if not RUNS.has("places", wanted):
            RUNS.keep("places", wanted | {"loss": round(names["end_at"](**wanted), 5)})


def prepare(model: GPT, eight_bits: bool) -> GPT:
    "The model with adapters beside all matrices of its blocks."
    return add_lora(quantise_base(model) if eight_bits else model, RANK, generator=0)


def run(name: str, steps: int | None = None) -> None:
    "One run: loss, exact answers and bits per byte of plain text at its end; minutes, memory, and the adapter's bytes."
    if name in RUNS.load() and steps is None:
        return
    folder = "lora-smollm2" + ("" if name == "lora" else f"-{name}") + ("" if steps is None else "-short")
    out = ROOT / "runs" / folder
    training = {"batch_size": 8, "learning_rate": RATE} | ({} if steps is None else {"max_steps": steps})
    config = FineTuneConfig(model="smollm2", data="tasks", packed=True, context_length=512, training=training)
    kind = with_adapters(FineTuneTrainer)
    if holds_run(out):
        trainer, counts = continue_finetuning(out, trainer_class=kind, progress=True)
    else:
        make = partial(prepare, eight_bits=name == "eight_bits")
        trainer, counts = start_finetuning(out, config, prepare=make, trainer_class=kind, progress=True)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    n_asked = 100 if steps is None else 5
    held = hold_out(without_copies(load_dialogues("tasks")), config.val_fraction, trainer.config.seed)[1][:n_asked]
    text = read_text(load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False))
    text = text[-20_000 if steps is None else -1_000 :]
    chat_format, model = format_of_run(out), trainer.model.eval()
    written = answers(model, chat_format, [dialogue.question for dialogue in held], 40)
    adapter = save_lora(model, out / "adapter", base_model="smollm2", overwrite=True)
    result = {
        "rank": RANK,
        "rate": RATE,
        "pairs": counts.read,
        "steps": trainer.step,
        "trained": model.num_parameters(trainable_only=True),
        "loss": trainer.evaluate(),
        "exact": sum(a.strip() == dialogue.answer for a, dialogue in zip(written, held)) / len(held),
        "bits": score_text(model, chat_format.tokenizer, text).bits_per_byte,
        "minutes": trainer.seconds / 60,
        "gigabytes": peak,
        "predicted": lora_training_memory(model.config, RANK, 8, 512, int8=name == "eight_bits") / 1e9,
        "file_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "threads": torch.get_num_threads(),
    }
    print(name, result)
    if steps is None:
        RUNS.set(name, result)


if __name__ == "__main__":
    start, arguments = time.perf_counter(), sys.argv[1:]
    short = int(arguments.pop(arguments.index("--steps") + 1)) if "--steps" in arguments else None
    small: dict = {}
    for part in arguments or ["ranks", "places", "lora", "eight_bits"]:
        if part in ("ranks", "places"):
            torch.set_num_threads(1)
            if not small:
                write_json(RUNS.path, RUNS.load())  # the lesson reads it
                small = lesson()
            {"ranks": ranks, "places": places}[part](small)
        elif part in ("lora", "eight_bits"):
            torch.set_num_threads(2)
            run(part, short)
        else:
            sys.exit(f"There is no part {part}; choose from ranks, places, lora, eight_bits.")
    print(f"{time.perf_counter() - start:.0f} s")
