"""How long each chapter takes to read: the lesson, from its first sentence to the recap, and the library half after it.

    python tools/reading.py            # print the minutes of every chapter
    python tools/reading.py --write    # and write them below the chapters' titles

Minutes are words of prose / 200 + lines of code shown / 20. Hidden and folded cells, directives, blank lines,
equations, outputs, hints and solutions don't count. `make test` counts again and fails where a lesson is too long.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import contents

ROOT = contents.ROOT
WORDS_PER_MINUTE, LINES_PER_MINUTE = 200, 20
LONGEST_CELL = 60  # lines of an exported cell
LIBRARY = re.compile(r"^## The library\b", re.M)
UNSEEN = re.compile(r"^#\| *(hide|echo: *false|code-fold: *true)", re.M)
UNREAD = re.compile(r"<details>.*?</details>|<[^>]+>|\$\$.*?\$\$|\$[^$\n]*\$", re.S)
STATED = re.compile(r"\A\*Reading time: [^\n]*\*\n\n")


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


def longest_lesson(name: str) -> int:
    "The minutes that a chapter's lesson may take."
    return 40 if contents.number(name) <= 8 else 45


def read(notebook: dict) -> Reading:
    "Count a chapter's words and lines, its two halves apart."
    words, lines, half, longest = [0, 0], [0, 0], 0, 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            before, heading, after = text, "", ""
            if half == 0 and (found := LIBRARY.search(text)):
                before, heading, after = text[:found.start()], found.group(0), text[found.end():]
            words[half] += len(UNREAD.sub(" ", before).split())
            half = 1 if heading else half
            words[half] += len(UNREAD.sub(" ", after).split())
        elif cell["cell_type"] == "code" and not UNSEEN.search(text):
            shown = [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]
            lines[half] += len(shown)
            if re.search(r"^#\| *exports?", text, re.M):
                longest = max(longest, len(shown))
    lesson, library = (w / WORDS_PER_MINUTE + n / LINES_PER_MINUTE for w, n in zip(words, lines))
    return Reading(lesson, library, sum(words), longest)


def introduction(notebook: dict) -> dict:
    "The cell whose first line says the minutes: the first prose after the title."
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"][1]


def has_two_halves(notebook: dict) -> bool:
    return any(LIBRARY.search("".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def write(path: Path) -> None:
    "Say a chapter's minutes in its first lines."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = introduction(notebook)
    text = STATED.sub("", "".join(cell["source"]))
    cell["source"] = text.splitlines(True)  # the line itself isn't counted
    cell["source"] = (read(notebook).line() + text).splitlines(True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def problems(name: str, notebook: dict) -> list[str]:
    "What keeps a chapter from being read in an evening."
    found, limit = [], longest_lesson(name)
    if not has_two_halves(notebook):
        return [f"{name} has no heading '## The library' that ends the lesson"]
    cell = introduction(notebook)
    text = "".join(cell["source"])
    stated = STATED.match(text)
    cell["source"] = STATED.sub("", text).splitlines(True)
    reading = read(notebook)
    if reading.lesson > limit:
        found.append(f"{name}: the lesson takes {reading.lesson:.1f} minutes, at most {limit} are wanted")
    if reading.longest > LONGEST_CELL:
        found.append(f"{name}: an exported cell has {reading.longest} lines, at most {LONGEST_CELL} are wanted")
    if not stated or stated.group(0) != reading.line():
        found.append(f"{name} does not say its reading time as it is: run tools/reading.py --write")
    return found


def main() -> None:
    print("chapter             lesson  library  words  longest exported cell")
    for name in contents.chapters():
        path = ROOT / "nbs" / name
        if "--write" in sys.argv[1:] and has_two_halves(json.loads(path.read_text(encoding="utf-8"))):
            write(path)
        found = read(json.loads(path.read_text(encoding="utf-8")))
        print(f"{Path(name).stem:18}{found.lesson:8.1f}{found.library:9.1f}{found.words:7}{found.longest:7}")


if __name__ == "__main__":
    main()
