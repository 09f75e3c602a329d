"""The site: what its translation does, and what a reader's browser finds on every page.

The browser's part needs Chromium and playwright; without them it is skipped, and says so.
"""
import functools
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from transformer_llm.demo import TRAINING_LENGTH, counting_sequences
from transformer_llm.foundations import set_seed
from transformer_llm.generation import generate
from transformer_llm.tokenizer_files import tokenizer_from_json
from transformer_llm.training import AdamW
from transformer_llm.transformer import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "tools")]

import api
import live_data
import references
import render
import translate
from browser import browser as chromium
from browser import needs_browser, watch

PHONE, DESKTOP = {"width": 375, "height": 760}, {"width": 1280, "height": 900}
LARGEST = 1_500_000  # bytes of a page with all that it loads
RAW = {
    "a fenced div": r"^:::",
    "a Quarto reference": r"@(fig|eq|tbl|sec)-",
    "dollars": r"\$\$",
    "an unrendered formula": r"\\[(\[]|\\(frac|operatorname|sqrt|tag)\b",
    "question marks for a reference": r"\?\?",
    "a directive": r"^#\|",
}


# ---------------------------------------------------------------- translation, without a browser

def code(source, *outputs):
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs)}


PICTURE = b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + (640).to_bytes(4, "big") + (480).to_bytes(4, "big")


def picture(data=PICTURE):
    import base64
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(data).decode()}}


def page_of(*cells, address="attention.html", folder=Path("unused")):
    "The rendered content of a page made of these cells."
    soup, held = render.body(translate.translate(list(cells), address, {}, folder))
    return soup, held


def linked(pages, chapters=None):
    "Pages of markdown, by address, after their references became links; also what leads nowhere."
    soups = {
        address: render.body([translate.markdown(translate.exercises(translate.equations(text))[0])])[0]
        for address, text in pages.items()
    }
    targets = references.collect(soups, chapters or {})
    problems = [problem for address, soup in soups.items() for problem in references.link(soup, address, targets)]
    return soups, problems


def hrefs(soup):
    return {references.words(a.get_text()): a["href"] for a in soup.find_all("a")}


def test_equations_have_numbers_and_anchors():
    soup, held = page_of(translate.markdown("Before.\n\n$$x = \\frac12\n\\tag{1.2}$$\n\nAfter $y$."))
    assert soup.find(id="equation-1.2").find(class_="number").get_text() == "(1.2)"
    assert sum("<math" in text for text in held) == 2 and not any("tag" in text for text in held)


def test_equations_in_code_stay():
    assert translate.equations("```\n$$x \\tag{1.2}$$\n```") == "```\n$$x \\tag{1.2}$$\n```"


def test_exercises_become_boxes_with_hints_cell_and_solution():
    soup, held = page_of(
        translate.markdown(
            "> **Exercise 1.1 (predict).** How *much*?\n> Say "
            "it.\n\n<details><summary>Hint 1</summary>\n\nThink of $x$.\n\n</details>"
        ),
        code("def helper(): ..."),
        code('check("1.1", ...)'),
        code('# Solution 1.1\n#| code-fold: true\ncheck_solution("1.1", 3)'),
        translate.markdown("Outside."),
    )
    box = soup.find(id="exercise-1.1")
    assert box.find(class_="title").get_text() == "Exercise 1.1 predict" and box.find("em").get_text() == "much"
    assert [s.get_text() for s in box.find_all("summary")] == ["Hint 1", "Solution 1.1"]
    assert "Outside." in soup.get_text() and "Outside." not in box.get_text() and len(box.select(".cell")) == 3


def test_an_exercise_between_paragraphs_closes_its_box():
    soup, _ = page_of(translate.markdown("Before.\n\n> **Exercise 1.1.** Do.\n\nAfter."))
    assert "After." not in soup.find(id="exercise-1.1").get_text() and "Do." in soup.find(id="exercise-1.1").get_text()


def test_pictures_become_figures(tmp_path):
    cell = code(
        '#| fig-alt: "A <small> square"\n#| fig-cap: "Figure 1.3. What $x$ does."\ndraw();', picture(), picture()
    )
    soup, held = page_of(cell, folder=tmp_path / "figures")
    figure = soup.find(id="figure-1.3")
    assert [image["alt"] for image in figure.find_all("img")] == ["A <small> square"] * 2
    assert figure.find("img")["width"] == "640" and (tmp_path / figure.find("img")["src"]).exists()
    assert figure.find("figcaption").get_text(" ", strip=True).startswith("Figure 1.3.")
    assert "fig-alt" not in "".join(held)


def test_controls_become_a_note():
    soup, held = page_of(
        code(
            "explore(draw, window=(1, 8))",
            {
                "output_type": "display_data",
                "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "interactive(...)"},
            },
        )
    )
    assert soup.select_one(".kernel a")["href"] == "#open" and "interactive" not in soup.get_text()


