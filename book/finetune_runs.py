"""Make data/finetuning.json, the runs that chapter 14 shows.

    python book/finetune_runs.py [PART ...]

PART is one of whom, grid, facts, smollm2, distill. Each result is written as soon as it is there, and one that is there
already is not made again (delete the file to begin anew). `whom`, `grid` and `facts` train small models on made-up
people with the functions of the chapter's own lesson, for a few minutes of one core; other processes may run beside
them.

`smollm2` fine-tunes SmolLM2 on 1,000 made-up tasks (`--steps N` makes it shorter, and keeps nothing); its run is in
runs/finetune-smollm2, and a run that was stopped goes on. Its minutes are those of one core, and count only if that
core does nothing else.

`distill` needs that run: its model teaches students of random weights, a fiftieth of its size, for some minutes of one
core. Other students learn from the right answers alone.
"""
import ast
import copy
import inspect
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from stored import ROOT, Stored

from transformer_llm.checkpoints import load_model
from transformer_llm.dataset import load_shakespeare, read_text
from transformer_llm.evaluation import score_text
from transformer_llm.finetuning import (
    FACTS,
    IGNORE,
    FineTuneConfig,
    People,
    answers,
    collate,
    continue_finetuning,
    distill_loss,
    format_of_run,
    hold_out,
    load_dialogues,
    start_finetuning,
    target_logits,
    without_copies,
)
from transformer_llm.pretrained import load_pretrained
from transformer_llm.runs import holds_run
from transformer_llm.training import TrainingConfig, make_optimizers, schedule_factor, set_learning_rate
from transformer_llm.transformer import GPT, GPTConfig

RUNS = Stored("finetuning.json")
SEEDS = (0, 1, 2)
RATES, STEPS, TIMES = (1e-4, 1e-3), (100, 300), (1, 4)
RATES_OF_STUDENTS, STEPS_OF_STUDENTS = (1e-3, 3e-3), 150
TAUGHT = 400  # tasks that students read
LESSON = ("read_statements", "conversation", "tune", "right", "recites", "bits_per_byte", "old_windows")
NAMES = dict(torch=torch, F=F, copy=copy, GPT=GPT, GPTConfig=GPTConfig, TrainingConfig=TrainingConfig, FACTS=FACTS,
             make_optimizers=make_optimizers, schedule_factor=schedule_factor, set_learning_rate=set_learning_rate,
             pad_sequence=torch.nn.utils.rnn.pad_sequence)


def lesson_functions() -> dict:
    "The functions that the lesson defines, from its own cells."
    cells = json.loads((ROOT / "nbs" / "14_finetuning.ipynb").read_text(encoding="utf-8"))["cells"]
    names = dict(NAMES)
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.FunctionDef) and node.name in LESSON:
                    exec(compile(ast.Module([node], []), "lesson", "exec"), names)
    return names


class Readers:
    "For each seed its people, a model that has read about them, and the examples; made when first asked for."

    def __init__(self):
        self.lesson, self.made = lesson_functions(), {}
        self.steps = inspect.signature(self.lesson["tune"]).parameters["steps"].default

    def __call__(self, seed: int) -> dict:
        if seed not in self.made:
            people = People(seed=seed)
            base, text = self.lesson["read_statements"](people, seed=seed)
            asked, never = people.names[:75], people.names[75:]
            examples = [self.lesson["conversation"](people, name, kind) for name in asked for kind in FACTS]
            self.made[seed] = dict(people=people, base=base, text=text, asked=asked, never=never, examples=examples)
        self.lesson["people"] = self.made[seed]["people"]  # `bits_per_byte` spells the words with it
        return self.made[seed]

    def judge(self, model, one: dict) -> dict:
        right, bits = self.lesson["right"], self.lesson["bits_per_byte"]
        return {
            "asked": right(model, one["people"], one["asked"]),
            "never": right(model, one["people"], one["never"]),
            "bits_before": bits(one["base"], one["text"]),
            "bits_after": bits(model, one["text"]),
        }


