"""A chapter in JupyterLab, as a reader has it: Run All, no complaint, exercises, mathematics, sliders, and no request
that leaves the machine.
"""
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from browser import browser, needs_browser, watch

pytestmark = needs_browser

ROOT = Path(__file__).parent.parent
CHAPTER = "00_counting.ipynb"
SETTINGS = {  # all cells are in the page, also those far down; nothing is asked of the outside
    "notebook-extension/tracker": {"windowingMode": "none", "codeCellConfig": {"autoClosingBrackets": False}},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}
PROMPTS = """[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell =>
    (cell.querySelector('.jp-InputPrompt') || {textContent: ''}).textContent.trim())"""
READY = """async () => {
    const session = window.jupyterapp.shell.currentWidget.sessionContext;
    await session.ready; await session.session.kernel.info; }"""
PATIENCE = 240_000  # milliseconds for Run All, on a machine that is busy


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def stop(process: subprocess.Popen) -> None:
    """End the server and all that it started.

    Kernels live in process groups of their own, so they are found through their parent.
    """
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # a server that is asked to stop ends its kernels itself
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
    for member in reversed(family):
        try:
            member.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    process.wait(10)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with settings, data and a copy of the chapter of its own; gives the chapter's address."
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    shutil.copy(ROOT / "nbs" / CHAPTER, work)
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    private = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(folder / part) for name, part in private.items()}}
    environment.pop("MPLBACKEND", None)  # a kernel draws into the notebook
    port, token = free_port(), secrets.token_hex(16)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={work}",
        "--LabApp.expose_app_in_browser=True",
    ]
    log = folder / "server.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_for_server(f"http://127.0.0.1:{port}/api/status?token={token}", process, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{CHAPTER}?token={token}&reset"
        finally:
            stop(process)


def wait_for_server(address: str, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"JupyterLab ended at once:\n{log.read_text(encoding='utf-8')[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer within {seconds} s:\n{log.read_text(encoding='utf-8')[-2000:]}")


class Notebook:
    "The chapter in the browser, after Run All."

    def __init__(self, page, notes):
        self.page, self.notes = page, notes
        cells = json.loads((ROOT / "nbs" / CHAPTER).read_text(encoding="utf-8"))["cells"]
        self.sources = ["".join(cell["source"]) for cell in cells]
        self.code = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
        # solutions and set-up
        self.closed = [i for i in self.code if cells[i]["metadata"].get("jupyter", {}).get("source_hidden")]
        self.solutions = [i for i in self.code if self.sources[i].startswith("# Solution ")]
        self.questions = [
            i
            for i in self.code
            if "check(" in self.sources[i]
            and i not in self.solutions
            and "import" not in self.sources[i]
            and "check_shapes" not in self.sources[i]
        ]
        self.widgets = [i for i in self.code if self.sources[i].startswith("explore(")]

    def cell(self, number: int):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def output(self, number: int) -> str:
        return self.cell(number).locator(".jp-Cell-outputArea").inner_text()

    def prompts(self) -> list[str]:
        """What stands before each code cell: [ ] before it runs, [*] while it waits, its number afterwards.

        Nothing before a closed one.
        """
        return self.page.evaluate(f"() => {PROMPTS}")

    def run_all(self) -> None:
        """Run All Cells, once the notebook's session has a kernel (a click before that is lost, a second one would run
        everything twice); then wait for every cell.
        """
        self.page.locator(".jp-Notebook .jp-CodeCell").nth(len(self.code) - 1).wait_for(
            state="attached", timeout=60_000
        )
        self.page.evaluate(READY)
        self.page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        self.page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        self.page.wait_for_function(
            f"() => {PROMPTS}.every(prompt => !prompt || /[0-9]/.test(prompt))", timeout=PATIENCE, polling=300
        )

    def wait_until(self, true, otherwise: str, seconds: float = 30) -> None:
        "Ask until it is so; fail with `otherwise` after so many seconds."
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, otherwise
            self.page.wait_for_timeout(50)

    def answer(self, number: int, text: str, verdict: str) -> None:
        """Put `text` into a cell as a reader does, run it, and wait for the verdict below it (which may come after the
        cell's number).
        """
        cell = self.cell(number)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Control+Enter")
        self.wait_until(lambda: verdict in self.output(number), f"no {verdict!r} below cell {number}")


