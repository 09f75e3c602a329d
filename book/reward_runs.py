"""Make data/rewards.json, the runs of many seeds that chapter 17 shows.

    python book/reward_runs.py [PART ...]

PART is one of main, switches, failures, control; without one, all of them in this order. Each run is written as soon as
it is there, and one that is there already is not made again (delete the file to begin anew). `--seconds N` ends every
run after about N seconds, to try the script; such runs go to runs/rewards-trial.json.

Let nothing else run on the machine while `main` and `control` are made: their seconds count. In the other parts only
the answers count, so that two processes may share the work, each with `--threads 1` and a part of its own. A run costs
about two minutes of processor time, all of them together about an hour.
"""
import argparse
import fcntl
import time
from dataclasses import replace
from pathlib import Path

import torch
from stored import ROOT, machine

from transformer_llm.foundations import check_choice, read_json, write_json
from transformer_llm.reinforcement import (
    REWARD_CONFIG,
    REWARD_POLICY,
    REWARD_START,
    RULES,
    Policy,
    ReinforceTrainer,
    Rule,
    Sampler,
    SolvedTrainer,
    Task,
    load_task,
    pass_at,
    small_start,
)
from transformer_llm.training import TrainingConfig, TrainingError
from transformer_llm.transformer import GPT

FILE, TRIAL = ROOT / "data" / "rewards.json", ROOT / "runs" / "rewards-trial.json"
THREADS = 2
SEEDS = 5  # of the main run and the control
FEWER = 3  # of every switch, and of what fails
SHORT = 250  # updates of a switch's run, and of one that fails, to save time

# name: about, what is changed in the library's policy. The clip can only act on the second update with a batch of
# answers, so that switch is turned over where a batch serves twice; these runs make as many updates, from half the
# answers.
SWITCHES = {
    "short": ("all as in the library", {}),
    "undivided": ("no division by the deviation", dict(divide=not REWARD_POLICY.divide)),
    "by_length": ("a mean over an answer's tokens", dict(by_length=not REWARD_POLICY.by_length)),
    "divergence": ("divergence, weight 0.05", dict(kl=0.05)),
    "twice": ("two updates per batch", dict(updates=2)),
    "twice_unclipped": ("two updates per batch, no clip", dict(updates=2, clip=0.0)),
}

# A checker that looks at the ones only, which are written first.
RULES["ones"] = Rule(lambda prompt, answer: answer[:1] == RULES["addition"].solve(prompt)[:1])


class Runs:
    "The results so far, in a file."

    def __init__(self, path: Path, seconds: float | None):
        self.path, self.seconds, self.starts = path, seconds, {}

    def load(self) -> dict:
        return read_json(self.path) if self.path.exists() else {"machine": machine(), "runs": []}

    def once(self, part: str, name: str, seed: int, about: str, make) -> None:
        "The run of this part, name and seed, made now unless it is there."
        if any((run["part"], run["name"], run["seed"]) == (part, name, seed) for run in self.load()["runs"]):
            return
        result = {"part": part, "name": name, "seed": seed, "about": about, "threads": torch.get_num_threads()} | make()
        TRIAL.parent.mkdir(exist_ok=True)
        with open(TRIAL.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at another part
            results = self.load()
            results["runs"].append(rounded(result))
            write_json(self.path, results)
        print({key: value for key, value in rounded(result).items() if key != "curve"}, flush=True)

    def start(self, task: Task, seed: int, **limits) -> tuple[GPT, float]:
        "A copy of this seed's start, and the seconds that it took."
        key = (seed, *limits.items())
        if key not in self.starts:
            began = time.perf_counter()
            self.starts[key] = small_start(task, seed, **limits), time.perf_counter() - began
        model, seconds = self.starts[key]
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
        return copy, seconds


def rounded(value):
    "Numbers with four places, in dictionaries and lists too."
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def found(model: GPT, task: Task) -> dict:
    "What a model answers to held-out prompts: greedy, and drawn sixteen times."
    sampler = Sampler(model, task.tokenizer(), task)
    drawn = sampler.sample(task.held_out[:500], 16, generator=torch.Generator().manual_seed(0)).rewards
    return {
        "right": sampler.sample(task.held_out, greedy=True).rewards.mean().item(),
        "pass@1": pass_at(drawn, 1),
        "pass@16": pass_at(drawn, 16),
    }


def learn(
    runs: Runs, task: Task, model: GPT, config: TrainingConfig, policy: Policy, judged: Task | None = None
) -> dict:
    """One run: its curve, its seconds (evaluations included) and what it ends with.

    `judged`: the task whose rule rewards the answers, if it is not the one that is wanted.
    """
    trainer = ReinforceTrainer(model, judged or task, config, policy=policy, progress=False)
    before, curve, wanted = found(model, task), [], Sampler(model, trainer.tokenizer, task)
    began, own = time.perf_counter(), time.process_time()
    stopped = None
    while trainer.step < config.max_steps and not over(runs, began):
        try:
            trainer.train_step()
        except TrainingError as error:
            stopped = str(error)
            break
        if trainer.step % config.eval_every == 0 or trainer.step == config.max_steps:
            right = wanted.sample(task.held_out, greedy=True).rewards.mean().item()
            seconds = time.perf_counter() - began
            curve.append({"step": trainer.step, "seconds": seconds, "right": right} | trainer.measures)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - own}
    return {"before": before, "after": found(model, task), "stopped": stopped, "curve": curve} | spent


