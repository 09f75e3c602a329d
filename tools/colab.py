"""The hidden cell that sets up each notebook, Colab as settings.ini wants it; and the book in one file.

    python tools/colab.py            # write the cell into every notebook that has one
    python tools/colab.py --zip      # write transformer_llm.zip, which Colab unpacks while the book has no address

`user` in settings.ini is the one setting: whose the repository is. While it is empty the book has no public address, so
the cell unpacks a file that the reader uploads, and no page links to a repository.
"""
import configparser
import json
import re
import sys
import zipfile
from pathlib import Path

from execute import ROOT, notebooks

START = re.compile(r'^((?:#\| default_exp .*\n)?)#\| hide\nif "google\.colab" in str\(get_ipython\(\)\):')
CHECKED = """
from transformer_llm.foundations import check_shapes

check_shapes()"""  # what the set-up cell of a notebook with shapes ends with
ZIP = "transformer_llm.zip"
IN_ZIP = """
settings.ini setup.py _quarto.yml constraints.txt ruff.toml Makefile LICENSE MANIFEST.in *.md CITATION.cff
data/*.md data/*.json data/simple_patterns.txt transformer_llm/**/*.py transformer_llm/py.typed
nbs/*.ipynb nbs/exercises/*.ipynb nbs/images/*.png tools/*.py
""".split()


def read_settings(root: Path = ROOT) -> dict[str, str]:
    "settings.ini, with `git_url` empty while the repository belongs to nobody."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    values = dict(parser["DEFAULT"])
    return values if values["user"].strip() else {**values, "git_url": ""}


def cell(settings: dict[str, str]) -> str:
    "The source of the set-up cell."
    if settings["git_url"]:
        fetch = f'''"test -d /content/book || git clone -q --depth 1 "
        "{settings["git_url"]} /content/book"'''
    else:
        fetch = f'''"test -d /content/book || unzip -q /content/{ZIP} -d /content/book "
        "|| echo 'Put {ZIP}, which the book offers beside its notebooks, into the folder /content.'"'''
    return f'''#| hide
if "google.colab" in str(get_ipython()):  # Colab lacks the package; it has torch, which is left as it is
    get_ipython().system(
        {fetch}
    )
    get_ipython().system(
        "pip install -q --no-deps /content/book && pip install -q 'jaxtyping>=0.3' "
        "'beartype>=0.18' 'regex>=2024.5.15' 'safetensors>=0.4.3' 'gguf>=0.10'"
    )
    get_ipython().run_line_magic("cd", "-q /content/book/nbs")'''


def set_up(text: str, plain: str) -> str:
    "What a set-up cell should hold: its module's name, the plain cell, and the switch that checks shapes if it had one."
    return START.match(text).group(1) + plain + (CHECKED if text.endswith(CHECKED) else "")


def write_cells(root: Path = ROOT) -> list[Path]:
    "Put the cell that the settings ask for into every notebook that has one; returns those that changed."
    plain, changed = cell(read_settings(root)), []
    for path in notebooks(root):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for one in notebook["cells"]:
            text = "".join(one["source"])
            if START.match(text) and text != (wanted := set_up(text, plain)):
                one["source"] = wanted.splitlines(True)
                changed.append(path)
        if path in changed:
            text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
            path.write_text(text + "\n", encoding="utf-8")
    return changed


def write_zip(path: Path, root: Path = ROOT) -> Path:
    "The notebooks, the package and what installs it, in one file with always the same bytes."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in sorted({found for pattern in IN_ZIP for found in root.glob(pattern)}):
            entry = zipfile.ZipInfo(one.relative_to(root).as_posix(), (2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, one.read_bytes())
        entry = zipfile.ZipInfo("nbs/_quarto.yml", (2020, 1, 1, 0, 0, 0))
        file.writestr(entry, (root / "_quarto.yml").read_bytes())
    return path


def main() -> None:
    if sys.argv[1:] == ["--zip"]:
        print("wrote", write_zip(ROOT / ZIP).relative_to(ROOT))
    else:
        for path in write_cells():
            print("wrote", path.relative_to(ROOT).as_posix())


if __name__ == "__main__":
    main()
