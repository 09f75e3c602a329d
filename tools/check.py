"""Does the book agree with itself? Each check below is one test of `make test`; none of them changes a file.

    python tools/check.py                    # print what is wrong, if anything
    python tools/check.py linted executed    # only these checks
"""
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import contents
import readme
import reading
from colab import START
from execute import FRAMES, ROOT, closed, fingerprints, notebooks

PACKAGE = "transformer_llm"
# What readers and authors run; a chapter or a module that chapters use must work without them.
TOOLS = {"cli", "__main__", "benchmark", "peers", "exercises", "widgets", "classroom"}
# A method or function that only hands over to a later module, which it imports when it is called.
DOORS = {("transformer", "pretrained"), ("transformer", "export"), ("tokenizer", "tokenizer_files")}
BY_HAND = {"__init__.py"}
LONGEST_LINE = 120
NOT_COVERED = """Not covered here: whether the cells run (nbdev_test), what the prose says about their numbers, whether
addresses outside of the book answer, how pages look and work in a browser, and the tests in tests/. `make test` runs
the cells and the tests, `make test-browser` the browsers; prose and addresses are for people to read."""
MADE_BY_THE_BUILD = {"api.ipynb"}  # pages that book/build.py adds; they have no notebook


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and source(c).strip()]


def parse(code: str) -> ast.Module:
    "A cell's code as a tree; lines of magic count as nothing."
    return ast.parse(re.sub(r"^[%!].*$", "pass", code, flags=re.M))


def name_of(path: Path, root: Path) -> str:
    "A notebook as `_quarto.yml` calls it: 01_attention.ipynb, exercises/01_attention.ipynb."
    return path.relative_to(root / "nbs").as_posix()


def modules(root: Path) -> dict[str, Path]:
    "Every module of the package by its name below it: attention, exercises, exercises.attention."
    package = root / PACKAGE
    found = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.as_posix() not in {*BY_HAND, "_modidx.py"}:
            found[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def exported_modules(root: Path) -> dict[str, list[str]]:
    "Each module that some notebook exports, and the notebooks that do: one, if all is well."
    found = defaultdict(list)
    for path in notebooks(root):
        for cell in code_cells(load(path)):
            for name in re.findall(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M):
                found[name.removesuffix(".__init__")].append(name_of(path, root))
    return dict(found)


def in_sync(root: Path = ROOT) -> list[str]:
    "nbdev_export and nbdev_clean change nothing (tried in a copy)."
    tools = Path(sys.executable).parent
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "book"
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "runs")
        for name in ("nbs", PACKAGE):
            shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignore)
        for name in ("settings.ini", "setup.py", "_quarto.yml"):
            if (root / name).exists():
                shutil.copy(root / name, copy / name)
        for command in ("nbdev_export", "nbdev_clean"):
            done = subprocess.run([str(tools / command)], cwd=copy, capture_output=True, text=True)
            if done.returncode:
                return [f"{command} fails: {done.stderr.strip().splitlines()[-1]}"]
        for kind in ("nbs/**/*.ipynb", f"{PACKAGE}/**/*.py"):
            names = {
                p.relative_to(base)
                for base in (root, copy)
                for p in base.glob(kind)
                if ".ipynb_checkpoints" not in p.parts
            }
            for name in sorted(names):
                ours, fresh = root / name, copy / name
                if not fresh.exists() or not ours.exists():
                    problems.append(f"{name.as_posix()} is missing on one side; run nbdev_export")
                elif ours.read_text(encoding="utf-8") != fresh.read_text(encoding="utf-8"):
                    problems.append(f"{name.as_posix()} is not what nbdev_export and nbdev_clean make; run both")
    return problems


def contents_are_complete(root: Path = ROOT) -> list[str]:
    "`_quarto.yml` lists every notebook once and nothing else; chapters are 00 to 39, appendices 70 to 99, in order."
    listed = contents.pages(root)
    there = [name_of(path, root) for path in notebooks(root)]
    problems = [f"_quarto.yml lists {name} {times} times" for name, times in Counter(listed).items() if times > 1]
    problems += [f"_quarto.yml lists {name}, which is not there" for name in listed
                 if name not in there and name not in MADE_BY_THE_BUILD]
    problems += [f"{name} is not in _quarto.yml, the table of contents" for name in there if name not in listed]
    numbers = Counter(contents.number(name) for name in listed if contents.number(name) is not None)
    problems += [f"two notebooks have the number {number:02d}" for number, times in numbers.items() if times > 1]
    for name in listed:
        if contents.number(name) is not None and not (contents.is_chapter(name) or contents.is_appendix(name)):
            problems.append(f"{name}: chapters have the numbers 00 to 39, appendices 70 to 99")
    for section, names in contents.read(root):
        if names != sorted(names):
            problems.append(f"_quarto.yml, {section}: the notebooks do not stand in the order of their numbers")
    problems += [f"{name} belongs to no chapter" for name in there
                 if name.startswith("exercises/") and name.removeprefix("exercises/") not in contents.chapters(root)]
    return problems


