"""Build the site from the notebooks as they stand; nothing is executed.

    python book/build.py             # _docs/, with Quarto where it is installed, otherwise with our own renderer
    python book/build.py --serve     # and show it at 127.0.0.1:8000
"""
import argparse
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

SCRIPTS = ("live.js", "figures.js", "trained.js", "counting.js", "poet.js")  # what moves, with either renderer
PREVIEW = "index_1.png"  # what others show of a link to the book
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tools"), str(HERE.parent)]

import colab
from contents import is_appendix, is_chapter, sections
from contents import number as number_of
from errors import BookError

from transformer_llm.live import live_source

PROCESS = (
    "from nbdev.config import get_config; get_config().d['skip_procs'] = 'exec_show_docs'; "
    "from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)"
)
NEEDED = [
    "nbdev",
    "bs4",
    "lxml",
    "yaml",
    "jinja2",
    "pygments",
    "markdown_it",
    "mdit_py_plugins",
    "math_core",
    "ziamath",
    "fontpkg_source_serif_4",
    "fontTools",
]


def check_tools() -> None:
    "All that the build needs, before anything is done."
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise BookError(
            f"The site needs {', '.join(missing)}: install the book's tools "
            "with `pip install -c constraints.txt -e '.[dev]'`."
        )


def settings(root: Path) -> dict[str, str]:
    "settings.ini; its `git_url` is empty while the book has no public address."
    if not (root / "settings.ini").exists():
        raise BookError(f"There is no settings.ini in {root}.")
    return colab.read_settings(root)


