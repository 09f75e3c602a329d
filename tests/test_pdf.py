"""The book on paper: what a page loses and keeps on its way; where Pandoc and Typst are, also a PDF and an EPUB."""
import base64
import io
import re
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book"))

import build
import pdf
import translate
from errors import BookError
from PIL import Image

MISSING = [package for module, package in pdf.NEEDED.items() if find_spec(module) is None]
CONFIG = {"website": {"sidebar": {"contents": [
    {"section": "Part I: begin", "contents": ["01_attention.ipynb", "02_more.ipynb", "exercises/01_attention.ipynb"]},
    {"section": "For teachers", "contents": ["99_teachers.ipynb"]},
]}}}
INFO = {"title": "A small book", "description": "A small book: of two chapters", "author": "Nobody", "version": "1.0"}
LONG = "print('" + "many words " * 14 + "end')"


def code(source, *outputs):
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs)}


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def picture():
    made = io.BytesIO()
    Image.new("RGB", (350, 200), "navy").save(made, "PNG")
    data = base64.b64encode(made.getvalue()).decode()
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": data}}


FIRST = [
    translate.markdown("## Weights\n\nSee [more](more.html#words), equation (1.1) and [teachers](teachers.html).\n\n"
                       "$$\\operatorname{softmax}(x)_i < 1, \\quad a \\odot b \\tag{1.1}$$"),
    code("def weigh(x):\n    return x", printed("0.5\n")),
    translate.markdown('<details class="api" id="weigh"><summary>weigh</summary><p>Its table.</p></details>'),
    code('# How it is drawn\n#| code-fold: true\n#| fig-cap: "Figure 1.1. Blue."\n#| fig-alt: "A square"\ndraw()',
         picture()),
    code("explore(draw)"),
    translate.markdown("> **Exercise 1.1 (predict).** How *much*?\n\n"
                       "<details><summary>Hint 1</summary>\n\nThink of $x$.\n\n</details>"),
    code('check("1.1", ...)', printed("Exercise 1.1: no answer yet\n")),
    code('# Solution 1.1\n#| code-fold: true\ncheck_solution("1.1", 3)'),
]
SECOND = [
    translate.markdown("## Words\n\n| a | b |\n|---|---:|\n| `x` | 2 |\n\nBack to "
                       "[weigh](attention.html#weigh), exercise 1.1 and [a lost place](attention.html#lost)."),
    code(LONG, printed("plain\n")),
]


@pytest.fixture
def folder(tmp_path):
    "Processed and translated notebooks, as the site's build leaves them."
    pages = {"01_attention": ("Attention", FIRST), "02_more": ("More", SECOND), "99_teachers": ("For teachers", [])}
    for name, (title, cells) in pages.items():
        front = build.front(title, f"About `{title}`.")
        front["source"] = front["source"].replace("\n---\n", f"\noutput-file: {name[3:]}.html\n---\n")
        done = translate.translate([front, *cells], f"{name[3:]}.html", {}, tmp_path / "figures")
        build.save(tmp_path / f"{name}.ipynb", done)
    return tmp_path


def test_a_page_on_paper(folder):
    text, problems = pdf.document(folder, CONFIG)
    assert problems == []
    assert '<h1 id="part-i-begin">Part I: begin</h1>' in text and '<h2 id="attention">01 Attention</h2>' in text
    assert '<h3 id="attention.weights">Weights</h3>' in text
    assert "teachers</a>" not in text and "For teachers" not in text
    assert r'<script type="math/tex; mode=display">\operatorname{softmax}(x)_i \lt  1' in text and "$$" not in text
    assert '<pre class="python"><code>def weigh(x):' in text and '<pre class="output"><code>0.5</code></pre>' in text
    assert "Its table" not in text and "draw()" not in text and "needs a kernel" not in text
    assert "no answer" not in text and 'width="50%"' in text and "<strong>Figure 1.1.</strong> Blue." in text


def test_links_lead_to_what_the_book_has(folder):
    text, _ = pdf.document(folder, CONFIG)
    links = dict(re.findall(r'<a [^>]*href="#([^"]+)"[^>]*>([^<]+)</a>', text))
    assert links["more.words"] == "more" and links["attention.equation-1.1"] == "equation (1.1)"
    assert links["attention.source-weigh"] == "weigh" and links["attention"] == "a lost place"
    known = re.findall(r' id="([^"]+)"', text)
    assert set(links) <= set(known) and len(set(known)) == len(known)


def test_solutions_are_at_the_end_and_hints_are_not(folder):
    text, _ = pdf.document(folder, CONFIG)
    chapters, solutions = text.split('<h1 id="solutions">')
    assert re.search(r'<div class="hint">\s*<p><strong>Hint 1\. </strong>Think of', chapters)
    assert "check_solution" not in chapters
    assert '<a class="solution" href="#attention.solution-1.1">Solution 1.1</a>' in chapters
    assert 'id="attention.solution-1.1"' in solutions and 'check_solution("1.1", 3)' in solutions
    assert '<a href="#attention.exercise-1.1">Solution 1.1</a>' in solutions and "More" not in solutions


def test_long_lines_are_folded_and_nothing_is_lost():
    assert max(map(len, pdf.folded(LONG).split("\n"))) <= pdf.LONGEST < len(LONG)
    assert "".join(pdf.folded(LONG).split()) == "".join(LONG.split())
    assert max(map(len, pdf.folded("x" * 500).split("\n"))) <= pdf.LONGEST
    short = "    return x  # as it is  \n\n\tend"
    assert pdf.folded(short) == short


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(pdf, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(BookError, match="need no-such-package: use `make pdf`"):
        pdf.check_tools()


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install -e '.[pdf]'")
def test_a_pdf_and_an_epub(folder, tmp_path):
    text, _ = pdf.document(folder, CONFIG)
    paper, epub = pdf.write(folder, text, INFO, tmp_path / "made")
    assert paper.read_bytes()[:5] == b"%PDF-"
    pages = re.search(rb"/Type ?/Pages ?/Count (\d+)", paper.read_bytes())
    assert int(pages.group(1)) == 8  # title, contents, about, part, two chapters, part, solutions
    with zipfile.ZipFile(epub) as archive:
        names = archive.namelist()
        pages = [archive.read(name) for name in names if name.endswith(".xhtml")]
    for page in pages:
        ElementTree.fromstring(page)
    whole = b"".join(pages)
    assert whole.count(b"<math") == 2 and b"\\operatorname{softmax}(x)_i" not in re.sub(
        rb"<annotation.*?</annotation>", b"", whole, flags=re.S)
    assert any(name.endswith(".png") for name in names) and whole.count(b"<img") == 1
    typst = (folder / "book.typ").read_text(encoding="utf-8")
    assert 'op("softmax")' in typst and '#equation("(1.1)")[' in typst
    assert "#solution(<attention.solution-1.1>)[" in typst


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: pip install -e '.[pdf]'")
def test_what_pandoc_cannot_write_is_an_error(folder, tmp_path):
    with pytest.raises(BookError, match="Pandoc can't write the book: .*nowhere.png"):
        pdf.write(folder, '<p><img src="nowhere.png" alt=""></p>', INFO, tmp_path / "made")
