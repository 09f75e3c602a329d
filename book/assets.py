"""Styles, the script and the fonts of the site.

Fonts come from pinned packages, are checked by their hash, and cut down to what the pages need.
"""
import hashlib
import html
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from fontTools import subset
from fontTools.varLib.instancer import instantiateVariableFont

from errors import BookError

LETTERS = [
    (0x20, 0x7E),
    (0xA0, 0x17F),
    (0x391, 0x3C9),
    (0x2010, 0x2030),
    (0x2032, 0x2033),
    (0x20AC, 0x20AC),
    (0x2190, 0x2192),
    (0x2212, 0x2212),
]
# and each character of the equations; roots and accents are drawn without one
MATHEMATICS = [
    (0x20, 0x7E),
    (0x302, 0x304),
    (0x2032, 0x2032),
    (0x20D7, 0x20D7),
    (0x210E, 0x210E),
    (0x221A, 0x221C),
    (0x1D434, 0x1D467),
    (0x1D6E2, 0x1D71B),
]
TEXT_AXES = {"opsz": 14, "wght": (400, 700)}  # one optical size, from regular to bold
# name on the site: package, file in it, its SHA-256, code points, axes to fix
FONTS = {
    "stix-two-math.woff": (
        "ziamath",
        "fonts/STIXTwoMath-Regular.ttf",
        "8f42cb183a85043a4dc3f8e41ac3821eb27bf178d68ace929ba439523622323c",
        MATHEMATICS,
        {},
    ),
    "source-serif.woff": (
        "fontpkg_source_serif_4",
        "files/SourceSerif4[opsz,wght].ttf",
        "97b2d4da6e3cb494b5a1e66ae176914d852ccabef49e0c02c0df25f3e39aca0b",
        LETTERS,
        TEXT_AXES,
    ),
    "source-serif-italic.woff": (
        "fontpkg_source_serif_4",
        "files/SourceSerif4-Italic[opsz,wght].ttf",
        "15fbc7e4679489a501998c3669272637a6646388ef7e4bd77eebb5bf967a1f42",
        LETTERS,
        TEXT_AXES,
    ),
}


def font_file(package: str, file: str, digest: str) -> Path:
    "A font file of an installed package, if it is the one that was tested."
    path = Path(find_spec(package).origin).parent / file
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise BookError(f"{file} of the package {package} is not the tested one: install what constraints.txt says.")
    return path


def cut(path: Path, target: Path, ranges: list[tuple[int, int]], axes: dict) -> None:
    "Write the glyphs of these code points, with all that mathematics needs of them, as a web font."
    options = subset.Options(
        layout_features=["*"] if not axes else subset.Options().layout_features + ["tnum"],
        hinting=False,
        drop_tables=["DSIG"],
    )
    font = subset.load_font(str(path), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[code for start, end in ranges for code in range(start, end + 1)])
    cutter.subset(font)
    font = instantiateVariableFont(font, axes) if axes else font
    font.flavor = "woff"
    target.parent.mkdir(parents=True, exist_ok=True)
    font.save(target)


def write_assets(output: Path, here: Path, cache: Path, formulas: set[str]) -> None:
    """All that the pages refer to besides each other; fonts that were cut before are taken from `cache`.

    `formulas` are the book's, in MathML.
    """
    for name in ("content.css", "page.css", "script.js", "icon.svg"):
        shutil.copy(here / name, output / name)
    symbols = set(html.unescape(re.sub(r"<[^>]*>", "", "".join(formulas))))
    for name, (package, file, digest, ranges, axes) in FONTS.items():
        if not axes:
            ranges = [*ranges, *((ord(symbol), ord(symbol)) for symbol in sorted(symbols))]
        recipe = hashlib.sha256(f"{digest} {ranges} {axes}".encode()).hexdigest()[:12]
        if not (ready := cache / f"{recipe}-{name}").exists():
            cut(font_file(package, file, digest), ready, ranges, axes)
        (output / "fonts").mkdir(exist_ok=True)
        shutil.copy(ready, output / "fonts" / name)
