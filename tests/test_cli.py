"""The command line from outside: what it prints, what it refuses and how, what it never destroys.

Nearly all of it runs through `main([...])` in this process; a new process pays seconds to import PyTorch.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_llm import cli
from transformer_llm.cli import main

ROOT = Path(__file__).parent.parent
WORDS = "the cat sat on a mat and saw one red hat by the old oak tree near our small house".split()


def make_text(n_words: int = 1500, seed: int = 0) -> str:
    "Lines of short words, with blank lines between paragraphs."
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ("\n" if i % 5 == 4 else "") for i in range(n_words // 8)]
    return "\n".join(lines) + "\n"


def call(capsys, *argv) -> tuple[int, str, str]:
    "Exit code, standard output and standard error of one command."
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def succeeds(capsys, *argv) -> str:
    "The standard output of a command that must succeed."
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    return out


def refused(capsys, *argv, says: str = "") -> str:
    "The one sentence of a command that must be refused."
    code, _, err = call(capsys, *argv)
    assert code == 2 and "Traceback" not in err, err
    assert err.startswith("transformer-llm: ") and err.endswith(".\n") and err.count("\n") == 1, err
    assert re.search(says, err), f"{says!r} is not in {err!r}"
    return err


def fingerprint(folder: Path) -> dict[str, str]:
    "The hash of every file below a folder."
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    "A text file of about 6 kB."
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, text) -> Path:
    "The same text as characters on disk."
    folder = tmp_path_factory.mktemp("tokens") / "cats"
    assert main(["data", "prepare", "--text_file", str(text), "--tokenizer", "char", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, text) -> Path:
    "A finished run of 30 steps. Tests only read it."
    folder = tmp_path_factory.mktemp("runs") / "cats"
    small = ["train", "--model_size", "demo", "--text_file", str(text), "--max_steps", "30", "--batch_size", "8"]
    assert main([*small, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    "Each test runs in a folder of its own, so that defaults like runs/NAME leave nothing in the repository."
    monkeypatch.chdir(tmp_path)


# --- the command itself -------------------------------------------------------------------------------------------

COMMANDS = ["", "demo", "data", "data shakespeare", "data patterns", "data prepare", "tokenizer", "tokenizer train",
            "train", "finetune", "adapter merge", "generate", "chat", "evaluate", "inspect", "export", "shakespeare",
            "bench", "info"]
COMMANDS = [command.split() for command in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(capsys, command):
    assert "usage: " + " ".join(["transformer-llm", *command]) in succeeds(capsys, *command, "--help")


def test_help_is_fast_and_imports_nothing_heavy():
    "Seconds of computing, which other processes on this machine don't lengthen."
    seconds = []
    for _ in range(4):
        start = sum(os.times()[2:4])
        command = [sys.executable, "-m", "transformer_llm", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds.append(sum(os.times()[2:4]) - start)
        assert done.returncode == 0 and done.stdout.startswith("usage: transformer-llm") and done.stderr == ""
    assert min(seconds) < 0.5, seconds
    heavy = "any(m in sys.modules for m in ('torch', 'numpy', 'matplotlib'))"
    code = f"import sys, transformer_llm.cli as c; c.main(['train', '--help']); sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=ROOT).returncode == 0


def test_version_and_entry_point(capsys):
    from transformer_llm import __version__

    assert succeeds(capsys, "--version") == f"transformer-llm {__version__}\n"
    assert "transformer-llm=transformer_llm.cli:run" in (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert callable(cli.run)


def test_choices_are_those_of_the_chapters():
    from transformer_llm.training import OPTIMIZERS, SCHEDULES
    from transformer_llm.transformer import PRESETS

    assert set(cli.MODEL_SIZES) == set(PRESETS)
    options = {flag: action for action in subparser("train")._actions for flag in action.option_strings}
    assert set(options["--optimizer"].choices) == set(OPTIMIZERS) and set(options["--schedule"].choices) == set(
        SCHEDULES
    )


def subparser(name: str):
    "The parser of one command."
    return next(a for a in cli.make_parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict)).choices[
        name
    ]


def test_every_training_flag_is_a_setting():
    from transformer_llm.runs import TRAINING_FIELDS

    known = set(TRAINING_FIELDS) | {
        "context_length", "model_size", "dropout", "epochs", "text_file", "tokenizer", "vocab_size", "val_fraction",
        "out", "resume", "overwrite", "help", "fast", "parallel",
    }  # fast and parallel: which trainer, not a setting of it
    assert {action.dest for action in subparser("train")._actions} <= known


def test_both_spellings_mean_the_same():
    parse = cli.make_parser().parse_args
    one = parse(cli.one_spelling(["train", "--model-size", "nano", "--text-file=my-text.txt", "--max-steps", "5"]))
    other = parse(["train", "--model_size", "nano", "--text_file=my-text.txt", "--max_steps", "5"])
    assert one == other and one.text_file == "my-text.txt"


# --- data and tokenizers ------------------------------------------------------------------------------------------


def test_data_patterns(capsys):
    assert "patterns.txt" in succeeds(capsys, "data", "patterns", "--out", "some/patterns.txt")
    assert Path("some/patterns.txt").stat().st_size > 1000


def test_data_shakespeare(capsys, monkeypatch, text):
    monkeypatch.setattr("transformer_llm.dataset.load_shakespeare", lambda **options: text)
    monkeypatch.setattr("transformer_llm.dataset.SHAKESPEARE_SHA256", hashlib.sha256(text.read_bytes()).hexdigest())
    assert str(text) in succeeds(capsys, "data", "shakespeare")


def test_data_prepare_then_train(capsys, tokens):
    assert {"train.bin", "val.bin", "meta.json", "tokenizer.json"} <= {path.name for path in tokens.iterdir()}
    before = fingerprint(tokens)
    out = succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", tokens, "--max_steps", 2, "--batch_size", 2, "--out",
        "run",
    )
    assert "parameters" in out and fingerprint(tokens) == before
    refused(capsys, "train", "--text_file", tokens, "--tokenizer", "char", says="leave them out")
    refused(capsys, "data", "prepare", "--text_file", tokens, "--out", "again", says="already holds prepared tokens")


def test_a_folder_of_texts(capsys):
    Path("texts").mkdir()
    for seed in range(3):
        Path(f"texts/{seed}.txt").write_text(make_text(400, seed), encoding="utf-8")
    out = succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", "texts", "--tokenizer", "bpe", "--max_steps", 2
    )
    assert "runs/texts-demo" in out.replace("\\", "/") and Path("runs/texts-demo/step-0000002").is_dir()


def test_tokenizer_train(capsys, text):
    from transformer_llm.tokenizer import load_tokenizer

    assert "300 tokens" in succeeds(capsys, "tokenizer", "train", "--text_file", text, "--vocab-size", 300)
    assert load_tokenizer("tokenizer.json").vocab_size == 300
    before = Path("tokenizer.json").read_bytes()
    refused(capsys, "tokenizer", "train", "--text_file", text, says="--overwrite")
    assert Path("tokenizer.json").read_bytes() == before
    succeeds(capsys, "tokenizer", "train", "--text_file", text, "--tokenizer", "char", "--overwrite")
    assert load_tokenizer("tokenizer.json").decode(load_tokenizer("tokenizer.json").encode("the cat")) == "the cat"
    succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", text, "--tokenizer", "tokenizer.json", "--max_steps", 1
    )


def test_vocabulary_of_a_small_text_fits_it():
    from transformer_llm import runs

    assert (
        runs.default_vocab_size(0) == 257
        and runs.default_vocab_size(300_000) == 1257
        and runs.default_vocab_size(10**9) == 8192
    )


# --- train --------------------------------------------------------------------------------------------------------


def test_train_leaves_a_whole_run(capsys, run):
    assert (run / "step-0000030" / "checkpoint.json").exists() and (run / "loss.png").read_bytes().startswith(
        b"\x89PNG"
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["step"] == 30 and rows[-1]["loss"] < 3.5 and rows[-1]["val_loss"] < 3.5
    assert json.loads((run / "command.json").read_text(encoding="utf-8"))["max_steps"] == 30


def test_train_prints_its_plan_first(capsys, text):
    out = succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", text, "--epochs", 0.5, "--batch_size", 4,
        "--accumulation", 2,
    )
    for name in ("parameters", "vocabulary", "tokens", "steps", "memory", "run", "loss", "validation"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), out
    assert re.search(r"^steps +\d+ of 4 × 32 tokens × 2 batches \(0\.5\d* epochs\)$", out, re.MULTILINE), out
    assert re.search(r"^time +about .* measured on \d steps? after the first$", out, re.MULTILINE), out


def test_the_calls_of_the_readme(capsys, monkeypatch, text):
    monkeypatch.setattr("transformer_llm.runs.load_shakespeare", lambda **options: text)
    out = succeeds(capsys, "train", "--model_size", "tiny", "--epochs", 0.1, "--batch_size", 4)
    assert Path("runs/shakespeare-tiny/loss.png").parent.is_dir() and "parameters" in out
    refused(capsys, "train", "--model_size", "tiny", "--epochs", 0.1, "--batch_size", 4, says="--resume")


def test_shakespeare_is_prepared_where_its_file_is_named(capsys, monkeypatch, text):
    asked = []
    monkeypatch.setattr("transformer_llm.runs.load_shakespeare", lambda path, **options: asked.append(path) or text)
    succeeds(capsys, "train", "--model_size", "demo", "--max_steps", 1, "--text_file", "data/shakespeare.txt")
    assert asked == [Path("data/shakespeare.txt")]
    refused(
        capsys, "train", "--model_size", "demo", "--max_steps", 1, "--text_file", "data/marlowe.txt",
        says="data/marlowe.txt",
    )


def test_shakespeare_trains_once_and_writes_again(capsys, tmp_path, monkeypatch):
    from transformer_llm import training

    play = tmp_path / "play.txt"
    play.write_text("ROMEO:\n" + make_text(), encoding="utf-8")
    monkeypatch.setattr("transformer_llm.runs.load_shakespeare", lambda **options: play)
    monkeypatch.setattr(
        training, "SHAKESPEARE_CONFIG", training.SHAKESPEARE_CONFIG.replace(max_steps=12, warmup_steps=2, eval_every=6)
    )
    out = tmp_path / "run"
    first = succeeds(capsys, "shakespeare", "--out", out)
    assert "12 of 32 × 64 tokens" in first and "nats per character on all" in first and "\nROMEO:" in first
    assert (out / "loss.png").exists()
    before = fingerprint(out)
    again = succeeds(capsys, "shakespeare", "--out", out)
    assert "steps" not in again and first.endswith(again.split("The curve")[1]) and fingerprint(out) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "muon"],
        ["--dtype", "bfloat16"],
        ["--schedule", "wsd", "--warmup_steps", 1],
        ["--dropout", 0.1],
        ["--val_fraction", 0.3],
        ["--context_length", 8],
        ["--tokenizer", "bpe"],
        ["--keep_checkpoints", 1, "--checkpoint_every", 1],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_take_effect(capsys, text, flags):
    succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", text, "--max_steps", 3, "--out", "run", "--device",
        "cpu", *flags,
    )
    newest = Path("run/step-0000003")
    saved = json.loads((newest / "training.json").read_text(encoding="utf-8"))["training"] | json.loads(
        (newest / "config.json").read_text(encoding="utf-8")
    )
    for flag, value in zip(flags[::2], flags[1::2]):
        assert saved.get(flag[2:], value) == value
    if "--keep_checkpoints" in flags:
        assert [path.name for path in Path("run").glob("step-*")] == ["step-0000003"]


def test_an_existing_run_is_not_lost(capsys, run, text):
    before = fingerprint(run)
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 1, "--out", run)
    refused(capsys, *arguments, says="already holds a run.*--resume.*--overwrite")
    refused(capsys, *arguments, "--overwrite", "--resume", says="not allowed with")
    refused(capsys, "train", "--out", run, "--resume", "--seed", 5, says="has seed 0; leave out --seed 5")
    refused(capsys, "train", "--out", run, "--resume", "--batch_size", 5, says="has batch_size 8")
    refused(
        capsys, "train", "--model_size", "demo", "--text_file", "missing.txt", "--out", run, "--overwrite",
        says="missing.txt",
    )
    assert fingerprint(run) == before


def test_a_refused_overwrite_leaves_a_run_that_goes_on(capsys, text):
    arguments = ("train", "--model_size", "demo", "--batch_size", 4, "--out", "run")
    succeeds(capsys, *arguments, "--text_file", text, "--max_steps", 3)
    before = fingerprint(Path("run"))
    Path("short.txt").write_text("to be or not", encoding="utf-8")
    refused(capsys, *arguments, "--text_file", "short.txt", "--overwrite", says="window")
    after = fingerprint(Path("run"))
    assert before == {name: after.get(name) for name in before}
    succeeds(capsys, "train", "--resume", "--out", "run", "--max_steps", 4)
    for _ in range(2):
        succeeds(capsys, *arguments, "--text_file", text, "--max_steps", 2, "--overwrite")
        succeeds(capsys, "train", "--resume", "--out", "run", "--max_steps", 4)
        assert len(list(Path("run").glob("tokens*"))) == 1
    own = next(Path("run").glob("tokens*"))
    succeeds(capsys, *arguments, "--text_file", own, "--max_steps", 2, "--overwrite")
    assert (own / "meta.json").exists()


def test_overwrite_removes_only_the_run(capsys, text):
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--out", "run", "--max_steps")
    succeeds(capsys, *arguments, 4)
    Path("run/notes.txt").write_text("mine", encoding="utf-8")
    succeeds(capsys, *arguments, 2, "--overwrite")
    assert not Path("run/step-0000004").exists() and Path("run/step-0000002").is_dir()
    assert Path("run/notes.txt").read_text(encoding="utf-8") == "mine"


def test_resume_goes_further_even_after_a_move(capsys, text):
    succeeds(
        capsys, "train", "--model_size", "demo", "--text_file", text, "--max_steps", 4, "--batch_size", 4, "--out",
        "run",
    )
    Path("run").rename("moved")
    out = succeeds(capsys, "train", "--resume", "--out", "moved", "--max_steps", 6, "--batch_size", 4)
    assert "continued at step 4" in out and Path("moved/step-0000006").is_dir()
    succeeds(capsys, "train", "--resume", "--out", "moved", "--epochs", 0.2)
    succeeds(capsys, "train", "--resume", "--out", "moved")  # nothing left to do is no mistake
    refused(capsys, "train", "--resume", "--out", "elsewhere", says="elsewhere")


def test_ctrl_c_saves_and_says_how_to_continue(capsys, monkeypatch, text):
    from transformer_llm.training import Trainer

    make_step = Trainer.train_step

    def interrupted_step(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return make_step(self)

    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 8, "--out", "my run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted_step)
        code, _, err = call(capsys, *arguments)
    assert (
        code == 130
        and "Stopped at step 3" in err
        and "transformer-llm train --out 'my run' --resume" in err
        and "Traceback" not in err
    )
    assert Path("my run/step-0000003").is_dir()
    assert "continued at step 3" in succeeds(capsys, "train", "--out", "my run", "--resume")
    succeeds(capsys, *arguments[:-1], "whole")
    weights = [(Path(name) / "step-0000008" / "model.safetensors").read_bytes() for name in ("my run", "whole")]
    assert weights[0] == weights[1]


def test_ctrl_c_elsewhere_is_quiet(capsys, monkeypatch):
    def interrupt(*path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformer_llm.dataset.load_shakespeare", interrupt)
    code, _, err = call(capsys, "data", "shakespeare")
    assert code == 130 and err == "\nStopped.\n"


# --- refusals -----------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "train": """max_steps 0, max_steps -1, max_steps 1.5, max_steps many, max_steps 1e9, max_steps 99999999999,
        epochs 0, epochs -1, epochs nan, epochs inf, batch_size 0, context_length 1, vocab_size 1, val_fraction 1,
        val_fraction -0.1, learning_rate -1, learning_rate 1e400, warmup_steps -1, accumulation 0, dropout 1,
        dropout -0.1, eval_every -1, checkpoint_every -1, keep_checkpoints 0, seed -1, seed 0.5""",
    "generate": """temperature -1, temperature nan, top_k 0, top_p 1.5, top_p -1, min_p 2, beams 0, seed x,
        repetition_penalty 0, max_new_tokens 0, num_samples 0, num_samples 1.5""",
    "data prepare": "workers 0",
    "tokenizer train": "vocab_size 0",
    "demo": "seed -1",
}
OUT_OF_RANGE = [f"{command} --{one.strip()}" for command, flags in OUT_OF_RANGE.items() for one in flags.split(",")]


@pytest.mark.parametrize("words", OUT_OF_RANGE)
def test_flags_out_of_range(capsys, words):
    *command, flag, value = words.split()
    needed = {"generate": ["--checkpoint", "x", "--prompt", "x"], "data": ["--out", "x"]}.get(command[0], [])
    refused(capsys, *command, *needed, flag, value, says=f"{flag} must be a (whole )?number .*, not ")


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("train --model_size huge", "--model_size: invalid choice: 'huge'"),
        ("train --batch 4", "unrecognized arguments: --batch"),
        ("train --max_steps", "expected one argument"),
        ("train --epochs 1 --max_steps 5", "not allowed with"),
        ("train --optimizer sgd", "invalid choice"),
        ("train --dtype float16", "invalid choice"),
        ("train --device tpu", "invalid choice"),
        ("generate --prompt x", "required: --checkpoint"),
        ("generate --checkpoint x", "required: --prompt"),
        ("generate --checkpoint nowhere --prompt x", "nowhere"),
        ("info nowhere", "nowhere"),
        ("data prepare --out x --text_file nowhere", "nowhere"),
        ("tokenizer train --text_file nowhere", "nowhere"),
        ("train --text_file nowhere", "nowhere"),
        ("train --resume --out nowhere", "nowhere"),
    ],
)
def test_other_mistakes(capsys, words, says):
    refused(capsys, *words.split(), says=re.escape(says))


BAD_TEXTS = {
    "empty": b"",
    "blank": b" \n \n",
    "binary": bytes(range(256)) * 20,
    "zeros": b"the cat\0\0\0" * 100,
    "latin": "Nous étions à l'étage".encode("latin-1") * 50,
    "utf16": make_text(200).encode("utf-16"),
    "short": b"to be",
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@pytest.mark.parametrize("command", ["train --model_size demo", "data prepare --out tokens"])
def test_bad_texts(capsys, name, command):
    if name in ("short", "blank") and command.startswith("data"):
        pytest.skip("a short text can be tokenized; how long a window is, only train knows")
    Path("text.txt").write_bytes(BAD_TEXTS[name])
    refused(capsys, *command.split(), "--text_file", "text.txt", "--tokenizer", "char", says="text")


def test_texts_and_vocabularies_that_do_not_fit(capsys, text):
    Path("none").mkdir()
    refused(capsys, "train", "--text_file", "none", says="none")
    refused(capsys, "train", "--model_size", "demo", "--text_file", text, "--context_length", 100_000, says="100,?000")
    refused(capsys, "train", "--text_file", text, "--vocab_size", 50_000, says="50,?000")
    refused(capsys, "tokenizer", "train", "--text_file", text, "--vocab_size", 50_000, says="50,?000")
    refused(capsys, "train", "--text_file", text, "--vocab_size", 100, says="vocab_size must be .* 257")
    refused(
        capsys, "train", "--text_file", text, "--vocab_size", 100, "--tokenizer", "char",
        says="only with --tokenizer bpe"
    )
    refused(capsys, "train", "--text_file", text, "--tokenizer", "nowhere.json", says="nowhere.json")
    Path("bad.json").write_text("{", encoding="utf-8")
    refused(capsys, "train", "--text_file", text, "--tokenizer", "bad.json", says="bad.json")


def test_a_model_far_larger_than_the_machine(capsys, tokens):
    refused(
        capsys, "train", "--model_size", "medium", "--text_file", tokens, "--batch_size", 1_000_000,
        says="smaller --batch_size",
    )
    assert not Path("runs").exists() or not list(Path("runs").rglob("step-*"))


def test_a_device_that_is_not_there(capsys, text):
    import torch

    missing = [
        name
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if not there
    ]
    for name in missing:
        refused(capsys, "train", "--text_file", text, "--device", name, says=f"{name}.* is not available")


def test_places_that_can_not_be_written(capsys, text, run):
    Path("file").write_text("mine", encoding="utf-8")
    refused(capsys, "train", "--model_size", "demo", "--text_file", text, "--out", "file", says="file")
    refused(capsys, "train", "--model_size", "demo", "--text_file", text, "--out", "file/run", says="file")
    refused(capsys, "data", "patterns", "--out", "file/patterns.txt", says="file")
    refused(capsys, "data", "prepare", "--text_file", text, "--out", "file/tokens", says="file")
    refused(capsys, "tokenizer", "train", "--text_file", text, "--out", "file/tokenizer.json", says="file")
    assert Path("file").read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(capsys, text):
    Path("locked").mkdir(mode=0o500)
    refused(capsys, "train", "--model_size", "demo", "--text_file", text, "--out", "locked/run", says="no permission")
    refused(capsys, "tokenizer", "train", "--text_file", text, "--out", "locked/tokenizer.json", says="no permission")


# --- a full disk --------------------------------------------------------------------------------------------------


def test_full_disk_during_training_keeps_the_last_checkpoint(capsys, monkeypatch, text):
    from transformer_llm.checkpoints import find_checkpoint, load_checkpoint

    sync, arguments = (
        os.fsync,
        ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 6, "--checkpoint_every", 2),
    )

    def full(descriptor):
        if Path("run/step-0000002").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(capsys, *arguments, "--out", "run", says="the disk is full")
    assert find_checkpoint("run").name == "step-0000002" and load_checkpoint("run").step == 2
    succeeds(capsys, "train", "--resume", "--out", "run")
    succeeds(capsys, *arguments, "--out", "whole")
    assert (
        Path("run/step-0000006/model.safetensors").read_bytes()
        == Path("whole/step-0000006/model.safetensors").read_bytes()
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a file's size")
def test_a_real_limit_on_file_size(text):
    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    command = [
        sys.executable, "-m", "transformer_llm", "train", "--model_size", "demo", "--text_file", str(text),
        "--max_steps", "2", "--out", "run",
    ]
    # Python itself would write half of a module's bytecode, and everybody after it would read that
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)
    assert (
        done.returncode == 2 and done.stderr.startswith("transformer-llm: Can't write") and done.stderr.count("\n") == 1
    ), done.stderr
    assert not list(Path("run").glob("step-*"))


# --- generate and info --------------------------------------------------------------------------------------------


def test_generate(capsys, run):
    arguments = ("generate", "--checkpoint", run, "--prompt", "the cat", "--max_new_tokens", 40)
    first = succeeds(
        capsys, *arguments, "--temperature", 0.8, "--top_k", 50, "--top_p", 0.9, "--min_p", 0.01,
        "--repetition_penalty", 1.1,
    )
    assert first.startswith("the cat") and len(first) == len("the cat") + 40 + 1
    assert succeeds(capsys, *arguments, "--seed", 1) == succeeds(capsys, *arguments, "--seed", 1)
    assert succeeds(capsys, *arguments, "--seed", 1) != succeeds(capsys, *arguments, "--seed", 2)
    assert succeeds(capsys, *arguments, "--stream") == succeeds(capsys, *arguments)
    greedy = [succeeds(capsys, *arguments, "--temperature", 0, "--seed", seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generate_several_samples(capsys, run):
    arguments = ("generate", "--checkpoint", run, "--prompt", "the cat", "--max_new_tokens", 30, "--num_samples", 3)
    out = succeeds(capsys, *arguments)
    samples = re.split(r"--- \d of 3 ---\n", out)[1:]
    assert len(set(samples)) == 3 and all(sample.startswith("the cat") for sample in samples)
    assert succeeds(capsys, *arguments, "--stream") == out


def test_generate_from_one_checkpoint_with_beams(capsys, run):
    arguments = (
        "generate",
        "--checkpoint",
        run / "step-0000030",
        "--prompt", "the cat", "--max_new_tokens", 10, "--beams", 3,
    )
    assert succeeds(capsys, *arguments).startswith("the cat")
    refused(capsys, *arguments, "--temperature", 1, "--stream", says="leave out --temperature and --stream")


def test_generate_with_the_fast_decoder(capsys, monkeypatch, run):
    import torch

    from transformer_llm.decoding import Decoder

    made, make = [], Decoder.__init__
    monkeypatch.setattr(
        Decoder, "__init__", lambda self, model, *, dtype: made.append(dtype) or make(self, model, dtype=dtype)
    )
    arguments = ("generate", "--checkpoint", run, "--prompt", "the cat", "--max_new_tokens", 30)
    for options in ((), ("--temperature", 0), ("--top_k", 5, "--stream"), ("--beams", 3)):
        plain = succeeds(capsys, *arguments, *options, "--plain")
        assert not made
        for form in ([], ["--dtype", "float32"]):  # what is written by itself, and what was asked for
            assert succeeds(capsys, *arguments, *options, *form) == plain
        assert made.pop() == torch.float32 and made.pop() is None and not made
    for dtype in ("bfloat16", "int8"):
        assert succeeds(capsys, *arguments, "--dtype", dtype).startswith("the cat")
    assert len(made) == 2
    refused(capsys, *arguments, "--dtype", "int8", "--plain", says="--plain.*--dtype")
    refused(capsys, *arguments, "--dtype", "int3", says="--dtype.*int3")
    refused(capsys, *arguments, "--dtype", "int4", says="multiples of 32, but d_model is 16")


def test_fast_steps_are_the_same_training(capsys, monkeypatch, text):
    import json

    from transformer_llm.performance import FastTrainer

    steps, step = [], FastTrainer.train_step
    monkeypatch.setattr(FastTrainer, "train_step", lambda self: steps.append(self.step) or step(self))
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 6, "--batch_size", 4)
    assert "Trainer in float32 on cpu" in succeeds(capsys, *arguments, "--out", "plain", "--plain")
    assert not steps
    assert "FastTrainer in float32 on cpu" in succeeds(capsys, *arguments, "--out", "fast")
    assert len(steps) == 6
    losses = [
        [
            row["val_loss"]
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
            if (row := json.loads(line)).get("val_loss")
        ]
        for out in ("plain", "fast")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0]
    succeeds(capsys, "train", "--out", "fast", "--resume", "--max_steps", 8)  # as it was started
    assert len(steps) == 8
    # both read the same checkpoints
    succeeds(capsys, "train", "--out", "plain", "--resume", "--max_steps", 9, "--fast")
    assert len(steps) == 11
    # a model with dropout, which the faster steps don't know, takes the plain ones
    assert "\ntrainer      Trainer in" in succeeds(capsys, *arguments, "--out", "dropped", "--dropout", 0.1)
    assert len(steps) == 11
    refused(capsys, *arguments, "--out", "both", "--fast", "--plain", says="--plain.*--fast")


@pytest.mark.parametrize("beams", [[], ["--beams", 2]], ids=["draw", "beams"])
def test_prompts_that_can_not_be_continued(capsys, run, beams):
    arguments = ("generate", "--checkpoint", run, *beams)
    refused(capsys, *arguments, "--prompt", "", says="prompt is empty|empty prompt")
    refused(capsys, *arguments, "--prompt", "the cat " * 20, says="160.* 32|32.* 160")
    refused(capsys, *arguments, "--prompt", "the cät", says="at position 5")


def test_damaged_checkpoints(capsys, run):
    source = run / "step-0000030"
    for name in (
        "config.json", "model.safetensors", "training.json", "training_state.safetensors", "tokenizer.json",
        "checkpoint.json",
    ):
        for damage in ("flip", "cut", "gone"):
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree(source, "run/step-0000030")
            path = Path("run/step-0000030") / name
            data = bytearray(path.read_bytes())
            if damage == "flip":
                data[len(data) // 2] ^= 1
            path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
            if damage == "gone":
                path.unlink()
            for command in (
                ["generate", "--checkpoint", "run", "--prompt", "a"],
                ["info", "run"],
                ["train", "--resume", "--out", "run"],
            ):
                refused(capsys, *command)


def test_a_run_whose_newest_checkpoint_is_damaged(capsys, text):
    from transformer_llm.checkpoints import load_checkpoint

    settings = (
        "train", "--model_size", "demo", "--text_file", text, "--batch_size", 4, "--checkpoint_every", 3,
        "--max_steps", 6, "--out",
    )
    succeeds(capsys, *settings, "whole")
    expected = Path("whole/step-0000006/model.safetensors").read_bytes()
    succeeds(capsys, *settings, "run")
    Path("run/step-0000006/training.json").write_text("{", encoding="utf-8")
    code, out, err = call(capsys, "train", "--resume", "--out", "run")
    assert code == 0 and re.search("step-0000006 is skipped, and .*step-0000003 is used: .* damaged", err), err
    assert "continued at step 3" in out and Path("run/loss.png").exists() and load_checkpoint("run").step == 6
    assert Path("run/step-0000006/model.safetensors").read_bytes() == expected
    load_checkpoint("run/step-0000003")
    refused(capsys, *settings, "run/step-0000003", says="is a checkpoint")
    Path("run/step-0000006/training.json").write_text("{", encoding="utf-8")
    succeeds(capsys, *settings, "run", "--overwrite")
    assert Path("run/step-0000006/model.safetensors").read_bytes() == expected


def test_a_tilde_is_the_home_folder(capsys, monkeypatch, tmp_path, text):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    succeeds(capsys, "train", "--model_size", "demo", f"--text_file={text}", "--max_steps", 2, "--out=~/run")
    assert (tmp_path / "run" / "step-0000002").is_dir()
    succeeds(capsys, "generate", "--checkpoint=~/run", "--prompt", "a", "--max_new_tokens", 2)
    succeeds(capsys, "info", "~/run")


@pytest.mark.parametrize("eval_batches, batches", [(None, None), (2, 2), (10**6, None)])
def test_the_estimated_time_counts_what_a_validation_reads(eval_batches, batches):
    from transformer_llm.training import TrainingConfig

    config = TrainingConfig(max_steps=100, eval_every=50, batch_size=4, accumulation=2, eval_batches=eval_batches)
    trainer = SimpleNamespace(config=config, context_length=8, data=SimpleNamespace(val=range(6400)))
    read = 6400 if batches is None else batches * 4 * 8
    assert cli.estimate_for(trainer).eval_steps == pytest.approx(read / (3 * 2 * 4 * 8))


def test_ctrl_c_before_anything_was_saved(capsys, monkeypatch, text):
    from transformer_llm.training import Trainer

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", stop)
    code, _, err = call(capsys, "train", "--model_size", "demo", "--text_file", text, "--max_steps", 2, "--out", "run")
    assert code == 130 and "Stopped." in err and "--resume" not in err


def test_a_checkpoint_without_a_tokenizer(capsys):
    import torch

    from transformer_llm.checkpoints import save_checkpoint
    from transformer_llm.transformer import GPT, GPTConfig

    torch.manual_seed(0)
    save_checkpoint("run", 1, GPT(GPTConfig.preset("demo")))
    refused(capsys, "generate", "--checkpoint", "run", "--prompt", "1", says="has no tokenizer")


def test_info(capsys, run):
    assert re.search(r"^torch +\d", succeeds(capsys, "info"), re.MULTILINE)
    assert re.search(r"^parameters +5,162$", succeeds(capsys, "info", "demo"), re.MULTILINE)
    for size in cli.MODEL_SIZES:
        assert re.search(rf"^preset +{size}$", succeeds(capsys, "info", size), re.MULTILINE)
    out = succeeds(capsys, "info", run)
    assert re.search(r"^step +30$", out, re.MULTILINE) and "CharTokenizer" in out


def test_demo_gets_its_flags(capsys, monkeypatch):
    demo = pytest.importorskip("transformer_llm.demo")
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: calls.append(options))
    succeeds(capsys, "demo", "--out", "here", "--seed", 3)
    assert calls == [{"directory": "here", "seed": 3, "progress": False}]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, run) -> Path:
    "A small model as a folder that Hugging Face reads, written by `export`."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    text = tmp_path_factory.mktemp("words") / "words.txt"
    text.write_text(make_text(), encoding="utf-8")
    run_folder = folder.parent / "run"
    arguments = [
        "--model_size", "tiny", "--text_file", text, "--vocab_size", 300, "--context_length", 16, "--batch_size", 2,
        "--max_steps", 2, "--out", run_folder,
    ]
    assert main(["train", *map(str, arguments)]) == 0
    assert main(["export", "--checkpoint", str(run_folder), "--hf", str(folder)]) == 0
    return folder


def test_generate_and_info_take_a_model_of_others(capsys, pretrained):
    out = succeeds(capsys, "generate", "--checkpoint", pretrained, "--prompt", "the cat", "--max_new_tokens", 5)
    assert out.startswith("the cat")
    assert succeeds(
        capsys, "generate", "--checkpoint", pretrained, "--prompt", "the cat", "--max_new_tokens", 5, "--beams", 2
    ).startswith("the cat")
    out = succeeds(capsys, "info", pretrained)
    assert re.search(r"^vocab_size +300$", out, re.MULTILINE) and re.search(r"^answers +no: ", out, re.MULTILINE)
    refused(capsys, "chat", "--model", pretrained, "--prompt", "a", says="has no chat template.* generate")
    refused(
        capsys, "chat", "--model", pretrained.parent / "run", "--prompt", "a",
        says="has no chat template; use .*generate",
    )


def test_export(capsys, pretrained, tmp_path):
    refused(capsys, "export", "--checkpoint", pretrained, says="one of the arguments --hf --onnx --gguf is required")
    refused(capsys, "export", "--checkpoint", pretrained, "--hf", "a", "--onnx", "b", says="not allowed with")
    refused(capsys, "export", "--checkpoint", pretrained, "--hf", "a", "--with_cache", says="only with --onnx")
    refused(capsys, "export", "--checkpoint", "nowhere", "--hf", "a", says="nowhere")
    Path("there").write_text("mine", encoding="utf-8")
    refused(capsys, "export", "--checkpoint", pretrained, "--onnx", "there", says="--overwrite")
    assert Path("there").read_text(encoding="utf-8") == "mine"
    assert "copy: " in succeeds(capsys, "export", "--checkpoint", pretrained, "--hf", "copy")
    assert fingerprint(Path("copy")) == fingerprint(pretrained)
    refused(capsys, "export", "--checkpoint", pretrained, "--hf", "copy", says="overwrite")
    succeeds(capsys, "export", "--checkpoint", pretrained, "--hf", "copy", "--overwrite")


def test_export_onnx(capsys, pretrained):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert "model.onnx: " in succeeds(capsys, "export", "--checkpoint", pretrained, "--onnx", "model.onnx")
    assert Path("model.onnx").stat().st_size > 100_000


# --- the process --------------------------------------------------------------------------------------------------


def test_a_broken_pipe_is_quiet(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = write

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["info", "demo"]) == 141


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently on Windows")
def test_a_process_with_a_broken_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "transformer_llm", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_errors_become_sentences():
    assert cli.sentence_for(OSError(errno.ENOSPC, "No space left", "x")).startswith("Can't use x: the disk is full")
    assert cli.sentence_for(MemoryError()).startswith("Out of memory")
    assert cli.sentence_for(RuntimeError("DefaultCPUAllocator: can't allocate memory")).startswith("Out of memory")
    assert cli.sentence_for(KeyError("a bug")) is None


# --- any numbers --------------------------------------------------------------------------------------------------

WILD = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.integers(-3, 40).map(str),
    st.floats(-1, 2).map(str),
    st.text(max_size=6),
)
SMALL = st.one_of(
    st.integers(-2, 12).map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "9" * 30, "0x10", "", " 3", "1_0", "٣"]),
)


def flags(wild: list[str], small: list[str]):
    "Some flags with any numbers: wild ones where a large number is cheap, small ones where it would take long."
    choices = [st.tuples(st.just(flag), WILD) for flag in wild] + [st.tuples(st.just(flag), SMALL) for flag in small]
    return st.lists(st.one_of(choices), min_size=1, max_size=4, unique_by=lambda pair: pair[0])


def words(pairs) -> list[str]:
    "`--flag=value`, so that a value that begins with a dash stays one."
    return [f"{flag}={value}" for flag, value in pairs]


@settings(max_examples=60)
@given(
    pairs=flags(
        ["--temperature", "--top_k", "--top_p", "--min_p", "--repetition_penalty", "--seed"],
        ["--max_new_tokens", "--num_samples"],
    )
)
def test_generate_with_any_numbers(run, pairs):
    assert main(["generate", "--checkpoint", str(run), "--prompt", "the", "--max_new_tokens=4", *words(pairs)]) in (
        0,
        2,
    )


@settings(max_examples=40)
@given(
    pairs=flags(
        [
            "--learning_rate", "--warmup_steps", "--seed", "--dropout", "--eval_every", "--checkpoint_every",
            "--keep_checkpoints", "--val_fraction", "--vocab_size",
        ],
        ["--max_steps", "--batch_size", "--accumulation", "--context_length"],
    )
)
def test_train_with_any_numbers(tmp_path_factory, text, tokens, pairs):
    given_flags = {flag for flag, _ in pairs}
    settled = {"--val_fraction", "--vocab_size"} & given_flags
    steps = [] if "--max_steps" in given_flags else ["--max_steps=2"]
    batch = [] if "--batch_size" in given_flags else ["--batch_size=2"]
    out = tmp_path_factory.mktemp("fuzz") / "run"
    argv = [
        "train",
        "--model_size=demo",
        f"--text_file={text if settled else tokens}",
        f"--out={out}",
        *steps,
        *batch,
        *words(pairs),
    ]
    assert main(argv) in (0, 2)


# --- bench --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch):
    "Sections of the benchmark that cost nothing; the second can be made to stop."
    from transformer_llm import benchmark

    ran = []

    def section(name):
        def run(plan):
            ran.append((name, plan.quick, plan.seed, plan.text))
            if name in stops:
                raise KeyboardInterrupt
            return [
                benchmark.line(
                    f"a line of {name}",
                    benchmark.figure("ours", [2.0]),
                    [benchmark.figure("theirs", [1.0])],
                    unit="tokens/s",
                    at_least=1,
                )
            ]

        return benchmark.Section(name, "Cheap.", run, on_request=name.startswith("gpu"))

    stops = set()
    monkeypatch.setattr(benchmark, "SECTIONS", {name: section(name) for name in cli.SECTION_NAMES})
    return ran, stops


def test_the_sections_are_those_of_the_appendix():
    from transformer_llm.benchmark import SECTIONS

    assert cli.SECTION_NAMES == tuple(SECTIONS)


def test_bench_writes_results_and_a_picture(capsys, cheap):
    from transformer_llm.benchmark import load_results

    out = succeeds(capsys, "bench", "--quick", "--seed", 3)
    names = [name for name in cli.SECTION_NAMES if not name.startswith("gpu")]
    assert list(load_results("benchmark.json")["sections"]) == names == [name for name, *_ in cheap[0]] and {
        run[1:3] for run in cheap[0]
    } == {(True, 3)}
    assert (
        "2.00 ×" in out and "a line of generation" in out and Path("benchmark.png").read_bytes().startswith(b"\x89PNG")
    )


def test_bench_of_some_sections(capsys, cheap):
    Path("cats.txt").write_text(make_text(6000), encoding="utf-8")
    succeeds(
        capsys, "bench", "--section", "tokenizer", "generation", "--section", "gpu-training-loss", "--text-file",
        "cats.txt", "--output", "deep/r.json", "--seed", 0,
    )
    assert [name for name, *_ in cheap[0]] == ["gpu-training-loss", "generation", "tokenizer"] and Path(
        "deep/r.png"
    ).exists()
    assert not cheap[0][0][1]
    # goes on with the same file and picture
    succeeds(capsys, "bench", "--section", "training-loss", "--output", "deep/r.json")
    assert json.loads(Path("deep/r.json").read_text(encoding="utf-8"))["sections"].keys() == {
        "training-loss", "gpu-training-loss", "generation", "tokenizer",
    }


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--section", "speed"], "choose from"),
        (["--section"], "expected at least one"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", "x"], "--seed must be"),
        (["--output", "folder"], "folder is a folder"),
        (["--output", "diary.json"], "not a file of results"),
        (["--output", "diary.json/r.json"], "diary.json"),
        (["--output", "r.png"], "ends in .json"),
        (["--output", "mine.json"], "mine.png exists"),
        (["--text_file", "absent.txt"], "absent.txt"),
        (["--text_file", "short.txt"], "too short"),
        (["--text_file", "folder"], "is a folder"),
        (["--quick", "1"], "unrecognized"),
        (["--rounds", "3"], "unrecognized"),
    ],
)
def test_bench_refuses_before_it_measures(capsys, cheap, flags, says):
    Path("folder").mkdir()
    Path("diary.json").write_text("my diary", encoding="utf-8")
    Path("mine.png").write_bytes(b"my picture")
    Path("short.txt").write_text("too short", encoding="utf-8")
    before = fingerprint(Path("."))
    refused(capsys, "bench", *flags, says=says)
    assert cheap[0] == [] and fingerprint(Path(".")) == before


def test_bench_refuses_results_of_another_machine(capsys, cheap):
    succeeds(capsys, "bench")
    results = json.loads(Path("benchmark.json").read_text(encoding="utf-8"))
    results["machine"]["processor"] = "Another"
    Path("benchmark.json").write_text(json.dumps(results), encoding="utf-8")
    before = fingerprint(Path("."))
    refused(capsys, "bench", says="measured differently .processor.")
    assert fingerprint(Path(".")) == before


def test_ctrl_c_in_bench_keeps_what_was_measured(capsys, cheap):
    cheap[1].add("generation")
    code, out, err = call(capsys, "bench")
    assert (
        code == 130 and "Traceback" not in err and "holds what was measured: training-loss, training-throughput" in out
    )
    assert list(json.loads(Path("benchmark.json").read_text(encoding="utf-8"))["sections"]) == [
        "training-loss",
        "training-throughput",
    ]
    cheap[1].clear()
    succeeds(capsys, "bench", "--section", "generation", "tokenizer", "start-up-and-memory")
    assert len(json.loads(Path("benchmark.json").read_text(encoding="utf-8"))["sections"]) == 5


def test_bench_without_its_peers(capsys, cheap, monkeypatch):
    from transformer_llm import benchmark, peers

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.why_missing("transformers") == "transformers is not installed"
    assert isinstance(benchmark.peer_makers()["transformers"], str) and callable(
        benchmark.peer_makers()["torch.nn.TransformerEncoder"]
    )


# --- strange places -----------------------------------------------------------------------------------------------

PATH_FLAGS = {
    "train": ["--text_file", "--tokenizer", "--out"],
    "finetune": ["--model", "--checkpoint", "--data", "--template", "--out"],
    "data prepare --out x": ["--text_file", "--tokenizer", "--out"],
    "data patterns": ["--out"],
    "data shakespeare": ["--out"],
    "tokenizer train": ["--text_file", "--tokenizer", "--out"],
    "generate --checkpoint x --prompt x": ["--checkpoint"],
    "chat --prompt x": ["--model"],
    "evaluate --text_file x --checkpoint x": ["--text_file", "--checkpoint"],
    "export --checkpoint x --hf x": ["--checkpoint", "--hf"],
    "shakespeare": ["--out"],
    "demo": ["--out"],
    "bench": ["--output", "--text_file"],
}


@pytest.mark.parametrize("path, says", [
    ("", "must be a path, but this one is empty"),
    ("~nobody-of-that-name/x", "home folder"),
    ("caf\udce9.txt", "not UTF-8"),
    ("a\0b", "zero byte"),
], ids=["empty", "nobody", "latin", "zero"])  # fmt: skip
def test_no_flag_takes_a_path_that_can_not_be(capsys, path, says):
    "An empty one once meant the current folder, and the others ended in tracebacks."
    before = fingerprint(Path("."))
    for command, names in PATH_FLAGS.items():
        for name in names:
            refused(capsys, *command.split(), f"{name}={path}", says=says)
    refused(capsys, "info", path, says=says)
    assert fingerprint(Path(".")) == before


def test_two_dashes_are_a_value_behind_an_equals_sign(capsys, text):
    "`--out=--` once trained into the default folder, and the others ended in tracebacks."
    for command, names in PATH_FLAGS.items():
        for name in names:
            parsed = cli.make_parser().parse_args([*command.split(), f"{name}=--"])
            assert getattr(parsed, name[2:]) == "--"
    refused(capsys, "bench", "--section=--", says="invalid choice: '--'")
    refused(capsys, "train", "--model_size=--", says="invalid choice: '--'")
    out = succeeds(capsys, "train", "--model_size", "demo", "--text_file", text, "--max_steps", 1, "--out=--")
    assert Path("--/step-0000001").is_dir() and not Path("runs").exists()
    assert "generate --checkpoint=-- --prompt" in out  # what can be typed next
    assert succeeds(capsys, "generate", "--checkpoint=--", "--prompt", "a", "--max_new_tokens", 2).startswith("a")


def test_a_prompt_that_is_not_utf8(capsys, run, pretrained):
    for model in (run, pretrained):
        refused(capsys, "generate", "--checkpoint", model, "--prompt", "the caf\udce9")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize("command", ["train --model_size demo --out x", "data prepare --out x", "tokenizer train",
                                     "evaluate --checkpoint x"])  # fmt: skip
def test_a_pipe_is_no_text_file(capsys, command):
    "It can be read only once; it was called empty, or waited for without end."
    os.mkfifo("pipe")
    refused(capsys, *command.split(), "--text_file", "pipe", says="pipe")
    if Path("/dev/fd").is_dir():  # what a shell makes of <(...)
        read, write = os.pipe()
        os.write(write, b"the cat sat on a mat " * 99)
        os.close(write)
        try:
            refused(capsys, *command.split(), "--text_file", f"/dev/fd/{read}", says="can be read only once")
        finally:
            os.close(read)
    assert os.listdir() == ["pipe"]


def test_without_streams(monkeypatch, capsys, run):
    "A process may have been started with `>&-`."
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["info", "demo"]) == 0
    assert main(["generate", "--checkpoint", str(run), "--prompt", "a", "--max_new_tokens", "3", "--stream"]) == 0
    assert main(["info", "nowhere"]) == 2 and main(["fly"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="a shell's way to close a stream")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_ends_nothing(closed):
    command = shlex.join([sys.executable, "-m", "transformer_llm"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    cases = {"--help": 0, "train --help": 0, "--version": 0, "fly": 2, "info ~nobody-of-that-name": 2}
    for words, code in cases.items():
        done = subprocess.run(["sh", "-c", f"{command} {words} {closed}"], capture_output=True, env=environment)
        assert done.returncode == code and b"Traceback" not in done.stderr + done.stdout, done


@pytest.mark.skipif(os.name == "nt", reason="a shell's way to close a stream")
def test_training_where_nothing_is_usual(text, tmp_path):
    """No name for the user, no home, no streams but a file, and a nonsense way of drawing: the run is complete, and its
    files hold what belongs into them. The log shows the loss, and no bars.
    """
    code = """
