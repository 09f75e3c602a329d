"""Cross-references, citations and glossary terms: found in the finished pages, whoever made them, and turned into
links.
"""
import html
import posixpath
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, NavigableString, Tag

CLOSED = {
    "a",
    "code",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "math",
    "script",
    "style",
    "svg",
    "summary",
    "button",
    "nav",
    "dt",
}
NUMBER = re.compile(r"\(\d+\.\d+\)|\d+\.\d+")
NUMBERED = re.compile(
    rf"\b(Figure|Exercise|[Ee]quation)(s?)\s+(?:{NUMBER.pattern})"
    rf"(?:(?:,\s+|,?\s+and\s+|\s+or\s+|\s+to\s+)(?:{NUMBER.pattern}))*|\(\d+\.\d+\)"
)
CHAPTER = re.compile(
    r"\b(?:[Cc]hapter|[Aa]ppendi)(?:s|x|ces)?\s+\d\d\b(?:(?:,\s+|,?\s+and\s+|\s+or\s+|\s+to\s+)\d\d\b)*"
)
CITATION = re.compile(
    r"\b(?:[A-Z][\w'’-]+,\s+)?((?:[A-Z][\w'’-]+)(?:\s+et\s+al\.|\s+and\s+[A-Z][\w'’-]+)?)"
    r"\s+\(((?:19|20)\d\d[a-z]?)\b"
)


@dataclass
class Targets:
    "What can be referred to, and where it stands."
    anchors: dict[str, str] = field(default_factory=dict)  # figure-1.3: attention.html
    chapters: dict[int, str] = field(default_factory=dict)  # 1: attention.html
    works: dict[str, str] = field(default_factory=dict)  # Vaswani et al. 2017: its entry's anchor
    terms: dict[str, tuple[str, str]] = field(default_factory=dict)  # token: (its anchor, its definition)


def main_of(page: BeautifulSoup) -> Tag:
    return page.find("main") or page.body or page


def words(text: str) -> str:
    return " ".join(text.split())


def author(name: str) -> str:
    return re.sub(r"\W", "", name.split()[0].lower())


def collect_works(page: BeautifulSoup) -> dict[str, str]:
    "Give each entry of the bibliography its anchor; returns the anchors by author and year."
    works = {}
    for item in main_of(page).find_all("li"):
        if found := CITATION.match(words(item.get_text())):
            item["id"] = f"{author(found.group(1))}-{found.group(2)}"
            works[f"{found.group(1)} {found.group(2)}"] = item["id"]
    return works


def collect_terms(page: BeautifulSoup) -> dict[str, tuple[str, str]]:
    """The glossary's terms and their other names, each with its anchor and the first sentence of its definition.

    A heading that says in parentheses which of a word's meanings it explains is not one to link to from every mention.
    """
    terms = {}
    for heading in main_of(page).find_all(["h2", "h3"]):
        paragraph = heading.find_next_sibling("p")
        name, anchor = words(heading.get_text()), heading.get("id") or heading.parent.get("id")
        if paragraph and "(" not in name and (heading.name == "h3" or "small" in heading.get("class", ())):
            also, definition = re.match(
                r"(?:Also: (.*?)\. )?(.*?[.!?](?=\s|$)|.*)", words(paragraph.get_text())
            ).groups()
            for term in [name, *(also or "").split(", ")]:
                if term:
                    terms[term] = anchor, definition
    return terms


def collect(pages: dict[str, BeautifulSoup], chapters: dict[int, str]) -> Targets:
    "Everything that the pages, by address, let one refer to."
    targets = Targets(chapters=chapters)
    for address, page in pages.items():
        for tag in main_of(page).find_all(id=re.compile(r"^(figure|equation|exercise)-")):
            targets.anchors[tag["id"]] = address
    if "bibliography.html" in pages:
        targets.works = collect_works(pages["bibliography.html"])
    if "glossary.html" in pages:
        targets.terms = collect_terms(pages["glossary.html"])
    return targets


def relative(target: str, page: str) -> str:
    "The address `target`, seen from the page at the address `page`."
    path, hash_, anchor = target.partition("#")
    return ("" if path == page else posixpath.relpath(path, posixpath.dirname(page) or ".")) + hash_ + anchor


def text_nodes(main: Tag) -> list[NavigableString]:
    "The prose: text outside of code, headings, links and mathematics."
    return [
        node
        for node in main.find_all(string=True)
        if type(node) is NavigableString
        and node.strip()
        and not any(
            parent.name in CLOSED or "number" in parent.get("class", ()) or "title" in parent.get("class", ())
            for parent in node.parents
        )
    ]


def replace(soup: BeautifulSoup, node: NavigableString, spans: list[tuple[int, int, dict]]) -> None:
    "Set links with these attributes over these stretches of a text."
    at, parts = 0, []
    for start, end, attributes in spans:
        link = soup.new_tag("a", attrs=attributes)
        link.string = node[start:end]
        parts += [NavigableString(node[at:start]), link]
        at = end
    node.replace_with(*parts, NavigableString(node[at:]))


