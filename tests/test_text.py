"""The text agrees with itself: figures, equations, references, citations, notation, glossary, lengths and spelling.

Each problem names the notebook, and the word, the symbol or the reference that is wrong. Nothing here executes a cell.
"""
import ast
import configparser
import json
import re
import zipfile
from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files

import colab
import contents
import execute
import pytest
from check import ROOT, SHAPED

PAGES = {name: ROOT / "nbs" / name for name in contents.pages() if (ROOT / "nbs" / name).exists()}
CHAPTERS = contents.chapters()
NUMBERED = [name for name in PAGES if contents.number(name) is not None]
NOTATION, GLOSSARY, BIBLIOGRAPHY = "96_notation.ipynb", "97_glossary.ipynb", "98_bibliography.ipynb"
DOCUMENTS = [*PAGES, "README.md", "data/README.md"]


# What a page says
# ------------------------------------------------------------------------------------------------------

@cache
def cells(page: str) -> list[tuple[str, str, dict]]:
    "Kind, text and content of each cell."
    notebook = json.loads(PAGES[page].read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in notebook["cells"]]


def number(page: str) -> str:
    return page[:2]


@cache
def markdown(page: str) -> str:
    "A page's markdown without code blocks."
    text = (
        "\n\n".join(text for kind, text, _ in cells(page) if kind == "markdown")
        if page in PAGES
        else (ROOT / page).read_text(encoding="utf-8")
    )
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def without_code(text: str) -> str:
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", " ", text, flags=re.S)


def without_math(text: str) -> str:
    return re.sub(r"\$\$.*?\$\$|(?<![\\$])\$(?!\s)[^$\n]+?\$", " ", text, flags=re.S)


@cache
def prose(page: str) -> str:
    "What a reader reads: markdown without code, formulas, addresses and mark-up."
    text = without_math(without_code(markdown(page)))
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", " ", text, flags=re.S)
    return re.sub(r"https?://\S+", " ", re.sub(r"\]\([^)\s]*\)", "] ", text))


@cache
def options(page: str, name: str) -> list[str]:
    "The values of a directive such as `fig-cap`, in order."
    return [
        value
        for kind, text, _ in cells(page)
        if kind == "code"
        for value in re.findall(rf'^#\|\s*{name}: "?(.*?)"?\s*$', text, re.M)
    ]


def docstrings(text: str) -> list[str]:
    "The docstrings of a code cell, and the comments that document its parameters where it is exported."
    try:
        tree = ast.parse(re.sub(r"^[%!].*$", "pass", text, flags=re.M))
    except SyntaxError:
        return []
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    comments = re.findall(r"  # (?!noqa)(.*)$", text, re.M) if re.match(r"#\|\s*exports?\b", text) else []
    return [note for note in found if note] + comments


