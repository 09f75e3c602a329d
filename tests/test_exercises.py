"""Every exercise of every chapter: it stands in its chapter, its solution passes, and typical wrong answers are named.
"""
import ast
import re
import signal
import sys
import threading
import time
from pathlib import Path

import contents
import pytest
from check import ROOT, code_cells, load, source
from execute import FRAMES, WIDGET

from transformer_llm import exercises
from transformer_llm.exercises import Verdict, exercises_of, find_exercise, judge
from transformer_llm.foundations import InputError

STEMS = {contents.number(name): Path(name).stem for name in contents.chapters()}
NUMBER = r'"(\d+\.\d+)"'


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def calls(notebook: dict, name: str) -> list[ast.Call]:
    "Every call of a function by this name, anywhere in a notebook's code."
    trees = [ast.parse(re.sub(r"^[%!].*$", "pass", source(cell), flags=re.M)) for cell in code_cells(notebook)]
    return [node for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]


@pytest.fixture(scope="module", params=STEMS, ids=STEMS.values())
def chapter(request):
    number = request.param
    return (
        number,
        load(ROOT / "nbs" / f"{STEMS[number]}.ipynb"),
        load(ROOT / "nbs" / "exercises" / f"{STEMS[number]}.ipynb"),
    )


def test_a_chapter_has_at_least_four_exercises_in_order(chapter):
    number, book, _ = chapter
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    stated = re.findall(r"^> \*\*Exercise (\d+\.\d+)\b", text, re.M)
    there = [one.number for one in exercises_of(number)]
    assert sorted(stated) == sorted(there) and len(set(stated)) == len(stated) >= 4
    assert there == [f"{number}.{n + 1}" for n in range(len(there))], "a number is missing"
    kinds = re.findall(r"^> \*\*Exercise \d+\.\d+ \((\w[\w ,]*)\)", text, re.M)
    assert any("predict" in kind for kind in kinds) and any("write" in kind for kind in kinds), kinds


def test_an_exercise_has_hints(chapter):
    _, book, _ = chapter
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    parts = re.split(r"^> \*\*Exercise (\d+\.\d+)\b", text, flags=re.M)
    for number, part in zip(parts[1::2], parts[2::2]):
        assert 1 <= len(re.findall(r"<details>\s*<summary>Hint", part)) <= 3, number


def test_the_readers_cell_waits_and_the_solution_passes(chapter):
    number, book, _ = chapter
    asked, solved = [], []
    for cell in code_cells(book):
        for one in re.findall(rf"^check\({NUMBER}", source(cell), re.M):
            asked.append(one)
            assert f"Exercise {one}: no answer yet." in printed(cell), f"{one}: {printed(cell)}"
        for one in re.findall(rf"^check_solution\({NUMBER}", source(cell), re.M):
            solved.append(one)
            # the first line is what a closed cell shows in JupyterLab
            assert source(cell).startswith(f"# Solution {one}\n#| code-fold: true\n"), source(cell)[:80]
            assert cell["metadata"] == {"jupyter": {"outputs_hidden": True, "source_hidden": True}}, (
                f"the solution of {one} lies open in JupyterLab"
            )
    assert asked == solved and sorted(asked) == sorted(one.number for one in exercises_of(number))


def test_a_solution_says_nothing(chapter):
    "Run All must not answer a question that the reader hasn't: solutions are held against the checks in silence."
    _, book, _ = chapter
    told = [source(cell).split("\n")[0] for cell in code_cells(book)
            if source(cell).startswith("# Solution ") and cell["outputs"]]
    assert not told, told


def test_wrong_answers_are_named(chapter):
    number, _, checks = chapter
    refused, accepted = {}, set()
    for node in calls(checks, "refuses"):
        refused.setdefault(node.args[0].value, set()).add(ast.unparse(node.args[2]).lower())
    for node in calls(checks, "accepts"):
        accepted.add(node.args[0].value)
    for one in exercises_of(number):
        assert len(refused.get(one.number, ())) >= 3, f"{one.number}: fewer than three mistakes are told apart"
        assert one.number in accepted, f"{one.number}: no right answer is tried beside the solution"