def number_spans(
    text: str, page: str, targets: Targets, here: set[str], problems: list[str]
) -> list[tuple[int, int, dict]]:
    """References by number.

    One that leads nowhere is a problem, unless it is a bare (3.11) that no equation of this chapter can be.
    """
    spans = []
    for found in NUMBERED.finditer(text):
        kind = (found.group(1) or "equation").lower()
        for i, number in enumerate(NUMBER.finditer(found.group())):
            digits = number.group().strip("()")
            anchor = f"{kind}-{digits}"
            start = found.start() + (number.start() if i or found.group(2) or not found.group(1) else 0)
            if anchor in here:  # a caption doesn't refer to itself
                continue
            if anchor in targets.anchors:
                spans.append(
                    (
                        start,
                        found.start() + number.end(),
                        {"href": relative(f"{targets.anchors[anchor]}#{anchor}", page), "class": "ref"},
                    )
                )
            elif found.group(1) or page == targets.chapters.get(int(digits.split(".")[0])):
                problems.append(f"{page}: {words(found.group())!r} refers to nothing, in {words(text)[:90]!r}")
    return spans


def chapter_spans(text: str, page: str, targets: Targets) -> list[tuple[int, int, dict]]:
    """`chapter 03`, `chapters 01, 02 and 07`, `appendix 91`, in two digits (chapter 3 is another book's): those that
    exist and are not this page.
    """
    spans = []
    for found in CHAPTER.finditer(text):
        for i, number in enumerate(re.finditer(r"\d+", found.group())):
            address = targets.chapters.get(int(number.group()))
            if address and address != page:
                spans.append(
                    (
                        found.start() + (number.start() if i else 0),
                        found.start() + number.end(),
                        {"href": relative(address, page), "class": "ref"},
                    )
                )
    return spans


def citation_spans(text: str, page: str, targets: Targets, problems: list[str]) -> list[tuple[int, int, dict]]:
    "`Vaswani et al. (2017)`, which must stand in the bibliography once there is one."
    spans = []
    for found in CITATION.finditer(text):
        name = words(f"{found.group(1)} {found.group(2)}")
        if name in targets.works:
            end = found.end() + (text[found.end():found.end() + 1] == ")")
            spans.append(
                (
                    found.start(),
                    end,
                    {"href": relative(f"bibliography.html#{targets.works[name]}", page), "class": "cite"},
                )
            )
        elif targets.works:
            problems.append(f"{page}: {words(found.group())}) is not in the bibliography")
    return spans


@cache
def term_pattern(terms: tuple[str, ...]) -> re.Pattern:
    "Any of these terms, whole, in the singular or with an `s`; the longest that fits."
    words = (re.escape(term).replace(r"\ ", r"\s+") for term in sorted(terms, key=len, reverse=True))
    return re.compile(r"(?<![\w-])(" + "|".join(words) + r")s?(?![\w-])", re.I)


def term_spans(text: str, page: str, targets: Targets, left: dict[str, tuple[str, str]]) -> list[tuple[int, int, dict]]:
    "The first mention of each term on a page; terms found are taken out of `left`."
    spans = []
    known = {term.lower(): term for term in targets.terms}
    for found in term_pattern(tuple(known)).finditer(text) if left else ():
        if (term := known.get(words(found.group(1)).lower())) in left:
            anchor, definition = left[term]
            spans.append(
                (
                    found.start(),
                    found.end(),
                    {"href": relative(f"glossary.html#{anchor}", page), "class": "term", "title": definition},
                )
            )
            for name in [name for name in left if left[name][0] == anchor]:
                del left[name]
    return spans


def without_overlaps(spans: list[tuple[int, int, dict]]) -> list[tuple[int, int, dict]]:
    kept = []
    for span in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def link(page: BeautifulSoup, address: str, targets: Targets) -> list[str]:
    "Turn the references of a page into links; returns what leads nowhere."
    problems, left = [], {} if address == "glossary.html" else dict(targets.terms)
    for node in text_nodes(main_of(page)):
        text = str(node)
        here = (
            {parent["id"] for parent in node.parents if parent.get("id")} if node.find_parent("figcaption") else set()
        )
        spans = number_spans(text, address, targets, here, problems) + chapter_spans(text, address, targets)
        if address != "bibliography.html":
            spans += citation_spans(text, address, targets, problems)
        in_prose = node.find_parent(["p", "li", "td"]) and not node.find_parent(["details", "figcaption"])
        spans += term_spans(text, address, targets, left) if in_prose else []
        if spans := without_overlaps(spans):
            replace(page, node, spans)
    return problems


def dead_links(folder: Path) -> list[str]:
    "Internal links, pictures and anchors of the finished pages that lead nowhere."
    texts = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    ids = {address: set(re.findall(r'\bid="([^"]*)"', text)) for address, text in texts.items()}
    problems = []
    for address, text in texts.items():
        for target in sorted(set(re.findall(r'<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"]+)"', text))):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = html.unescape(unquote(target)).partition("#")
            whole = posixpath.normpath(posixpath.join(posixpath.dirname(address), path)) if path else address
            if not (folder / whole).exists():
                problems.append(f"{address}: {target} is not there")
            elif anchor and whole in ids and anchor not in ids[whole]:
                problems.append(f"{address}: {target} has no such anchor")
    return problems
