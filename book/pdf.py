"""The book as a PDF and as an EPUB, from the notebooks as they stand; nothing is executed.

    python book/pdf.py               # build/book/: a PDF with page numbers and running heads, and an EPUB

Pages are those of the site, made fit for paper. Pandoc turns them into an EPUB and into Typst, which sets the PDF.
"""
import argparse
import html
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import build  # first: it makes the tools importable
import references
import render
import yaml
from api import inline
from bs4 import BeautifulSoup, Tag
from contents import is_appendix, is_chapter, sections
from contents import number as number_of
from errors import BookError

HERE = build.HERE
NEEDED = {"pypandoc": "pypandoc_binary", "typst": "typst"}
NAME = "transformer_llm"  # of the two files
LONGEST = 120  # characters of a line of code or output; longer ones, which no cell of a lesson has, are folded
# pages that only make sense beside a running kernel, or to those who write or teach with the book
LEFT_OUT = {79, 93, 94, 95, 99}
ABOUT = """
<h2 id="about">About this edition</h2>
<p>This is the text of the book with its code, outputs and figures. Three things are in the notebooks and on the site
only: controls that move, the code that draws a figure (where the figure is what matters), and tables of every
function's parameters. So are the pages that check exercises and those for teachers.</p>
<p>Hints stand below their exercise. Solutions are at the end of the book, in the order of the exercises, so that none
is read by accident; each exercise says where its solution is. Code that ends in <code>check(...)</code> is where your
answer goes: in the notebook, it is judged.</p>
"""


def check_tools() -> None:
    "What this edition needs besides the site."
    build.check_tools()
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise BookError(
            f"The PDF and the EPUB need {', '.join(missing)}: use `make pdf`, or install them with "
            "`pip install -c constraints.txt -e '.[dev,pdf]'`."
        )


# ---------------------------------------------------------------- a page, as paper shows it

def formula(latex: str, options: dict) -> str:
    "A formula as Pandoc reads it, still in LaTeX."
    kind = "math/tex; mode=display" if options["display_mode"] else "math/tex"
    safe = latex.strip().replace("<", r"\lt ").replace(">", r"\gt ")
    return f'<script type="{kind}">{safe}</script>'