import pwd
def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = nobody
from transformer_llm.cli import run
run()
"""
    command = [sys.executable, "-c", code, "train", "--model_size", "demo", "--text_file", str(text), "--max_steps",
               "20", "--batch_size", "2", "--eval_every", "5", "--out", "run", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "nonsense", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(command)} <&- >log 2>&1"], env=environment)
    log = Path("log").read_text(encoding="utf-8")
    assert done.returncode == 0 and "Traceback" not in log, log
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")
    lines = re.findall(r"^step +(\d+) of 20: loss [\d.]+, validation [\d.]+$", log, re.MULTILINE)
    assert lines == ["5", "10", "15", "20"] and "it/s" not in log and "\r" not in log and "%" not in log
    assert main(["info", "run"]) == 0  # every hash is right


def test_a_curve_that_can_not_be_drawn_loses_nothing(capsys, monkeypatch, text):
    def nonsense(*arguments, **options):
        raise ValueError("'nonsense' is not a valid value for backend")

    monkeypatch.setattr("transformer_llm.training.plot_history", nonsense)
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 20, "--out", "run")
    code, out, err = call(capsys, *arguments)
    assert code == 0 and "nats per token" in out and "could not be drawn" in err and "nonsense" in err
    assert Path("run/step-0000020").is_dir()


def test_the_loss_is_a_line_now_and_then():
    ticks = iter([0.0, 1.0, 61.5, 61.5, 62.0, 63.0, 63.0])
    lines = cli.LossLines(60, clock=lambda: next(ticks))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for step, val_loss in ((10, None), (20, None), (30, None), (40, 2.5)):
            trainer = SimpleNamespace(config=SimpleNamespace(max_steps=50))
            lines(trainer, {"step": step, "loss": 3, "val_loss": val_loss})
    assert said.getvalue().splitlines() == ["step         20 of 50: loss 3.0000",
                                            "step         40 of 50: loss 3.0000, validation 2.5000"]  # fmt: skip


# --- interrupted --------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int, *signals: int) -> None:
    "Let a step of the next run send signals to its own process."
    from transformer_llm.training import Trainer

    make_step = Trainer.train_step

    def interrupted_step(self):
        if self.step == step:
            for number in signals:
                signal.raise_signal(number)
        return make_step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted_step)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_end_of_a_session_saves(capsys, monkeypatch, text, name, code):
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 8, "--batch_size", 2)
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, getattr(signal, name))
        got, _, err = call(capsys, *arguments, "--out", "run")
    assert got == code and "Stopped at step 3" in err and "train --out run --resume" in err
    assert signal.getsignal(getattr(signal, name)) == before
    assert "continued at step 3" in succeeds(capsys, "train", "--out", "run", "--resume")


def test_a_second_ctrl_c_names_what_was_saved(capsys, monkeypatch, text):
    "It interrupts at once; the step that it interrupts is saved nowhere."
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--max_steps", 9, "--checkpoint_every", 2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, signal.SIGINT, signal.SIGINT)
        code, _, err = call(capsys, *arguments, "--out", "run")
    assert code == 130 and "newest checkpoint is from step 4" in err, err
    assert "continued at step 4" in succeeds(capsys, "train", "--out", "run", "--resume")


def test_a_broken_pipe_in_training_saves_the_step(capsys, monkeypatch, text):
    class Reader(io.StringIO):
        "Goes away after the plan."

        def write(self, said):
            if said.startswith("step "):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(said)

    arguments = ["train", "--model_size", "demo", "--text_file", str(text), "--max_steps", "9", "--eval_every", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Reader())
        assert main([*arguments, "--checkpoint_every", "0", "--out", "run"]) == 141
    assert Path("run/step-0000003").is_dir()
    assert "continued at step 3" in succeeds(capsys, "train", "--out", "run", "--resume")


# --- continued ----------------------------------------------------------------------------------------------------


def test_a_resume_says_what_is_not_as_expected(capsys, text):
    "Nothing left to train; a rate that rises again; an equal seed is fine."
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--batch_size", 2, "--out", "run")
    succeeds(capsys, *arguments, "--max_steps", 8)
    again = ("train", "--resume", "--out", "run")
    for options in ((), ("--max_steps", 3), ("--max_steps", 8, "--seed", 0), ("--batch_size", 2)):
        out = succeeds(capsys, *again, *options)
        assert "Nothing is left to train: the run in run has made 8 steps" in out and "nats per token" not in out
    code, out, err = call(capsys, *again, "--max_steps", 16)
    assert code == 0 and "learning rate continues at" in err, err
    assert err.count("\n") == 1 and err.startswith("transformer-llm: ") and "Warning" not in err and ".py" not in err
    assert call(capsys, *again, "--max_steps", 16)[2] == ""


def test_a_run_that_lost_its_note_goes_on(capsys, text):
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--batch_size", 2, "--out", "run")
    succeeds(capsys, *arguments, "--max_steps", 2)
    Path("run/command.json").write_text("5", encoding="utf-8")
    refused(capsys, "train", "--resume", "--out", "run", "--max_steps", 4, says="command.json.*delete it")
    Path("run/command.json").unlink()
    assert "continued at step 2" in succeeds(capsys, "train", "--resume", "--out", "run", "--max_steps", 4)


def test_going_on_from_an_older_checkpoint_keeps_the_newer_one(capsys, text):
    arguments = ("train", "--model_size", "demo", "--text_file", text, "--batch_size", 2, "--out", "run")
    succeeds(capsys, *arguments, "--max_steps", 6, "--checkpoint_every", 3)
    newer = fingerprint(Path("run/step-0000006"))
    code, out, err = call(capsys, "train", "--resume", "--out", "run/step-0000003")
    assert code == 0 and "continued at step 3" in out and "step-0000006" in err + out
    kept = [path for path in Path("run").rglob("step-0000006") if fingerprint(path) == newer]
    assert kept, err


def test_one_process_at_a_time(capsys, text):
    "A second one is refused before it writes anything, with the first one's number; --overwrite too."
    from transformer_llm.checkpoints import lock_run

    arguments = ("train", "--model_size", "demo", "--text_file", text, "--batch_size", 2, "--out", "run")
    succeeds(capsys, *arguments, "--max_steps", 2)
    code = "import sys, transformer_llm.checkpoints as c; lock = c.lock_run('run'); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        before = fingerprint(Path("run"))
        for options in (("--overwrite", "--max_steps", 1), ("--max_steps", 1)):
            refused(capsys, *arguments, *options, says=str(other.pid) if "--overwrite" in options else "")
        refused(capsys, "train", "--resume", "--out", "run", "--max_steps", 3, says=str(other.pid))
        assert fingerprint(Path("run")) == before
        other.kill()
    code = code.replace("'run'", "'new'")
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:  # one that has written nothing yet
        other.stdout.readline()
        for options in ((), ("--overwrite",)):
            refused(capsys, *arguments[:-1], "new", *options, says=str(other.pid))
        assert os.listdir("new") == [".lock"]
        other.kill()
    succeeds(capsys, "train", "--resume", "--out", "run", "--max_steps", 3)
    lock_run("run").release()


# --- what exists stays --------------------------------------------------------------------------------------------


def test_data_replaces_nothing_unasked(capsys, text):
    "The rule of `tokenizer train`, for each thing that `data` writes."
    Path("tokens").mkdir()
    for name in ("patterns.txt", "tokens/train.bin", "tokens/notes.txt", "thesis.txt"):
        Path(name).write_text("mine", encoding="utf-8")
    before = fingerprint(Path("."))
    prepare = ("data", "prepare", "--text_file", text, "--tokenizer", "char", "--out", "tokens")
    refused(capsys, "data", "patterns", "--out", "patterns.txt", says="patterns.txt already exists; use --overwrite")
    refused(capsys, *prepare, says="train.bin already exists; use --overwrite")
    refused(capsys, "data", "shakespeare", "--out", "thesis.txt", says="exists and is not this book's Shakespeare")
    assert fingerprint(Path(".")) == before
    succeeds(capsys, "data", "patterns", "--out", "patterns.txt", "--overwrite")
    succeeds(capsys, *prepare, "--overwrite")
    assert Path("patterns.txt").stat().st_size > 1000 and Path("tokens/notes.txt").read_text(encoding="utf-8") == "mine"
    refused(capsys, *prepare, "--val_fraction", 0.5, says="already exists; use --overwrite")


def test_the_demo_refuses_before_it_trains(capsys, monkeypatch):
    from transformer_llm import demo

    monkeypatch.setattr(demo, "train_counter", lambda **options: pytest.fail("it trained"))
    Path("file").write_text("mine", encoding="utf-8")
    Path("pictures").mkdir()
    Path("pictures/loss.png").write_bytes(b"mine")
    refused(capsys, "demo", "--out", "file", says="file is a file")
    refused(capsys, "demo", "--out", "file/below", says="file")
    refused(capsys, "demo", "--out", "pictures", says="loss.png exists")
    assert Path("pictures/loss.png").read_bytes() == b"mine" == Path("file").read_bytes()


# --- sampling and evaluate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_field_of_sampling_has_a_flag(command):
    from dataclasses import fields

    from transformer_llm.generation import Sampling

    names = [field.name for field in fields(Sampling)]
    assert names == list(cli.SAMPLING_FLAGS)
    needed = ["--checkpoint", "x", "--prompt", "x"] if command == "generate" else []
    for name in names:
        args = cli.make_parser().parse_args([command, *needed, f"--{name}", "1"])
        assert cli.typed_sampling(args) == {name: 1}


def test_a_seed_is_not_ignored_by_beams(capsys, run):
    refused(
        capsys, "generate", "--checkpoint", run, "--prompt", "a", "--beams", 2, "--seed", 3, says="leave out --seed"
    )


def test_evaluate(capsys, run, pretrained, text):
    Path("test.txt").write_text(make_text(400, seed=9), encoding="utf-8")
    out = succeeds(capsys, "evaluate", "--checkpoint", run, "--text_file", "test.txt")
    assert all(name in out for name in ("bits per byte", "perplexity", "next token right", "±", "5-gram"))
    found = json.loads(succeeds(capsys, "evaluate", "--checkpoint", run, "--text-file", "test.txt", "--json"))
    assert found["model"]["bits_per_byte"] > 0 and found["table"]["bits_per_byte"] > 0
    assert found["text_file"] == "test.txt" and found["name"] == str(run)
    assert "±" in succeeds(capsys, "evaluate", "--model", pretrained, "--text_file", "test.txt")


def test_evaluate_refuses_by_name(capsys, run, pretrained):
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("some.txt").write_text("the cat sat", encoding="utf-8")
    Path("texts").mkdir()
    refused(capsys, "evaluate", "--text_file", "some.txt", says="--checkpoint --model is required")
    refused(capsys, "evaluate", "--checkpoint", run, says="required: --text_file")
    refused(capsys, "evaluate", "--checkpoint", run, "--model", pretrained, "--text_file", "x", says="not allowed with")
    refused(capsys, "evaluate", "--checkpoint", run, "--text_file", "empty.txt", says="empty.txt is empty")
    refused(capsys, "evaluate", "--checkpoint", run, "--text_file", "texts", says="is a folder")
    refused(capsys, "evaluate", "--checkpoint", run, "--text_file", "nowhere.txt", says="nowhere.txt")
    refused(capsys, "evaluate", "--checkpoint", "nowhere", "--text_file", "some.txt", says="nowhere")
    refused(capsys, "evaluate", "--model", run, "--text_file", "some.txt", says="use --checkpoint instead")