def same_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def tables(page: str, columns: int) -> list[list[str]]:
    "The rows, without the head, of a page's tables with that many columns."
    rows = []
    for block in re.findall(r"(?:^\|.*\|\s*$\n?)+", markdown(page), re.M):
        lines = [
            [part.strip() for part in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            for line in block.strip().splitlines()
        ]
        rows += lines[2:] if len(lines[0]) == columns else []
    return rows


# Figures, equations, references
# ----------------------------------------------------------------------------------------

@cache
def figures() -> dict[str, str]:
    "Every figure's number, and the page that it stands on."
    return {
        found.group(1): page
        for page in NUMBERED
        for caption in options(page, "fig-cap")
        if (found := re.match(r"Figure (\d+\.\d+)\.", caption))
    }


@cache
def equations() -> dict[str, str]:
    "Every equation's number, and the page that it stands on."
    return {tag: page for page in PAGES for tag in re.findall(r"\\tag\{([^}]*)\}", markdown(page))}


@pytest.mark.parametrize("page", NUMBERED)
def test_figures_are_numbered_captioned_and_referred_to(page):
    problems, chapter = [], int(number(page))
    captions = options(page, "fig-cap")
    for position, caption in enumerate(captions, 1):
        if not re.match(rf"Figure {chapter}\.{position}\. \S.*[.!?]$", caption):
            problems.append(
                f"caption {position} should begin with 'Figure {chapter}.{position}. ' and be a sentence: {caption!r}"
            )
        elif not re.search(rf"Figures?\s(?:\d+\.\d+(?:,| and| to)\s)*{chapter}\.{position}\b", prose(page)):
            problems.append(f"Figure {chapter}.{position} is not referred to in the prose")
    for position, (_, text, cell) in enumerate(cells(page)):
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        drawn = any("image/png" in data and execute.FRAMES not in data for data in shown)  # a control has no caption
        if drawn and "#| fig-cap:" not in text:
            problems.append(f"cell {position} draws a picture without a caption")
        if "#| fig-cap:" in text and "#| fig-alt:" not in text:
            problems.append(f"cell {position} has a caption and no alternative text")
    assert not problems, f"\n{page}: " + f"\n{page}: ".join(problems)


@pytest.mark.parametrize("page", PAGES)
def test_equations_are_numbered(page):
    tags = re.findall(r"\\tag\{([^}]*)\}", markdown(page))
    wanted = [f"{int(number(page))}.{position}" for position in range(1, len(tags) + 1)] if tags else []
    assert tags == wanted, f"\n{page}: the equations are tagged {tags} and should be {wanted}"


@pytest.mark.parametrize("page", DOCUMENTS)
def test_references_lead_somewhere(page):
    text = same_line(prose(page))
    chapters = {number(name) for name in NUMBERED}
    problems = [
        f"Figure {name} is nowhere" for name in re.findall(r"Figures? (\d+\.\d+)", text) if name not in figures()
    ]
    problems += [
        f"equation ({name}) is nowhere" for name in re.findall(r"\((\d+\.\d+)\)", text) if name not in equations()
    ]
    problems += [
        f"equation {name} is nowhere or should be written ({name})"
        for name in re.findall(r"[Ee]quations? (\d+\.\d+)", text)
    ]
    # other books have chapters too
    own_text = re.split(r"^## Sources", markdown(page), flags=re.M)[0] if page != BIBLIOGRAPHY else ""
    outside_links = re.sub(r"\[[^\]]*\]\([^)]*\)", " ", without_code(own_text))
    for name in re.findall(r"(?i)\bchapters?\s+(\d+(?:(?:,|\s+and|\s+to)\s+\d+)*)", outside_links):
        problems += [
            f"there is no chapter {part} (chapters are written with two digits)"
            for part in re.findall(r"\d+", name)
            if part not in chapters
        ]
    assert not problems, f"\n{page}: " + f"\n{page}: ".join(problems)


# Structure and length
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", CHAPTERS)
def test_chapters_have_their_parts_and_length(page):
    "First the lesson, which ends in a recap, then the library, then the sources. tools/check.py counts the minutes."
    headings = re.findall(r"^## (.*)$", markdown(page), re.M)
    end = ["Recap", "The library", "Sources"] if "The library" in headings else ["Recap", "Sources"]
    problems = [f"has no section {name}" for name in end if name not in headings]
    if headings[-len(end):] != end:
        problems.append(f"should end with {', '.join(end)}, and ends with {headings[-len(end):]}")
    words, least = len(prose(page).split()), 1200 if number(page) == "00" else 1500
    if words < least or end[1] == "Sources" and words > 4500:
        problems.append(f"has {words} words of prose; at least {least} are wanted")
    assert not problems, f"\n{page}: " + f"\n{page}: ".join(problems)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_no_word_stands_twice(page):
    placed = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)|\$\$.*?\$\$|\$[^$\n]+\$", "·", markdown(page), flags=re.S)
    paragraphs = re.split(r"\n\s*\n|\|", placed)
    twice = [
        found.group(0)
        for paragraph in paragraphs
        for found in re.finditer(r"\b([a-z]{2,})\s+\1\b", same_line(paragraph))
        if found.group(1) not in {"that", "had"}
    ]
    assert not twice, f"\n{page}: {', '.join(twice)}"


# Citations
# -------------------------------------------------------------------------------------------------------------

