"""Everything that must be green, in one command: the notebooks as `nbdev_test` runs them, then pytest.

    python tools/run.py           # all; exits 1 if anything failed, or left a file that git does not know
"""
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from execute import notebooks

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
LONGEST = ("test_site.py", "test_cli.py", "test_lab.py")  # begin with these, or one worker ends long after the other


def section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def run_notebooks(environment: dict[str, str], minutes: float = 40) -> tuple[int, list[str], bool]:
    """Every notebook through nbdev_test; returns how many passed, which didn't, and whether nbdev_test is content.

    A notebook that runs for more than so many minutes will run for ever: everything is stopped, and it is named.
    """
    section("notebooks (nbdev_test)")
    paths = {path.resolve(): path.relative_to(ROOT).as_posix() for path in notebooks()}
    running, completed, failed = {}, set(), []
    command = [str(TOOLS / "nbdev_test"), "--n_workers", "2", "--timing", "--do_print"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1"},  # or its lines would come when all is over
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        ended = threading.Event()
        threading.Thread(target=stop_the_endless, args=(process, running, 60 * minutes, ended), daemon=True).start()
        for line in process.stdout:
            print(line, end="", flush=True)
            for path in re.findall(r"Starting (\S.*?\.ipynb)", line):  # two workers can share a line
                running[(ROOT / path).resolve()] = time.perf_counter()
            for path in re.findall(r"- Completed (\S.*?\.ipynb)", line):
                completed.add((ROOT / path).resolve())
                running.pop((ROOT / path).resolve(), None)
            failed += re.findall(r"^\t(\S.*\.ipynb)$", line)  # nbdev_test's own list, at its end
        ended.set()
    failed += [name for path, name in paths.items() if path not in completed]
    return len(paths) - len(failed), failed, process.returncode == 0


def stop_the_endless(process: subprocess.Popen, running: dict[Path, float], seconds: float, ended: threading.Event):
    "End the process, and those it started, once one of the running notebooks has taken so long."
    while not ended.wait(min(10, seconds)):
        slow = [path for path, start in list(running.items()) if time.perf_counter() - start > seconds]
        if slow:
            print(f"not at its end after {seconds / 60:.0f} minutes: {', '.join(map(str, slow))}", flush=True)
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            return process.kill()


def run_pytest(environment: dict[str, str]) -> tuple[int, int, int]:
    "The tests in tests/, two files at a time, the longest first; returns how many passed, failed and were skipped."
    section("tests (pytest)")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=25"]
        options.append(f"--junitxml={report}")
        first = [f"tests/{name}" for name in LONGEST]
        command = [sys.executable, "-m", "pytest", *first, "tests", *options]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            return 0, 1, 0
        suite = ElementTree.parse(report).getroot().find("testsuite")
        print("seconds by file:", ", ".join(f"{name} {t:.0f}" for name, t in seconds_by_file(suite)[:12]))
        total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
        failed = int(suite.get("failures")) + int(suite.get("errors"))
        return total - failed - skipped, failed or int(code != 0), skipped


def seconds_by_file(suite: ElementTree.Element) -> list[tuple[str, float]]:
    "The test files of a report and the seconds of their tests, fixtures included, the longest first."
    seconds = Counter()
    for case in suite.iter("testcase"):
        seconds[case.get("classname").rpartition(".")[2]] += float(case.get("time"))
    return seconds.most_common()


def files_in_git(root: Path = ROOT) -> set[str]:
    "What git does not know or finds changed, a line each; nothing where there is no git."
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return set(done.stdout.splitlines()) if done.returncode == 0 else set()


def left_behind(before: set[str], root: Path = ROOT) -> list[str]:
    "The files that were made, changed or removed since `before`: the tests leave the project as it was."
    return sorted(files_in_git(root) - before)


def main() -> int:
    start = time.perf_counter()
    before = files_in_git()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a shell started this in its background:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # then page 92's Ctrl-C would be ignored
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", PYTHONUTF8="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
    )
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or every kernel would compile the package anew
    notebooks, failed_notebooks, content = run_notebooks(environment)
    tests, tests_failed, skipped = run_pytest(environment)
    left = left_behind(before)
    for line in left:
        print(f"left behind by the notebooks or the tests: {line}")
    for name in failed_notebooks:
        print(f"failed: {name}")
    passed = notebooks + tests
    failed = (len(failed_notebooks) or int(not content)) + tests_failed + bool(left)
    section(f"{notebooks} notebooks and {tests} tests in {time.perf_counter() - start:.0f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
