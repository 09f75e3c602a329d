"""The book agrees with itself: one test for each check of tools/check.py, and each check fails where it should.

The checks are shown to fail on a small book of two chapters, an appendix and a sub-package, spoilt in one place a test.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import contents
import notebook as notebook_tool
import pytest
import reading
import run
from check import CHECKS, ROOT, bare_tensors, code_cells, load, stale


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_book(check):
    problems = check()
    assert not problems, "\n" + "\n".join(problems)


# A small book
# -------------------------------------------------------------------------------------------------------------

SETTINGS = """[DEFAULT]
repo = transformer_llm
lib_name = transformer_llm
lib_path = transformer_llm
nbs_path = nbs
doc_path = _docs
doc_host = https://example.org
doc_baseurl = /
git_url = https://example.org
user = u
branch = main
title = Small
recursive = True
black_formatting = False
jupyter_hooks = False
clean_ids = True
cell_number = True
put_version_in_init = False
update_pyproject = False
readme_nb = none.ipynb
allowed_metadata_keys = executed
version = 0.0.1
author = a
copyright = c
license = apache2
status = 3
min_python = 3.11
language = English
custom_sidebar = True
"""
ADDING = '''def added(a: int, b: int) -> int:
    "The sum of two numbers."
    return a + b
'''
SMALL = {
    "01_adding.ipynb": ["#| default_exp adding", "#| export\n" + ADDING, "added(1, 2)"],
    "02_doubling.ipynb": [
        "#| default_exp doubling",
        "#| export\nfrom transformer_llm.adding import added",
        '#| export\ndef doubled(a: int) -> int:\n    "Twice a number."\n    return added(a, a)',
    ],
    "90_plumbing.ipynb": ["#| default_exp plumbing", '#| export\ndef nothing() -> None:\n    "Do nothing."'],
    "95_tool.ipynb": ["#| default_exp exercises.__init__", '#| export\ndef judge() -> None:\n    "Judge nothing."'],
    "exercises/01_adding.ipynb": [
        "#| default_exp exercises.adding",
        "#| export\nfrom transformer_llm.exercises import judge",
        '#| export\ndef check_1() -> None:\n    "Judge the first exercise."\n    judge()',
    ],
}


def notebook(title: str, cells: list[str]) -> dict:
    "A notebook as nbdev keeps it, executed so far as a fingerprint can tell."
    made = [{"cell_type": "markdown", "id": "00000000", "metadata": {}, "source": [f"# {title}\n", "> One line."]}]
    for number, text in enumerate(cells, 1):
        made.append({"cell_type": "code", "execution_count": None, "id": f"{number:08x}", "metadata": {},
                     "outputs": [], "source": text.splitlines(True)})
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    book = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    book["metadata"]["executed"] = {"seconds": 1, **check.fingerprints(book)}
    return book


def write(root: Path, name: str, cells: list[str]) -> None:
    path = root / "nbs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    made = notebook(path.stem, cells)
    if contents.is_chapter(name):
        halves = ("A lesson.\n\n## Recap\n\nIt adds.", "## The library\n\nThe same, for any number.")
        made["cells"][1:1] = [{"cell_type": "markdown", "id": f"{number:08x}", "metadata": {}, "source": [text]}
                              for number, text in enumerate(halves, 100)]
    path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if contents.is_chapter(name):
        reading.write(path)


def export(root: Path) -> None:
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=root, check=True, capture_output=True)


def list_pages(root: Path, names: list[str]) -> None:
    rows = "\n".join(f"      - {name}" for name in names)
    (root / "_quarto.yml").write_text(f"website:\n  sidebar:\n    contents:\n{rows}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "book"
    package = root / "transformer_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('_HOME = {"added": "adding"}\n', encoding="utf-8")
    (root / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    (root / "README.md").write_text("[chapter](nbs/01_adding.ipynb)\n", encoding="utf-8")
    shutil.copy(ROOT / "ruff.toml", root)
    list_pages(root, list(SMALL))
    for name, cells in SMALL.items():
        write(root, name, cells)
    export(root)
    return root


@pytest.fixture
def small(original, tmp_path):
    shutil.copytree(original, tmp_path / "book")
    return tmp_path / "book"


def module(root: Path, name: str) -> Path:
    return root / "transformer_llm" / f"{name}.py"


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def only(problems: list[str], *words: str) -> None:
    "One problem is found, and its sentence holds these words."
    assert len(problems) == 1 and all(word in problems[0] for word in words), problems


def test_the_small_book_is_sound(small):
    for one in CHECKS:
        if one is not check.readme_is_derived:
            assert one(small) == [], one.__name__


@pytest.mark.parametrize("path", ["adding", "exercises/adding"])
def test_a_module_that_drifted_is_noticed(small, path):
    append(module(small, path), "# changed by hand\n")
    only(check.in_sync(small), f"{path}.py is not what nbdev_export")


def test_a_notebook_that_was_not_cleaned_is_noticed(small):
    path = small / "nbs" / "01_adding.ipynb"
    book = load(path)
    book["cells"][-1]["execution_count"] = 7
    path.write_text(json.dumps(book, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    only(check.in_sync(small), "01_adding.ipynb is not what")


def test_a_cell_that_was_not_executed_is_noticed(small):
    path = small / "nbs" / "02_doubling.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("added(a, a)", "added(a, a) + 0"), encoding="utf-8")
    only(check.executed(small), "02_doubling.ipynb", "changed since: code")


def test_stale_notebooks_are_noticed():
    path = ROOT / "nbs" / contents.chapters()[1]
    fresh = load(path)
    fresh["metadata"]["executed"] = {"seconds": 1, **check.fingerprints(fresh)}
    assert stale(fresh) == ""
    changed, cleared, unmarked = (json.loads(json.dumps(fresh)) for _ in range(3))
    code_cells(changed)[-1]["source"] += ["\n1 + 1"]
    for cell in code_cells(cleared):
        cell["outputs"] = []
    del unmarked["metadata"]["executed"]
    assert [stale(notebook) for notebook in (changed, cleared, unmarked)] == ["code", "outputs", "code and outputs"]


def test_a_caption_is_no_code():
    before, caption, other, code = (
        notebook("A page", [f'#| {directive}: "A line."\nadded(1, {number})'])
        for directive, number in (("fig-cap", 2), ("fig-alt", 2), ("code-summary", 2), ("fig-cap", 3))
    )
    caption["cells"][-1]["source"][0] = '#| fig-cap: "Another line."\n'
    for changed, expected in ((before, ""), (caption, ""), (other, "code"), (code, "code")):
        changed["metadata"]["executed"] = before["metadata"]["executed"]
        assert stale(changed) == expected


@pytest.mark.parametrize("line", ["from .doubling import doubled", "from transformer_llm.doubling import doubled",
                                  "import transformer_llm.doubling", "from . import doubling"])
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a function"])
def test_a_circle_of_imports_is_noticed(small, line, inside):
    append(module(small, "adding"), f"\ndef f():\n    {line}\n" if inside else f"\n{line}\n")
    only(check.imports_make_no_cycle(small), "circle", "adding", "doubling")


def test_a_circle_through_the_names_of_the_package_is_noticed(small):
    append(module(small, "plumbing"), "\nfrom transformer_llm import added\n")
    assert check.imports_make_no_cycle(small) == []
    append(module(small, "adding"), "\nfrom .plumbing import nothing\n")
    only(check.imports_make_no_cycle(small), "circle", "plumbing")


def test_a_door_is_open_inside_of_a_function_only(small, monkeypatch):
    monkeypatch.setattr(check, "DOORS", {("adding", "doubling")})
    text = module(small, "adding").read_text(encoding="utf-8")
    append(module(small, "adding"), "\ndef f():\n    from .doubling import doubled\n")
    assert check.imports_make_no_cycle(small) == []
    module(small, "adding").write_text(text + "\nfrom .doubling import doubled\n", encoding="utf-8")
    only(check.imports_make_no_cycle(small), "circle")


def test_a_chapter_that_needs_a_tool_is_noticed(small):
    append(module(small, "adding"), "\nfrom .exercises import judge\n")
    only(check.imports_make_no_cycle(small), "adding line", "exercises, a tool")


def test_modules_in_folders_are_checked_too(small):
    append(module(small, "exercises/adding"), "\nfrom ..doubling import doubled\nfrom ..gone import x\n")
    only(check.imports_make_no_cycle(small), "exercises.adding line", "gone, which is not there")
    append(module(small, "doubling"), "\ndef f():\n    from .exercises.adding import judge\n")
    assert any("doubling line" in problem and "a tool" in problem for problem in check.imports_make_no_cycle(small))
    module(small, "exercises/loose").write_text("x = 1\n", encoding="utf-8")
    only(check.modules_come_from_notebooks(small), "transformer_llm.exercises.loose comes from no notebook")


def test_a_chapter_that_uses_a_later_one_is_noticed(small):
    write(small, "01_adding.ipynb", [*SMALL["01_adding.ipynb"], "from transformer_llm.doubling import doubled"])
    only(check.lessons_use_earlier_chapters(small), "01_adding.ipynb", "doubling of chapter 02")


def test_two_notebooks_of_one_module_are_noticed(small):
    write(small, "03_again.ipynb", ["#| default_exp adding", "#| export\nx = 1"])
    only(check.modules_come_from_notebooks(small), "01_adding.ipynb and 03_again.ipynb both export the module adding")


def test_a_module_without_a_notebook_is_noticed(small):
    module(small, "loose").write_text(module(small, "adding").read_text(encoding="utf-8"), encoding="utf-8")
    only(check.modules_come_from_notebooks(small), "transformer_llm.loose comes from no notebook")


def test_a_module_that_was_never_exported_is_noticed(small):
    write(small, "03_new.ipynb", ["#| default_exp new", "#| export\nx = 1"])
    only(check.modules_come_from_notebooks(small), "03_new.ipynb exports the module new, which is not there")


@pytest.mark.parametrize("names, words", [
    ([*SMALL][1:], ["01_adding.ipynb is not in _quarto.yml"]),
    ([*SMALL, "03_gone.ipynb"], ["_quarto.yml lists 03_gone.ipynb, which is not there"]),
    ([*SMALL, "01_adding.ipynb"], ["lists 01_adding.ipynb 2 times"]),
    ([*SMALL][::-1], ["order of their numbers"]),
], ids=["forgotten", "gone", "twice", "order"])
def test_a_table_of_contents_that_is_wrong_is_noticed(small, names, words):
    list_pages(small, names)
    problems = check.contents_are_complete(small)
    assert any(words[0] in problem for problem in problems), problems


@pytest.mark.parametrize("name, words", [("45_between.ipynb", "chapters have the numbers 00 to 39"),
                                         ("02_second.ipynb", "two notebooks have the number 02"),
                                         ("exercises/33_none.ipynb", "belongs to no chapter")])
def test_a_number_that_leads_nowhere_is_noticed(small, name, words):
    write(small, name, ["1 + 1"])
    list_pages(small, sorted([*SMALL, name]))
    problems = check.contents_are_complete(small)
    assert any(words in problem for problem in problems), problems


def test_a_new_chapter_is_added_in_one_place(small):
    "A notebook and a line of `_quarto.yml`: no list in a tool has to be told."
    write(small, "07_new.ipynb", ["#| default_exp new", "#| export\nfrom transformer_llm.adding import added",
                                "#| export\nthree = added(1, 2)"])
    list_pages(small, sorted([*SMALL, "07_new.ipynb"]))
    export(small)
    for one in CHECKS:
        if one is not check.readme_is_derived:
            assert one(small) == [], one.__name__
    assert contents.chapters(small) == ["01_adding.ipynb", "02_doubling.ipynb", "07_new.ipynb"]


def test_no_tool_and_no_test_keeps_a_list_of_chapters():
    "What is told of single chapters by number has a reason of its own; a pattern of numbers has none."
    problems = []
    for path in [*ROOT.glob("tools/*.py"), *ROOT.glob("book/*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text(encoding="utf-8")
        problems += [f"{path.name}: {found}" for found in re.findall(r"\[01\]\\d|\[89\]\\d|\[01\]\[0-9\]", text)
                     if path != Path(__file__)]
    for path in check.notebooks():
        for cell in code_cells(load(path)):
            if found := re.search(r"\[01\]\\d|\[01\]\[0-9\]", check.source(cell)):
                problems.append(f"{path.name}: {found.group()}")
    assert not problems, problems


def test_a_lesson_that_is_too_long_is_noticed(small):
    "Minutes are counted, from prose and code, up to the library half; an exported cell has its limit too."
    path = small / "nbs" / "01_adding.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    intro = "".join(book["cells"][1]["source"])
    book["cells"][1]["source"] = [intro + " word" * 8100]
    path.write_text(json.dumps(book), encoding="utf-8")
    assert any("the lesson takes 40." in problem for problem in check.lessons_are_short(small))
    book["cells"][1]["source"], book["cells"][2]["source"] = [intro], ["## The library\n\n" + "word " * 8100]
    path.write_text(json.dumps(book), encoding="utf-8")
    only(check.lessons_are_short(small), "does not say its reading time")
    reading.write(path)
    assert check.lessons_are_short(small) == []
    written = path.read_text(encoding="utf-8")
    assert "## The library\\n\",\n    \"\\n\",\n    \"*41 minutes.*" in written  # 8100 words / 200
    reading.write(path)
    assert path.read_text(encoding="utf-8") == written  # its own words don't count
    path.write_text(written.replace("*41 minutes.*", "*4 minutes.*"), encoding="utf-8")
    only(check.lessons_are_short(small), "does not say its reading time")
    book = json.loads(written)
    book["cells"][-1]["source"] = ["#| export\n" + "x = 1\n" * 61]
    path.write_text(json.dumps(book), encoding="utf-8")
    assert any("61 lines" in problem for problem in check.lessons_are_short(small))
    book["cells"][2]["source"] = ["The end."]
    path.write_text(json.dumps(book), encoding="utf-8")
    only(check.lessons_are_short(small), "has no heading")


def test_a_long_line_in_a_lesson_is_noticed(small):
    "Shown code before the library half has lines of at most 100 characters; hidden and folded code may be longer."
    path = small / "nbs" / "01_adding.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    lesson = {"cell_type": "code", "id": "00000200", "metadata": {}, "outputs": [], "execution_count": None}
    book["cells"].insert(2, lesson)  # after the lesson's prose, before the library
    long = "a" * 97 + " = 1"
    for source, noticed in (
        (long, True), ("#| export\n" + long, True), (long[1:], False), ("# Folded\n#| code-fold: true\n" + long, False),
        ("#| hide\n" + long, False), (f"#| fig-cap: {long}", False),
    ):
        lesson["source"] = source.splitlines(True)
        found = [line for line in reading.problems(path.name, book) if "a line of 101 characters" in line]
        assert len(found) == noticed, (source, found)
    lesson["source"] = [long]
    path.write_text(json.dumps(book), encoding="utf-8")
    only(check.lessons_are_short(small), "01_adding.ipynb cell 2: a line of 101 characters (of 100 in a lesson)")
    book["cells"].append(book["cells"].pop(2))  # now it is after the library's heading
    assert reading.problems(path.name, book) == []


def test_a_public_name_without_a_docstring_is_noticed(small):
    append(module(small, "exercises/adding"), "\ndef lonely():\n    return 1\n\n\ndef _own():\n    return 2\n")
    only(check.public_names_are_documented(small), "exercises.adding.lonely has no docstring")


def test_a_field_that_help_does_not_show_is_noticed(small):
    append(module(small, "adding"), '''
@dataclass(frozen=True)
class ToyConfig:
    """A configuration.

    width: how wide.
    """

    width: int = 1
    height: int = 2
''')
    only(check.fields_are_documented(small), "adding.ToyConfig", "height")


def test_a_long_line_is_noticed(small):
    long = "x = " + " + ".join(["100000"] * 20)
    write(small, "01_adding.ipynb", [*SMALL["01_adding.ipynb"], long, '#| fig-alt: "' + "long " * 40 + '"\n1 + 1'])
    only(check.cells_are_well_formed(small), "01_adding.ipynb", f"a line of {len(long)} characters")
    append(module(small, "adding"), f"\n{long}\n")
    only(check.linted(small), "adding.py", "E501")


def test_a_line_that_the_site_would_drop_is_noticed(small):
    write(small, "01_adding.ipynb", [*SMALL["01_adding.ipynb"], "x = (\n    7\n    % 2\n)"])
    only(check.cells_are_well_formed(small), "01_adding.ipynb", "begins with %")


def test_an_unused_import_is_noticed(small):
    append(module(small, "adding"), "\nimport json\n")
    only(check.linted(small), "adding.py", "F401")


def test_a_link_that_leads_nowhere_is_noticed(small):
    (small / "README.md").write_text("[a](nbs/01_adding.ipynb) [b](LICENSE) [c](https://example.org)", encoding="utf-8")
    only(check.links_lead_somewhere(small), "README.md links to LICENSE")


def test_what_the_tests_leave_behind_is_noticed(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "old.txt").write_text("1", encoding="utf-8")
    before = run.files_in_git(tmp_path)
    assert run.left_behind(before, tmp_path) == []
    (tmp_path / "nbs" / "data").mkdir(parents=True)
    (tmp_path / "nbs" / "data" / "shakespeare.txt").write_text("1", encoding="utf-8")
    assert run.left_behind(before, tmp_path) == ["?? nbs/data/shakespeare.txt"]


@pytest.mark.parametrize("name", ["01", "01_adding", "nbs/01_adding.ipynb", "exercises/01"])
def test_a_notebook_is_found_by_its_number_name_or_path(small, name):
    assert notebook_tool.find(name, small).name == "01_adding.ipynb"


@pytest.mark.parametrize("name", ["44", "adding", "9"])
def test_a_notebook_that_is_not_there_is_refused(small, name):
    with pytest.raises(SystemExit, match="no notebooks; there are 01_adding"):
        notebook_tool.find(name, small)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_a_page_leaves_gradients_as_it_found_them(path):
    "`nbdev_test` runs the next page in the same process, which then could not train."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    switches = re.findall(r"^torch\.set_grad_enabled\((True|False)\)", code, re.M)
    assert switches[-1:] in ([], ["True"]), switches


def test_the_checks_say_what_they_do_not_cover(monkeypatch, capsys):
    monkeypatch.setattr(check, "CHECKS", [])
    assert check.main() == 0
    assert "Not covered here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "annotation, bare",
    [
        ("Tensor", True),
        ("Tensor | None", True),
        ("tuple[Tensor, int]", True),
        ('Float[Tensor, "batch seq"] | Tensor', True),
        ('Float[Tensor, "batch seq"]', False),
        ('Int[Tensor, "batch"] | None', False),
        ("dict[str, Tensor]", False),
        ("int", False),
    ],
)
def test_tensors_without_a_shape_are_noticed(annotation, bare):
    assert bare_tensors(ast.parse(annotation, mode="eval").body) == bare


# What `make test` says of notebooks
# -------------------------------------------------------------------------------------------------------------

def as_nbdev_test(monkeypatch, tmp_path: Path, script: str):
    "Let `run.run_notebooks` start this script instead of nbdev_test."
    program = tmp_path / "nbdev_test"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr(run, "TOOLS", tmp_path)
    monkeypatch.setattr(run, "notebooks", lambda: [ROOT / "nbs" / name for name in ("a.ipynb", "b.ipynb")])


@pytest.mark.skipif(os.name == "nt", reason="a script with its interpreter in its first line")
def test_a_notebook_that_runs_for_ever_is_ended_and_named(monkeypatch, tmp_path, capsys):
    script = "import subprocess, time\nprint('Starting nbs/a.ipynb\\n- Completed nbs/a.ipynb')\n"
    script += "subprocess.Popen(['sleep', '600'])\nprint('Starting nbs/b.ipynb')\ntime.sleep(600)\n"
    as_nbdev_test(monkeypatch, tmp_path, script)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert run.run_notebooks(dict(os.environ), minutes=0.02) == (1, ["nbs/b.ipynb"], False)
    assert "not at its end" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="a script with its interpreter in its first line")
def test_the_longest_files_exist_and_the_seconds_are_added_up():
    assert all((ROOT / "tests" / name).exists() for name in run.LONGEST)
    cases = [("tests.test_a", "1.5"), ("tests.test_b", "2.0"), ("tests.test_a", "1.0")]
    suite = run.ElementTree.Element("testsuite")
    for name, seconds in cases:
        run.ElementTree.SubElement(suite, "testcase", classname=name, time=seconds)
    assert run.seconds_by_file(suite) == [("test_a", 2.5), ("test_b", 2.0)]


def test_failing_notebooks_are_named(monkeypatch, tmp_path):
    script = "print('Starting nbs/a.ipynbStarting nbs/b.ipynb\\n')\n"
    script += "print('- Completed nbs/b.ipynb\\n- Completed nbs/a.ipynb')\n"
    as_nbdev_test(monkeypatch, tmp_path, script)
    assert run.run_notebooks(dict(os.environ)) == (2, [], True)
    script += "print('nbdev Tests Failed On The Following Notebooks:\\n=====\\n\\tb.ipynb')\nraise SystemExit(1)\n"
    as_nbdev_test(monkeypatch, tmp_path, script)
    assert run.run_notebooks(dict(os.environ)) == (1, ["b.ipynb"], False)