NAME = r"[A-Z][\w’'-]+"
CITATION = re.compile(rf"(?:{NAME}, )*({NAME}(?: et al\.| and {NAME})?) \((\d{{4}})(?=[,)])")
LOOSE = re.compile(rf"{NAME}(?: et al\.,? | and {NAME},? |,? )\d{{4}}\b")


@cache
def bibliography() -> dict[str, str]:
    "Each entry's citation form, and the entry."
    return {
        found.group(1).split(", ")[-1]: found.group(0)
        for found in re.finditer(r"^- (.+? \(\d{4}\))\. .*$", markdown(BIBLIOGRAPHY), re.M)
    }


def cited(page: str) -> set[str]:
    "The citations of a page's markdown and docstrings."
    texts = [
        without_code(markdown(page)),
        *(note for kind, text, _ in cells(page) if kind == "code" for note in docstrings(text)),
    ]
    return {f"{name} ({year})" for text in texts for name, year in CITATION.findall(same_line(text))}


def test_bibliography_is_well_formed():
    entries = re.findall(r"^- .*$", markdown(BIBLIOGRAPHY), re.M)
    keys = list(bibliography())
    problems = [f"not an entry: {entry[:60]}" for entry in entries if not re.match(
        rf"- (?:{NAME}, )?{NAME}(?: et al\.| and {NAME})? \(\d{{4}}\)\. \*.+\*\. .*\[.+\]\(https://\S+\)\.$", entry)]
    problems += [
        f"{key} is there twice"
        for key, times in Counter(
            re.match(r"- (.+?\))\.", e).group(1) for e in entries if re.match(r"- (.+?\))\.", e)
        ).items()
        if times > 1
    ]
    heads = [bibliography()[key].removeprefix("- ").split("). ")[0] for key in keys]
    in_order = sorted(heads, key=lambda head: (head.split()[0].strip(",").lower(), head.split("(")[1]))
    problems += [f"{head} is in the wrong place" for head, right in zip(heads, in_order) if head != right][:1]
    addresses = Counter(re.findall(r"\((https://[^)]*)\)", markdown(BIBLIOGRAPHY)))
    problems += [f"{address} is there twice" for address, times in addresses.items() if times > 1]
    problems += [
        f"{key}: the number is not that of the link"
        for key, entry in bibliography().items()
        if (shown := re.search(r"\[arXiv (.+?)\]\((.+?)\)", entry))
        and not shown.group(2).endswith("/abs/" + shown.group(1))
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("page", [page for page in PAGES if page != BIBLIOGRAPHY])
def test_citations_are_in_the_bibliography(page):
    problems = [f"{key} is not in the bibliography" for key in sorted(cited(page) - set(bibliography()))]
    surnames = {key.split()[0] for key in bibliography()}
    texts = [
        without_code(markdown(page)),
        *(note for kind, text, _ in cells(page) if kind == "code" for note in docstrings(text)),
    ]
    for text in texts:
        problems += [
            f"write {found.group(0)!r} as Name (year)"
            for found in LOOSE.finditer(same_line(text))
            if found.group(0).split()[0].rstrip(",") in surnames
        ]
    assert not problems, f"\n{page}: " + f"\n{page}: ".join(problems)


@pytest.mark.parametrize("page", CHAPTERS)
def test_what_a_chapter_cites_stands_in_its_sources(page):
    "And the other way round: a source in the bibliography's form is cited in its form."
    parts = re.split(r"^## Sources\s*$", markdown(page), flags=re.M)
    sources = (
        {f"{name} ({year})" for name, year in CITATION.findall(same_line(parts[-1]))} if len(parts) == 2 else set()
    )
    missing = sorted(cited(page) - sources)
    assert not missing, f"\n{page}: cited and not among its sources: {', '.join(missing)}"


def test_every_entry_is_cited():
    everywhere = set().union(*(cited(page) for page in PAGES if page != BIBLIOGRAPHY))
    assert not (unused := sorted(set(bibliography()) - everywhere)), f"\ncited on no page: {', '.join(unused)}"


# Notation
# --------------------------------------------------------------------------------------------------------------

GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa "
    "lambda mu nu xi pi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split()
)
MATHS = (
    set(
        """
        approx arg ast big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr binom bmod cap cdot cdots circ colon
        cos cup dfrac displaystyle dots Delta equiv exp forall frac ge geq gg hat iff in infty int lVert lceil
        ldots le left leftarrow leq lfloor lim ll ln log lvert mapsto max mid min ne neq ni nolimits not odot
        otimes overbrace overline partial phantom pm prime prod propto qquad quad rVert rceil rfloor right
        rightarrow rvert sim sin sqrt star subset sum tanh text textstyle tfrac tilde times to top uparrow
        underbrace underline vdots vec vert xrightarrow mathbb
        """.split()
    )
    - GREEK
)


