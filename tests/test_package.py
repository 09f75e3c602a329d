"""What others get: the sdist, the wheel, an editable install, types for editors, and the conventional files."""
import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from check import ROOT

import transformer_llm


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "What the build reads, in a folder of its own: building leaves files beside the sources."
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "transformer_llm", folder / "transformer_llm", ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in {".py", ".ini", ".md", ".in", ".txt", ".cff", ""} and path.name[0] != ".":
            shutil.copy(path, folder)
    return folder


def build(kind: str, folder: Path, output: Path) -> Path:
    "One of setuptools' builds, as pip asks for it, without a network."
    output.mkdir(parents=True, exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(output)], cwd=folder, check=True, capture_output=True)
    return next(path for path in output.iterdir() if path.suffix in (".whl", ".gz"))


@pytest.fixture(scope="module")
def sdist(project, tmp_path_factory):
    return build("sdist", project, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return next(folder.iterdir())


def test_the_sdist_holds_what_its_build_needs(unpacked):
    for name in ("settings.ini", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
                 "constraints.txt", "transformer_llm/py.typed", "transformer_llm/exercises/attention.py"):
        assert (unpacked / name).is_file(), name


def test_a_wheel_is_built_from_the_sdist_alone(unpacked, tmp_path):
    wheel = build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "transformer_llm").rglob("*.py")}
        assert modules <= set(names) and "transformer_llm/py.typed" in names
        scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "transformer_llm").rglob("*.js")}
        assert scripts and scripts <= set(names)
        licence = next(name for name in names if re.search(r"dist-info/(licenses/)?LICENSE$", name))
        assert file.read(licence).decode() == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.M)
    assert "example.org" not in metadata and "UNKNOWN" not in metadata


def test_an_editable_install_is_a_path_that_type_checkers_follow(project, tmp_path):
    with zipfile.ZipFile(build("editable", project, tmp_path)) as file:
        links = [name for name in file.namelist() if name.endswith(".pth")]
        assert [Path(file.read(name).decode().strip()) for name in links] == [project.resolve()]


def test_what_type_checkers_see_is_what_the_package_gives():
    tree = ast.parse((ROOT / "transformer_llm" / "__init__.py").read_text(encoding="utf-8"))
    switch = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(switch.test) == "TYPE_CHECKING"
    seen = {name.asname: node.module for node in switch.body for name in node.names if name.asname == name.name}
    assert seen == transformer_llm._HOME
    for name in transformer_llm.__all__:
        assert getattr(transformer_llm, name).__module__.startswith("transformer_llm"), name


def test_a_misspelt_name_and_a_misspelt_setting_are_reported_in_the_editor(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import transformer_llm\n"
        "from transformer_llm import GPT, GPTConfig\n"
        "transformer_llm.Nonsense\n"
        "GPTConfig(d_mdoel=3)\n"
        "model: GPT = GPT(GPTConfig(vocab_size=10))\n",
        encoding="utf-8",
    )
    settings = {"include": ["mine.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {one["range"]["start"]["line"]: one["message"] for one in found if one["severity"] == "error"}
    assert errors.keys() == {2, 3} and "Nonsense" in errors[2] and "d_mdoel" in errors[3], errors


def test_the_conventional_files_say_what_the_settings_say():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    version = re.search(r"^version = (.*)$", settings, re.M).group(1)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version == transformer_llm.__version__ and citation["license"] == "Apache-2.0"
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", guide):
        assert re.search(rf"^{target}:", made, re.M), f"there is no make {target}"
    for path in re.findall(r"`((?:tools|tests|book|nbs)/[\w./]+)`", guide):
        assert (ROOT / path).exists(), path


def test_the_readme_links_the_conventional_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        assert f"]({name})" in readme, name
