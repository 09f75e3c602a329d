"""Make data/serving.json, what chapter 22 shows of SmolLM2 behind its engine.

    python book/serving_runs.py [PART ...]

PART is one of clients, first_token, prefix, schema, endurance. Each result is written as soon as it is there, and a
part that is there already is not made again (delete it from the file to begin anew). Times are compared only within a
turn, in which both sides run one after the other: the machine may be busy with other things.
"""
import json
import os
import resource
import statistics
import sys
import time

import torch
from stored import Stored

from transformer_llm.generation import Sampling
from transformer_llm.pretrained import chat_settings, load_pretrained, load_pretrained_tokenizer
from transformer_llm.serving import Engine, Grammar, Job, RowSampler, Vocabulary
from transformer_llm.templates import encode_rendered, render_template

RUNS = Stored("serving.json")
TURNS, N_CLIENTS, N_TOKENS = 5, 8, 12
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Tell me a short story.",
             "What is seven times eight?", "Who wrote Hamlet?", "How do bees make honey?", "Give me a recipe for soup."]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"},
                                           "known": {"type": "boolean"}}}


def smollm2() -> tuple:
    "The model, its tokenizer and its questions as tokens."
    model, tokenizer, chat = load_pretrained("smollm2"), load_pretrained_tokenizer("smollm2"), chat_settings("smollm2")
    names = dict(bos_token=chat.bos_token, eos_token=chat.eos_token)
    prompts = [encode_rendered(tokenizer, render_template(chat.template, [dict(role="user", content=text)], **names))
               for text in QUESTIONS]
    return model, tokenizer, prompts


def jobs_of(prompts: list[list[int]], n: int, **more) -> list[Job]:
    "Greedy jobs, one per prompt."
    return [Job(list(prompt), n, RowSampler(Sampling(temperature=0), 0), **more) for prompt in prompts]


def run(engine: Engine, jobs: list[Job]) -> float:
    "Serve jobs; the seconds that it took."
    start = time.perf_counter()
    for job in jobs:
        engine.submit(job)
    while engine.step():
        pass
    engine.table.check()
    return time.perf_counter() - start


def clients(model, tokenizer, prompts) -> None:
    "Eight clients at once, or one after the other, on the same engine."
    for turn in range(TURNS):
        seconds, written = {}, {}
        sides = [1, N_CLIENTS] if turn % 2 else [N_CLIENTS, 1]
        for slots in sides:
            jobs = jobs_of(prompts, N_TOKENS)
            seconds[slots] = run(Engine(model, n_slots=slots, n_pages=256), jobs)
            written[slots] = [job.written for job in jobs]
        tokens = N_CLIENTS * N_TOKENS
        RUNS.keep("clients", dict(
            turn=turn, alone=round(tokens / seconds[1], 2), together=round(tokens / seconds[N_CLIENTS], 2),
            ratio=round(seconds[1] / seconds[N_CLIENTS], 2), load=round(os.getloadavg()[0], 1),
            same=sum(a == b for a, b in zip(written[1], written[N_CLIENTS]))))


def clock_of(job: Job, waits: list[float], start: float):
    "What notes when a job's first token comes."
    return lambda token, logprobs: job.written[1:] or waits.append(time.perf_counter() - start)


def first_token(model, tokenizer, prompts) -> None:
    "When the first token of each of eight clients comes, who all ask at once; prompts in chunks, or whole."
    for chunk in (64, 512):
        waits: list[float] = []
        start = time.perf_counter()
        jobs = jobs_of(prompts, 4)
        for job in jobs:
            job.emit = clock_of(job, waits, start)
        run(Engine(model, n_slots=N_CLIENTS, n_pages=256, chunk=chunk), jobs)
        RUNS.keep("first_token", dict(chunk=chunk, median=round(statistics.median(waits), 2), last=round(max(waits), 2),
                                      load=round(os.getloadavg()[0], 1)))


def prefix(model, tokenizer, prompts) -> None:
    "A common beginning of 512 tokens, before eight questions."
    common = tokenizer.encode("You are a careful assistant and answer in one sentence. " * 60)[:512]
    engine = Engine(model, n_slots=N_CLIENTS, n_pages=512, chunk=128)
    run(engine, jobs_of([common + prompts[0]], 1))
    first = engine.counts.read
    run(engine, jobs_of([common + prompt for prompt in prompts[1:]], 1))
    asked = sum(len(common) + len(prompt) for prompt in prompts[1:])
    RUNS.set("prefix", dict(tokens=len(common), first=first, later=engine.counts.read - first, asked=asked,
                            shared=engine.counts.shared))


def schema(model, tokenizer, prompts) -> None:
    "Two hundred answers by a schema, drawn at temperature 1, 25 of each question."
    grammar = Grammar(SCHEMA, Vocabulary(tokenizer, model.config.vocab_size))
    jobs = [Job(list(prompt), 64, RowSampler(Sampling(), seed), grammar=grammar)
            for seed in range(25) for prompt in prompts]
    run(Engine(model, n_slots=16, n_pages=1024, max_waiting=200), jobs)
    parsed = 0
    for job in jobs:
        try:
            parsed += set(json.loads(tokenizer.decode(job.written))) == {"name", "age", "known"}
        except ValueError:
            continue
    RUNS.set("schema", dict(answers=len(jobs), parsed=parsed, masks=len(grammar.masks)))


def endurance(model, tokenizer, prompts) -> None:
    "Many short requests; the process's memory on the way, and the pages at the end."
    engine = Engine(model, n_slots=16, n_pages=256, max_waiting=100)
    memory = []
    for _ in range(6):
        run(engine, jobs_of(prompts * 4, 2))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    RUNS.set("endurance", dict(requests=6 * 4 * len(prompts), peak_mb=memory, free=engine.table.n_free, pages=256))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = dict(clients=clients, first_token=first_token, prefix=prefix, schema=schema, endurance=endurance)
    loaded = smollm2()
    for part in sys.argv[1:] or parts:
        if part not in parts:
            sys.exit(f"There is no part {part}; choose from {', '.join(parts)}.")
        if part not in RUNS.load():
            parts[part](*loaded)
            print(part, RUNS.load()[part], flush=True)
