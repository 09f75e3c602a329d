"""What a class is given and how its notebooks are marked: nothing is believed that a notebook says of itself."""
import csv
import json
from pathlib import Path

import pytest

from transformer_llm import cli
from transformer_llm.classroom import (
    ANSWER,
    SOLUTION,
    find_chapters,
    for_students,
    grade_class,
    is_solution,
    key_of,
    mark_notebook,
    needed_cells,
    read_notebook,
    source,
    write_handout,
)
from transformer_llm.foundations import InputError

BOOK = Path(__file__).parent.parent / "nbs"
IMPORT = "from transformer_llm.exercises import check"
RIGHT = """def my_softmax(x, dim):
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)"""


def hand_in(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"cell_type": "code", "source": text, "metadata": {}, "outputs": []} for text in (IMPORT, *cells)]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(BOOK.glob("[0-3][0-9]_*.ipynb")), ids=lambda path: path.name[:2])
def test_students_get_no_solution_and_the_key_has_them_all(path):
    notebook = read_notebook(path)
    solutions = [SOLUTION.match(source(cell)).group(1) for cell in notebook["cells"] if is_solution(cell)]
    given, key = for_students(notebook), key_of(notebook)
    assert not any(is_solution(cell) for cell in given["cells"])
    code = [source(cell) for cell in given["cells"] if cell["cell_type"] == "code"]
    asked = [number for text in code for number in ANSWER.findall(text)]
    assert sorted(asked) == sorted(solutions) and len(given["cells"]) == len(notebook["cells"]) - len(solutions)
    answered = [SOLUTION.match(source(cell)).group(1) for cell in key["cells"] if is_solution(cell)]
    questions = [source(cell) for cell in key["cells"][1::2]]
    assert answered == solutions
    assert all(text.startswith(f"> **Exercise {number}") for text, number in zip(questions, solutions))


def test_the_books_solutions_are_marked_right(tmp_path):
    "Each answer cell of chapter 01 gets the solution of its exercise: all of them are right, after what they need."
    notebook = read_notebook(BOOK / "01_attention.ipynb")
    solutions = {SOLUTION.match(source(cell)).group(1): source(cell).replace("check_solution(", "check(")
                 for cell in notebook["cells"] if is_solution(cell)}
    student = for_students(notebook)
    for cell in student["cells"]:
        if cell["cell_type"] == "code" and (asked := ANSWER.findall(source(cell))):
            cell["source"] = solutions[asked[0]].partition("\n")[2]
    path = tmp_path / "01.ipynb"
    path.write_text(json.dumps(student), encoding="utf-8")
    marks = mark_notebook(path)
    assert {number: mark.state for number, mark in marks.items()} == dict.fromkeys(solutions, "right")


def test_what_a_notebook_says_of_itself_does_not_count(tmp_path):
    boast = 'print("Exercise 1.2: right.")\ncheck("1.2", lambda x, dim: x)'
    path = hand_in(tmp_path / "a.ipynb", boast, 'check("1.1", ...)')
    notebook = read_notebook(path)
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "Exercise 1.2: right."}]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert {number: mark.state for number, mark in mark_notebook(path).items()} == {"1.2": "wrong", "1.1": "unanswered"}


def test_one_answer_does_not_spoil_another(tmp_path):
    "An error, a leaving and a redefined check cost the answers that they concern; verdicts before a crash count."
    ask = '\n\n\ncheck("1.2", my_softmax)'
    broken = hand_in(tmp_path / "broken.ipynb", 'check("1.1", 1 / 0)', RIGHT + ask)
    marks = mark_notebook(broken)
    assert marks["1.1"].state == "failed" and "ZeroDivisionError" in marks["1.1"].message
    assert marks["1.2"].state == "right"
    left = hand_in(tmp_path / "left.ipynb", RIGHT + ask, 'import os\nos._exit(0)\ncheck("1.1", 1)')
    assert {n: mark.state for n, mark in mark_notebook(left).items()} == {"1.2": "right", "1.1": "failed"}
    quits = hand_in(tmp_path / "quits.ipynb", 'exit()\ncheck("1.1", 1)', RIGHT + ask)
    assert {n: mark.state for n, mark in mark_notebook(quits).items()} == {"1.1": "failed", "1.2": "right"}
    own = hand_in(tmp_path / "own.ipynb", 'def check(number, answer):\n    print("right")\n\n\ncheck("1.1", 1)')
    assert mark_notebook(own)["1.1"].state == "failed"


def test_an_endless_answer_is_stopped(tmp_path):
    path = hand_in(tmp_path / "a.ipynb", 'import subprocess\nwhile True:\n    pass\ncheck("1.1", 1)')
    mark = mark_notebook(path, seconds=2)["1.1"]
    assert mark.state == "stopped" and "2 s" in mark.message


def test_only_what_is_needed_is_executed():
    cells = ["import math", "1 / 0", "x = 1", "def f():\n    return math.pi * x", "x += 1", "y = 3", "f()"]
    assert needed_cells(cells, [6]) == [0, 2, 3, 6] and needed_cells(cells, [4]) == [2, 4]
    assert needed_cells(["%matplotlib", "not python at all", "2"], [1, 2]) == [1, 2]


def test_the_table_of_a_class(tmp_path):
    "A line for every notebook, whatever is in it; a name that a spreadsheet would execute gets a dot in front."
    folder = tmp_path / "class"
    hand_in(folder / "Ada" / "01.ipynb", 'check("1.1", ...)')
    hand_in(folder / "=1+1.ipynb", 'check("1.10", ...)')
    (folder / "broken.ipynb").write_text("{")
    (folder / "other.ipynb").write_text('{"cells": [{"cell_type": "code", "source": 3}]}')
    said = []
    lines = grade_class(folder, tmp_path / "marks.csv", on_notebook=said.append)
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [row["notebook"] for row in rows] == ["./=1+1.ipynb", "Ada/01.ipynb", "broken.ipynb", "other.ipynb"]
    assert rows[1]["1.1"] == "unanswered" and "is not a readable notebook" in rows[2]["problem"] and said == lines
    assert list(rows[0])[4:] == sorted(list(rows[0])[4:], key=lambda n: [*map(int, n.split("."))])
    with pytest.raises(InputError, match="--overwrite"):
        grade_class(folder, tmp_path / "marks.csv")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="There is no notebook"):
        grade_class(empty, tmp_path / "m.csv")


def test_handouts_are_not_replaced_by_accident(tmp_path):
    chapters = find_chapters(["01"], BOOK)
    assert [path.parent.name for path in write_handout(chapters, tmp_path)] == ["students", "key"]
    with pytest.raises(InputError, match="--overwrite"):
        write_handout(chapters, tmp_path)
    assert len(write_handout(chapters, tmp_path, overwrite=True)) == 2
    with pytest.raises(InputError, match="There is no chapter 77"):
        find_chapters(["77"], BOOK)
    with pytest.raises(InputError, match="--book"):
        find_chapters(["01"], tmp_path)


def test_the_command(tmp_path, capsys):
    assert cli.main(["class", "handout", "--chapter", "0", "--book", str(BOOK), "--out", str(tmp_path / "c")]) == 0
    assert "students/00_counting.ipynb" in capsys.readouterr().out.replace("\\", "/")
    assert cli.main(["class", "grade", str(tmp_path / "nowhere"), "--out", str(tmp_path / "m.csv")]) == 2
    assert "is not a folder" in capsys.readouterr().err