def whom(readers: Readers) -> None:
    "All weights, or the names' rows of the table of embeddings kept; answers only, or old text as well."
    tune, old_windows = readers.lesson["tune"], readers.lesson["old_windows"]
    for seed in SEEDS:
        for frozen in (False, True):
            for mixed in (False, True):
                if RUNS.has("whom", dict(seed=seed, frozen=frozen, mixed=mixed)):
                    continue
                one = readers(seed)
                people = one["people"]
                still = people.encode(" ".join(people.names + people.strangers)) if frozen else []
                more = old_windows(one["text"], len(one["examples"]), seed=seed) if mixed else []
                steps = (2 if mixed else 1) * readers.steps
                model = tune(one["base"], one["examples"] + more, steps=steps, seed=seed, still=still)
                RUNS.keep("whom", {"seed": seed, "frozen": frozen, "mixed": mixed, **readers.judge(model, one)})


def grid(readers: Readers) -> None:
    "Rates and numbers of steps, all weights."
    for seed in SEEDS:
        for rate in RATES:
            for steps in STEPS:
                if RUNS.has("grid", dict(seed=seed, rate=rate, steps=steps)):
                    continue
                one = readers(seed)
                model = readers.lesson["tune"](one["base"], one["examples"], steps=steps, rate=rate, seed=seed)
                RUNS.keep("grid", {"seed": seed, "rate": rate, "steps": steps, **readers.judge(model, one)})


def facts(readers: Readers) -> None:
    """People whom no statement is about, taught by questions alone: their answers, and other statements about them.

    Their questions occur once in the examples, or several times; the run is longer then, so that everything else is
    read as often.
    """
    for seed in SEEDS:
        for times in TIMES:
            if RUNS.has("facts", dict(seed=seed, times=times)):
                continue
            one, lesson = readers(seed), readers.lesson
            people, strangers = one["people"], one["people"].strangers
            others = one["examples"] + lesson["old_windows"](one["text"], len(one["examples"]), seed=seed)
            more = [lesson["conversation"](people, name, kind) for name in strangers for kind in FACTS]
            steps = round(2 * readers.steps * (1 + times * len(more) / len(others)))
            model = lesson["tune"](one["base"], others + times * more, steps=steps, seed=seed)
            RUNS.keep("facts", {
                "seed": seed,
                "times": times,
                "readings": round(16 * steps / (len(others) + times * len(more))) * times,
                "answers": lesson["right"](model, people, strangers),
                "statements": lesson["recites"](model, people, strangers),
                "asked": lesson["right"](model, people, one["asked"]),
                "asked_statements": lesson["recites"](model, people, one["asked"]),
            })


def smollm2(steps: int | None = None) -> None:
    "SmolLM2 on 1,000 made-up tasks: loss, exact answers and bits per byte before and after."
    if "smollm2" in RUNS.load() and steps is None:
        return
    out = ROOT / "runs" / ("finetune-smollm2" if steps is None else "finetune-smollm2-short")
    training = {"batch_size": 2} | ({} if steps is None else {"max_steps": steps, "eval_every": 0})
    config = FineTuneConfig(model="smollm2", data="tasks", packed=True, context_length=512, training=training,
                            epochs=1 if steps is None else None)
    if holds_run(out):
        trainer, counts = continue_finetuning(out, progress=True)
    else:
        trainer, counts = start_finetuning(out, config, progress=True)
    print(counts, flush=True)
    trainer.train()
    n_shown, n_asked = 5, 100 if steps is None else 5
    held = hold_out(without_copies(load_dialogues("tasks")), config.val_fraction, trainer.config.seed)[1][:n_asked]
    text = read_text(load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False))
    text = text[-20_000 if steps is None else -1_000 :]
    chat_format, found = format_of_run(out), []
    after = trainer.model
    for model in (load_pretrained("smollm2"), after):
        trainer.model = model
        written = answers(model, chat_format, [dialogue.question for dialogue in held], 40)
        exact = sum(a.strip() == dialogue.answer for a, dialogue in zip(written, held)) / len(held)
        bits = score_text(model, chat_format.tokenizer, text).bits_per_byte
        found.append((trainer.evaluate(None if steps is None else 1), exact, bits, written))
    shown = [{"question": dialogue.question[-1]["content"], "right": dialogue.answer, "before": a, "after": b}
             for dialogue, a, b in zip(held[:n_shown], found[0][3], found[1][3])]
    result = {"pairs": counts.read, "steps": trainer.step, "minutes": trainer.seconds / 60,
              "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
              "threads": torch.get_num_threads(), "answers": shown}
    result |= {name: [one[place] for one in found] for place, name in enumerate(("loss", "exact", "bits"))}
    print(result)
    if steps is None:
        RUNS.set("smollm2", result)