def over(runs: Runs, began: float) -> bool:
    return runs.seconds is not None and time.perf_counter() - began > runs.seconds


def main_run(runs: Runs, task: Task) -> None:
    "The run as the library makes it, five seeds."
    for seed in range(SEEDS):

        def make(seed=seed):
            model, seconds = runs.start(task, seed)
            result = learn(runs, task, model, REWARD_CONFIG.replace(seed=seed), REWARD_POLICY)
            return result | {"start_seconds": seconds}

        runs.once("main", "main", seed, "all as in the library", make)


def switches(runs: Runs, task: Task) -> None:
    "Each switch turned over, one at a time, and a run with none turned over: the main run's first starts and seeds."
    for seed in range(FEWER):
        for name, (about, changes) in SWITCHES.items():
            policy = replace(REWARD_POLICY, **changes)

            def make(seed=seed, policy=policy):
                model, _ = runs.start(task, seed)
                return learn(runs, task, model, REWARD_CONFIG.replace(seed=seed, max_steps=SHORT), policy)

            runs.once("switches", name, seed, about, make)


def failures(runs: Runs, task: Task) -> None:
    "A rate that is too large, a start that is too weak, a reward that can be cheated."
    rate = 10 * REWARD_CONFIG.learning_rate
    for seed in range(FEWER):

        def too_fast(seed=seed):
            config = REWARD_CONFIG.replace(seed=seed, max_steps=SHORT, learning_rate=rate)
            return learn(runs, task, runs.start(task, seed)[0], config, REWARD_POLICY)

        def too_weak(seed=seed):
            model, _ = runs.start(task, seed, least=0.03, at_most=0.08)
            return learn(runs, task, model, REWARD_CONFIG.replace(seed=seed, max_steps=SHORT), REWARD_POLICY)

        def cheated(seed=seed):
            judged, model = task._replace(rule="ones"), runs.start(task, seed)[0]
            return learn(runs, task, model, REWARD_CONFIG.replace(seed=seed, max_steps=SHORT), REWARD_POLICY, judged)

        runs.once("failures", "rate", seed, f"rate {rate:g}", too_fast)
        runs.once("failures", "weak", seed, "a start of 3 to 8 %", too_weak)
        runs.once("failures", "cheated", seed, "paid for the ones only", cheated)


def control(runs: Runs, task: Task) -> None:
    "Written answers instead of rewards, from the main run's starts, until 95 % of the held-out sums are right."
    for seed in range(SEEDS):

        def make(seed=seed):
            model, _ = runs.start(task, seed)
            trainer = SolvedTrainer(model, task, REWARD_START.replace(seed=seed + 100), progress=False)
            before, began, curve = found(model, task), time.perf_counter(), []
            while trainer.step < REWARD_START.max_steps and not over(runs, began):
                trainer.train_step()
                if trainer.step % 20 == 0:
                    right = 1 - trainer.evaluate()
                    curve.append({"step": trainer.step, "seconds": time.perf_counter() - began, "right": right})
                    if right >= 0.95:
                        break
            spent = time.perf_counter() - began
            return {"before": before, "after": found(model, task), "curve": curve, "seconds": spent}

        runs.once("control", "written", seed, "written answers until 95 % are right", make)


PARTS = {"main": main_run, "switches": switches, "failures": failures, "control": control}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, help="end every run after about this long, to try the script")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"of each run (default: {THREADS})")
    args = parser.parse_args()
    for part in args.parts:
        check_choice("PART", part, PARTS)
    torch.set_num_threads(args.threads)
    results = Runs(FILE if args.seconds is None else TRIAL, args.seconds)
    for part in args.parts or PARTS:
        PARTS[part](results, load_task("addition"))