def process(root: Path) -> Path:
    """nbdev's own processing, less the execution of cells: hidden cells go, front matter and addresses come.

    Returns the folder `_proc`.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"}
    )
    if done.returncode:
        raise BookError(f"nbdev can't process the notebooks: {done.stderr.strip().splitlines()[-1]}")
    return root / "_proc"


def notebooks(folder: Path) -> dict[str, Path]:
    "The processed notebooks by their addresses."
    from render import front_matter
    found = {}
    for path in sorted(folder.rglob("*.ipynb")):
        if "_docs" in path.parts or ".ipynb_checkpoints" in path.parts:
            continue
        name = Path(front_matter(load(path)["cells"]).get("output-file", path.stem + ".html")).name
        found[(path.relative_to(folder).parent / name).as_posix()] = path
    return found


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, cells: list[dict]) -> None:
    for cell in cells:
        if cell["cell_type"] == "code":
            cell.setdefault("execution_count", None)
            cell.setdefault("outputs", [])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        ),
        encoding="utf-8",
    )


def front(title: str, description: str) -> dict:
    "The first cell of a page that the build makes."
    return {
        "cell_type": "raw",
        "metadata": {},
        "source": f"---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(description)}\n---\n",
    }


def ways_to_open(name: str, info: dict[str, str], up: str, seconds: int | None) -> str:
    "Where a notebook can be opened: here and, once the book has an address, on its host and where notebooks run."
    links = [f'<a href="{up}notebooks/{name}" download>download</a>']
    if info["git_url"]:
        where = f"{info['user']}/{info['repo']}"
        path = quote(f"nbs/{name}")
        addresses = {
            "GitHub": f"{info['git_url']}/blob/{info['branch']}/{path}",
            "Colab": f"https://colab.research.google.com/github/{where}/blob/{info['branch']}/{path}",
            "Binder": f"https://mybinder.org/v2/gh/{where}/{info['branch']}?urlpath=lab/tree/{path}",
        }
        links += [f'<a href="{address}">{title}</a>' for title, address in addresses.items()]
        how = ""
    else:
        links.append(f'<a href="{up}notebooks/{colab.ZIP}" download>the whole book</a>')
        how = (f' <span class="colab">In Colab: <em>File, Upload notebook</em>, put <code>{colab.ZIP}</code> into '
               "the <em>Files</em> pane, run all.</span>")
    duration = "" if seconds is None else f' <span class="seconds">All cells run in about {max(seconds, 1)} s.</span>'
    return f'<p class="open" id="open">Open this notebook: {" · ".join(links)}.{how}{duration}</p>'


def source_pages(package: Path, folder: Path) -> None:
    "A page for each generated module, with a numbered anchor at each line."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    from translate import markdown
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "File to edit" in text:
            module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
            lines = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
            numbered = "\n".join(f'<span id="L{i}">{line}</span>' for i, line in enumerate(lines, 1))
            save(
                folder / "source" / f"{module}.ipynb",
                [
                    front(
                        f"{package.name}.{module}",
                        f"The source of the module {module}, as nbdev exports it from its notebook.",
                    ),
                    markdown(f'<pre class="code numbered" tabindex="0"><code>{numbered}</code></pre>'),
                ],
            )


def index_page(entries: dict, addresses: dict[str, str], folder: Path) -> None:
    "One alphabetical page of everything that is exported."
    import api
    from translate import markdown
    def rows(checks: bool) -> str:
        found = []
        for item in sorted(entries.values(), key=lambda e: e.name.lower()):
            if item.module.startswith("exercises.") == checks:
                page = addresses.get(item.notebook)
                name = (
                    f'<a href="{page}#{item.anchor}"><code>{item.name}</code></a>'
                    if page
                    else f"<code>{item.name}</code>"
                )
                found.append(
                    f'<tr><td>{name}</td><td>{api.inline(item.summary)}</td><td><a '
                    f'href="source/{item.module}.html#L{item.line}">{item.module}'
                    f'<span class="unseen">, source of {item.name}</span></a></td></tr>'
                )
        return (
            '<table class="index"><thead><tr><th>Name</th><th>What it is</th><th>Module</th></tr></thead><tbody>'
            + "".join(found)
            + "</tbody></table>"
        )

    text = (
        f"The package exports {len(entries)} functions and classes. The name leads to the place in the book where it "
        "is built, the module to its source."
    )
    save(
        folder / "api.ipynb",
        [
            front(
                "Index of the package",
                "Every exported function and class, in alphabetical order, with the place where it is built.",
            ),
            markdown(f"{text}\n\n## The package\n\n{rows(False)}\n\n## What checks the exercises\n\n{rows(True)}"),
        ],
    )


def translate_all(root: Path, folder: Path, info: dict[str, str]) -> None:
    "Translate the processed notebooks in place, and add the pages that the build makes."
    import api
    from translate import markdown, translate
    package = root / info["lib_path"]
    entries = api.read_package(package)
    pages = notebooks(folder)
    addresses = {path.relative_to(folder).as_posix(): address for address, path in pages.items()}
    for address, path in pages.items():
        notebook, name = load(path), path.relative_to(folder).as_posix()
        cells = notebook["cells"]
        runs = any(cell["cell_type"] == "code" and cell.get("outputs") for cell in cells)
        seconds = notebook["metadata"].get("executed", {}).get("seconds") if runs else None
        first = markdown(ways_to_open(name, info, "../" * address.count("/"), seconds))
        cells = translate(
            [cells[0], first, *(c for c in cells[1:] if "AUTOGENERATED! DO NOT EDIT" not in "".join(c["source"]))],
            address,
            entries,
            folder / "figures",
        )
        for cell in cells:
            if cell["cell_type"] == "markdown":
                cell["source"] = mend_links("".join(cell["source"]), name, addresses, info)
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = mend_links(
                        "".join(output["data"]["text/markdown"]), name, addresses, info
                    )
        save(path, cells)
    source_pages(package, folder)
    index_page(entries, addresses, folder)


def mend_links(text: str, name: str, addresses: dict[str, str], info: dict[str, str]) -> str:
    "Links of one notebook to other notebooks, to nbdev's host and to files outside of nbs/, as the site needs them."
    import posixpath
    here = posixpath.dirname(name)
    up = "../" * name.count("/")
    text = text.replace(f"]({info['doc_host']}{info['doc_baseurl']}/", f"]({up}")
    # nbdev links private names too, and they have no entry to lead to
    text = re.sub(r"\[(`_\w+`)\]\([^)\s]*\)", r"\1", text)

    def mend(found: re.Match) -> str:
        path, anchor = found.group(1), found.group(2) or ""
        whole = posixpath.normpath(posixpath.join(here, path))
        if whole in addresses:
            return f"]({posixpath.relpath(addresses[whole], here or '.')}{anchor.lower()})"
        if not whole.startswith("../"):
            return found.group()
        outside = posixpath.normpath(whole[3:])
        if info["git_url"]:
            return f"]({info['git_url']}/blob/{info['branch']}/{outside})"
        return f"]({up}files/{outside})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", mend, text)


def render_pages(folder: Path) -> dict:
    "The content of the pages by address, as our own renderer makes it."
    from render import body, front_matter
    pages = {}
    for address, path in notebooks(folder).items():
        cells = load(path)["cells"]
        try:
            pages[address], held = body(cells)
        except BookError as error:
            raise BookError(f"{address}: {error}") from None
        pages[address].held, pages[address].front = held, front_matter(cells)
    return pages


def write_pages(
    pages: dict,
    order: list[tuple[str, list[str]]],
    paths: dict[str, str],
    output: Path,
    site: str,
    info: dict[str, str],
) -> None:
    "Write the pages, each with the book around it, and the search index."
    from api import inline
    from jinja2 import Environment, FileSystemLoader
    from references import relative, words
    from render import add_permalinks, contents, release, sections

    template = Environment(
        loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, autoescape=True
    ).get_template("page.html")
    flat = [paths[name] for name in flat_names(order) if name in paths]
    book = [
        (section, [(paths[n], short(pages[paths[n]].front["title"], n), number(n)) for n in names if n in paths])
        for section, names in order
    ]
    names, index = {address: name for name, address in paths.items()}, []
    home = f"{info['doc_host']}{info['doc_baseurl']}/" if info["git_url"] else ""  # where the book will stand
    template.globals.update(site=site, book=book, git_url=info["git_url"], home=home, preview=PREVIEW)
    for address, soup in pages.items():
        title, description = soup.front["title"], words(soup.front.get("description") or soup.front["title"])
        index += [] if address.startswith("source/") else sections(title, address, soup)
        headings = contents(soup)
        add_permalinks(soup)
        at = flat.index(address) if address in flat else -9
        neighbours = [
            (flat[i], pages[flat[i]].front["title"]) if 0 <= i < len(flat) else None for i in (at - 1, at + 1)
        ]
        text = template.render(
            title=title,
            lead=inline(description),
            description=description.replace("`", ""),
            address=address,
            eyebrow=eyebrow(names[address]),
            content=soup.find(id="content-body").decode_contents(),
            contents=headings,
            link=functools.partial(relative, page=address),
            root="../" * address.count("/"),
            neighbours=neighbours,
        )
        path = output / address
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(release(text, soup.held), encoding="utf-8")
    write_search(output, index, [paths[name] for name in flat_names(order) if name in paths and is_chapter(name)])
    if home:
        write_sitemap(output, home, [address for address in pages if not address.startswith("source/")])
    missing = template.render(
        title="This page isn't in the book",
        description="Its address may have changed: search for it, or begin at the list of chapters.",
        lead="Its address may have changed: search for it, or begin at the list of chapters.",
        address="404.html",
        contents=[],
        content="",
        neighbours=(None, None),
        link=functools.partial(relative, page="404.html"),
        root=home,
    )
    (output / "404.html").write_text(missing, encoding="utf-8")


def write_search(output: Path, index: list[list[str]], chapters: list[str]) -> None:
    "The script that searches, with all sections of the book in it: it is loaded when the search box opens."
    from assets import search_code
    data = f"window.bookChapters = new Set({json.dumps(chapters)});\n"
    data += f"window.bookIndex = {json.dumps(index, ensure_ascii=False)};\n"
    (output / "search.js").write_text(data + search_code(HERE, HERE.parent / "build" / "npm"), encoding="utf-8")


def write_sitemap(output: Path, home: str, addresses: list[str]) -> None:
    "What search engines read: every page's address."
    lines = [f"<url><loc>{home}{'' if address == 'index.html' else address}</loc></url>" for address in addresses]
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
    (output / "sitemap.xml").write_text(head + "\n".join(lines) + "\n</urlset>\n", encoding="utf-8")


def flat_names(order: list[tuple[str, list[str]]]) -> list[str]:
    "All notebooks in the order of the book, without its sections."
    return [name for _, names in order for name in names]


def eyebrow(name: str) -> str:
    "What stands above a page's title."
    if is_chapter(name):
        return f"Chapter {number(name)}"
    return f"Appendix {number(name)}" if is_appendix(name) and number_of(name) <= 96 else ""  # the rest are lists


def short(title: str, name: str) -> str:
    "A page's name in the list of chapters."
    return (
        "Home"
        if name == "index.ipynb"
        else title.split(": ")[-1].capitalize()
        if name.startswith("exercises/")
        else title
    )


def number(name: str) -> str:
    "The number of a chapter, from its file's name: 01."
    found = re.match(r"(?:.*/)?(\d\d)_", name)
    return found.group(1) if found else ""


def quarto_pages(folder: Path, output: Path, config: dict) -> dict:
    """The pages by address, as Quarto makes them: it brings its own navigation, search and dark mode, and takes our
    style for what stands in the text.
    """
    import yaml
    from bs4 import BeautifulSoup
    shutil.copy(HERE / "content.css", folder)
    config.setdefault("format", {}).setdefault("html", {})["css"] = "content.css"
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    done = subprocess.run(["quarto", "render", ".", "--no-execute"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BookError(
            f"Quarto can't render the pages: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    shutil.move(folder / "_docs", output)
    return {
        path.relative_to(output).as_posix(): BeautifulSoup(path.read_text(encoding="utf-8"), "lxml")
        for path in sorted(output.rglob("*.html"))
    }


def empty(output: Path) -> None:
    "Remove the site that was built before, and nothing else."
    if output.is_dir() and (output.name == "_docs" or (output / "index.html").exists() or not any(output.iterdir())):
        shutil.rmtree(output)
    elif output.exists():
        raise BookError(f"{output} is there and is no site: choose another --output, or remove it.")


def copy_files(root: Path, folder: Path, output: Path, names: list[str], info: dict[str, str]) -> None:
    "Pictures and the notebooks for download; without a public address also the whole book, and files that pages link."
    for name in ("figures", "images"):
        if (folder / name).exists():
            shutil.copytree(folder / name, output / name, dirs_exist_ok=True)
    for name in names:
        if (root / "nbs" / name).exists():
            (output / "notebooks" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "nbs" / name, output / "notebooks" / name)
    for script in SCRIPTS:
        shutil.copy(HERE / script, output / script)
    # a function, because figures give its text to workers
    engine = f"window.bookLive.engine = () => {{\n{live_source()}}};\nwindow.bookLive.engine();\n"
    (output / "engine.js").write_text(engine, encoding="utf-8")
    if info["git_url"]:
        return
    (output / "notebooks").mkdir(exist_ok=True)
    colab.write_zip(output / "notebooks" / colab.ZIP, root)
    linked = {name for page in output.rglob("*.html")
              for name in re.findall(r'href="(?:\.\./)*files/([^"#]+)"', page.read_text(encoding="utf-8"))}
    for name in linked:
        if (root / name).is_file():
            (output / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, output / "files" / name)


def build(root: Path, output: Path) -> list[str]:
    "The whole site. Returns what is wrong with the book."
    import references
    import yaml
    from assets import write_assets
    info = settings(root)
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    folder = process(root)
    translate_all(root, folder, info)
    paths = {path.relative_to(folder).as_posix(): address for address, path in notebooks(folder).items()}
    order = sections(config)
    problems = [
        f"_quarto.yml lists {name}, which is not there" for _, names in order for name in names if name not in paths
    ]
    empty(output)
    quarto = shutil.which("quarto") is not None
    pages = quarto_pages(folder, output, config) if quarto else render_pages(folder)
    targets = references.collect(pages, {int(number(n)): a for n, a in paths.items() if number(n) and "/" not in n})
    for address, soup in pages.items():
        problems += references.link(soup, address, targets)
    if quarto:
        for address, soup in pages.items():
            (output / address).write_text(str(soup), encoding="utf-8")
    else:
        write_pages(pages, order, paths, output, config["website"]["title"], info)
        write_assets(
            output,
            HERE,
            HERE.parent / "build" / "fonts",
            {text for soup in pages.values() for text in soup.held if text.startswith("<math")},
        )
    copy_files(root, folder, output, list(paths), info)
    return problems + references.dead_links(output)


def serve(output: Path, port: int) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(output))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"The book is at http://127.0.0.1:{server.server_port}/ (stop with Ctrl+C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=HERE.parent, help="folder of settings.ini (default: this project)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write; a site that is there is removed first (default: _docs in the root)",
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="write the site even if references or pages are missing, and only list them",
    )
    parser.add_argument("--serve", action="store_true", help="show the site at 127.0.0.1 when it is built")
    parser.add_argument("--port", type=int, default=8000, help="port for --serve (default: 8000)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    output = arguments.output or arguments.root / "_docs"
    try:
        check_tools()
        problems = build(arguments.root.resolve(), output.resolve())
    except (BookError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    count = sum(1 for _ in output.rglob("*.html"))
    print(
        f"{count} pages in {output} after {time.perf_counter() - start:.1f} s"
        + (f", {len(problems)} problems" if problems else ""),
        flush=True,
    )
    if problems and not arguments.draft:
        return 1
    if arguments.serve:
        try:
            serve(output, arguments.port)
        except OSError as error:
            print(
                f"The book can't be shown at port {arguments.port} ({error.strerror}): choose another with --port.",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