@pytest.fixture(scope="module")
def notebook(lab):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        notes = watch(page)
        page.goto(lab)
        opened = Notebook(page, notes)
        opened.run_all()
        yield opened


def test_every_cell_ran_and_none_complained(notebook):
    # a closed cell shows no number, and is counted by the next one
    in_order = [f"[{i}]:" for i in range(1, len(notebook.code) + 1)]
    closed = [number in notebook.closed for number in notebook.code]
    assert notebook.prompts() == ["" if hidden else number for number, hidden in zip(in_order, closed)]
    assert not closed[-1] and set(notebook.solutions) <= set(notebook.closed)
    page = notebook.page
    for kind in ("error", "stderr"):
        found = page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').all_inner_texts()
        assert not found, f"{kind}: {found}"
    assert not re.search(r"\bWarning\b|Traceback", page.locator(".jp-Notebook").inner_text())


def test_exercises_are_open_and_solutions_are_closed(notebook):
    assert len(notebook.questions) >= 4 and len(notebook.solutions) >= 4
    for number in notebook.questions:
        assert "no answer yet" in notebook.output(number), notebook.sources[number]
    for number in notebook.solutions:
        assert not notebook.cell(number).locator(".jp-OutputArea-output").count(), "a solution says something"
        assert not notebook.cell(number).locator(".cm-content").first.is_visible(), "a solution lies open"
    assert notebook.cell(notebook.questions[0]).locator(".cm-content").first.is_visible()
    hints = notebook.page.locator(".jp-RenderedMarkdown details")
    assert hints.count() >= 4 and not any(hints.nth(i).get_attribute("open") for i in range(hints.count()))


def test_mathematics_is_set(notebook):
    page = notebook.page
    formulas = sum("$$" in source for i, source in enumerate(notebook.sources) if i not in notebook.code)
    assert page.locator(".jp-RenderedMarkdown mjx-container").count() >= formulas > 0
    assert (
        page.locator('mjx-merror, mjx-container [style*="color: red"]').count() == 0
    )  # what MathJax does not know is red
    shown = "\n".join(page.locator(".jp-RenderedMarkdown").all_inner_texts())
    assert "$$" not in shown and "\\tag" not in shown and "\\frac" not in shown


def test_a_slider_changes_the_picture(notebook):
    assert notebook.widgets
    page, number = notebook.page, notebook.widgets[0]
    handle = notebook.cell(number).locator(".noUi-handle").first
    picture = (
        notebook.cell(number).locator(".widget-html-content img, .widget-html img, .widget-html-content pre").first
    )
    look = "node => node.src || node.textContent"
    before, value = picture.evaluate(look), handle.get_attribute("aria-valuetext")
    handle.focus()
    page.keyboard.press("ArrowRight")
    notebook.wait_until(
        lambda: handle.get_attribute("aria-valuetext") != value, "the keyboard does not move the slider"
    )
    notebook.wait_until(lambda: picture.evaluate(look) != before, "the slider moves, and the picture stays")
    assert picture.evaluate("node => node.alt === undefined || node.alt.length > 10"), (
        "the picture has no alternative text"
    )


def test_an_answer_is_judged(notebook):
    question, solution = notebook.questions[0], notebook.solutions[0]
    number = re.search(r'check\("([\d.]+)"', notebook.sources[question]).group(1)
    notebook.answer(question, f'check("{number}", -1)', ": not yet.")
    right = "\n".join(line for line in notebook.sources[solution].splitlines() if not line.startswith("#"))
    notebook.answer(question, right.replace("check_solution(", "check("), ": right.")


def test_nothing_left_the_machine(notebook):
    assert not notebook.notes.outside
