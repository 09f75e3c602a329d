"""Make data/sprint.json, the runs that chapter 12 shows.

    python book/sprint_runs.py [PART ...]

PART is one of final, ladder, again, one_factor, leave_out, rates, without_table, counts; the first four also with
names, as in ladder=tuned,linear. Each run is written as soon as it is there, and one that is there already is not made
again (delete the file to begin anew). Let nothing else run on the machine meanwhile: seconds count.

Only one_factor, the ladder that the lesson shows, is indifferent to that: it compares losses after equal steps. It
takes about half an hour of one core. `ladder` and `again` are the history of the search, in seconds.
"""
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from stored import ROOT, machine

from transformer_llm.dataset import load_shakespeare
from transformer_llm.foundations import read_json, write_json
from transformer_llm.sprint import (
    NGRAMS,
    PLAIN,
    RECIPES,
    TUNED,
    RowAdagrad,
    SprintGPT,
    count_loss,
    evaluate_all,
    read_characters,
    run_recipe,
)
from transformer_llm.training import Muon, Trainer, TrainingConfig, TrainingError, clip_gradients
from transformer_llm.transformer import GPT, GPTConfig

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
    if FILE.exists():
        return read_json(FILE)
    parts = ("final", "ladder", "leave_out", "without_table", "counts")
    return {"machine": machine() | {"threads": THREADS}} | {part: [] for part in parts}