def symbols(formula: str) -> set[str]:
    """The identifiers of a formula: letters, Greek commands, named functions, and letters with a word as index
    (`W_up`).

    Words in a `text` are words for people. An index of one letter is a symbol of its own.
    """
    text = re.sub(r"\\tag\{[^}]*\}|\\(?:begin|end)\{[^}]*\}", " ", formula).replace(r"\_", "_")
    text = re.sub(r"\}_\{\\text\{[^}]*\}\}", "} ", text)  # the label of a brace
    found = set()

    def keep(match: re.Match) -> str:
        found.add("_".join(part for part in match.groups() if part))
        return " "

    word = r"\{?\\(?:text|mathrm)\{([a-z_]+)\}\}?|\{([a-z]{3,})\}"
    text = re.sub(rf"\\?([A-Za-z]+|\\[a-z]+)_(?:{word})", keep, text)
    text = re.sub(r"\\(?:operatorname|mathrm)\*?\{([^}]*)\}", keep, text)
    text = re.sub(r"\\text\{[^}]*\}", " ", text)

    def command(match: re.Match) -> str:
        name = match.group(1)
        if name not in MATHS:
            found.add("\\" + name)
        return " "

    text = re.sub(r"\\([A-Za-z]+)\*?", command, text)
    return found | set(re.findall("[A-Za-z]", text))


def formulas(page: str) -> list[str]:
    text = markdown(page)
    shown = re.findall(r"\$\$(.*?)\$\$", text, re.S)
    return shown + re.findall(
        r"(?<![\\$])\$(?!\s)([^$\n]+?)\$", without_code(re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S))
    )


def notation() -> list[tuple[list[str], list[str], str]]:
    "Each row of the notation's tables: the symbols, the chapters, the equation of the first one."
    rows = [(row[0], row[-2], row[-1]) for columns in (5, 4) for row in tables(NOTATION, columns)]
    return [
        (re.findall(r"\$([^$]+)\$", first), [] if where == "all" else where.split(", "), equation.strip("()"))
        for first, where, equation in rows
    ]


@pytest.mark.parametrize("page", [page for page in NUMBERED if page not in (NOTATION, GLOSSARY) and formulas(page)])
def test_every_symbol_is_in_the_notation(page):
    listed = set().union(
        *(symbols(symbol) for first, where, _ in notation() if not where or number(page) in where for symbol in first)
    )
    missing = defaultdict(list)
    for formula in formulas(page):
        for symbol in symbols(formula) - listed:
            missing[symbol].append(formula.strip())
    assert not missing, f"\n{page}: not in {NOTATION} for chapter {number(page)}: " + "; ".join(
        f"{symbol} (as in {uses[0]})" for symbol, uses in sorted(missing.items())
    )


def test_the_notation_lists_what_is_used():
    problems = []
    by_number = {number(page): page for page in NUMBERED}
    for first, where, equation in notation():
        for chapter in where:
            used = set().union(*map(symbols, formulas(by_number[chapter]))) if chapter in by_number else set()
            problems += [
                f"{symbol} is not used in chapter {chapter}" for symbol in first if not symbols(symbol) <= used
            ]
        if equation and equation not in equations():
            problems.append(f"{first}: there is no equation ({equation})")
    assert not problems, f"\n{NOTATION}: " + f"\n{NOTATION}: ".join(problems)