def folded(text: str) -> str:
    "Text in which no line is longer than the paper is wide."
    lines = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip()) + 4
        parts = textwrap.wrap(line, LONGEST, subsequent_indent=" " * min(indent, LONGEST // 2), break_on_hyphens=False,
                              drop_whitespace=False, replace_whitespace=False, expand_tabs=False)
        lines += [line] if len(line) <= LONGEST else parts
    return "\n".join(lines)


def plain_code(code: str, language: str = "python") -> str:
    "Code as a block that Pandoc and Typst put into colours."
    return f'<pre class="code {language or "text"}"><code>{html.escape(folded(code), quote=False)}</code></pre>'


MARKDOWN = render.parser(formula, plain_code)


def held_code(held: str) -> str:
    "A block of code or output that `render.body` held apart, with its kind as its only class."
    if not held.startswith('<pre class="output'):
        return held.replace('<pre class="code ', '<pre class="', 1)
    text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</span>(?=<span)", "\n", held)))
    if all(re.match(r"Exercise \d+\.\d+: no answer", line) for line in text.strip().split("\n")):
        return ""  # what a check says to a reader who has not answered yet
    return f'<pre class="output"><code>{html.escape(folded(text), quote=False)}</code></pre>'


@dataclass
class Page:
    "A page on its way into the book."
    name: str  # attention: the beginning of its anchors
    title: str  # 01 Attention
    lead: str
    soup: BeautifulSoup
    held: list[str]
    answers: list[tuple[str, Tag]] = field(default_factory=list)  # solutions and keys, with their titles
    moved: dict[str, str] = field(default_factory=dict)  # anchors of folds that went: what stands for them

    @property
    def parts(self) -> list[Tag]:
        return [self.soup.find(id="content-body"), *(answer for _, answer in self.answers)]

    def text(self, tag: Tag) -> str:
        return render.release(tag.decode_contents(), self.held)


def open_fold(page: Page, fold: Tag) -> None:
    "Paper has no folds: code of figures and tables of parameters go, hints are opened, solutions are set aside."
    title = references.words(fold.summary.extract().get_text())
    kind = fold.get("class", [""])[0]
    if kind == "api":
        if cell := fold.find_previous_sibling(class_="cell"):
            cell["id"] = cell.get("id", f"source-{fold['id']}")
            page.moved |= {tag["id"]: cell["id"] for tag in [fold, *fold.find_all(id=True)]}
        fold.decompose()
    elif kind == "fold":
        fold.decompose()
    elif kind == "solution" or title.startswith("Key"):
        box = fold.find_parent(class_="exercise")
        anchor = f"solution-{box['id'].split('-')[1]}" if box else f"key-{len(page.answers) + 1}"
        where = page.soup.new_tag("p")
        where.append(page.soup.new_tag("a", href=f"#{anchor}", string=title, attrs={"class": "solution"}))
        fold.insert_before(where)
        fold.name, fold.attrs = "div", {"class": "answer", "id": anchor}
        page.answers.append((title, fold.extract()))
    else:
        label = page.soup.new_tag("strong", string=f"{title}. ")
        first = fold.find(True)
        if first and first.name == "p":
            first.insert(0, label)
        else:
            fold.insert(0, label)
            label.wrap(page.soup.new_tag("p"))
        fold.name, fold.attrs = "div", {"class": "hint"}


def for_paper(page: Page) -> None:
    "Take out of a page what only a screen needs."
    soup = page.soup
    for tag in soup.select("p.open, p.kernel, figure.explore, figure.live, script[src], .unseen"):
        tag.decompose()
    for heading in soup.find_all(["h2", "h3", "h4"]):
        heading.name = f"h{int(heading.name[1]) + 1}"
        if "".join(heading.get("class", [])) == "small":  # the terms of the glossary are no sections
            heading["class"] = "unlisted unnumbered"
    for title in soup.select(".exercise > .title"):
        title.insert(0, soup.new_tag("strong", string=title.contents[0].extract().strip() + " "))
    for image in soup.find_all("img"):  # 700 pixels are as wide as the page
        share = min(100, round(int(image.get("width", 700)) / 7))
        image.attrs = {"src": image["src"], "alt": image.get("alt", ""), "width": f"{share}%"}
    for fold in soup.find_all("details"):
        open_fold(page, fold)
    for part in page.parts:
        for tag in part.select("div.math, span.math, div.scroll, div.html-output, div.cell:not([id])"):
            tag.unwrap()


def mend_links(page: Page, names: set[str]) -> None:
    "Anchors that are unique in the book, links within it, and plain text for links to what it leaves out."
    for tag in [inner for part in page.parts for inner in part.find_all(id=True)]:
        tag["id"] = f"{page.name}.{tag['id']}"
    for _, answer in page.answers:
        answer["id"] = f"{page.name}.{answer['id']}"
    for link in [inner for part in page.parts for inner in part.find_all("a", href=True)]:
        target, _, anchor = unquote(link["href"]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        name = target.removesuffix(".html") if target else page.name
        if name in names:
            link["href"] = f"#{name}.{anchor}" if anchor else f"#{name}"
        else:
            link.unwrap()


# ---------------------------------------------------------------- the book as one document

def read_pages(folder: Path, order: list[tuple[str, list[str]]]) -> tuple[dict[str, Page], list[str]]:
    "The pages of the book by notebook, made fit for paper, and what refers to nothing."
    addresses = {path.relative_to(folder).as_posix(): address for address, path in build.notebooks(folder).items()}
    pages = {}
    for name in build.flat_names(order):
        cells = build.load(folder / name)["cells"]
        soup, held = render.body(cells, MARKDOWN, plain_code)
        front = render.front_matter(cells)
        numbered = is_chapter(name) or is_appendix(name) and number_of(name) < 97
        title = f"{build.number(name)} {front['title']}" if numbered else front["title"]
        title = "Before you begin" if name == "index.ipynb" else title
        lead = inline(references.words(front.get("description") or ""))
        pages[name] = Page(addresses[name].removesuffix(".html"), title, lead, soup, list(map(held_code, held)))
    soups = {addresses[name]: page.soup for name, page in pages.items()}
    chapters = {number_of(n): a for n, a in addresses.items() if number_of(n) is not None}
    targets = references.collect(soups, chapters)
    problems = [problem for address, soup in soups.items() for problem in references.link(soup, address, targets)]
    names = {page.name for page in pages.values()}
    for page in pages.values():
        for_paper(page)
        mend_links(page, names)
    return pages, problems


def solutions_of(page: Page) -> str:
    "The solutions of a page as a chapter of the last part."
    parts = [f'<h2 id="{page.name}.solutions">Solutions: {html.escape(page.title, quote=False)}</h2>']
    for title, answer in page.answers:
        exercise = answer["id"].replace(".solution-", ".exercise-")
        back = title if exercise == answer["id"] else f'<a href="#{exercise}">{title}</a>'
        parts.append(f'<div class="answer" id="{answer["id"]}"><p><strong>{back}</strong></p></div>')
        parts.append(page.text(answer))
    return "\n".join(parts)


def document(folder: Path, config: dict) -> tuple[str, list[str]]:
    "The book as one page of HTML, from the translated notebooks in `folder`, and what refers to nothing."
    order = [(section, [name for name in names if "/" not in name and name != "api.ipynb"
                        and number_of(name) not in LEFT_OUT]) for section, names in sections(config)]
    pages, problems = read_pages(folder, order)
    parts = [ABOUT]
    for section, names in order:
        if section and names:
            parts.append(f'<h1 id="{render.slug(section)}">{html.escape(section, quote=False)}</h1>')
        for page in (pages[name] for name in names):
            parts.append(f'<h2 id="{page.name}">{html.escape(page.title, quote=False)}</h2>')
            parts += [f'<div class="lead"><p>{page.lead}</p></div>', page.text(page.parts[0])]
    solved = [page for page in pages.values() if page.answers]
    parts += ['<h1 id="solutions">Solutions</h1>'] * bool(solved) + [solutions_of(page) for page in solved]
    text = "\n".join(parts)
    known = set(re.findall(r'<[^>]* id="([^"]+)"', text))
    moved = {f"{p.name}.{old}": f"{p.name}.{new}" for p in pages.values() for old, new in p.moved.items()}

    def alive(found: re.Match) -> str:
        anchor = moved.get(found.group(2), found.group(2))  # what is left out is at least on its page
        return found.group(1) + (anchor if anchor in known else anchor.split(".")[0])

    return re.sub(r'(<a [^>]*?href="#)([^"]+)', alive, text), problems


# ---------------------------------------------------------------- Pandoc and Typst

def pandoc(*arguments: str, folder: Path) -> None:
    "Run Pandoc in the folder where the pictures are; what it can't turn into the other form is an error."
    import pypandoc
    command = [pypandoc.get_pandoc_path(), "--fail-if-warnings", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise BookError(f"Pandoc can't write the book: {references.words(done.stderr)[:400]}")


def write(folder: Path, text: str, info: dict[str, str], output: Path) -> list[Path]:
    "Write the EPUB and the PDF of a document whose pictures are in `folder`."
    import typst
    output.mkdir(parents=True, exist_ok=True)
    (folder / "book.html").write_text(text, encoding="utf-8")
    about = {
        "title": info["title"],
        "subtitle": info["description"].split(": ")[-1],
        "author": info["author"],
        "lang": "en",
        "identifier": f"urn:transformer-llm:{info['version']}",
        "rights": f"Version {info['version']}. Apache License 2.0",
    }
    (folder / "book.yml").write_text(yaml.safe_dump(about), encoding="utf-8")
    common = ["--from=html", "--standalone", "--metadata-file=book.yml", f"--lua-filter={HERE / 'pdf.lua'}"]
    epub, pdf = output / f"{NAME}.epub", output / f"{NAME}.pdf"
    pandoc("--to=epub3", "--mathml", "--toc", "--toc-depth=2", "--split-level=2", f"--css={HERE / 'epub.css'}",
           f"--output={epub}", *common, "book.html", folder=folder)
    pandoc("--to=typst", "--syntax-highlighting=idiomatic", f"--template={HERE / 'pdf.typ'}", "--output=book.typ",
           *common, "book.html", folder=folder)
    try:  # fonts of the machine are only asked for characters that Typst's own lack
        typst.compile(str(folder / "book.typ"), output=str(pdf), root=str(folder))
    except RuntimeError as error:
        reason = references.words(getattr(error, "diagnostic", str(error)))
        raise BookError(f"Typst can't set the book: {reason[:400]}") from None
    return [pdf, epub]


def make(root: Path, output: Path) -> tuple[list[Path], list[str]]:
    "The whole edition of the book that lies in `root`: its files, and what refers to nothing."
    info = build.settings(root)
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    folder = build.process(root)
    build.translate_all(root, folder, info)
    text, problems = document(folder, config)
    return write(folder, text, info, output), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=HERE.parent, help="folder of settings.ini (default: this project)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: build/book in the root)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    output = arguments.output or arguments.root / "build" / "book"
    try:
        check_tools()
        files, problems = make(arguments.root.resolve(), output.resolve())
    except (BookError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    sizes = " and ".join(f"{path} ({path.stat().st_size / 1e6:.1f} MB)" for path in files)
    print(f"{sizes} after {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
