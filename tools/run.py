"""Everything that must be green, in one command: the notebooks as `nbdev_test` runs them, then pytest. Counts at the
end.

    python tools/run.py           # all; exits 1 if anything failed
"""
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

from execute import notebooks

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent


def section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def run_notebooks(environment: dict[str, str]) -> tuple[int, int]:
    "Every notebook through nbdev_test; returns how many passed and failed."
    section("notebooks (nbdev_test)")
    paths = notebooks()
    completed = set()
    command = [str(TOOLS / "nbdev_test"), "--n_workers", "2", "--timing", "--do_print"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"- Completed (.*\.ipynb)\s*$", line):
                completed.add((ROOT / found.group(1)).resolve())
    failed = [path.relative_to(ROOT).as_posix() for path in paths if path.resolve() not in completed]
    if failed:
        print("failed:", ", ".join(failed), flush=True)
    return len(paths) - len(failed), len(failed) or int(process.returncode != 0)


def run_pytest(environment: dict[str, str]) -> tuple[int, int, int]:
    "The tests in tests/, two files at a time; returns how many passed, failed and were skipped."
    section("tests (pytest)")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "tests",
                "-q",
                "-n",
                "2",
                "--dist",
                "loadfile",
                "--durations=8",
                f"--junitxml={report}",
            ],
            cwd=ROOT,
            env=environment,
        ).returncode
        if not report.exists():
            return 0, 1, 0
        suite = ElementTree.parse(report).getroot().find("testsuite")
        total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
        failed = int(suite.get("failures")) + int(suite.get("errors"))
        return total - failed - skipped, failed or int(code != 0), skipped


def main() -> int:
    start = time.perf_counter()
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", PYTHONUTF8="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
    )
    notebooks, notebooks_failed = run_notebooks(environment)
    tests, tests_failed, skipped = run_pytest(environment)
    passed, failed = notebooks + tests, notebooks_failed + tests_failed
    section(f"{notebooks} notebooks and {tests} tests in {time.perf_counter() - start:.0f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