def keep(part: str, result: dict) -> None:
    runs = load()
    runs.setdefault(part, []).append(
        {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    )
    for ladder_part, rungs in (("ladder", RUNGS), ("one_factor", ONE_FACTOR)):
        order = {name: number for number, (name, *_) in enumerate(rungs)}
        runs.get(ladder_part, []).sort(key=lambda run, order=order: order[run["name"]])
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


# The ladder of one factor: each rung changes exactly one setting of the rung before:
# (rung, about, setting, its value, the rates that are tuned anew).
# What changes the work of a step (layers, width, windows per step) isn't on it: at equal steps more work would win.
# All rungs have the plain recipe's size and a warm-up of ten steps.
# The rungs from "n-grams" on take the longest; the page does without those that the file doesn't hold.
BEGINNING = dict(
    schedule="cosine", min_lr_fraction=0.1, weight_decay=0.1, beta2=0.99, optimizer="adamw", momentum=0.95,
    position="learned", rope_base=10_000.0, norm="layernorm", activation="gelu", qk_norm=False,
    blocks_end="small", blocks_start="0.02", tied_embeddings=True, output_start=0.02, embedding_start=0.02,
    grad_clip=1.0, gains=True, token_shift=False, ngrams=(),
)  # fmt: skip
ONE_FACTOR = [
    ("beginning", "the documented recipe in the plain one's size", None, None, ("all",)),
    ("to zero", "the rate falls to zero, not to a tenth", "min_lr_fraction", 0.0, ("all",)),
    ("in a line", "it falls in a line, not along a cosine", "schedule", "linear", ("all",)),
    ("no decay", "no weight decay", "weight_decay", 0.0, ("all",)),
    ("β₂ 0.95", "AdamW's second average forgets sooner", "beta2", 0.95, ("all",)),
    ("two rates", "the matrices get a rate of their own", "optimizer", "two rates", ("matrices", "all")),
    ("Muon", "Muon moves the matrices", "optimizer", "muon", ("matrices", "all")),
    ("momentum 0.9", "Muon's momentum 0.9 in place of 0.95", "momentum", 0.9, ("matrices",)),
    ("rotary", "rotary positions, base 10,000", "position", "rotary", ("matrices",)),
    ("base 100", "the base of the rotation", "rope_base", 100.0, ("matrices",)),
    ("RMSNorm", "RMSNorm in place of LayerNorm", "norm", "rmsnorm", ("matrices",)),
    ("ReLU²", "ReLU² in place of GELU", "activation", "relu2", ("matrices",)),
    ("query-key norm", "queries and keys are normalised", "qk_norm", True, ("matrices",)),
    ("blocks add 0", "what a block adds starts at zero", "blocks_end", "zero", ("matrices",)),
    ("larger blocks", "the other matrices start with 0.5/√columns", "blocks_start", "columns", ("matrices",)),
    ("rates again", "the rate outside the blocks is tuned anew", None, None, ("all",)),
    ("token before", "the previous token's embedding is mixed in", "token_shift", True, ("all",)),
    ("n-grams", "a table of hashed pairs to fives", "ngrams", NGRAMS.ngrams, ("table",)),
    ("untied", "an output matrix of its own", "tied_embeddings", False, ("all",)),
    ("output from 0", "the output matrix starts at zero", "output_start", 0.0, ("all",)),
    ("embeddings 0.3", "embeddings start at size 0.3, not 0.02", "embedding_start", 0.3, ("all",)),
    ("no clipping", "gradients are not clipped", "grad_clip", 0.0, ("all",)),
    ("gains of one", "the norms' gains stay one", "gains", False, ("all",)),
]
STEPS = 100  # of every run on that ladder
FACTOR = 2  # between neighbouring rates
SHARE = 4  # the loss is taken over the first of so many parts of the validation text


class LadderTrainer(Trainer):
    "A `Trainer` of a rung: the same windows for each rung with the same seed, and optimizers by the rung's settings."

    def __init__(self, model, data, config: TrainingConfig, settings: dict, rates: dict):
        super().__init__(model, data, config, progress=False)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != "ngram_table"]
        inside = [p for name, p in named if "blocks." in name and p.ndim == 2]
        outside = [p for name, p in named if "blocks." not in name and p.ndim == 2]
        vectors = [p for _, p in named if p.ndim < 2]
        decay, betas = settings["weight_decay"], (0.9, settings["beta2"])
        groups = [dict(params=outside, lr=rates["all"], weight_decay=decay)]
        groups += [dict(params=vectors, lr=rates["all"], weight_decay=0.0)] if vectors else []
        own = rates.get("matrices", rates["all"])
        if settings["optimizer"] == "muon":
            momentum = settings["momentum"]
            matrices = [Muon(inside, lr=own, momentum=momentum, weight_decay=decay, dtype=torch.float32)]
        else:
            groups, matrices = [*groups, dict(params=inside, lr=own, weight_decay=decay)], []
        self.optimizers = [torch.optim.AdamW(groups, betas=betas), *matrices]
        if "table" in rates:
            self.optimizers.append(RowAdagrad([model.ngram_table], lr=rates["table"]))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["top_lr"] = group["lr"]
        last, generator = len(data.train) - self.context_length, torch.Generator().manual_seed(config.seed)
        self.starts = torch.randint(last, (config.max_steps, config.batch_size, 1), generator=generator)

    def next_batch(self):
        windows = self.data.train[self.starts[self.step] + torch.arange(self.context_length + 1)]
        return windows[:, :-1].long(), windows[:, 1:].long()

    def clip(self) -> float:
        "As `Trainer.clip`, without the table of n-grams: its gradients are sparse, and Adagrad scales them."
        limited = [p for name, p in self.model.named_parameters() if name != "ngram_table"]
        return clip_gradients(limited, self.config.grad_clip).item()


def model_of(settings: dict, vocab_size: int) -> GPT:
    "The untrained model of a rung. Where `SprintGPT` is used, it computes what `GPT` would."
    names = ("position", "rope_base", "norm", "activation", "qk_norm", "tied_embeddings")
    size = {name: PLAIN.model[name] for name in ("context_length", "d_model", "n_layers", "n_heads", "d_ff")}
    config = GPTConfig(
        vocab_size=vocab_size, rope_interleaved=True, **size, **{name: settings[name] for name in names}
    )
    if settings["token_shift"] or settings["ngrams"]:
        model = SprintGPT(config, settings["ngrams"], settings["token_shift"])
    else:
        model = GPT(config)
    begin(model, settings)
    return model


@torch.no_grad()
def begin(model: GPT, settings: dict) -> None:
    "Draw a rung's initial weights."
    for name, p in model.named_parameters():
        adds = name.endswith(("o_proj.weight", "down.weight"))
        if "norm" in name:
            p.fill_(1.0)
            p.requires_grad_(settings["gains"])
        elif name in ("previous", "ngram_table"):
            p.zero_()
        elif "blocks." in name:
            size = 0.02 if settings["blocks_start"] == "0.02" else 0.5 / math.sqrt(p.shape[1])
            small = 0.0 if settings["blocks_end"] == "zero" else 0.02 / math.sqrt(2 * model.config.n_layers)
            p.normal_(0.0, small if adds else size)
        else:
            sizes = {"lm_head.weight": settings["output_start"], "token_embedding.weight": settings["embedding_start"]}
            p.normal_(0.0, sizes.get(name, 0.02))


