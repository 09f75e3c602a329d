"""What the book holds, as `_quarto.yml` lists it: the one table of contents, read by tools, tests and site.

    python tools/contents.py     # print it
"""
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CHAPTERS, APPENDICES = range(0, 40), range(70, 100)


def sections(config: dict) -> list[tuple[str, list[str]]]:
    "The sections of the book and the notebooks of each, below nbs/; what stands outside of a section has the name ''."
    found = [("", [])]
    for item in config["website"]["sidebar"]["contents"]:
        if isinstance(item, dict):
            found += [(item["section"], item["contents"]), ("", [])]
        else:
            found[-1][1].append(item)
    return [section for section in found if section[1]]


def read(root: Path = ROOT) -> list[tuple[str, list[str]]]:
    "The sections of the book that lies in `root`."
    return sections(yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8")))


def pages(root: Path = ROOT) -> list[str]:
    "Every notebook, in the order of the book."
    return [name for _, names in read(root) for name in names]


def number(name: str) -> int | None:
    "A notebook's number: 1 for 01_attention.ipynb, None for index.ipynb and for the pages of exercises."
    found = re.match(r"(\d\d)_", name)
    return int(found.group(1)) if found else None


def is_chapter(name: str) -> bool:
    "Whether a notebook is a chapter, 00 to 39."
    return number(name) in CHAPTERS


def is_appendix(name: str) -> bool:
    "Whether a notebook is an appendix, 70 to 99."
    return number(name) in APPENDICES


def chapters(root: Path = ROOT) -> list[str]:
    "The chapters, in the order of the book."
    return [name for name in pages(root) if is_chapter(name)]


def main() -> None:
    for section, names in read():
        print(section or "(no section)")
        for name in names:
            print("   ", name)


if __name__ == "__main__":
    main()
