"""Runs from Python: what `start_run` and `continue_run` refuse, what they never destroy, and what `load_any` takes."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from transformer_llm import runs
from transformer_llm.checkpoints import find_checkpoint
from transformer_llm.foundations import InputError
from transformer_llm.runs import RunConfig, continue_run, load_any, prepare, start_run
from transformer_llm.training import Trainer, TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
WORDS = "the cat sat on a mat and saw one red hat by the old oak tree near our small house".split()


def make_text(n_lines: int = 150, seed: int = 0) -> str:
    "Lines of short words."
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=8)) + "\n" for _ in range(n_lines))


def snapshot(folder: Path) -> dict[str, bytes]:
    "Every file below a folder."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings(text: Path, max_steps: int = 3, **training) -> RunConfig:
    "A run of the smallest model."
    training = {"max_steps": max_steps, "batch_size": 2, "device": "cpu", **training}
    return RunConfig(text_file=text, model_size="demo", training=training)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    "A text file of about 5 kB."
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text) -> Path:
    "A finished run of three steps, to be copied."
    folder = tmp_path_factory.mktemp("runs") / "cats"
    start_run(folder, settings(text)).train()
    return folder


@pytest.fixture
def run(tmp_path, finished) -> Path:
    "A run of one's own."
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what a run is made of ----------------------------------------------------------------------------------------


def test_a_configuration_is_flat_and_comes_back(text):
    config = RunConfig(text_file=text, epochs=2, fast=True, training={"seed": 3, "betas": [0.9, 0.99]})
    flat = config.to_dict()
    assert flat == {"text_file": str(text), "epochs": 2, "fast": True, "seed": 3, "betas": [0.9, 0.99]}
    assert RunConfig.from_dict(json.loads(json.dumps(flat))).to_dict() == flat
    assert RunConfig().to_dict() == {}


WRONG = [
    ({"max_step": 3}, "max_step is an unknown setting"),
    ({"batch_size": 0}, "batch_size must be"),
    ({"batch_size": True}, "batch_size must be"),
    ({"seed": "x"}, "seed must be"),
    ({"betas": 5}, "betas"),
    ({"text_file": 5}, "text_file must be a path"),
    ({"tokenizer": ["char"]}, "tokenizer must be a path"),
    ({"model_size": "huge"}, "model_size must be one of"),
    ({"model_size": ["tiny"]}, "model_size must be one of"),
    ({"model_size": {}}, "model_size must be one of"),
    ({"vocab_size": 1.5}, "vocab_size must be"),
    ({"context_length": 10**400}, "context_length must be"),
    ({"val_fraction": 1}, "val_fraction must be"),
    ({"dropout": "much"}, "dropout must be"),
    ({"epochs": float("nan")}, "epochs must be"),
    ({"epochs": 1, "max_steps": 5}, "give only one of them"),
    ({"fast": "yes"}, "fast must be true or false"),
    ({"fast": 3}, "fast must be true or false"),
    (5, "5 is not a setting"),
    (None, "None is not a setting"),
    ([], "is not a setting"),
    ("x", "is not a setting"),
]


def test_settings_that_can_not_be(tmp_path):
    "From Python, and in `command.json`; in a process where no annotation is checked, as a user has it."
    (tmp_path / "cases.json").write_text(json.dumps([values for values, _ in WRONG]), encoding="utf-8")
    code = """
import json, sys
from pathlib import Path
from transformer_llm.foundations import InputError
from transformer_llm.runs import RunConfig, run_note
folder, said = Path(sys.argv[1]), []
for values in json.loads((folder / "cases.json").read_text()):
    (folder / "command.json").write_text(json.dumps(values))
    for make in (lambda: RunConfig.from_dict(values), lambda: run_note(folder / "command.json")):
        try:
            make()
            said.append("accepted")
        except InputError as error:
            said.append(str(error))
(folder / "command.json").write_text("{")
try:
    run_note(folder / "command.json")
except InputError as error:
    said.append(str(error))
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *said, damaged = json.loads(done.stdout)
    assert "command.json" in damaged
    for (values, says), direct, noted in zip(WRONG, said[::2], said[1::2], strict=True):
        assert says in direct and says in noted and "command.json" in noted, (values, direct, noted)