def climb(data, vocab_size: int, settings: dict, rates: dict, seed: int) -> dict:
    "One complete run of a rung: its final loss (None where it stops because the loss is no number)."
    config = TrainingConfig(
        max_steps=STEPS, batch_size=PLAIN.training.batch_size, schedule=settings["schedule"], warmup_steps=10,
        min_lr_fraction=settings["min_lr_fraction"], grad_clip=settings["grad_clip"], device="cpu", seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = model_of(settings, vocab_size)
    trainer = LadderTrainer(model, data, config, settings, rates)
    try:
        for _ in range(STEPS):
            trainer.train_step()
        loss = evaluate_all(model, data.val[: len(data.val) // SHARE])
    except TrainingError:
        loss = None
    return {"val_loss": loss, "parameters": model.num_parameters()}


def settings_of(rung: str) -> dict:
    "All settings of a rung of `ONE_FACTOR`."
    settings = dict(BEGINNING)
    for name, _, setting, value, _ in ONE_FACTOR:
        if setting:
            settings[setting] = value
        if name == rung:
            return settings
    raise ValueError(f"{rung} is no rung.")


def final_loss(text: tuple, rung: str, about: str, rates: dict, seed: int = 0) -> float:
    "A rung's final loss with these rates and this seed; the run is made now unless it is there."
    rates = {key: round(rate, 6) for key, rate in rates.items()}
    for run in load().get("one_factor", []):
        if (run["name"], run["seed"], run["rates"]) == (rung, seed, rates):
            return math.inf if run["val_loss"] is None else run["val_loss"]
    result = climb(*text, settings_of(rung), rates, seed)
    keep("one_factor", {"name": rung, "about": about, "seed": seed, "rates": rates, "steps": STEPS} | result)
    return math.inf if result["val_loss"] is None else round(result["val_loss"], 4)


def tune(loss_at, rates: dict, tuned: tuple) -> dict:
    "The best rates: from those given one `FACTOR` up or down, and on in the better direction while the loss falls."
    best = loss_at(rates)
    for key in tuned:
        for factor in (FACTOR, 1 / FACTOR):
            before = best
            while (loss := loss_at(rates | {key: rates[key] * factor})) < best:
                best, rates = loss, rates | {key: rates[key] * factor}
            if best < before:
                break
    return rates


def one_factor(path: Path, names=None) -> None:
    """The ladder of one factor: the loss after equal steps. The rates that a rung concerns are tuned by one rule.

    Seed 0 finds the rates, starting from those of the rung before; seeds 1 and 2 follow at the rates found. Losses
    don't depend on how fast the machine is: other processes may run beside it.
    """
    torch.set_num_threads(1)
    data, tokenizer = read_characters(path)
    rates: dict[str, float] = {"all": 2.25e-3}
    for rung, about, _, _, tuned in ONE_FACTOR:
        settings = settings_of(rung)
        if settings["optimizer"] != "adamw" and "matrices" not in rates:
            rates = {"matrices": rates["all"]} | rates
        if rung == "Muon":
            rates = rates | {"matrices": 0.06}
        if settings["ngrams"] and "table" not in rates:
            rates = rates | {"table": 0.3}
        if names and rung not in names:
            done = [run for run in load().get("one_factor", []) if run["name"] == rung and run["seed"] == 2]
            rates = done[0]["rates"] if done else rates
            continue
        loss_at = partial(final_loss, (data, tokenizer.vocab_size), rung, about)
        rates = tune(loss_at, rates, tuned)
        for seed in (1, 2):
            loss_at(rates, seed)


if __name__ == "__main__":
    path = load_shakespeare(ROOT / "data" / "shakespeare.txt", progress=False)
    parts = {
        "final": final,
        "ladder": ladder,
        "one_factor": one_factor,
        "again": again,
        "leave_out": leave_out,
        "rates": rates,
        "without_table": without_table,
        "counts": counts,
    }
    for argument in sys.argv[1:] or parts:
        part, _, names = argument.partition("=")
        parts[part](path, *([names.split(",")] if names else []))