def test_source_stands_before_its_cards():
    entries = {
        n: api.Entry(
            n, "attention", "01_attention.ipynb", 1, f"About {n}.", [("x", 'Float[Tensor, "seq"]', "", "Of `seq`")]
        )
        for n in ("one", "two")
    }
    cells = [
        code("#| echo: false\nshow_doc(two)"),
        code('#| code-fold: show\n#| code-summary: "Exported source"\n#| exports\ndef one(x): ...\ndef two(x): ...'),
        code("show_doc(one)"),
    ]
    made = translate.translate(cells, "attention.html", entries, Path("unused"))
    assert made[0]["source"].startswith("def one") and [
        re.search('id="(.*?)"', c["source"]).group(1) for c in made[1:]
    ] == ["one", "two"]
    assert (
        '<td><code>Float[Tensor, "seq"]</code></td>' in made[1]["source"]
        and 'href="source/attention.html#L1"' in made[1]["source"]
    )


def test_parameters_are_read_with_their_comments(tmp_path):
    (tmp_path / "attention.py").write_text(
        '# File to edit: ../nbs/01_attention.ipynb.\nclass C:\n    "A class."\n    '
        'def __init__(self, *, a: int = 3):  # ignored\n        ...\n'
        '    def step(self, b):\n        "Goes on."\n\ndef f(\n    x: Float[Tensor, "seq"],  # The `x`\n    y=(1, '
        '2), z: int | None = None,  # Last, # and all\n) -> int:  # How many\n    "Counts."\n'
    )
    found = api.read_package(tmp_path)
    assert found["f"].parameters == [
        ("x", 'Float[Tensor, "seq"]', "", "The `x`"),
        ("y", "", "(1, 2)", ""),
        ("z", "int | None", "None", "Last, # and all"),
    ]
    assert (
        found["f"].returns == ("int", "How many") and found["f"].line == 9 and found["C"].methods[0].anchor == "c.step"
    )


def test_references_become_links():
    soups, problems = linked(
        {
            "attention.html": '$$x \\tag{1.1}$$\n\n$$y \\tag{1.2}$$\n\n<figure id="figure-1.3">'
            '<figcaption>\n\n**Figure 1.3.** As in Figure 1.3.\n\n</figcaption></figure>\n\n> **Exercise 1.1.** Do.',
            "exercises/attention.html": "See (1.1), equations (1.1) and\n(1.2), Figure 1.3, Exercise 1.1 "
            "and chapter 02. Not `Figure 1.3`, not version (3.11), not chapter 40, not chapter 2.",
            "feedforward.html": "In chapter 02, [see chapter 02](x.html).",
        },
        {1: "attention.html", 2: "feedforward.html"},
    )
    assert problems == []
    up = "../attention.html#"
    assert hrefs(soups["exercises/attention.html"]) == {
        "(1.1)": f"{up}equation-1.1",
        "(1.2)": f"{up}equation-1.2",
        "Figure 1.3": f"{up}figure-1.3",
        "Exercise 1.1": f"{up}exercise-1.1",
        "chapter 02": "../feedforward.html",
    }
    assert len(soups["exercises/attention.html"].find_all("a")) == 6
    assert hrefs(soups["feedforward.html"]) == {"see chapter 02": "x.html"} and not soups["attention.html"].find_all(
        "a"
    )


@pytest.mark.parametrize(
    "text, name",
    [
        ("Figure 1.9 shows it.", "Figure 1.9"),
        ("By equation (1.8), so.", "equation (1.8)"),
        ("It is (1.7) again.", "(1.7)"),
        ("Exercise 2.4 asks.", "Exercise 2.4"),
    ],
)
def test_a_reference_to_nothing_is_named_with_page_and_text(text, name):
    _, problems = linked({"attention.html": text}, {1: "attention.html"})
    assert (
        len(problems) == 1
        and problems[0].startswith(f"attention.html: {name!r} refers to nothing")
        and text[-9:] in problems[0]
    )


def test_citations_lead_to_the_bibliography():
    soups, problems = linked(
        {
            "bibliography.html": "- Vaswani et al. (2017). *Attention*. arXiv.\n- Shazeer (2019). *Fast*.\n"
            "- Milakov and Gimelshein (2018). *Online*.",
            "a.html": "Vaswani et al. (2017, section 3.2.1), then Shazeer (2019) and Milakov and Gimelshein (2018); "
            "Nobody et al. (2020) too.",
        }
    )
    assert list(hrefs(soups["a.html"]).values()) == [
        "bibliography.html#vaswani-2017",
        "bibliography.html#shazeer-2019",
        "bibliography.html#milakov-2018",
    ]
    assert problems == ["a.html: Nobody et al. (2020) is not in the bibliography"]


def test_the_first_mention_of_a_term_leads_to_the_glossary():
    soups, _ = linked(
        {
            "glossary.html": "### token\n\nA piece of text.\n\n### attention head\n\nOne of several.",
            "a.html": "## Tokens\n\n`token`. Tokens and\nattention heads; a token.",
        }
    )
    assert [(a.get_text().replace("\n", " "), a["href"], a["title"]) for a in soups["a.html"].find_all("a")] == [
        ("Tokens", "glossary.html#token", "A piece of text."),
        ("attention heads", "glossary.html#attention-head", "One of several."),
    ]
    assert not soups["glossary.html"].find_all("a")


