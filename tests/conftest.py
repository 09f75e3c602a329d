"""Before anything of the package is imported: shapes are checked, progress bars are off, one thread computes."""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # check, execute, readme

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models are faster so, and results don't depend on the machine
os.environ["MPLBACKEND"] = "Agg"
# as a shell starts what runs in its background; the tests of Ctrl-C need it, here and in what they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup starts what it runs
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from transformer_llm.foundations import check_shapes

check_shapes()

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from tqdm import std

torch.set_num_threads(1)
start_bar = std.tqdm.__init__
std.tqdm.__init__ = lambda bar, *args, **options: start_bar(bar, *args, **{**options, "disable": True})
settings.register_profile("book", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("book")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "browser: needs Chromium and playwright (make test-browser); skipped where they are missing"
    )


LONGEST = ("test_site", "test_decoding", "test_cli", "test_pretrained", "test_lab", "test_kill", "test_benchmark")


def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that two processes that share the files end at about the same time."
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def unchecked():
    """Shapes are not checked in this test, which calls the same functions many thousand times: the checks would take
    most of its time, and its neighbours call the same functions with the checks on.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def one_thread():
    "A command that ran in this process may have chosen more, and then sums are added up in another order."
    torch.set_num_threads(1)

