"""Execute notebooks in a real kernel, clean them and stamp them, so that what is committed is what was run.

    python tools/execute.py                    # every notebook, in order
    python tools/execute.py nbs/01_attention.ipynb

The stamp holds a fingerprint of the code cells and one of what they gave: a notebook whose code changed, or whose
outputs were cleared or edited, after it was executed fails `tools/check.py`.
"""
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

ROOT = Path(__file__).parent.parent


def notebooks(root: Path = ROOT) -> list[Path]:
    "Every notebook below nbs/, whether the table of contents lists it or not, in the order of their names."
    folder = root / "nbs"
    return [
        p
        for p in sorted(folder.rglob("*.ipynb"))
        if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)
    ]


def fingerprints(notebook: dict) -> dict[str, str]:
    "A hash of all code cells' sources, in order, and one of their outputs; figures' captions are words, not code."
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = [re.sub(r"^#\| fig-.*\n?", "", "".join(cell["source"]), flags=re.M).strip() for cell in cells]
    outputs = [cell.get("outputs", []) for cell in cells]
    return {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()[:16]
            for name, value in (("code", sources), ("outputs", outputs))}


def execute(path: Path) -> float:
    """Run one notebook in its own kernel, in its own folder, and write it back with outputs; returns seconds of
    processor time, which other work on the machine hardly changes (of the clock where the system doesn't count them).
    """
    notebook = nbformat.read(path, as_version=4)
    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), BOOK_FRAMES="1")
    start, before = time.perf_counter(), sum(os.times()[2:4])
    NotebookClient(
        notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    ).execute(env=environment)
    seconds = sum(os.times()[2:4]) - before or time.perf_counter() - start
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = closed(cell)
        if "outputs" in cell:  # a widget without its kernel is dead; its pictures stay
            cell.outputs = [
                o for o in map(without_traces, cell.outputs) if not is_widget(o) and o.get("text") != ""
            ]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "executed": {"seconds": round(seconds)}}
    nbformat.write(notebook, path)
    nbdev_clean(str(path))
    stamp(path)
    return seconds


WIDGET = "application/vnd.jupyter.widget-view+json"
FRAMES = "application/vnd.transformer-llm.frames+json"  # pictures that `explore` drew in advance


def is_widget(output: dict) -> bool:
    "Whether nothing is left of an output without its kernel; of one with pictures, what needs a kernel is removed."
    data = output.get("data", {})
    if WIDGET in data and FRAMES in data:
        del data[WIDGET]
    return WIDGET in data


def without_traces(output: dict) -> dict:
    "An output without the lines that PyTorch's profiler writes beside the results: they hold the date."
    if output["output_type"] == "stream":
        output["text"] = "".join(line for line in output["text"].splitlines(True) if not line.startswith("USDT:"))
    return output


def closed(cell: dict) -> dict:
    "A cell's metadata: in JupyterLab it is closed where the site closes it; a solution stays closed with its outputs."
    if cell["cell_type"] != "code" or not re.search(r"^#\| (code-fold: true|hide|echo: false)$", cell["source"], re.M):
        return {}
    solution = cell["source"].startswith("# Solution ")
    return {"jupyter": {"source_hidden": True, **({"outputs_hidden": True} if solution else {})}}


def stamp(path: Path) -> None:
    "Note the fingerprints of a notebook that was executed and cleaned."
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["executed"].update(fingerprints(json.loads(path.read_text(encoding="utf-8"))))
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or notebooks()
    for path in paths:
        print(
            f"{path.stem if path.parent.name == 'nbs' else path.parent.name + '/' + path.stem}: executed in "
            f"{execute(path):.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