class Lesson:
    "Tasks as examples, and the teacher's last hidden states at their targets, which make its logits in one product."

    def __init__(self, run: Path, n: int):
        self.teacher = load_model(run)[0].eval()
        chat_format, tasks = format_of_run(run), hold_out(without_copies(load_dialogues("tasks")), 0.1, 0)
        self.examples, self.held = ([chat_format.example(task) for task in part[:n]] for part in tasks)
        with torch.no_grad():
            self.hidden = [self.teacher.hidden_states(example.inputs[None])[0][example.targets != IGNORE]
                           for example in self.examples]

    def student(self, seed: int) -> GPT:
        torch.manual_seed(seed)
        config = GPTConfig(vocab_size=self.teacher.config.vocab_size, context_length=512, d_model=48, n_layers=2,
                           n_heads=4)
        return GPT(config)

    def loss(self, student: GPT, chosen: list[int], way: str) -> torch.Tensor:
        logits, targets = target_logits(student, collate([self.examples[i] for i in chosen]))
        if way == "tokens":
            return F.cross_entropy(logits, targets)
        with torch.no_grad():
            taught = self.teacher.unembed(torch.cat([self.hidden[i] for i in chosen])[None])[0]
        return distill_loss(logits, taught, way)

    @torch.no_grad()
    def judge(self, model: GPT) -> dict:
        losses, exact, count = 0.0, 0, 0
        for example in self.held:
            logits, targets = target_logits(model, collate([example]))
            losses += F.cross_entropy(logits, targets, reduction="sum").item()
            exact, count = exact + bool((logits.argmax(-1) == targets).all()), count + len(targets)
        return {"loss": losses / count, "exact": exact / len(self.held)}


def better_rate(way: str) -> float:
    "The rate that the first seed's students of this kind learned better with."
    tried = [run for run in RUNS.load()["distill"] if run["way"] == way and run["seed"] == SEEDS[0]]
    return min(tried, key=lambda run: run["loss"])["rate"]


def distill(steps: int | None = None) -> None:
    "Students that learn from the right answers, or from a teacher's distributions at the same places."
    run = ROOT / "runs" / ("finetune-smollm2" if steps is None else "finetune-smollm2-short")
    lesson = Lesson(run, TAUGHT if steps is None else 8)
    for seed in SEEDS if steps is None else SEEDS[:1]:
        for way in ("tokens", "forward", "reverse"):
            for rate in RATES_OF_STUDENTS if seed == SEEDS[0] else [better_rate(way)]:
                if steps is None and RUNS.has("distill", dict(seed=seed, way=way, rate=rate)):
                    continue
                student, draw = lesson.student(seed), torch.Generator().manual_seed(seed)
                optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
                for _ in range(steps or STEPS_OF_STUDENTS):
                    chosen = torch.randperm(len(lesson.examples), generator=draw)[:8].tolist()
                    loss = lesson.loss(student, chosen, way)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                found = {"seed": seed, "way": way, "rate": rate, **lesson.judge(student)}
                print(found, flush=True) if steps else RUNS.keep("distill", found)
    if steps is None and not RUNS.has("distill_teacher", {}):
        sizes = {"parameters": lesson.teacher.num_parameters(), "student_parameters": student.num_parameters()}
        RUNS.keep("distill_teacher", sizes | lesson.judge(lesson.teacher))


if __name__ == "__main__":
    torch.set_num_threads(1)
    start, arguments, readers = time.perf_counter(), sys.argv[1:], Readers()
    short = int(arguments.pop(arguments.index("--steps") + 1)) if "--steps" in arguments else None
    for part in [name for name in arguments if name != "--steps"] or ["whom", "grid", "facts", "smollm2", "distill"]:
        if part in ("smollm2", "distill"):
            {"smollm2": smollm2, "distill": distill}[part](short)
        else:
            {"whom": whom, "grid": grid, "facts": facts}[part](readers)
    print(f"{time.perf_counter() - start:.0f} s")
