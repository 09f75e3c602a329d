"""From translated notebooks to pages, without Quarto: markdown, mathematics as MathML, code in colours, one template.
"""
import html
import re
from functools import cache

import yaml
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from math_core import LatexError, LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from errors import BookError
from references import words
from translate import directives, source, without_directives

TO_MATHML = LatexToMathML()


def mathematics(latex: str, options: dict) -> str:
    "LaTeX as MathML, which browsers show without a script."
    try:
        return TO_MATHML.convert_with_local_state(latex.strip(), displaystyle=options["display_mode"])
    except LatexError:
        raise BookError(f"The formula {latex.strip()!r} can't be turned into MathML.") from None


@cache
def coloured(code: str, language: str = "python") -> str:
    "Code as a block in colours."
    try:
        lexer = get_lexer_by_name(language or "text", stripnl=False)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    inner = highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip("\n")
    return f'<pre class="code" tabindex="0"><code>{inner}</code></pre>'


def parser(mathematics=mathematics, coloured=coloured) -> MarkdownIt:
    """Markdown as JupyterLab reads it: CommonMark with tables and mathematics.

    The two functions write formulas and code; the printed book has others.
    """
    md = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    md.use(dollarmath_plugin, renderer=mathematics, double_inline=True, allow_space=False, allow_labels=False)
    for kind in ("fence", "code_block"):
        md.add_render_rule(
            kind,
            lambda self, tokens, i, options, env: (
                coloured(tokens[i].content.rstrip("\n"), tokens[i].info.strip()) + "\n"
            ),
        )
    return md


MARKDOWN = parser()


VERDICT = r"^Exercise \d+\.\d+: (right|not yet|no answer)"


def output(item: dict, md: MarkdownIt = MARKDOWN) -> str:
    "One output of a cell: markdown, HTML, or text as it was printed."
    data = item.get("data", {"text/plain": item.get("text", "")})
    if "text/markdown" in data:
        return md.render("".join(data["text/markdown"]))
    if "text/html" in data:
        return f'<div class="html-output">{"".join(data["text/html"])}</div>'
    text = "".join(data.get("text/plain", "")).rstrip("\n")
    if not text.strip() or "application/vnd.jupyter.widget-view+json" in data:
        return ""
    if re.match(VERDICT, text):  # sentences rather than a table of numbers: they may wrap
        lines = [
            '<span class="line '
            f'{"".join(re.findall(VERDICT, line)[:1]).split(" ")[0]}">{html.escape(line, quote=False)}</span>'
            for line in text.split("\n")
        ]
        return f'<pre class="output verdict" tabindex="0">{"".join(lines)}</pre>'
    return f'<pre class="output" tabindex="0">{html.escape(text, quote=False)}</pre>'


def cell_html(cell: dict, md: MarkdownIt = MARKDOWN, coloured=coloured) -> str:
    "A cell of a translated notebook."
    if cell["cell_type"] == "markdown":
        return md.render(source(cell))
    if cell["cell_type"] != "code":
        return ""
    said, code = directives(source(cell)), without_directives(source(cell))
    if said.get("include") == "false":
        return ""
    shown = coloured(code) if code and said.get("echo") != "false" else ""
    outputs = "" if said.get("output") == "false" else "".join(output(o, md) for o in cell.get("outputs", []))
    return f'<div class="cell">{shown}{outputs}</div>' if shown or outputs else ""


def front_matter(cells: list[dict]) -> dict:
    "What nbdev has noted of a page: title, description, output-file."
    raw = source(cells[0]) if cells and cells[0]["cell_type"] == "raw" else ""
    return yaml.safe_load(raw.strip().strip("-")) or {} if raw else {}


def slug(text: str) -> str:
    "A heading's anchor, as Pandoc makes it."
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text.lower()).strip()).lstrip("0123456789-._") or "section"


HELD = re.compile(r'<pre class="(?:code|output).*?</pre>|<math.*?</math>', re.S)


def body(cells: list[dict], md: MarkdownIt = MARKDOWN, coloured=coloured) -> tuple[BeautifulSoup, list[str]]:
    """The content of a page, with anchors at its headings and boxes around its tables.

    Code and mathematics are held apart (to save time).
    """
    held = []

    def hold(found: re.Match) -> str:
        held.append(found.group())
        return f'<span data-held="{len(held) - 1}"></span>'
    text = HELD.sub(hold, "\n".join(cell_html(cell, md, coloured) for cell in cells))
    soup = BeautifulSoup(f'<div id="content-body">{text}</div>', "lxml")
    taken = {tag["id"] for tag in soup.find_all(id=True)}
    for heading in soup.find_all(["h2", "h3", "h4"]):
        name, count = slug(heading.get_text()), 1
        anchor = name
        while anchor in taken:
            anchor, count = f"{name}-{count}", count + 1
        heading["id"] = anchor
        taken.add(anchor)
    if not soup.find("h2"):  # no level is left out
        for heading in soup.find_all("h3"):
            heading.name, heading["class"] = "h2", "small"
    for block in soup.select(".math.block"):
        block["tabindex"] = "0"
    if (minutes := soup.find("p")) and minutes.get_text().startswith("Reading time:"):
        minutes["class"] = "reading"
    for cell in soup.find_all("th"):
        if not cell.get_text(strip=True) and not cell.find("span"):  # a header that says nothing is none
            cell.name = "td"
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return soup, held


def release(text: str, held: list[str]) -> str:
    "Put back what `body` held apart."
    return re.sub(r'<span data-held="(\d+)"></span>', lambda found: held[int(found.group(1))], text)


def contents(page: BeautifulSoup) -> list[tuple[int, str, str]]:
    "The headings of a page: level, anchor, inner HTML."
    return [
        (int(h.name[1]), h["id"], h.decode_contents())
        for h in page.find_all(["h2", "h3"])
        if not h.find_parent("details")
    ]


def add_permalinks(page: BeautifulSoup) -> None:
    "Give each heading a link to itself."
    for heading in page.find_all(["h2", "h3"]):
        link = page.new_tag("a", href=f"#{heading['id']}", attrs={"class": "permalink"})
        link["aria-label"] = f"Link to “{words(heading.get_text())}”"
        link.string = "#"
        heading.append(link)


def sections(title: str, address: str, soup: BeautifulSoup) -> list[list[str]]:
    "A page's entries in the search index: title, section, address and text of each section."
    found = [[title, "", address, words(soup.front.get("description") or "")]]
    for row in soup.select("table.index tbody tr"):  # a name of the package leads to the place where it is built
        name, what, _ = row.find_all("td")
        if name.a:
            found.append([title, name.get_text(), name.a["href"], words(what.get_text())])
    for node in soup.find_all(["h2", "h3", "p", "li", "td", "summary"]):
        if node.find_parent("table", class_="index"):
            continue
        if node.name in ("h2", "h3"):
            found.append([title, words(node.get_text()), f"{address}#{node['id']}", ""])
        elif not node.find(["p", "li"]) and node.get("class") != ["open"]:
            found[-1][3] += " " + words(node.get_text())
    return found
