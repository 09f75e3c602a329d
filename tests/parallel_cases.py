"""What tests/test_distributed.py starts on two processes: many cases in one start, each judged by what it wrote.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/parallel_cases.py FOLDER
"""
import errno
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from transformer_llm import distributed
from transformer_llm.foundations import InputError
from transformer_llm.training import Trainer, TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

TOKENS = torch.randint(0, 37, (600,), generator=torch.Generator().manual_seed(5))
DATA = (TOKENS[:450], TOKENS[450:])
SETTINGS = TrainingConfig(max_steps=4, batch_size=4, warmup_steps=0, eval_every=2, log_every=1, checkpoint_every=1,
                          learning_rate=3e-3, device="cpu")
CASES = {  # what differs from SETTINGS, and from the model below
    "adamw tied": ({"accumulation": 2, "grad_clip": 0.3}, {}),
    "adamw untied": ({"grad_clip": 0}, {"tied_embeddings": False}),
    "muon tied": ({"optimizer": "muon", "grad_clip": 0.3}, {}),
    "muon untied": ({"optimizer": "muon", "accumulation": 3}, {"tied_embeddings": False, "qk_norm": True}),
    "biases": ({}, {"bias": True, "norm": "layernorm", "activation": "gelu", "n_kv_heads": 4}),
}


def model_of(changes: dict) -> GPT:
    "A tiny model; its residual projections don't begin at zero, or the first gradients of most weights would be zero."
    torch.manual_seed(1)
    base = dict(vocab_size=37, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
                zero_init_residual=False)
    return GPT(GPTConfig(**{**base, **changes}))


def summary(trainer: Trainer) -> dict:
    "What a run came to: its records, and its weights."
    records = [{name: row[name] for name in ("step", "loss", "val_loss", "grad_norm", "lr")} for row in trainer.history]
    weights = {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone()
               for name, t in trainer.model.state_dict().items()}
    return {"records": records, "weights": weights}


def trained(kind: type, case: str, **more) -> Trainer:
    settings, changes = CASES[case]
    trainer = kind(model_of(changes), DATA, SETTINGS.replace(**settings), progress=False, **more)
    trainer.train()
    return trainer


def equal_to_one(folder: Path) -> dict:
    found = {}
    for way, kind in distributed.TRAINERS.items():
        for case in CASES:
            found[f"{way} {case}"] = summary(trained(kind, case))
    return found


def in_bfloat16(folder: Path) -> dict:
    settings = SETTINGS.replace(dtype="bfloat16")
    found = {}
    for way, kind in distributed.TRAINERS.items():
        trainer = kind(model_of({}), DATA, settings, progress=False)
        trainer.train()
        found[way] = summary(trainer)["records"]
    return found


def bytes_counted(folder: Path) -> dict:
    found = {}
    for way, kind in distributed.TRAINERS.items():
        trainer = kind(model_of({"vocab_size": 38}), DATA, SETTINGS.replace(grad_clip=0), progress=False)
        trainer.train_step()
        with distributed.Traffic() as traffic:
            batch = trainer.next_batch()
            if trainer.shares_rows:
                batch = distributed.my_rows(batch, trainer.rank, trainer.processes)
            trainer._exchange_gradients(True)
            loss, _ = Trainer._loss_and_count(trainer, batch)
            loss.backward()
        weights = sum(p.numel() * 4 for p in trainer.model.parameters())
        found[way] = {"sent": traffic.sent, "calls": traffic.calls, "weight_bytes": weights,
                      "kept": sum(distributed.local(p).numel() * 4 for p in trainer.model.parameters())}
    return found


def hidden_states(folder: Path) -> dict:
    model = model_of({})
    wanted = model.hidden_states(TOKENS[None, :8]).detach()
    trainer = distributed.TRAINERS["fsdp"](model, DATA, SETTINGS, progress=False)
    return {"difference": (trainer.model.hidden_states(TOKENS[None, :8]) - wanted).abs().max().item()}


def stop_after(step: int, rank: int):
    "For `on_step`: a signal that reaches one process after this step."
    def stop(trainer, record: dict) -> None:
        if record["step"] == step and dist.get_rank() == rank:
            signal.raise_signal(signal.SIGTERM)

    return stop


def interrupted(trainer: Trainer) -> str:
    try:
        trainer.train()
    except KeyboardInterrupt as end:
        return str(end)
    return "was not interrupted"


def saved_in_parts(folder: Path) -> dict:
    "A run that two processes leave after two of four steps; only the second one got a signal."
    run = folder / "parts"
    trainer = distributed.TRAINERS["fsdp"](model_of({}), DATA, SETTINGS, run_directory=run, progress=False,
                                           on_step=stop_after(2, rank=1))
    return {"end": interrupted(trainer), "files": sorted(p.name for p in run.iterdir())}


def two_one_two(folder: Path) -> dict:
    "Two processes to step 2, one to step 3, two to the end."
    found = {}
    for (way, kind), optimizer in zip(distributed.TRAINERS.items(), ("muon", "adamw", "muon")):
        run = folder / f"run-{way}"
        trainer = kind(model_of({}), DATA, SETTINGS.replace(optimizer=optimizer), run_directory=run, progress=False,
                       on_step=stop_after(2, rank=0))
        ends = [interrupted(trainer)]

        def alone() -> str:
            distributed.merge_shards(run)
            return interrupted(Trainer.resume(run, DATA, progress=False, on_step=stop_after(3, rank=0)))

        ends.append(distributed.on_first(alone))
        trainer = kind.resume(run, DATA, progress=False)
        trainer.train()
        found[way] = {**summary(trainer), "ends": ends, "files": sorted(p.name for p in run.iterdir())}
    return found


def refused(folder: Path) -> dict:
    tries = {
        "rows": lambda: distributed.TRAINERS["ddp"](model_of({}), DATA, SETTINGS.replace(batch_size=1)),
        "dropout": lambda: distributed.TRAINERS["fsdp"](model_of({"dropout": 0.1}), DATA, SETTINGS),
        "heads": lambda: distributed.TRAINERS["tp"](model_of({"n_heads": 1, "n_kv_heads": 1}), DATA, SETTINGS),
        "first": lambda: distributed.on_first(lambda: open("/no/such/folder/file")),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except InputError as error:
            found[name] = str(error)
    return found


def unwritable(folder: Path) -> dict:
    "Process 0 can't write the checkpoint of step 1: the disk is full."
    run = folder / "unwritable"
    trainer = distributed.TRAINERS["fsdp"](model_of({}), DATA, SETTINGS, run_directory=run, progress=False)
    trainer.save()
    seal = distributed.seal_shards

    def full(part: Path, step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(part / "shards.json"))

    distributed.seal_shards = full
    try:
        trainer.train()
    except InputError as error:
        return {"error": str(error)}
    finally:
        distributed.seal_shards = seal
    return {}


def lost(folder: Path) -> dict:
    "The last case: process 1 ends without a word; the other must not wait for it."
    if dist.get_rank() == 1:
        os._exit(9)
    distributed.total_of(1)
    return {}


def main(folder: Path, names: list[str]) -> None:
    try:
        with distributed.joined("cpu", seconds=60):
            for name in names:
                torch.save(globals()[name](folder), folder / f"{name}-{dist.get_rank()}.pt")
    except InputError as error:
        (folder / f"error-{os.environ['RANK']}.txt").write_text(f"{error.says} {error}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