def test_a_symbol_means_one_thing_in_a_chapter():
    rows = Counter(
        (symbol, chapter) for first, where, _ in notation() for symbol in first for chapter in where or ["all"]
    )
    twice = [
        f"{symbol} has several meanings in chapter {chapter}" for (symbol, chapter), times in rows.items() if times > 1
    ]
    assert not twice, "\n" + "\n".join(twice)


def annotated_axes(page: str) -> set[str]:
    "The axis names in the annotations of a page's code."
    found = set()
    for kind, text, _ in cells(page):
        if kind != "code":
            continue
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "pass", text, flags=re.M))):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Name)
                and node.value.id in SHAPED
                and isinstance(node.slice, ast.Tuple)
            ):
                last = node.slice.elts[-1]
                found |= (
                    set(last.value.split()) if isinstance(last, ast.Constant) and isinstance(last.value, str) else set()
                )
    return found


def test_axis_names_are_in_the_notation():
    listed = {name for row in tables(NOTATION, 2) for name in re.findall(r"`([^`]+)`", row[0])}
    used = defaultdict(set)
    for page in PAGES:
        for axis in annotated_axes(page):
            used[axis].add(page)
    problems = [
        f"axis {axis!r} of {', '.join(sorted(used[axis]))} is not in {NOTATION}" for axis in sorted(set(used) - listed)
    ]
    problems += [f"{NOTATION} lists the axis {axis!r}, which no annotation uses" for axis in sorted(listed - set(used))]
    assert not problems, "\n" + "\n".join(problems)


# Glossary
# --------------------------------------------------------------------------------------------------------------

@cache
def glossary() -> dict[str, str]:
    "Each term, and its paragraph."
    parts = re.split(r"^### (.+)$", markdown(GLOSSARY), flags=re.M)
    return {term.strip(): text.strip() for term, text in zip(parts[1::2], parts[2::2])}


def aliases(text: str) -> list[str]:
    "The other names in a paragraph's first line, `Also: merges, merge rule.`"
    found = re.match(r"Also: (.+?)\.\s", text)
    return [name.strip() for name in found.group(1).split(",")] if found else []


def test_glossary_is_well_formed():
    terms = list(glossary())
    problems = [] if 60 <= len(terms) <= 150 else [f"{len(terms)} terms; 60 to 150 are wanted"]
    problems += [
        f"{term} is in the wrong place" for term, right in zip(terms, sorted(terms, key=str.lower)) if term != right
    ][:1]
    everything = " ".join(same_line(prose(page)).lower() for page in NUMBERED if page != GLOSSARY)
    names = Counter(name.lower() for term, text in glossary().items() for name in (term, *aliases(text)))
    problems += [f"{name} is there twice" for name, times in names.items() if times > 1]
    built = {contents.number(page) for page in NUMBERED}
    for term, text in glossary().items():
        if "\n\n" in text:
            problems.append(f"{term}: one paragraph, please")
        if not {int(found) for found in re.findall(r"(?i)\b(?:chapters?|appendix) (\d\d)\b", text)} & built:
            problems.append(f"{term}: in which chapter is it built?")
        if not any(
            re.search(rf"\b{re.escape(name.lower())}", everything) for name in (term.split(" (")[0], *aliases(text))
        ):
            problems.append(f"{term} occurs on no other page")
    assert not problems, f"\n{GLOSSARY}: " + f"\n{GLOSSARY}: ".join(problems)


# Spelling
# --------------------------------------------------------------------------------------------------------------

WORD = re.compile(r"[^\W\d_²³ᵀ]+(?:['’][^\W\d_]+)*")
BRITISH = [
    (r"(?<=[a-z]{4})is(?=(?:e[drs]?|ers|ing|able|ations?|ation's)$)", "iz"),
    (r"(?<=[a-z]{3})our", "or"),
    (r"(?<=[a-z]{3})ll(?=(?:ed|ing|ers?)$)", "l"),
    (r"(?<=[a-z]{3})tre(?=s?$)", "ter"),
    (r"(?<=[a-z]{3})yse(?=[ds]?$)", "yze"),
]


