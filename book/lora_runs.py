"""Make data/lora.json, the runs of SmolLM2 that chapter 15 shows.

    python book/lora_runs.py [lora | eight_bits] [--steps N]

Each trains adapters of rank 8 on the 1,000 made-up tasks of chapter 14, with the same held-out tasks and the same
windows as `book/finetune_runs.py smollm2`, whose run of all weights stands beside them on the page. The rate is ten
times that run's. A result is written as soon as it is there, and not made again (delete it from the file to begin
anew); the runs are in runs/lora-smollm2 and runs/lora-smollm2-eight_bits, and one that was stopped goes on. `--steps N`
makes them shorter, and keeps nothing. Minutes and memory count only if nothing else runs on the machine, and memory
only for one run per call.
"""
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch

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
from transformer_llm.foundations import read_json, write_json
from transformer_llm.lora import add_lora, lora_training_memory, quantise_base, save_lora, with_adapters
from transformer_llm.runs import holds_run
from transformer_llm.transformer import GPT

ROOT = Path(__file__).parents[1]
FILE = ROOT / "data" / "lora.json"
RANK, RATE = 8, 2e-4


def prepare(model: GPT, eight_bits: bool) -> GPT:
    "The model with adapters beside all matrices of its blocks."
    return add_lora(quantise_base(model) if eight_bits else model, RANK, generator=0)


def load() -> dict:
    return read_json(FILE) if FILE.exists() else {}


def run(name: str, steps: int | None = None) -> None:
    "One run: loss, exact answers and bits per byte of plain text at its end; minutes, memory, and the adapter's bytes."
    if name in load() and steps is None:
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
        write_json(FILE, load() | {name: result})


if __name__ == "__main__":
    torch.set_num_threads(2)
    start, arguments = time.perf_counter(), sys.argv[1:]
    short = int(arguments.pop(arguments.index("--steps") + 1)) if "--steps" in arguments else None
    for part in [name for name in arguments if name != "--steps"] or ["lora", "eight_bits"]:
        run(part, short)
    print(f"{time.perf_counter() - start:.0f} s")