@pytest.mark.parametrize(
    "answer",
    [
        "words",
        10**30,
        -1,
        float("nan"),
        True,
        [1, 2],
        {},
        object(),
        lambda: 1,
        lambda *x: "text",
        lambda x: x,
        lambda *x, **y: 1 / 0,
        print,
        len,
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_no_answer_breaks_a_check(chapter, answer, capsys):
    for one in exercises_of(chapter[0]):
        verdict = judge(one.number, answer)
        assert isinstance(verdict, Verdict) and verdict.message.strip().endswith((".", ")", "?", "!")), verdict
        assert "can't use this answer" not in verdict.message or not callable(answer), verdict


def test_a_chapter_has_a_widget(chapter):
    _, book, _ = chapter
    found = calls(book, "explore")
    assert found
    for cell in code_cells(book):
        if re.search(r"^explore\(", source(cell), re.M):
            kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
            assert FRAMES in kinds, "a control that no page can move"
            assert WIDGET not in kinds, "a control without a kernel was saved"
            frames = [output["data"][FRAMES] for output in cell["outputs"] if FRAMES in output.get("data", {})]
            shown = [moved for frame in frames for moved in frame["shown"].values()]
            assert shown and "None" not in [text for _, text, _ in shown], "its function draws, but returns nothing"


def test_numbers_that_lead_nowhere():
    with pytest.raises(InputError, match=r"no exercise 1\.77; chapter 01 has 1\.1, "):
        judge("1.77", 1)
    with pytest.raises(InputError, match="chapter 77"):
        find_exercise("77.1")
    with pytest.raises(InputError, match="attention"):
        find_exercise("attention")


def test_inputs_are_drawn_afresh():
    assert exercises.fresh("t").initial_seed() != exercises.fresh("t").initial_seed()


# Answers that don't end
# --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    "An exercise whose check calls the answer, and half a second of time for it."
    monkeypatch.setattr(exercises, "TIME_LIMIT", 0.5)
    monkeypatch.setitem(exercises.EXERCISES, "99.1", exercises.Exercise(
        "99.1", "The answer is called", lambda answer: f"It gave {exercises.call(answer)}."))


def forever():
    while True:
        pass


def stubborn():
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            pass


def catches_all():
    while True:
        try:
            sum(range(1000))
        except BaseException:
            sum(range(1000))


def catches_in_handlers():
    while True:
        try:
            catches_all()
        except BaseException:
            sum(range(1000))


def prints():
    while True:
        print(".", end="")
        time.sleep(0.01)


def sleeps():
    time.sleep(60)


ENDLESS = [forever, stubborn, catches_all, catches_in_handlers, prints, sleeps]


@pytest.mark.parametrize("answer", ENDLESS, ids=lambda answer: answer.__name__)
def test_an_answer_without_an_end_is_stopped(quick, answer):
    start = time.perf_counter()
    verdict = judge("99.1", answer)
    assert time.perf_counter() - start < 20 and verdict.state == "wrong"
    assert verdict.message.startswith("It was stopped after 0.5 s") and "\n" not in verdict.message
    assert judge("99.1", lambda: 1) == Verdict("99.1", "right", "It gave 1.")


@pytest.mark.parametrize("answer", [forever, stubborn, prints], ids=lambda answer: answer.__name__)
def test_an_answer_without_an_end_is_stopped_in_a_thread(quick, answer):
    "As on Windows, where there are no alarms."
    found = []
    thread = threading.Thread(target=lambda: found.append(judge("99.1", answer)), daemon=True)
    thread.start()
    thread.join(20)
    assert [verdict.state for verdict in found] == ["wrong"] and "stopped after 0.5 s" in found[0].message


def test_the_outer_limit_holds_for_an_answer_that_judges(quick):
    verdict = judge("99.1", lambda: judge("99.1", forever))
    assert "stopped after 0.5 s" in verdict.message and not exercises.LIMITED


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms here")
def test_an_alarm_of_somebody_else_is_left_alone(quick):
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        assert "stopped after" in judge("99.1", forever).message
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_nothing_is_left_of_a_limit(quick):
    handler = signal.getsignal(signal.SIGALRM) if hasattr(signal, "SIGALRM") else None
    judge("99.1", forever)
    judge("99.1", lambda: 1)
    if handler is not None:
        assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    time.sleep(0.6)


def test_an_interrupt_is_one_sentence(quick, capsys):
    exercises.check("99.1", lambda: signal.raise_signal(signal.SIGINT))
    assert capsys.readouterr().out == (
        "Exercise 99.1: no answer yet. You interrupted the check while your answer was running.\n"
    )
    with pytest.raises(KeyboardInterrupt):  # a program that marks a class can be stopped
        judge("99.1", lambda: signal.raise_signal(signal.SIGINT))


def test_an_answer_that_exits_does_not_end_the_kernel(quick):
    assert "ends the program" in judge("99.1", lambda: sys.exit()).message
