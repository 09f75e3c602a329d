"""Execute notebooks in a real kernel, clean them and stamp them, so that what is committed is what was run.

    python tests/execute.py                    # every notebook, in order
    python tests/execute.py nbs/01_attention.ipynb

The stamp is a fingerprint of the code cells: a notebook whose code changed after it was executed fails `tests/check.py`.
"""
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

ROOT = Path(__file__).parent.parent


def fingerprint(notebook) -> str:
    "A hash of all code cells' sources, in order."
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(s.strip() for s in sources).encode("utf-8")).hexdigest()[:16]


def execute(path: Path) -> float:
    "Run one notebook in its own kernel, in its own folder, and write it back with outputs; returns seconds."
    notebook = nbformat.read(path, as_version=4)
    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute(env=environment)
    seconds = time.perf_counter() - start
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "executed": {"code": fingerprint(notebook), "seconds": round(seconds)}}
    nbformat.write(notebook, path)
    nbdev_clean(str(path))
    return seconds


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").glob("*.ipynb"))
    for path in paths:
        print(f"{path.name}: executed in {execute(path):.1f} s", flush=True)


if __name__ == "__main__":
    main()