@cache
def own_words() -> tuple[str, ...]:
    """The words of tests/words.txt: one with a capital is right as it stands, one without also at the start of a
    sentence.
    """
    lines = (ROOT / "tests" / "words.txt").read_text(encoding="utf-8").splitlines()
    return tuple(word for line in lines for word in line.split("#")[0].split())


@cache
def names() -> set[str]:
    "The names in the bibliography."
    return {
        word
        for entry in bibliography().values()
        for word in WORD.findall(re.sub(r"\*.*?\*|\]\(.*?\)", " ", entry))
        if word[0].isupper()
    }


@cache
def in_dictionary(word: str) -> bool:
    "English as pyspellchecker knows it, in American and in British spelling, less the slips that codespell knows."
    american = word
    for pattern, ending in BRITISH:
        american = re.sub(pattern, ending, american)
    return any(form in checker() for form in (word, american)) and word not in misspellings()


@cache
def checker():
    from spellchecker import SpellChecker

    return SpellChecker(language="en").word_frequency.dictionary


@cache
def misspellings() -> set[str]:
    lines = files("codespell_lib").joinpath("data/dictionary.txt").read_text(encoding="utf-8").splitlines()
    return {line.split("->")[0] for line in lines}


def singular(word: str) -> str:
    "A word without its possessive ending."
    return re.sub(r"'s$|'$", "", word.replace("’", "'"))


def is_word(word: str) -> bool:
    plain = singular(word)
    own = (
        plain in own_words()
        or plain in names()
        or plain[0].isupper()
        and plain.lower() == plain[0].lower() + plain[1:]
        and plain.lower() in own_words()
    )
    return (
        own
        or len(set(plain.lower())) == 1
        or bool(re.fullmatch(r"[IVX]+|[A-F]{2,4}", plain))
        or in_dictionary(plain.lower())
    )


def written(page: str) -> str:
    "All that a page spells out: prose, captions, alternative texts and docstrings."
    texts = [prose(page)]
    if page in PAGES:
        texts += options(page, "fig-cap") + options(page, "fig-alt") + options(page, "code-summary")
        texts += [note for kind, text, _ in cells(page) if kind == "code" for note in docstrings(text)]
    text = without_math(without_code("\n".join(texts)))
    # calls, names, paths, flags
    text = re.sub(r"\S*[\w)\]]\([^()\s]*\)\S*|\S*\w[_=/\\]\w\S*|\S*\.\w+\b\S*|\w*\d\w*|--?\w+\S*|\\\w+", " ", text)
    return re.sub(r"\b[^\W\d_]+\^|\b[a-z]+[A-Z]\w*|\w\[", " ", text)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_spelling(page):
    wrong = sorted({word for word in WORD.findall(written(page)) if not is_word(word)})
    assert not wrong, (
        f"\n{page}: not in the dictionary (mend the page, or add a right word to tests/words.txt): {', '.join(wrong)}"
    )


def test_the_list_of_words_holds_what_is_needed():
    used = {singular(word) for page in DOCUMENTS for word in WORD.findall(written(page))}
    used |= {word.lower() for word in used}
    problems = [f"{word} is there twice" for word, times in Counter(own_words()).items() if times > 1]
    problems += [
        f"{word} is in the dictionary already" for word in own_words() if word.islower() and in_dictionary(word)
    ]
    problems += [f"{word} is used nowhere" for word in own_words() if word not in used]
    assert not problems, "\ntests/words.txt: " + "\ntests/words.txt: ".join(problems)


@pytest.mark.parametrize(
    "word, right",
    [
        ("colour", True),
        ("color", True),
        ("recieve", False),
        ("dependancy", False),
        ("softmax", True),
        ("sofmax", False),
        ("Vaswani", True),
        ("vaswani", False),
        ("normalise", True),
        ("normalize", True),
        ("teh", False),
    ],
)
def test_spelling_knows_right_from_wrong(word, right):
    assert is_word(word) == right


