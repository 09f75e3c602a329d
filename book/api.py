"""What the package exports, read from its source without importing it: the parameter tables and the index of names."""
import ast
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

FROM_NOTEBOOK = re.compile(r"File to edit: (?:\.\./)*nbs/(\S+\.ipynb)")


@dataclass
class Entry:
    "One exported name: a function, a class, or a method of one."
    name: str  # softmax, or KVCache.crop
    module: str  # attention, or exercises.attention
    notebook: str  # 01_attention.ipynb, below nbs/
    line: int  # of its definition, in the module
    docstring: str
    parameters: list[tuple[str, str, str, str]]  # name, type, default, meaning
    returns: tuple[str, str] | None = None  # type, meaning
    methods: list["Entry"] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return self.name.lower()

    @property
    def summary(self) -> str:
        return self.docstring.split("\n\n")[0].replace("\n", " ")


def comment(lines: list[str], node: ast.AST) -> str:
    "What is written behind a parameter, on the line where it ends."
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
    found = re.match(r"[\s,:)]*#\s*(.*)", rest)
    return found.group(1).strip() if found else ""


def written(node: ast.AST | None) -> str:
    "An annotation or a default as the book writes it."
    return ast.unparse(node).replace("'", '"') if node else ""


def parameters(function: ast.FunctionDef, lines: list[str]) -> list[tuple[str, str, str, str]]:
    "A function's parameters with the annotation, default and comment of each, `self` left out."
    a = function.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults + [None] + a.kw_defaults
    everything = positional + [a.vararg] + a.kwonlyargs + [a.kwarg]
    rows = []
    for argument, default in zip(everything, defaults + [None]):
        if argument is None or argument.arg in ("self", "cls"):
            continue
        star = "*" if argument is a.vararg else "**" if argument is a.kwarg else ""
        rows.append((star + argument.arg, written(argument.annotation),
                     written(default), comment(lines, default or argument)))
    return rows


def fields(definition: ast.ClassDef, lines: list[str]) -> list[tuple[str, str, str, str]]:
    "A data class's fields, as parameters."
    return [(node.target.id, written(node.annotation), written(node.value), comment(lines, node))
            for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def entry(node: ast.FunctionDef | ast.ClassDef, lines: list[str], module: str, notebook: str, owner: str = "") -> Entry:
    "The entry of one definition."
    made = Entry(owner + node.name, module, notebook, node.lineno, ast.get_docstring(node) or "", [])
    if isinstance(node, ast.ClassDef):
        functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
        start = next((f for f in functions if f.name == "__init__"), None)
        made.parameters = parameters(start, lines) if start else fields(node, lines)
        made.methods = [
            entry(f, lines, module, notebook, node.name + ".") for f in functions if not f.name.startswith("_")
        ]
    else:
        made.parameters = parameters(node, lines)
        if node.returns:
            made.returns = written(node.returns), comment(lines, node.returns)
    return made


def read_package(package: Path) -> dict[str, Entry]:
    "Every exported function and class of every generated module, by name."
    entries = {}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if found := FROM_NOTEBOOK.search(text):
            module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    entries[node.name] = entry(node, text.splitlines(), module, found.group(1))
    return entries


def inline(text: str) -> str:
    "Escaped text, with `code` in backticks set as such."
    return re.sub(r"``?([^`]+)``?", r"<code>\1</code>", html.escape(text, quote=False)).replace("\n", " ")


def code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False)}</code>" if text else ""


def table(item: Entry) -> str:
    "The parameters of an entry, with shapes, as a table."
    rows = [(code(n), code(t), code(d), inline(m)) for n, t, d, m in item.parameters]
    if item.returns:
        rows.append(("<em>returns</em>", code(item.returns[0]), "", inline(item.returns[1])))
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{name}</th>" for name in ("Parameter", "Shape or type", "Default", "Meaning"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def card(item: Entry, source: str) -> str:
    """The reference of an entry, folded, as one block of HTML without blank lines.

    `source` is the folder of the source pages.
    """
    text = "".join(f"<p>{inline(part)}</p>" for part in item.docstring.split("\n\n") if part)
    methods = "".join(
        f'<dt id="{m.anchor}"><code>{m.name.split(".")[-1]}({", ".join(p[0] for p in m.parameters)})</code></dt>'
        f"<dd>{inline(m.summary)}</dd>"
        for m in item.methods
    )
    address = f"{source}{item.module}.html#L{item.line}"
    link = f'<a class="source" href="{address}">Source<span class="unseen"> of {item.name}</span></a>'
    return (
        f'<details class="api" id="{item.anchor}"><summary><code>{item.name}</code> '
        f'<span>parameters and shapes</span></summary>{text}{table(item)}'
        + (f"<p>Methods</p><dl>{methods}</dl>" if methods else "")
        + f"<p>{link}</p></details>"
    )
