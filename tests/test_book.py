"""The book agrees with itself: one test for each check of tools/check.py."""
import ast

import pytest
from check import CHECKS, NOTEBOOKS, bare_tensors, code_cells, load, stale


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_book(check):
    problems = check()
    assert not problems, "\n" + "\n".join(problems)


def test_stale_notebooks_are_noticed():
    path = next(p for p in NOTEBOOKS if p.name == "01_attention.ipynb")
    assert stale(load(path)) == ""
    changed, cleared, unmarked = load(path), load(path), load(path)
    code_cells(changed)[-1]["source"] += ["\n1 + 1"]
    for cell in code_cells(cleared):
        cell["outputs"] = []
    del unmarked["metadata"]["executed"]
    assert [stale(notebook) for notebook in (changed, cleared, unmarked)] == ["code", "outputs", "code and outputs"]


@pytest.mark.parametrize(
    "annotation, bare",
    [
        ("Tensor", True),
        ("Tensor | None", True),
        ("tuple[Tensor, int]", True),
        ('Float[Tensor, "batch seq"] | Tensor', True),
        ('Float[Tensor, "batch seq"]', False),
        ('Int[Tensor, "batch"] | None', False),
        ("dict[str, Tensor]", False),
        ("int", False),
    ],
)
def test_tensors_without_a_shape_are_noticed(annotation, bare):
    assert bare_tensors(ast.parse(annotation, mode="eval").body) == bare