def test_the_length_of_a_run_follows_from_the_text():
    config = runs.training_config(RunConfig(epochs=2, training={"batch_size": 4}), 1000, 25)
    assert (config.max_steps, config.warmup_steps, config.eval_every) == (20, 2, 4)
    chosen = runs.training_config(RunConfig(training={"max_steps": 7, "warmup_steps": 5}), 1000, 25)
    assert (chosen.max_steps, chosen.warmup_steps) == (7, 5)


# --- prepare ------------------------------------------------------------------------------------------------------


def test_prepare_from_a_file_a_folder_and_prepared_tokens(tmp_path, text):
    data, tokenizer = prepare(text, tmp_path / "a", tokenizer="char")
    again, same = prepare(tmp_path / "a", tmp_path / "nothing")
    assert (again.train == data.train).all() and same.to_json() == tokenizer.to_json()
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(InputError, match="leave them out"):
        prepare(tmp_path / "a", tmp_path / "b", tokenizer="char")
    own, _ = prepare(text, tmp_path / "c", tokenizer=tokenizer)  # a tokenizer that is there already
    assert (own.train == data.train).all()


def test_a_text_folder_with_a_note_of_its_own_holds_texts(tmp_path, text):
    "A `meta.json` beside texts is somebody else's; it once made the folder count as prepared tokens."
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(text, folder / "cats.txt")
    for note in ('{"title": "Cats"}', "[]", "{"):
        (folder / "meta.json").write_text(note, encoding="utf-8")
        data, tokenizer = prepare(folder, tmp_path / "tokens", tokenizer="char")
        assert "the cat" in tokenizer.decode(data.train.tolist()) and not runs.holds_tokens(folder)
        assert (folder / "meta.json").read_text(encoding="utf-8") == note


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, text):
    shutil.copy(text, tmp_path / "cats.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        prepare("", tmp_path / "tokens")


@pytest.mark.parametrize("val_fraction", [0, 0.1])
def test_tokenizers_are_trained_without_the_whole_text_in_memory(monkeypatch, text, val_fraction):
    from transformer_llm import dataset
    from transformer_llm.tokenizer import BPETokenizer, CharTokenizer

    whole = dataset.read_text(text)
    seen = dataset.split_text(whole, val_fraction)[0] if val_fraction else whole
    monkeypatch.setattr(dataset, "read_text", lambda path: pytest.fail("the whole text was read"))
    assert runs.make_tokenizer("bpe", text, 300, val_fraction).to_json() == BPETokenizer.train(seen, 300).to_json()
    assert runs.make_tokenizer("char", text, None).to_json() == CharTokenizer.train(whole).to_json()


def test_an_empty_text_trains_no_tokenizer(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    for kind in ("bpe", "char"):
        with pytest.raises(InputError, match="is empty"):
            runs.make_tokenizer(kind, tmp_path / "empty.txt", None)


# --- start --------------------------------------------------------------------------------------------------------


def test_start_continue_and_load(tmp_path, text):
    start_run(tmp_path / "whole", settings(text, 6)).train()
    start_run(tmp_path / "run", settings(text, 6)).train()
    trainer = start_run(tmp_path / "run", settings(text, 6), overwrite=True)
    assert trainer.step == 0 and [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-0000000"]
    trainer.train()
    weights = [find_checkpoint(tmp_path / name) / "model.safetensors" for name in ("whole", "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    trainer = continue_run(tmp_path / "run", RunConfig(training={"max_steps": 8}))
    assert trainer.step == 6
    trainer.train()
    model, tokenizer = load_any(tmp_path / "run")
    assert model.config == trainer.model.config and tokenizer.vocab_size == model.config.vocab_size


def test_a_model_of_ones_own_is_trained_further(tmp_path):
    class Counting(Trainer):
        steps = 0

        def next_batch(self):
            type(self).steps += 1
            return super().next_batch()

    model = GPT(GPTConfig.preset("demo"))
    tokens = [n % 10 for n in range(400)]
    config = RunConfig(training={"max_steps": 2, "batch_size": 2, "device": "cpu"})
    trainer = start_run(tmp_path / "run", config, model=model, data=(tokens, None), trainer_class=Counting)
    trainer.train()
    assert trainer.model is model and Counting.steps == 2 and load_any(tmp_path / "run")[1] is None
    again = continue_run(tmp_path / "run", RunConfig(training={"max_steps": 3}), data=(tokens, None))
    assert again.step == 2


def test_nothing_is_touched_by_what_is_refused(run, tmp_path, text):
    before = snapshot(run)
    (tmp_path / "short.txt").write_text("to be", encoding="utf-8")
    refused = [
        (settings(text), {}, "already holds a run"),
        (settings(tmp_path / "nowhere.txt"), {"overwrite": True}, "nowhere.txt"),
        (settings(text).replace(tokenizer=str(tmp_path / "none.json")), {"overwrite": True}, "none.json"),
        (settings(text).replace(context_length=10**6), {"overwrite": True}, "context_length"),
        (settings(text, batch_size=10**9), {"overwrite": True}, "smaller --batch_size"),
    ]
    for config, options, says in refused:
        with pytest.raises(InputError, match=says):
            start_run(run, config, **options)
        assert {name: data for name, data in snapshot(run).items() if name in before} == before


def test_overwrite_deletes_only_what_the_run_wrote(run, text):
    "Files and folders whose names only look like a run's own survive, wherever they are."
    mine = {
        "step-by-step-notes.txt": "mine",
        "step-1/thesis.txt": "mine",
        "step-0000009/thesis.txt": "a folder named like a checkpoint",
        "step-0000003/notes.txt": "inside a checkpoint",
        "tokens/notes.txt": "beside the tokens",
        "tokens-2/thesis.txt": "a folder named like tokens",
        ".step-x.part": "mine",
        "tensorboard/notes.txt": "beside the curves",
    }
    events = run / "tensorboard" / "events.out.tfevents.1700000000.host"
    events.parent.mkdir()
    events.write_bytes(b"the old run's curves")
    for name, said in mine.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(said, encoding="utf-8")
    start_run(run, settings(text, 2), overwrite=True).train()
    assert not events.exists()
    left = snapshot(run)
    assert {name: left.get(name, b"gone").decode("utf-8") for name in mine} == mine
    assert not (run / "step-0000003" / "model.safetensors").exists() and (run / "step-0000002").is_dir()


def test_overwrite_deletes_nothing_where_there_is_no_run(tmp_path, text):
    folder = tmp_path / "mine"
    (folder / "step-1").mkdir(parents=True)
    (folder / "tokens").mkdir()
    for name in ("step-1/thesis.txt", "step-by-step-notes.txt", "tokens/words.txt"):
        (folder / name).write_text("mine", encoding="utf-8")
    before = snapshot(folder)
    start_run(folder, settings(text), overwrite=True)
    assert {name: snapshot(folder).get(name) for name in before} == before


@pytest.mark.parametrize("name", ["loss.png", "metrics.jsonl", "command.json"])
def test_a_file_that_a_new_run_would_replace_is_kept(tmp_path, text, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"{name} exists but is not from a run"):
            start_run(tmp_path, settings(text), overwrite=overwrite)
    assert snapshot(tmp_path) == {name: b"mine"}


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, text):
    start_run(tmp_path / "run", settings(text))
    shutil.rmtree(tmp_path / "run" / "step-0000000")
    (tmp_path / "run" / "metrics.jsonl").write_text("", encoding="utf-8")
    start_run(tmp_path / "run", settings(text)).train()


# --- continue -----------------------------------------------------------------------------------------------------


def test_a_damaged_note_of_what_was_asked_for(run):
    (run / "command.json").write_text('{"nonsense": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="command.json.*nonsense.*delete it to go on without it"):
        continue_run(run)


def test_a_run_whose_note_is_lost_goes_on(run, text):
    "The checkpoint has all that is needed; only where the text came from is known from the note alone."
    (run / "command.json").unlink()
    same = RunConfig(model_size="demo", tokenizer="char", training={"batch_size": 2, "max_steps": 5})
    trainer = continue_run(run, same)
    trainer.train()
    assert trainer.step == 5
    with pytest.raises(InputError, match="command.json is missing"):
        continue_run(run, RunConfig(text_file=text))


def test_equal_settings_are_accepted_and_others_named(run, text):
    "A setting that equals the run's is fine, typed at its start or not."
    same = {"seed": 0, "batch_size": 2, "schedule": "cosine", "learning_rate": TrainingConfig().learning_rate}
    asked = RunConfig(
        text_file=text,
        tokenizer="char",
        model_size="demo",
        context_length=32,
        dropout=0,
        val_fraction=0.1,
        training=same,
    )
    assert continue_run(run, asked).step == 3
    other = [
        {"seed": 1},
        {"batch_size": 4},
        {"model_size": "nano"},
        {"context_length": 16},
        {"dropout": 0.5},
        {"val_fraction": 0.2},
        {"tokenizer": "bpe"},
        {"vocab_size": 300},
        {"text_file": "other.txt"},
        {"schedule": "linear"},
    ]
    for change in other:
        name, value = next(iter(change.items()))
        with pytest.raises(InputError, match=f"leave out --{name} {value}"):
            continue_run(run, RunConfig.from_dict(change))


def test_a_run_that_moved_with_its_tokens_goes_on(tmp_path, text):
    "Tokens outside of the run's folder, all moved to another place."
    old = tmp_path / "old"
    prepare(text, old / "tokens" / "cats", tokenizer="char")
    start_run(old / "runs" / "cats", settings(old / "tokens" / "cats")).train()
    old.rename(tmp_path / "new")
    run = tmp_path / "new" / "runs" / "cats"
    assert continue_run(run, RunConfig(training={"max_steps": 5})).step == 3
    shutil.move(tmp_path / "new" / "tokens" / "cats", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="--text_file"):
        continue_run(run)
    assert continue_run(run, RunConfig(text_file=tmp_path / "elsewhere")).step == 3


# --- load ---------------------------------------------------------------------------------------------------------


def test_what_a_path_means(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    assert not runs.is_pretrained(finished) and not runs.is_pretrained(find_checkpoint(finished))
    assert runs.is_pretrained("smollm2") and runs.is_pretrained("nowhere.gguf") and runs.is_pretrained("owner/name")
    Path("runs").mkdir()
    assert not runs.is_pretrained("runs/typo") and not runs.is_pretrained("nowhere")
    for path in ("nowhere", "runs/typo", "~nobody-of-that-name/x", "a" * 300, "a\0b"):
        with pytest.raises(InputError):
            load_any(path)
    weights = [load_any(path)[0].state_dict() for path in (str(finished), finished / "step-0000003")]
    assert all((weights[0][name] == weight).all() for name, weight in weights[1].items())


def test_tokens_that_somebody_else_prepared_stay(tmp_path, text):
    "In a run's folder, under the name that the run would take, whether it was given them or not."
    run, mine = tmp_path / "run", tmp_path / "run" / "tokens"
    prepare(text, mine, tokenizer="char", val_fraction=0.5)
    before = snapshot(mine)
    start_run(run, settings(text))
    assert snapshot(mine) == before and runs.holds_tokens(run / "tokens-2")
    start_run(run, settings(mine), overwrite=True)
    assert [path.name for path in sorted(run.glob("tokens*"))] == ["tokens"]
    start_run(run, settings(text), overwrite=True)
    assert snapshot(mine) == before


def test_a_corrected_start_uses_the_same_folder_of_tokens(tmp_path, text):
    with pytest.raises(InputError, match="context_length"):
        start_run(tmp_path / "run", settings(text).replace(context_length=10**5))
    start_run(tmp_path / "run", settings(text))
    assert [path.name for path in (tmp_path / "run").glob("tokens*")] == ["tokens"]


def test_a_run_takes_the_fastest_training_that_it_can_have(monkeypatch):
    from transformer_llm import runs

    chosen = lambda **fields: runs.fastest_training(RunConfig(**fields))
    monkeypatch.setattr(runs, "native_bfloat16", lambda device: True)
    small = chosen(model_size="nano")
    assert small.fast and not small.training  # too small for bfloat16 to pay
    assert chosen(model_size="tiny").training == {"dtype": "bfloat16"}
    assert chosen(model_size="tiny", training={"dtype": "float32"}).training == {"dtype": "float32"}
    for kept in (dict(fast=False), dict(dropout=0.1), dict(training={"compile": True})):
        assert chosen(model_size="tiny", **kept) == RunConfig(model_size="tiny", **kept)
    monkeypatch.setattr(runs, "native_bfloat16", lambda device: False)
    assert not chosen(model_size="tiny").training
