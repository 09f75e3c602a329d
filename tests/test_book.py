"""The book agrees with itself: one test for each check of tests/check.py."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from check import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_book(check):
    problems = check()
    assert not problems, "\n" + "\n".join(problems)
