"""A real browser for the tests: finds Chromium, starts it without a window, and notes what a page asks for and
complains about.

    from browser import browser, needs_browser, watch

    pytestmark = needs_browser                     # the group `make test-browser`; skipped, with the reason, where
    there is none

    with browser() as chromium:
        page = chromium.new_page()
        notes = watch(page)                        # before the first address
        page.goto("http://127.0.0.1:8000/")
        assert not notes.problems(), notes.problems()
"""
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/usr/bin",
    "/usr/local/bin",
    "/snap/bin",
    "/Applications/Google Chrome.app/Contents/MacOS",
    "/Applications/Chromium.app/Contents/MacOS",
)
HERE = {"127.0.0.1", "localhost", "[::1]", "::1"}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE "
    "127.0.0.1, EXCLUDE localhost",  # what isn't on this machine does not exist
]


def find_chromium() -> str | None:
    "The browser's program: `$CHROMIUM` if it is set (and then no other), or one of the usual names."
    if chosen := os.environ.get("CHROMIUM"):
        return shutil.which(chosen)
    names = [*NAMES, "Google Chrome", "Chromium"]
    return next(
        (
            found
            for name in names
            if (found := shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES])))
        ),
        None,
    )


def skip_reason() -> str:
    "Why there can be no browser here; empty when there can."
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed; run make test-browser, or pip install -c constraints.txt -e '.[dev]'"
    if find_chromium() is None:
        if chosen := os.environ.get("CHROMIUM"):
            return f"$CHROMIUM is {chosen}, which is no program"
        return (
            "no Chromium found; install it (Debian, Ubuntu: apt-get install chromium) or set $CHROMIUM to its program"
        )
    return ""


needs_browser = [pytest.mark.browser, pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())]


@contextmanager
def browser() -> Iterator:
    "Chromium without a window, with a new and empty profile; closed at the end, whatever happens."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), headless=True, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


@dataclass
class Notes:
    "What a page did that it should not, one sentence each."

    errors: list[str] = field(default_factory=list)  # Written to the console as errors, or never caught
    failed: list[str] = field(default_factory=list)  # Requests without an answer, or with one of 400 and above
    outside: list[str] = field(default_factory=list)  # Requests that would leave the machine

    def problems(self) -> list[str]:
        "All of them, with their kind."
        return [f"{kind}: {what}" for kind in ("errors", "failed", "outside") for what in getattr(self, kind)]

    def clear(self) -> None:
        for kind in (self.errors, self.failed, self.outside):
            kind.clear()


def stays_here(url: str, home: Path | None = None) -> bool:
    "Whether a request stays on this machine; of files, only those under `home`."
    parts = urlsplit(url)
    if parts.scheme == "file":
        return home is not None and Path(parts.path).is_relative_to(home)
    return parts.scheme in ("data", "blob", "about", "chrome") or (parts.hostname or "") in HERE


def watch(page, home: Path | None = None) -> Notes:
    "Note from now on what the page (or all pages of a context) asks for and complains about."
    notes = Notes()

    def note_message(message) -> None:
        if message.type == "error":
            notes.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def note_request(request) -> None:
        if not stays_here(request.url, home):
            notes.outside.append(f"{request.method} {request.url}")

    def note_answer(answer) -> None:
        if answer.status >= 400:
            notes.failed.append(f"{answer.status} {answer.url}")

    context = page.context if hasattr(page, "goto") else page
    page.on("console", note_message)
    page.on("request", note_request)
    page.on("response", note_answer)
    page.on("requestfailed", lambda request: notes.failed.append(f"{request.failure} {request.url}"))
    if page is context:
        page.on("weberror", lambda error: notes.errors.append(str(error.error)))
    else:
        page.on("pageerror", lambda error: notes.errors.append(str(error)))
        page.on(
            "websocket",
            lambda socket: None if stays_here(socket.url) else notes.outside.append(f"websocket {socket.url}"),
        )
    return notes