def modules_come_from_notebooks(root: Path = ROOT) -> list[str]:
    "Every module, in sub-folders too, comes from one notebook, and no two notebooks export the same one."
    exported = exported_modules(root)
    problems = [f"{' and '.join(names)} both export the module {module}; the second replaces the first"
                for module, names in exported.items() if len(names) > 1]
    there = modules(root)
    problems += [f"{PACKAGE}.{name} comes from no notebook" for name in there if name not in exported and
                 there[name].read_text(encoding="utf-8").strip()]
    problems += [f"{names[0]} exports the module {name}, which is not there; run nbdev_export"
                 for name, names in exported.items() if name not in there]
    return problems


def homes(root: Path) -> dict[str, str]:
    "The names that the package re-exports, and the module of each."
    for node in ast.parse((root / PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    return {}


def imported(tree: ast.Module, there: set[str], home: dict[str, str], package: str = "") -> Iterator[tuple[str, int]]:
    """The modules of this package that some code imports, and the line of each.

    `package` is the sub-package that the code stands in. Only imports of this package are given; a module that is not
    there is given too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith(f"{PACKAGE}."):
                    yield name.name.removeprefix(f"{PACKAGE}."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            elif node.module == PACKAGE or (node.module or "").startswith(f"{PACKAGE}."):
                base = node.module.removeprefix(PACKAGE).removeprefix(".")
            else:
                continue
            if base:
                yield base, node.lineno
            for name in node.names:
                inner = f"{base}.{name.name}".removeprefix(".")
                if inner in there:
                    yield inner, node.lineno
                elif not base and name.name in home:
                    yield home[name.name], node.lineno


def is_tool(module: str) -> bool:
    return module.split(".")[0] in TOOLS


def inside_a_function(tree: ast.Module, line: int) -> bool:
    return any(node.lineno < line <= node.end_lineno for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def import_graph(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    "What each module imports from the package, doors left out; and what is wrong with single imports."
    there, home = modules(root), homes(root)
    graph, problems = {}, []
    for name, path in there.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for other, line in imported(tree, set(there), home, package):
            if other not in there:
                problems.append(f"{name} line {line} imports from {other}, which is not there")
            elif (name, other) in DOORS and inside_a_function(tree, line):
                continue
            elif is_tool(other) and not is_tool(name):
                problems.append(f"{name} line {line} imports from {other}, a tool, which no chapter may need")
            elif other != name:
                graph[name].add(other)
    return graph, problems


def imports_make_no_cycle(root: Path = ROOT) -> list[str]:
    "The modules can be ordered so that each imports only from those before it, and none but tools import a tool."
    graph, problems = import_graph(root)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        problems.append(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
    return problems


def lessons_use_earlier_chapters(root: Path = ROOT) -> list[str]:
    "A chapter's cells import only from chapters before it and from appendices; 00, the overture, may use all."
    there, home = set(modules(root)), homes(root)
    chapter_of = {module: contents.number(names[0]) for module, names in exported_modules(root).items()
                  if contents.is_chapter(names[0])}
    problems = []
    for name in contents.chapters(root):
        own = contents.number(name)
        if own == 0 or not (root / "nbs" / name).exists():
            continue
        modules_here = {module for module, number in chapter_of.items() if number == own}
        for place, cell in enumerate(load(root / "nbs" / name)["cells"]):
            if cell["cell_type"] != "code":
                continue
            try:
                tree = parse(source(cell))
            except SyntaxError:
                continue  # another check tells it
            for other, line in imported(tree, there, home):
                door = any((module, other) in DOORS for module in modules_here) and inside_a_function(tree, line)
                if chapter_of.get(other, -1) > own and not door:
                    problems.append(f"{name} cell {place} uses {other} of chapter {chapter_of[other]:02d}, a later one")
    return problems


def stale(notebook: dict) -> str:
    "What of an executed notebook is no longer as it was: its code, its outputs, or nothing."
    noted = notebook["metadata"].get("executed", {})
    return " and ".join(name for name, now in fingerprints(notebook).items() if noted.get(name) != now)


def executed(root: Path = ROOT) -> list[str]:
    "Every notebook was executed after its code last changed, its outputs are those of that run, and no cell raised."
    problems = []
    for path in notebooks(root):
        notebook = load(path)
        if what := stale(notebook):
            problems.append(
                f"{path.name} was not executed as it stands (changed since: {what}); run "
                f"python tools/execute.py {path.relative_to(root).as_posix()}"
            )
        for number, cell in enumerate(notebook["cells"]):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    problems.append(f"{path.name} cell {number} raised {output['ename']}")
                if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                    problems.append(f"{path.name} cell {number} saved a widget that no reader can move")
                if output.get("name") == "stderr" and "Warning" in "".join(output.get("text", "")):
                    problems.append(f"{path.name} cell {number} prints a warning")
    return problems


def lessons_are_short(root: Path = ROOT) -> list[str]:
    "A lesson is read in an evening, the library half follows the recap, and the page says how long both take."
    found = []
    for name in contents.chapters(root):
        found += reading.problems(name, load(root / "nbs" / name))
    return found


def cells_are_well_formed(root: Path = ROOT) -> list[str]:
    "Imports stand in cells of their own, lines are short, pictures have alternative text, and nothing is left to do."
    problems = []
    for path in notebooks(root):
        notebook = load(path)
        if "widgets" in notebook["metadata"]:
            problems.append(f"{path.name} holds saved widget state")
        first = source(notebook["cells"][0])
        if not re.match(r"# .+\n+> .+", first):
            problems.append(f"{path.name} does not begin with a title and a `>` description")
        for number, cell in enumerate(notebook["cells"]):
            text = source(cell)
            where = f"{path.name} cell {number}"
            if cell["cell_type"] != "code":
                if re.search(r"\b(TODO|FIXME|TBD|XXX)\b", text):
                    problems.append(f"{where}: something is left to do")
                if re.search(r"^:::|\{#(eq|fig|tbl|sec)-|@(eq|fig|tbl|sec)-|```\{mermaid", text, re.M):
                    problems.append(f"{where}: markup that JupyterLab does not show")
                continue
            for line in text.splitlines():
                if len(line) > LONGEST_LINE and not line.startswith("#|"):
                    problems.append(f"{where}: a line of {len(line)} characters (of {LONGEST_LINE}): {line[:50]}…")
            if re.search(r"^\s+[%!]", text, re.M):
                problems.append(f"{where}: a line begins with % or !, which the site takes for a command and drops")
            try:
                body = parse(text).body
            except SyntaxError as error:
                problems.append(f"{where}: {error}")
                continue
            imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
            if any(imports) and not all(imports) and not START.match(text):
                problems.append(f"{where}: an import and other code in one cell (the site executes such cells)")
            shown = [output.get("data", {}) for output in cell.get("outputs", [])]
            pictures = any("image/png" in data and FRAMES not in data for data in shown)  # frames bring their text
            drawn = [frame for data in shown for frame in data.get(FRAMES, {}).get("shown", {}).values()]
            if any(not words.strip() for _, words, _ in drawn):
                problems.append(f"{where}: a picture drawn in advance without text")
            if cell["metadata"] != closed({**cell, "source": text}):
                problems.append(f"{where} is not closed, or open, in JupyterLab as on the site: execute the notebook")
            if pictures and "#| fig-alt:" not in text:
                problems.append(f"{where}: a picture without alternative text")
    return problems


SHAPED = {"Float", "Int", "Bool", "Shaped", "Num", "Integer", "UInt8"}
# many kinds of things, none of them one tensor
UNTYPED = {"self", "cls", "ax", "tokenizer", "data", "meta", "params", "value",
           "tokens", "train", "val"}  # arrays, memory maps or tensors alike
NO_TENSORS = {"foundations", "widgets", "cli", "__main__"}
# of parameters, say, which have no shape in common
COLLECTIONS = {"dict", "list", "Mapping", "Sequence", "Iterable", "Callable"}


def bare_tensors(note: ast.AST | None) -> bool:
    "Whether an annotation holds a `Tensor` that is neither given a shape nor one of a collection."
    if isinstance(note, ast.Subscript) and isinstance(note.value, ast.Name) and note.value.id in SHAPED | COLLECTIONS:
        return False
    if isinstance(note, ast.Name):
        return note.id == "Tensor"
    return note is not None and any(bare_tensors(child) for child in ast.iter_child_nodes(note))


def shapes_are_annotated(root: Path = ROOT) -> list[str]:
    "Every exported function or method that takes or returns a tensor says its shape."
    problems = []
    for name, path in modules(root).items():
        if name.split(".")[0] == "exercises":  # they take anything, and say what is wrong with it
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                for argument in arguments:
                    if argument.annotation is None and argument.arg not in UNTYPED and name not in NO_TENSORS:
                        problems.append(f"{name}.{node.name}: {argument.arg} has no annotation")
                for what, note in [(a.arg, a.annotation) for a in arguments] + [("its result", node.returns)]:
                    if bare_tensors(note):
                        problems.append(f"{name}.{node.name}: {what} is a Tensor without a shape")
    return problems


def public_definitions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    "Every exported function and class, with its full name."
    for name, path in modules(root).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{name}.{node.name}", node


def public_names_are_documented(root: Path = ROOT) -> list[str]:
    "Every exported name has a docstring."
    return [f"{name} has no docstring" for name, node in public_definitions(root) if not ast.get_docstring(node)]


def is_configuration(node: ast.AST) -> bool:
    "Whether a class is a dataclass that people fill in: one that is frozen and can be read from a dictionary."
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    methods = {one.name for one in getattr(node, "body", []) if isinstance(one, ast.FunctionDef)}
    return (isinstance(node, ast.ClassDef) and any(re.match(r"dataclass\(.*frozen=True", text) for text in decorators)
            and (node.name.endswith("Config") or "from_dict" in methods))


def fields_are_documented(root: Path = ROOT) -> list[str]:
    "Every field of a configuration is named in its docstring, which is what `help` and editors show."
    problems = []
    for name, node in public_definitions(root):
        if is_configuration(node):
            text = ast.get_docstring(node) or ""
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and not re.search(rf"\b{field.target.id}\b", text):
                    problems.append(f"{name}: help() says nothing of the field {field.target.id}")
    return problems


def readme_is_derived(root: Path = ROOT) -> list[str]:
    "README.md and its pictures are what tools/readme.py makes of nbs/index.ipynb."
    return [f"{path.relative_to(root).as_posix()} is not what nbs/index.ipynb says; run python tools/readme.py"
            for path, content in readme.derive(root).items() if not path.exists() or path.read_bytes() != content]


def links_lead_somewhere(root: Path = ROOT) -> list[str]:
    "Every relative link of the notebooks and of the files beside them names a file that is there."
    problems = []
    texts = [(path, "\n".join(source(c) for c in load(path)["cells"] if c["cell_type"] == "markdown"))
             for path in notebooks(root)]
    texts += [(path, path.read_text(encoding="utf-8")) for path in (*root.glob("*.md"), *root.glob("data/*.md"))]
    for path, text in texts:
        text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target) and not (path.parent / target.split("#")[0]).exists():
                problems.append(f"{path.relative_to(root).as_posix()} links to {target}, which is not there")
    return problems


def linted(root: Path = ROOT) -> list[str]:
    "ruff finds nothing in the modules, tools, tests and the book's builder (its rules are in ruff.toml)."
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise", "."]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8")
    if done.returncode not in (0, 1):
        return [f"ruff fails: {done.stderr.strip()[-500:]}"]
    found = [re.match(r"(.+?):(\d+):\d+: (\w+) ", line) for line in done.stdout.splitlines()]
    return [match.string for match in found if match and not is_nbdevs(root / match[1], int(match[2]), match[3])]


def is_nbdevs(path: Path, line: int, rule: str) -> bool:
    "Whether a long line is one that nbdev writes: the list of a generated module's names."
    text = path.read_text(encoding="utf-8").splitlines()
    return rule == "E501" and "# AUTOGENERATED!" in "\n".join(text[:40]) and text[line - 1].startswith("__all__ = [")


CHECKS = [in_sync, contents_are_complete, modules_come_from_notebooks, imports_make_no_cycle,
          lessons_use_earlier_chapters, executed, lessons_are_short, cells_are_well_formed, shapes_are_annotated,
          public_names_are_documented, fields_are_documented, readme_is_derived, links_lead_somewhere, linted]


def main(*names: str) -> int:
    chosen = [check for check in CHECKS if not names or check.__name__ in names]
    if unknown := set(names) - {check.__name__ for check in CHECKS}:
        print(f"There is no check {', '.join(unknown)}; there are {', '.join(c.__name__ for c in CHECKS)}.")
        return 2
    failed = 0
    for check in chosen:
        problems = check()
        failed += bool(problems)
        for problem in problems:
            print(f"{check.__name__}: {problem}")
    print(f"{len(chosen) - failed} passed, {failed} failed")
    print(NOT_COVERED)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