def test_other_names_of_a_term_count_as_mentions_and_two_meanings_do_not():
    soups, _ = linked(
        {
            "glossary.html": "### KV cache\n\nAlso: KVCache, key-value cache. What is kept. More of it.\n\n"
            "### value (of a token)\n\nWhat it hands over.",
            "a.html": "The key-value cache keeps a value; the KV cache keeps a key.",
        }
    )
    assert [(a.get_text(), a["href"], a["title"]) for a in soups["a.html"].find_all("a")] == [
        ("key-value cache", "glossary.html#kv-cache", "What is kept.")
    ]


def test_folds_hide_code_and_solutions_hide_all():
    printed = {"output_type": "stream", "name": "stdout", "text": "told"}
    soup, _ = page_of(
        code('# How\n#| code-fold: true\nprint()', printed),
        code('# Solution 1.1\n#| code-fold: true\nprint()', printed),
    )
    assert [(d["class"], len(d.find_all(attrs={"data-held": True}))) for d in soup.find_all("details")] == [
        (["fold"], 1),
        (["solution"], 2),
    ]
    assert len(soup.find_all(attrs={"data-held": True})) == 4


def test_dead_links_are_named(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here">x</a><a href="b.html#there">y</a><a '
        'href="c.html">z</a><a href="https://example.org">w</a></p>',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text("<p></p>", encoding="utf-8")
    assert references.dead_links(tmp_path) == ["a.html: b.html#there has no such anchor", "a.html: c.html is not there"]


def test_headings_and_tables():
    soup, _ = render.body(
        [translate.markdown("## The *size* of `x`: 3?\n\n## Twice\n\n## Twice\n\n| a |\n|---|\n| b |")]
    )
    assert [h["id"] for h in soup.find_all("h2")] == ["the-size-of-x-3", "twice", "twice-1"] and soup.table.parent[
        "tabindex"
    ] == "0"


def run_build(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "book" / "build.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        **options,
    )


def test_help_and_errors_are_short(tmp_path):
    assert "--draft" in run_build("--help").stdout
    done = run_build("--root", tmp_path)
    assert done.returncode == 2 and "settings.ini" in done.stderr and len(done.stderr.splitlines()) == 1


PROJECT = {
    "settings.ini": "[DEFAULT]\nrepo = small\nlib_name = small\nuser = someone\nbranch = main\nversion = 0.1\n"
    "title = Small\nnbs_path = nbs\nlib_path = small\ndoc_path = _docs\n"
    "recursive = True\ncustom_sidebar = True\ngit_url = "
    "https://example.org/small\ndoc_host = https://example.com\ndoc_baseurl = /small\nmin_python = 3.11\n"
    "description = d\nkeywords = k\nauthor = a\nauthor_email = "
    "a@example.org\ncopyright = c\nlanguage = English\nlicense = apache2\nstatus = 3\n",
    "_quarto.yml": "project:\n  type: website\n  output-dir: _docs\nwebsite:\n  title: Small\n"
    "  sidebar:\n    contents: [index.ipynb, 01_one.ipynb, api.ipynb]\n",
    "nbs/index.ipynb": [
        "# Small\n\n> A book of one chapter.",
        "See [the chapter](01_one.ipynb#A-heading), equation (1.1) and [the licence](../LICENSE).",
    ],
    "nbs/01_one.ipynb": [
        "# One\n\n> Of `one`.",
        "$$x \\tag{1.1}$$",
        "## A heading",
        "#| default_exp one",
        "#| exports\ndef one():\n    'One.'",
    ],
    "small/__init__.py": "",
    "small/one.py": '# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/01_one.ipynb.\ndef one():\n    "One."\n',
}
# Stands for Quarto: a page for each notebook, at the address that its front matter names, in the folder that
# _quarto.yml names.
QUARTO = """#!{python}
import sys
from pathlib import Path
sys.path.insert(0, {book!r})
from build import load, notebooks
from render import body, release
assert sys.argv[1:] == ["render", ".", "--no-execute"] and Path("content.css").exists()
assert "css: content.css" in Path("_quarto.yml").read_text()
for address, path in notebooks(Path.cwd()).items():
    soup, held = body(load(path)["cells"])
    target = Path("_docs", address)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("<html><main>" + release(str(soup.find(id="content-body")), held) + "</main></html>")
"""


@pytest.fixture
def small(tmp_path):
    "A book of one chapter, in a folder of its own."
    for name, content in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not isinstance(content, str):
            content = json.dumps(
                {
                    "cells": [code(text) if text.startswith("#|") else translate.markdown(text) for text in content],
                    "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            )
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "renderer",
    [
        "own",
        pytest.param("quarto", marks=pytest.mark.skipif(os.name == "nt", reason="the stand-in for Quarto is a script")),
    ],
)
def test_a_small_book_is_built_by_either_renderer(small, renderer):
    tools = small / "tools"
    tools.mkdir()
    if renderer == "quarto":
        (tools / "quarto").write_text(QUARTO.format(python=sys.executable, book=str(ROOT / "book")))
        (tools / "quarto").chmod(0o755)
    done = run_build("--root", small, env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.relative_to(small / "_docs").as_posix() for path in (small / "_docs").rglob("*.html")} == {
        "index.html",
        "one.html",
        "api.html",
        "source/one.html",
        *(["404.html"] if renderer == "own" else []),
    }
    text = (small / "_docs" / "index.html").read_text(encoding="utf-8")
    assert (
        'href="one.html#a-heading"' in text
        and 'href="one.html#equation-1.1"' in text
        and "https://example.org/small/blob/main/LICENSE" in text
    )
    assert (
        "/someone/small/blob/main/nbs/index.ipynb" in text and (small / "_docs" / "notebooks" / "01_one.ipynb").exists()
    )


@pytest.mark.parametrize(
    "name, old, new, code, told",
    [
        ("nbs/index.ipynb", "equation (1.1)", "equation (1.9)", 1, "index.html: 'equation (1.9)' refers to nothing"),
        (
            "_quarto.yml",
            "01_one.ipynb,",
            "01_one.ipynb, 02_two.ipynb,",
            1,
            "_quarto.yml lists 02_two.ipynb, which is not there",
        ),
        (
            "nbs/01_one.ipynb",
            "$$x",
            "$$\\\\nonsense{x",
            2,
            "one.html: The formula '\\\\nonsense{x' can't be turned into MathML.",
        ),
        ("nbs/01_one.ipynb", "cells", "cel", 2, "nbdev can't process the notebooks"),
    ],
)
def test_what_is_wrong_with_a_book_is_named(small, name, old, new, code, told):
    text = (small / name).read_text(encoding="utf-8")
    assert old in text
    (small / name).write_text(text.replace(old, new), encoding="utf-8")
    done = run_build("--root", small)
    assert done.returncode == code and done.stderr.startswith(told) and len(done.stderr.splitlines()) == 1
    assert code == 2 or run_build("--root", small, "--draft").returncode == 0


def test_only_a_site_is_overwritten(small):
    (small / "mine").mkdir()
    (small / "mine" / "thesis.txt").write_text("...")
    done = run_build("--root", small, "--output", small / "mine")
    assert done.returncode == 2 and "is no site" in done.stderr and (small / "mine" / "thesis.txt").exists()


# ---------------------------------------------------------------- the site as built

@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The site, built once, and what the build complained about."
    folder = tmp_path_factory.mktemp("site") / "_docs"
    done = run_build("--draft", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_book_has_no_loose_ends(built):
    assert not built[1].stderr, built[1].stderr


def test_pages_are_light(built):
    folder = built[0]
    heavy = {}
    for path in sorted(folder.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        loaded = {
            (path.parent / name).resolve()
            for name in re.findall(r'<(?:img|link|script)\b[^>]*?\s(?:src|href)="([^"]+)"', text)
        } | set((folder / "fonts").iterdir())
        weight = path.stat().st_size + sum(p.stat().st_size for p in loaded if p.exists())
        if weight > LARGEST:
            heavy[path.relative_to(folder).as_posix()] = weight
    assert not heavy


def test_addresses_are_those_of_nbdev(built):
    for name in ("index", "attention", "exercises/attention", "api", "glossary", "source/attention"):
        assert (built[0] / f"{name}.html").exists(), name


# ---------------------------------------------------------------- in a browser

def in_browser(test):
    "One of the group `make test-browser`."
    for mark in needs_browser:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def browser():
    "Closed with this file: where two files share a worker, the second could not start Playwright beside it."
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def site(built):
    "The address at which the built site is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    "Where pictures of the pages go."
    folder = Path(os.environ.get("BOOK_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def addresses(folder):
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html"))]


# axe looks at each text's contrast anew, which takes seconds on a long page. Contrast is decided by a text's colour and
# size and by what is
# behind it: one text of each kind is enough. (Tokens of code have a test of their own; here code is one text, and so is
# a formula.)
FLATTEN = (
    "for (const inner of document.querySelectorAll('pre.code > code, math')) inner.textContent = inner.textContent"
)
COLOURS = ["color-contrast", "link-in-text-block"]
KINDS = """() => {
  const seen = new Set(), behind = new Map([[null, ""]]);
  const ground = element => {  // what is behind an element, as its ancestors paint it; worked out once for each
    if (!behind.has(element)) {
      const { backgroundColor, opacity } = getComputedStyle(element);
      const own = [backgroundColor, opacity].filter(k => k !== "rgba(0, 0, 0, 0)" && k !== "1").join();
      behind.set(element, `${own};${ground(element.parentElement)}`.replace(/^;/, ""));
    }
    return behind.get(element);
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
        || !element.checkVisibility()) continue;
    const { color, fontSize, fontWeight } = getComputedStyle(element);
    const key = [color, fontSize, fontWeight, ground(element)].join();
    if (!seen.has(key)) { seen.add(key); element.dataset.kind = seen.size }
  }
  return seen.size;
}"""


ONLY_KINDS = """() => {
  const prune = element => {
    for (const child of [...element.children]) {
      if (child.dataset.kind) continue;
      if (child.querySelector("[data-kind]")) prune(child); else child.remove();
    }
  };
  prune(document.body);
}"""


def axe():
    from importlib.util import find_spec
    if find_spec("axe_playwright_python") is None:
        pytest.skip("axe-playwright-python is not installed")
    return next(Path(find_spec("axe_playwright_python").origin).parent.rglob("axe.min.js")).read_text(encoding="utf-8")


def violations(page, where=None, **options):
    "What axe finds on a page, or in the elements that a selector names."
    found = page.evaluate(
        "([where, options]) => axe.run(where ? { include: [[where]] } : document, options).then(r => r.violations)",
        [where, {"resultTypes": ["violations"], **options}],
    )
    return [
        f"{item['id']}: {item['nodes'][0]['html'][:120]}"
        + (f" and {len(item['nodes']) - 1} more" if len(item["nodes"]) > 1 else "")
        for item in found
    ]


def contrasts(page):
    "The marked texts of this page that are hard to read."
    return violations(page, "[data-kind]", runOnly=COLOURS)


def read_pages(browser, pages, site, shots):
    "What is wrong with these pages."
    problems, script = [], axe()
    page = browser.new_context(viewport=DESKTOP, color_scheme="light").new_page()
    notes = watch(page)
    here = ""

    def note(text):
        problems.append(f"{here}: {text}")
    for here in pages:
        page.goto(site + here)
        text = page.evaluate(
            "() => { const m = document.querySelector('main').cloneNode(true); "
            "m.querySelectorAll('code, pre, math, script, style').forEach(e => e.remove()); return m.textContent }"
        )
        for what, pattern in RAW.items():
            if found := re.search(pattern, text, re.M):
                note(f"{what}: {text[max(0, found.start() - 30):found.end() + 30]!r}")
        if (
            not page.title()
            or page.locator("main").count() != 1
            or page.locator("h1").count() != 1
            or not page.locator("meta[name=description]").get_attribute("content")
        ):
            note("no title, description, main part or heading")
        if missing := page.evaluate(
            "[...document.images].filter(i => !i.hasAttribute('alt') || !i.getAttribute('alt').trim()).map(i => i.src)"
        ):
            note(f"no alternative text: {missing}")
        page.evaluate("() => window.bookLive?.mountAll()")
        page.evaluate(FLATTEN)
        page.evaluate(script)
        problems.extend(
            f"{here}: {v}" for v in violations(page, rules={rule: {"enabled": False} for rule in COLOURS})
        )
        assert page.evaluate(KINDS) > 3
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(PHONE)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        if (width := page.evaluate("document.documentElement.scrollWidth")) > PHONE["width"]:
            note(f"{width} pixels wide on a phone of {PHONE['width']}")
        problems.extend(f"{here}, dark, phone: {v}" for v in violations(page, runOnly=["scrollable-region-focusable"]))
        if os.environ.get("BOOK_SCREENSHOTS"):  # nobody looks at them otherwise
            page.screenshot(path=shots / f"{here.replace('/', '-').removesuffix('.html')}-phone-dark.png")
        assert page.evaluate(KINDS) > 3
        page.evaluate(ONLY_KINDS)  # axe walks over the whole page at each call
        problems.extend(f"{here}, dark, phone: {v}" for v in contrasts(page))
        page.set_viewport_size(DESKTOP)
        page.emulate_media(color_scheme="light")
        problems.extend(f"{here}: {v}" for v in contrasts(page))
        problems.extend(f"{here}: {problem}" for problem in notes.problems())
        notes.clear()
    return problems


@in_browser
def test_every_page_in_a_browser(built, site, browser, shots):
    """Nothing fails, nothing comes from elsewhere, nothing is left untranslated; accessible in light and dark.

    No page is wider than a phone.
    """
    pages = sorted(addresses(built[0]), key=lambda name: -(built[0] / name).stat().st_size)

    def second():
        with chromium() as another:
            return read_pages(another, pages[1::2], site, shots)
    with ThreadPoolExecutor(1) as pool:  # two cores, two browsers
        others = pool.submit(second)
        problems = read_pages(browser, pages[::2], site, shots) + others.result()
    assert not problems, "\n" + "\n".join(problems)


@in_browser
def test_code_colours_can_be_read(built, site, browser):
    "Each kind of token, once, on the code's background, by axe's measure, light and dark."
    kinds = {
        kind
        for path in built[0].rglob("*.html")
        for kind in re.findall(r'<span class="(\w{1,3})">', path.read_text(encoding="utf-8"))
    }
    assert len(kinds) > 15
    page = browser.new_page(viewport=DESKTOP)
    page.goto(site + "api.html")
    page.evaluate(axe())
    page.evaluate(
        "kinds => { document.querySelector('main').innerHTML = '<h1>Kinds</h1><pre class=\"sample code\" "
        "tabindex=\"0\">' + kinds.map(k => `<span class=\"${k}\">${k} token</span>`).join(' ') + '</pre>' }",
        sorted(kinds),
    )
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert violations(page, "pre.sample", runOnly=["color-contrast"]) == [], scheme


@in_browser
def test_search_finds_a_section_without_a_mouse(site, browser):
    page = browser.new_page(viewport=DESKTOP)
    page.goto(site + "exercises/attention.html")
    page.keyboard.press("/")
    page.keyboard.type("attention")
    page.wait_for_selector(".results a")
    assert (
        page.locator(".results a").count() > 5 and "attention" in page.locator(".results li").first.inner_text().lower()
    )
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.locator(".results a").nth(1).get_attribute("href")
    assert page.evaluate("document.activeElement.getAttribute('href')") == second
    page.keyboard.press("ArrowUp")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert page.locator("main h1").count() == 1


@in_browser
def test_search_answers_what_a_student_types(site, browser):
    "Small words, endings, one letter wrong, other words for the same thing, and the exact name of a function."
    page = browser.new_page(viewport=DESKTOP)
    page.goto(site + "index.html")
    page.click("#search-open")
    page.wait_for_function("() => !!window.bookSearch")
    wanted = {
        "overfitting": "training.html#learning-by-heart",
        "fine-tuning": "finetuning.html",
        "softmx": "attention.html#softmax",
        "transfomer": "transformer.html",
        "why divide by sqrt d": "attention.html#why-divide-by",
        "train my own model": "training.html",
        "learning rates": "training.html",
        "backpropagation": "transformer.html#the-gradient",
        "how to sample with top-p": "generation.html",
        "nucleus sampling": "generation.html",
        "RoPE": "embeddings.html#rotary",
        "BPE": "tokenizer.html",
        "what is the KV cache?": "attention.html",
        "FastTrainer": "fast.html",
        "load_tokenizer": "tokenizer",
    }
    first = {question: page.evaluate("question => bookSearch(question)[0]?.url", question) for question in wanted}
    assert not {question: url for question, url in first.items() if not (url or "").startswith(wanted[question])}
    overfit = page.evaluate("bookSearch('overfitting').map(found => found.url)")
    assert "glossary.html#overfit" in overfit[1:4]
    assert page.evaluate("bookSearch('the of and').length") == 0
    assert page.evaluate("bookSearch('FastTrainer')[0].section") == "FastTrainer"


@in_browser
def test_dark_mode_follows_the_system_until_one_chooses(site, browser):
    context = browser.new_context(viewport=DESKTOP, color_scheme="dark")
    page = context.new_page()

    def brightness():
        return sum(
            map(
                int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))[:3]
            )
        )

    page.goto(site + "index.html")
    assert brightness() < 200 and page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.click("#theme")
    assert brightness() > 600
    page.goto(site + "attention.html")
    assert brightness() > 600 and page.locator("#theme").get_attribute("aria-pressed") == "false"
    context.close()


@in_browser
def test_code_can_be_copied(site, browser):
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(site + "attention.html")
    page.locator(".cell .copy").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".cell pre.code").first.text_content()
    context.close()


def from_disk(browser, built, name):
    "A page as a reader opens it from a folder, with all its figures, and what it complains about."
    page = browser.new_context(viewport=DESKTOP).new_page()
    notes = watch(page)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((built[0] / name).as_uri())
    page.evaluate("() => window.bookLive.mountAll()")
    return page, notes, asked


def test_the_home_pages_figure_has_the_notebooks_training():
    "Weights, batches and losses of the committed script are those of chapter 00 today."
    kept, now = live_data.read_data("counting"), live_data.counting()
    assert max(abs(a - b) for a, b in zip(kept.pop("losses"), now.pop("losses"), strict=True)) < 1e-3
    assert kept == now


@in_browser
def test_the_counting_model_trains_in_the_home_page(built, browser):
    "From the disk, the notebook's own curve within 1e-3 at every step, and then it counts from any digit."
    page, notes, asked = from_disk(browser, built, "index.html")
    figure = page.locator("figure[data-live=counting]")
    figure.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('figure[data-live=counting]').dataset.losses", timeout=60_000)
    losses, wanted = json.loads(figure.get_attribute("data-losses")), live_data.read_data("counting")["losses"]
    assert len(losses) == len(wanted) == 200 and max(abs(a - b) for a, b in zip(losses, wanted)) < 1e-3
    for digit in (7, 3):
        figure.locator("select").select_option(str(digit))
        counted = [int(text) for text in figure.locator(".written").inner_text().split("→")]
        assert len(counted) == 12 and counted == [(digit + i) % 10 for i in range(12)]
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


@in_browser
@pytest.mark.parametrize(
    "name, live", [("attention", "heads"), ("embeddings", "clocks"), ("tokenizer", "merges"), ("generation", "rules")]
)
def test_a_figure_answers_the_keyboard_from_the_disk(built, browser, name, live):
    "Each control says what it is; an arrow key changes what the figure shows and what a screen reader is told."
    page, notes, asked = from_disk(browser, built, f"{name}.html")
    figure = page.locator(f"figure[data-live={live}]")
    assert figure.locator("p:has-text(\"doesn't work here\")").count() == 0
    sliders = figure.locator("input[type=range]")
    assert sliders.count() >= 1 and all(
        figure.locator(f"label[for={control.get_attribute('id')}]").count() == 1
        for control in figure.locator("input, select").all()
    )
    shown = "figure => figure.innerHTML.replace(/<div class=.controls.*?<\\/div><\\/div>/s, '')"
    states = {figure.evaluate(shown)}
    sliders.last.focus()
    for key in ("ArrowRight", "Home", "End"):
        page.keyboard.press(key)
        states.add(figure.evaluate(shown))
    assert len(states) > 2
    page.wait_for_function("f => f.querySelector('.unseen[aria-live]').textContent", arg=figure.element_handle())
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


def pressed(page, live, attribute, timeout=120_000):
    "A figure's button is reached and pressed by the keyboard; what it has when the work in its worker is done."
    figure = page.locator(f"figure[data-live={live}]")
    assert figure.locator("p:has-text(\"doesn't work here\")").count() == 0
    figure.locator("button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"f => f.dataset.{attribute}", arg=figure.element_handle(), timeout=timeout)
    page.wait_for_function("f => f.querySelector('.unseen[aria-live]').textContent", arg=figure.element_handle())
    return figure, figure.get_attribute(f"data-{attribute}")


def moved(page, figure, number, presses):
    "A figure's slider, moved by arrow keys from its low end."
    figure.locator("input[type=range]").nth(number).focus()
    page.keyboard.press("Home")
    for _ in range(presses):
        page.keyboard.press("ArrowRight")


def counting_losses(rate, warmup):
    "PyTorch's losses in 100 steps of chapter 00's model, at a rate that grows, then falls in a straight line."
    set_seed(0)
    model, generator = GPT(GPTConfig.preset("demo")), torch.Generator().manual_seed(0)
    optimizer, losses = AdamW(model.parameters(), lr=rate, weight_decay=0.1), []
    for step in range(100):
        batch = counting_sequences(torch.randint(7, (16,), generator=generator), TRAINING_LENGTH)
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / max(warmup, 1)) * (1 - step / 100)
        optimizer.step()
        losses.append(loss.item())
    return losses


@in_browser
def test_rates_are_tried_in_the_page_of_chapter_07(built, browser):
    "Two rates, one with a warm-up: PyTorch's losses at each step, both runs in the picture, and the table's means."
    page, notes, asked = from_disk(browser, built, "training.html")
    figure = page.locator("figure[data-live=rates]")
    for number, (place, rate, presses, warmup) in enumerate(((4, 0.01, 0, 0), (5, 0.03, 2, 10)), 1):
        moved(page, figure, 0, place)
        moved(page, figure, 1, presses)
        _, losses = pressed(page, "rates", "losses")
        wanted = counting_losses(rate, warmup)
        assert max(abs(a - b) for a, b in zip(json.loads(losses), wanted, strict=True)) < 1e-3
        assert figure.locator("polyline").count() == figure.locator("tbody tr").count() == number
        row = figure.locator("tbody tr").last.inner_text().split()
        assert row == [str(number), str(rate), str(warmup), row[-1]]
        assert float(row[-1]) == pytest.approx(sum(wanted[-20:]) / 20, abs=2e-3)
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


@in_browser
def test_the_minutes_model_writes_in_the_page_of_chapter_08(built, browser):
    "Its size is said, nothing of it is loaded before the button; then it writes what the package writes with it."
    page, notes, asked = from_disk(browser, built, "generation.html")
    figure = page.locator("figure[data-live=poet]")
    told = float(re.search(r"([\d.]+) MB", figure.inner_text()).group(1))
    weight = sum((built[0] / name).stat().st_size for name in ("poet.js", "engine.js"))
    assert told == pytest.approx(weight / 1e6, abs=0.01)
    assert not any("poet.js" in url for url in asked)
    moved(page, figure, 0, 0)  # temperature 0
    _, text = pressed(page, "poet", "written")
    data = live_data.read_data("poet")
    model, tokenizer = live_data.unpacked(data), tokenizer_from_json(json.dumps(data["tokenizer"]))
    wanted = generate(model, torch.tensor([tokenizer.encode("ROMEO:")]), 200, temperature=0.0)[0].tolist()
    assert text.startswith(tokenizer.decode(wanted)) and len(text) == len("ROMEO:") + 2000
    moved(page, figure, 0, 8)
    _, drawn = pressed(page, "poet", "written")
    assert drawn.startswith("ROMEO:") and len(drawn) == len(text) and drawn != text
    figure.locator("input[type=text]").fill("RÖMEO:")
    pressed(page, "poet", "written")
    assert "Ö" in figure.locator(".note").inner_text()
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


def printed(name, what):
    "Numbers that a notebook's cells print: all that a pattern finds in them, as numbers."
    notebook = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))
    text = "".join("".join(o.get("text", "")) for cell in notebook["cells"] for o in cell.get("outputs", []))
    return [tuple(map(float, found)) for found in re.findall(what, text)]


@in_browser
def test_the_cliff_of_chapter_19_happens_in_its_page(built, browser):
    "The notebook's losses on the way to the cliff, which comes within ten steps of its cliff; and both scores rise."
    page, notes, asked = from_disk(browser, built, "circuits.html")
    figure, _ = pressed(page, "growth", "looks")
    done = "f => JSON.parse(f.dataset.looks).length === 26"
    page.wait_for_function(done, arg=figure.element_handle(), timeout=240_000)
    looks = {step: row for step, *row in json.loads(figure.get_attribute("data-looks"))}
    wanted = printed("19_circuits.ipynb", r"step +(\d+): loss on the second copy ([\d.]+)")
    assert len(wanted) == 6
    assert all(abs(looks[int(step)][0] - loss) < 0.01 for step, loss in wanted if step <= 150)
    [(cliff, previous, induction, _)] = printed(
        "19_circuits.ipynb", r"seed 0: .*loss below 2 at (\d+); at the end ([\d.]+), ([\d.]+), ([\d.]+)"
    )
    assert abs(next(step for step, row in looks.items() if row[0] < 2) - cliff) <= 10
    assert looks[250][0] < 0.3 and looks[0][1] < 0.1 and looks[0][2] < 0.1
    assert abs(looks[250][1] - previous) < 0.15 and abs(looks[250][2] - induction) < 0.15
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


@in_browser
def test_text_of_ones_own_is_cut_and_looked_at(built, browser):
    "The merges of the page are the chapter's, and a letter finds its like."
    page, _, _ = from_disk(browser, built, "tokenizer.html")
    figure = page.locator("figure[data-live=merges]")
    figure.locator("input[type=text]").fill("ab ab ab")
    assert figure.locator(".note").inner_text() == "2 merges: 3 tokens; last merge: ·+ab; no pair is left"
    parts = page.evaluate("() => [0, 1, 2].map(n => bookLive.parts.ownMerges('ab ab ab', n).pieces.map(p => p.text))")
    assert parts == [["a", "b", "·", "a", "b", "·", "a", "b"], ["ab", "·", "ab", "·", "ab"], ["ab", "·ab", "·ab"]]
    weights = page.evaluate(
        "() => bookLive.parts.headWeights('aba', "
        "{ head: 'same letter', causal: true, window: 24, scale: true, temperature: 1 })"
    )
    matches = math.exp(8) / (2 * math.exp(8) + 1)
    assert weights[2] == pytest.approx([matches, 1 / (2 * math.exp(8) + 1), matches])
    page.context.close()


@in_browser
def test_pictures_drawn_in_advance_move(built, browser):
    "Nothing is loaded before a control moves; then the picture and its words change, one control at a time."
    page, notes, asked = from_disk(browser, built, "training.html")
    figure = page.locator("figure.explore").first
    assert not any("-move-" in url and not url.endswith("-0.png") for url in asked)
    image = figure.locator("img").first
    seen = "f => [f.querySelector('img').src, f.querySelector('canvas').hidden, f.querySelector('canvas').width]"
    before = figure.evaluate(seen)
    figure.locator("input[type=range]").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("f => f.dataset.at", arg=figure.element_handle())
    source, hidden, width = figure.evaluate(seen)
    assert source != before[0] or (not hidden and width == int(image.get_attribute("width")))
    assert image.get_attribute("alt").strip()
    assert not notes.errors + notes.failed and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.context.close()


def test_the_script_of_the_site_is_small(built):
    "All of it but the search index and a model's weights, which load when they are asked for."
    scripts = {path.name: path.stat().st_size for path in built[0].rglob("*.js")}
    assert scripts.keys() >= {"engine.js", "poet.js"}
    assert sum(size for name, size in scripts.items() if name not in ("search.js", "poet.js")) < 250_000
    assert scripts["poet.js"] < 1_500_000


def test_no_control_of_the_site_is_dead(built):
    for name in addresses(built[0]):
        assert "needs a kernel" not in (built[0] / name).read_text(encoding="utf-8"), name


@in_browser
def test_everything_can_be_read_without_scripts(site, browser, shots):
    context = browser.new_context(viewport=PHONE, java_script_enabled=False)
    page = context.new_page()
    page.goto(site + "attention.html")
    assert (
        page.locator("main math").count() > 20
        and page.locator("main p").count() > 30
        and page.locator("#theme").is_hidden()
    )
    assert not page.locator("#book").is_visible()
    page.click("a.menu")
    assert page.locator("#book a", has_text="Training").first.is_visible()
    page.click("#book .close")
    assert not page.locator("#book").is_visible()
    still = page.locator("figure.explore .stage img")
    assert still.count() == 2 and all(image.get_attribute("alt") for image in still.all())
    context.close()


@in_browser
def test_a_page_prints(site, browser, shots):
    page = browser.new_page(viewport=DESKTOP)
    page.goto(site + "attention.html")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#book").is_visible() and not page.locator(".bar").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(36, 38, 43)"
    page.pdf(path=shots / "attention.pdf", format="A4")
    assert (shots / "attention.pdf").stat().st_size > 100_000
