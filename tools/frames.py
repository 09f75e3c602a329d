"""Draw the pictures of `explore` anew without executing a whole notebook: only the cells that a control needs are run.

    python tools/frames.py nbs/07_training.ipynb           # run what is needed, keep the pictures, stamp the notebook
    python tools/frames.py --list nbs/07_training.ipynb    # only say which cells are needed

`tools/execute.py` draws the same pictures when it executes a notebook; this is for changes of the pictures alone. A
cell is needed if it binds a name that a needed cell reads, or calls a method of such a name, or gives it an attribute
or an item.
"""
import argparse
import ast
import json
import os
import re
import symtable
import sys
from pathlib import Path

os.environ.update(MPLBACKEND="Agg", OMP_NUM_THREADS="1", BOOK_FRAMES="1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from execute import FRAMES, fingerprints
from nbdev.clean import nbdev_clean

CONTROL = re.compile(r"^explore\(", re.M)


QUIET = re.compile(r"(check|check_solution|print|display|plot_\w+|draw_\w+|show_\w+)$")  # calls that change no object


def root_of(node: ast.AST) -> str:
    "The name at the beginning of `name.attribute[item]`, or nothing."
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def changed(text: str) -> set[str]:
    "The names whose objects a cell may change: those that it gives an attribute or an item, and those in bare calls."
    found = set()
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
                found.add(root_of(node))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                if not QUIET.match(root_of(node.value.func)):
                    found |= {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
    return found - {"", "plt"}


def names(text: str) -> tuple[set[str], set[str], set[str]]:
    "The names that a cell binds, those that it reads at once, and those that its functions read when they are called."
    table = symtable.symtable(text, "cell", "exec")
    symbols = table.get_symbols()
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    reads = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    later, inner = set(), list(table.get_children())
    while inner:
        child = inner.pop()
        later |= {symbol.get_name() for symbol in child.get_symbols() if symbol.is_global()}
        inner += child.get_children()
    return binds, reads, later


def needed(sources: list[str], last: int) -> set[int]:
    "The numbers of the cells before `last` that cell `last` needs, and itself."
    at_the_end = set()
    while True:
        found, wanted, later = {last}, set(names(sources[last])[1]) | at_the_end, set(names(sources[last])[2])
        for number in range(last - 1, -1, -1):
            text = sources[number]
            if not text or CONTROL.search(text):
                continue
            binds, reads, inside = names(text)
            alters = set() if "#| fig-" in text else changed(text)
            if (binds | alters) & wanted or re.search(r"^(import|from) ", text, re.M):
                found.add(number)
                wanted = (wanted - binds) | reads | inside
                later |= inside
        if later <= at_the_end:
            return found
        at_the_end |= later


def run(text: str, space: dict) -> object:
    "Run a cell without its assertions, which stand for the whole notebook; the value of its last expression."
    tree = ast.parse(text)
    tree.body = [statement for statement in tree.body if not isinstance(statement, ast.Assert)]
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), space) if last else None


def plain(cell: dict) -> str:
    "The code of a cell without the lines that only IPython understands."
    if cell["cell_type"] != "code":
        return ""
    return re.sub(r"^( *)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M)


def write(path: Path, notebook: dict) -> None:
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="only say which cells are needed")
    parser.add_argument("--skip", default="", help="ids of cells that are not run, with commas between them")
    parser.add_argument("--add", default="", help="ids of cells that are run too")
    parser.add_argument("notebook", type=Path)
    arguments = parser.parse_args()
    path = arguments.notebook.resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells, sources = notebook["cells"], [plain(cell) for cell in notebook["cells"]]
    controls = [number for number, text in enumerate(sources) if CONTROL.search(text)]
    chosen = {i for last in controls for i in needed(sources, last)}
    chosen |= {i for i, cell in enumerate(cells) if cell["id"] in arguments.add.split(",")}
    chosen -= {i for i, cell in enumerate(cells) if cell["id"] in arguments.skip.split(",")}
    os.chdir(path.parent)
    space = {"__name__": "__main__", "get_ipython": lambda: "", "display": lambda *_: None}
    for number in sorted(chosen):
        print(number, cells[number]["id"], sources[number].strip().split("\n")[0][:90], flush=True)
        if arguments.list:
            continue
        value = run(sources[number], space)
        if number in controls:
            data = {kind: content for kind, content in value._repr_mimebundle_().items() if "widget-view" not in kind}
            held = data[FRAMES]
            size = sum(map(len, held["pictures"]))
            print(f"   {len(held['shown'])} settings, {len(held['pictures'])} pictures, {size:,} characters")
            kept = [output for output in cells[number]["outputs"] if FRAMES not in output.get("data", {})]
            output = {"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
            cells[number]["outputs"] = [*kept, output]
    if not arguments.list:
        write(path, notebook)
        nbdev_clean(str(path))
        cleaned = json.loads(path.read_text(encoding="utf-8"))
        cleaned["metadata"]["executed"]["outputs"] = fingerprints(cleaned)["outputs"]
        write(path, cleaned)
    return 0


if __name__ == "__main__":
    sys.exit(main())
