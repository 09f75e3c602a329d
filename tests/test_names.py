"""One word for one thing: the parameters of the package's public functions, by the names that the book explains."""
import ast
from pathlib import Path

import pytest
from check import ROOT

PACKAGE = ROOT / "transformer_llm"

# a word that isn't used -> the word that is
PARAMETERS = {
    **dict.fromkeys(["folder", "dir", "dirname", "out", "out_dir", "output_dir", "save_dir"], "directory"),
    **dict.fromkeys(["run_dir", "run_folder", "output_directory"], "run_directory"),
    **dict.fromkeys(["filename", "file_name", "file_path", "filepath"], "path"),
    **dict.fromkeys(["is_token", "is_real", "token_mask", "padding_mask", "pad_mask"], "attention_mask"),
    **dict.fromkeys(["machine_memory", "memory"], "memory_bytes"),
    **dict.fromkeys(["block_size", "seq_len", "sequence_length", "window_size", "max_len"], "context_length"),
    **dict.fromkeys(["n_embd", "hidden_size", "dim_model", "model_dim"], "d_model"),
    **dict.fromkeys(["n_layer", "num_layers", "depth"], "n_layers"),
    **dict.fromkeys(["n_head", "num_heads"], "n_heads"),
    **dict.fromkeys(["num_kv_heads", "n_kv_head", "kv_heads"], "n_kv_heads"),
    **dict.fromkeys(["head_size", "d_head"], "head_dim"),
    **dict.fromkeys(["hidden_dim", "ffn_dim", "d_hidden"], "d_ff"),
    **dict.fromkeys(["n_vocab", "vocabulary_size"], "vocab_size"),
    **dict.fromkeys(["max_tokens", "n_new_tokens", "num_tokens"], "max_new_tokens"),
    **dict.fromkeys(["rng", "gen"], "generator"),
}
FUNCTIONS = {"learning_rate": "schedule_factor", "machine_memory": "memory_bytes"}


def public_functions(tree: ast.Module):
    "The functions of a module and the methods of its classes whose names don't begin with `_`; constructors count."
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((f"{node.name}.{name}", function) for name, function in public_functions(node))
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield node.name, node


def is_tensor(argument: ast.arg) -> bool:
    "Whether it is a tensor or an array to write into, which PyTorch's and NumPy's functions call `out`."
    written = "" if argument.annotation is None else ast.unparse(argument.annotation)
    return any(kind in written for kind in ("Float[", "Int[", "np.ndarray"))


def other_words(source: str) -> list[str]:
    "Each name in a module's public signatures for which the package has another word."
    found = []
    for name, function in public_functions(ast.parse(source)):
        if name in FUNCTIONS:
            found.append(f"{name}() is {FUNCTIONS[name]}() in this package")
        given = function.args
        for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
            word = PARAMETERS.get(argument.arg)
            if word and not (argument.arg == "out" and is_tensor(argument)):
                found.append(f"{name}({argument.arg}) is {word} in this package")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_word_for_one_thing(path: Path):
    assert other_words(path.read_text(encoding="utf-8")) == []


def test_the_table_bans_no_word_that_it_recommends():
    assert not set(PARAMETERS) & set(PARAMETERS.values()) and not set(FUNCTIONS) & set(FUNCTIONS.values())


@pytest.mark.parametrize("source, word", [
    ("def save(model, folder): ...", "save(folder) is directory"),
    ("def save(model, *, out: 'str | Path' = 'demo'): ...", "save(out) is directory"),
    ("class Model:\n    def __init__(self, n_head): ...", "Model.__init__(n_head) is n_heads"),
    ("class Model:\n    def forward(self, ids, /, is_token=None): ...", "Model.forward(is_token) is attention_mask"),
    ("def learning_rate(step): ...", "learning_rate() is schedule_factor()"),
])  # fmt: skip
def test_another_word_is_found(source, word):
    assert [f"{word} in this package"] == other_words(source)


@pytest.mark.parametrize("source", [
    "def save(model, directory, path): ...",
    "def into(x, out: Float[Tensor, 'batch rows']): ...",  # a tensor to write into
    "def _save(folder): ...",
    "def save():\n    def inner(folder): ...",
])  # fmt: skip
def test_other_names_are_left_alone(source):
    assert other_words(source) == []
