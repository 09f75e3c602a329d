"""Measure the staircase of chapter 13: tokens per second of one model in each of its forms, and what each form loses.

    python book/staircase_runs.py [--rounds 3] [--tokens 16] [--out data/staircase.json]

SmolLM2-135M writes greedily behind a prompt, in turns: every round takes each form once, in the same order, so that a
busy moment of the machine meets all of them. The time of two tokens is subtracted, so reading the prompt isn't counted.
The file keeps every turn, the machine, its load, its memory's speed, and each form's error in bits per byte: the mean
difference from float32, token by token, with its standard error.
"""
import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformer_llm.dataset import load_shakespeare, read_text
from transformer_llm.decoding import Decoder, PackedGPT, bytes_per_token, memory_bandwidth
from transformer_llm.foundations import atomic_write
from transformer_llm.generation import generate
from transformer_llm.pretrained import load_pretrained, load_pretrained_tokenizer

PROMPT = "The old fox sees every green river. The quiet owl follows a golden lantern. One night"


def make_forms(model) -> dict:
    "Each stair: a function that writes n tokens, and the model that reads."
    packed = PackedGPT(model)
    plainly = lambda reader, cached: lambda ids, n: generate(reader, ids, n, temperature=0, use_cache=cached)
    forms = {"plain": (plainly(model, False), model), "cache": (plainly(model, True), model)}
    forms["packed"] = plainly(packed, True), packed
    for name, dtype, kernel in (
        ("one step", torch.float32, False),
        ("int8", "int8", False),
        ("kernel, float32", torch.float32, True),
        ("kernel, int8", "int8", True),
        ("kernel, 4 bits", "int4", True),
    ):
        decoder = Decoder(model, dtype=dtype, kernel=kernel)
        forms[name] = (lambda ids, n, d=decoder: d.generate(ids, n, temperature=0)), decoder
    return forms


def seconds(write, ids, n: int) -> float:
    "For writing n tokens."
    start = time.perf_counter()
    write(ids, n)
    return time.perf_counter() - start


@torch.inference_mode()
def surprises(reader, ids) -> torch.Tensor:
    "Each token's surprise in bits; a compiled decoder reads them one by one, as it writes."
    if not isinstance(reader, Decoder) or not reader.has_kernel(1):
        logits = reader(ids[:, :-1])[0]
    else:
        cache = reader.new_cache(1, ids.shape[1])
        logits = torch.cat([reader(ids[:, t : t + 1], cache=cache)[0] for t in range(ids.shape[1] - 1)])
    return -logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] / math.log(2)


def main() -> None:
    "Measure, and write the file."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "staircase.json")
    args = parser.parse_args()
    model, tokenizer = load_pretrained("smollm2").eval(), load_pretrained_tokenizer("smollm2")
    ids = torch.tensor([tokenizer.encode(PROMPT, special=False)])
    text = read_text(load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False))[:900]
    page = torch.tensor([tokenizer.encode(text, special=False)])
    n_bytes, exact, forms = len(text.encode()), surprises(model, page), make_forms(model)
    turns = {name: [] for name in forms}
    texts = {name: tokenizer.decode(write(ids, args.tokens)[0].tolist()) for name, (write, _) in forms.items()}
    loads = []
    for number in range(args.rounds):
        for name, (write, _) in forms.items():
            least = seconds(write, ids, 2)
            turns[name].append((args.tokens - 2) / (seconds(write, ids, args.tokens) - least))
        loads.append(os.getloadavg()[0])
        print(f"round {number + 1}:", {name: round(found[-1], 1) for name, found in turns.items()}, flush=True)
    stairs, length = [], ids.shape[1] + args.tokens // 2
    reference = next(reader for name, (_, reader) in forms.items() if name == "one step")
    for name, (_, reader) in forms.items():
        change = (surprises(reader, page) - exact) * len(exact) / n_bytes
        stairs.append(
            dict(
                name=name,
                turns=turns[name],
                tokens_per_second=statistics.median(turns[name]),
                bytes=bytes_per_token(reader if isinstance(reader, PackedGPT) else reference, length),
                bits_per_byte=change.mean().item(),
                error=(change.std() / len(change) ** 0.5).item(),
                same_text=texts[name] == texts["cache"],
            )
        )
    found = dict(
        date=str(date.today()),
        model="SmolLM2-135M-Instruct",
        prompt_tokens=ids.shape[1],
        new_tokens=args.tokens,
        float32_bits_per_byte=exact.sum().item() / n_bytes,
        machine=dict(
            processor=platform.processor() or platform.machine(),
            instructions=torch.backends.cpu.get_cpu_capability(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            load=loads,
            bytes_per_second=memory_bandwidth(),
        ),
        stairs=stairs,
    )
    with atomic_write(args.out) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    print(args.out)


if __name__ == "__main__":
    main()
