"""What starting up costs, told by the modules that get imported: no clock, so no noise."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "transformer_llm").glob("*.py") if not path.stem.startswith("_"))
LIGHT = {"foundations", "widgets", "tokenizer", "tokenizer_files", "cli"}  # which need no torch
# what the modules import besides torch: some hundredths of a second, where torch takes more than one
EXTRAS = {"jaxtyping", "wadler_lindig", "regex", "jinja2", "markupsafe"}

BEGIN = """
import json, sys
before = set(sys.modules)
def foreign():
    "Packages imported since that are neither Python's own nor ours."
    packages = lambda names: {name.partition(".")[0] for name in names}
    return sorted(packages(sys.modules) - packages(before) - sys.stdlib_module_names - {"transformer_llm"})
"""


def fresh(code: str):
    "What a new Python process says, in JSON."
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_alone_loads_nothing():
    code = """
import transformer_llm
roots = {name.partition(".")[0].strip("_") for name in set(sys.modules) - before}
print(json.dumps([foreign(), sorted(roots)]))
"""
    assert fresh(code) == [[], ["transformer_llm"]]


def test_no_command_imports_anything_heavy_for_its_help():
    code = """
import argparse, contextlib, io
from transformer_llm import cli
def commands(parser, path=()):
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, (*path, name))
found = {}
for command in commands(cli.make_parser()):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    assert said.getvalue().startswith("usage: " + " ".join(["transformer-llm", *command])), command
    found[" ".join(command)] = foreign()
print(json.dumps(found))
"""
    found = fresh(code)
    assert len(found) > 5 and {"", "train", "generate"} <= set(found) and not any(found.values()), found


def test_light_modules_stay_light():
    found = fresh(
        f"from importlib import import_module\nfor name in {sorted(LIGHT)}: "
        "import_module('transformer_llm.' + name)\nprint(json.dumps(foreign()))"
    )
    assert set(found) <= {"regex"}, found


def test_modules_import_little_besides_torch():
    """No module imports what draws, fetches or reads other people's files until that is needed.

    The peers of the benchmark least of all.
    """
    code = f"""
from importlib import import_module
import torch
before, found = set(sys.modules), {{}}
lazy = {{"torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard"}}
for name in {MODULES}:
    import_module("transformer_llm." + name)
    found[name] = foreign() + sorted(lazy & (set(sys.modules) - before))
print(json.dumps(found))
"""
    found = fresh(code)
    assert (
        len(found) == len(MODULES) > 15
        and not {package for packages in found.values() for package in packages} - EXTRAS
    ), found


def test_a_public_name_loads_only_what_it_needs():
    code = """
from transformer_llm import GPT
print(json.dumps(sorted(name for name in sys.modules if name.startswith("transformer_llm."))))
"""
    assert fresh(code) == [
        f"transformer_llm.{name}" for name in ("attention", "embeddings", "feedforward", "foundations", "transformer")
    ]
    code = "from transformer_llm import BPETokenizer, InputError\nprint(json.dumps(foreign()))"
    assert fresh(code) == ["regex"]