@pytest.mark.parametrize("formula, wanted", [
    (r"\operatorname{softmax}\left(\frac{Q K^\top}{\sqrt{d}} + M\right) V", {"softmax", "Q", "K", "d", "M", "V"}),
    (r"W_\text{up}\,x + b_{\text{up}}", {"W_up", "b_up", "x"}),
    (r"\underbrace{2 d V}_{\text{logits}} \tag{4.6}", {"d", "V"}),
    (r"4 d_{model} \le d_\mathrm{ff}", {"d_model", "d_ff"}),
    (r"\theta_i = \text{base}^{-2i/\text{head\_dim}}", {r"\theta", "i"}),
    (r"\begin{pmatrix} a' \\ b' \end{pmatrix}", {"a", "b"}),
    (r"x_{bt}", {"x", "b", "t"}),
])
def test_symbols_of_a_formula(formula, wanted):
    assert symbols(formula) == wanted


# Installation
# ----------------------------------------------------------------------------------------------------------

def test_no_trace_of_the_profiler_is_kept():
    "PyTorch's profiler writes lines with the date to the standard error; all other lines are kept."
    lines = ["USDT:2026-11-30 02:01:55 1:1 Handler.cpp:52] profiler_start\n", "a warning\n", "not USDT: this\n"]
    output = execute.without_traces({"output_type": "stream", "name": "stderr", "text": "".join(lines)})
    assert output["text"] == "".join(lines[1:])
    assert execute.without_traces({"output_type": "stream", "name": "stderr", "text": lines[0]})["text"] == ""
    figure = {"output_type": "display_data", "data": {"text/plain": "USDT: a figure"}, "metadata": {}}
    assert execute.without_traces(dict(figure)) == figure


def test_colab_installs_what_settings_ask_for():
    "The set-up cell is the one that the settings ask for, adds only what Colab lacks, and never touches torch."
    settings = colab.read_settings()
    found = {page: text for page in PAGES for _, text, _ in cells(page) if colab.START.match(text)}
    wrong = [page for page, text in found.items() if text != colab.set_up(text, colab.cell(settings))]
    assert found and not wrong, f"run python tools/colab.py: {wrong}"
    asked = {*settings["requirements"].split(), *settings["dev_requirements"].split()}
    for text in (colab.cell({"git_url": ""}), colab.cell({"git_url": "https://example.org/book"})):
        wanted = re.findall(r"'([a-z0-9]+>=[\d.]+)'", text)
        assert wanted and set(wanted) <= asked and not any(name.startswith("torch") for name in wanted)
        assert "--no-deps" in text and ("example.org" in text) != (colab.ZIP in text)
        compile(text, "cell", "exec")


def test_no_page_names_an_address_that_is_not_there():
    "While settings.ini names no owner, nothing links to a repository; authors and mail are no placeholders."
    settings = colab.read_settings()
    if not settings["git_url"]:
        for page in DOCUMENTS:
            text = json.dumps([cell for *_, cell in cells(page)]) if page in PAGES else markdown(page)
            for address in ("github.com/transformer-llm", "colab.research", "mybinder.org/v2"):
                assert address not in text or page == "index.ipynb" and f"[on {address}" not in text, (page, address)
        assert "colab.research" not in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "example" not in settings["author_email"]


def test_the_book_in_one_file_installs_and_holds_every_notebook(tmp_path):
    with zipfile.ZipFile(colab.write_zip(tmp_path / colab.ZIP)) as file:
        names = set(file.namelist())
    assert {f"nbs/{page}" for page in PAGES} <= names
    assert {"setup.py", "settings.ini", "transformer_llm/__init__.py", "nbs/_quarto.yml", "LICENSE"} <= names
    assert colab.write_zip(tmp_path / "again").read_bytes() == (tmp_path / colab.ZIP).read_bytes()


def test_binder_keeps_its_torch_and_takes_the_tested_versions():
    environment, after = (
        (ROOT / ".binder" / name).read_text(encoding="utf-8") for name in ("environment.yml", "postBuild")
    )
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    least = next(name for name in settings["DEFAULT"]["requirements"].split() if name.startswith("torch")).removeprefix(
        "torch"
    )
    assert f"- python={settings['DEFAULT']['min_python']}\n" in environment and f"- pytorch-cpu{least}\n" in environment
    assert "grep -v '^torch==' constraints.txt" in after and "-e '.[dev]'" in after
