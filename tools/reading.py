"""How long each chapter takes to read: the lesson, from its first sentence to the recap, and the library half after it.

    python tools/reading.py            # print the minutes of every chapter
    python tools/reading.py --write    # and write them below the chapters' titles and the headings of the library

Minutes are words of prose / 200 + lines of code shown / 20. Hidden and folded cells, directives, blank lines,
equations, outputs, hints and solutions don't count, and neither do the lines that say the minutes. `make test` counts
again and fails where a lesson is too long, or where a line of its shown code is.
"""
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import contents

ROOT = contents.ROOT
WORDS_PER_MINUTE, LINES_PER_MINUTE = 200, 20
LONGEST_CELL = 60  # lines of an exported cell
LONGEST_LINE = 100  # characters of a line of code in the lesson: more would be cut off beside the site's contents
LIBRARY = re.compile(r"^## The library\b", re.M)
UNSEEN = re.compile(r"^#\| *(hide|echo: *false|code-fold: *true)", re.M)
UNREAD = re.compile(r"<details>.*?</details>|<[^>]+>|\$\$.*?\$\$|\$[^$\n]*\$", re.S)
STATED = re.compile(r"\A\*Reading time: [^\n]*\*\n\n")  # below the title
STATED_LIBRARY = re.compile(r"(?<=^## The library\n\n)\*\d+ minutes\.\*\n\n", re.M)


@dataclass(frozen=True)
class Reading:
    "What a chapter asks of its reader."

    lesson: float  # minutes
    library: float  # minutes
    words: int  # of prose, both halves
    longest: int  # lines of its longest exported cell

    def line(self) -> str:
        "How the chapter says it below its title."
        return f"*Reading time: the lesson {self.lesson:.0f} minutes, the library after it {self.library:.0f}.*\n\n"

    def library_line(self) -> str:
        "How it says the second half below that half's heading."
        return f"*{self.library:.0f} minutes.*\n\n"


def longest_lesson(name: str) -> int:
    "The minutes that a chapter's lesson may take."
    return 40 if contents.number(name) <= 8 else 45


def source(cell: dict) -> str:
    return "".join(cell["source"])


def without_minutes(text: str) -> str:
    "Prose without the lines that say the minutes."
    return STATED_LIBRARY.sub("", STATED.sub("", text))


def shown_lines(text: str) -> list[str]:
    "The lines of a code cell that a reader reads."
    return [] if UNSEEN.search(text) else [
        line for line in text.splitlines() if line.strip() and not line.startswith("#|")
    ]


def read(notebook: dict) -> Reading:
    "Count a chapter's words and lines, its two halves apart."
    words, lines, half, longest = [0, 0], [0, 0], 0, 0
    for cell in notebook["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            text = without_minutes(text)
            before, heading, after = text, "", ""
            if half == 0 and (found := LIBRARY.search(text)):
                before, heading, after = text[:found.start()], found.group(0), text[found.end():]
            words[half] += len(UNREAD.sub(" ", before).split())
            half = 1 if heading else half
            words[half] += len(UNREAD.sub(" ", after).split())
        elif cell["cell_type"] == "code":
            shown = len(shown_lines(text))
            lines[half] += shown
            if re.search(r"^#\| *exports?", text, re.M):
                longest = max(longest, shown)
    lesson, library = (w / WORDS_PER_MINUTE + n / LINES_PER_MINUTE for w, n in zip(words, lines))
    return Reading(lesson, library, sum(words), longest)


def introduction(notebook: dict) -> dict:
    "The cell whose first line says the minutes: the first prose after the title."
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"][1]


def library(notebook: dict) -> int | None:
    "The place of the cell with the heading of the library half."
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and LIBRARY.search(source(cell)):
            return place
    return None


def write(path: Path) -> None:
    "Say a chapter's minutes in its first lines, and those of the library half below its heading."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    reading, cell, heading = read(notebook), introduction(notebook), notebook["cells"][library(notebook)]
    cell["source"] = (reading.line() + STATED.sub("", source(cell))).splitlines(True)
    text = STATED_LIBRARY.sub("", source(heading))
    said = LIBRARY.sub(lambda found: f"{found.group()}\n\n{reading.library_line().rstrip()}", text, count=1)
    heading["source"] = said.splitlines(True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def long_lines(notebook: dict) -> Iterator[str]:
    "The lines of code shown in the lesson that are too long, each with the number of its cell."
    for place, cell in enumerate(notebook["cells"][:library(notebook)]):
        for line in shown_lines(source(cell)) if cell["cell_type"] == "code" else []:
            if len(line) > LONGEST_LINE:
                yield f"cell {place}: a line of {len(line)} characters (of {LONGEST_LINE} in a lesson): {line[:50]}…"


def problems(name: str, notebook: dict) -> list[str]:
    "What keeps a chapter from being read in an evening."
    found, limit, heading = [], longest_lesson(name), library(notebook)
    if heading is None:
        return [f"{name} has no heading '## The library' that ends the lesson"]
    reading = read(notebook)
    if reading.lesson > limit:
        found.append(f"{name}: the lesson takes {reading.lesson:.1f} minutes, at most {limit} are wanted")
    if reading.longest > LONGEST_CELL:
        found.append(f"{name}: an exported cell has {reading.longest} lines, at most {LONGEST_CELL} are wanted")
    stated = STATED.match(source(introduction(notebook)))
    stated_library = STATED_LIBRARY.search(source(notebook["cells"][heading]))
    said = [found_line and found_line.group() for found_line in (stated, stated_library)]
    if said != [reading.line(), reading.library_line()]:
        found.append(f"{name} does not say its reading time as it is: run tools/reading.py --write")
    return found + [f"{name} {line}" for line in long_lines(notebook)]


def main() -> None:
    print("chapter             lesson  library  words  longest exported cell")
    for name in contents.chapters():
        path = ROOT / "nbs" / name
        if "--write" in sys.argv[1:] and library(json.loads(path.read_text(encoding="utf-8"))) is not None:
            write(path)
        found = read(json.loads(path.read_text(encoding="utf-8")))
        print(f"{Path(name).stem:18}{found.lesson:8.1f}{found.library:9.1f}{found.words:7}{found.longest:7}")


if __name__ == "__main__":
    main()
