"""The benchmark's machinery: who runs when, medians and ratios, absent peers, the file of results.

No speed is asserted anywhere.
"""
import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_llm import benchmark
from transformer_llm.benchmark import (
    FORMAT,
    SECTIONS,
    Plan,
    Section,
    best,
    choose_sections,
    describe_machine,
    failure,
    figure,
    find_line,
    find_section,
    format_section,
    goal_in_words,
    in_words,
    line,
    load_results,
    machine_in_words,
    make_plan,
    measure,
    plot_section,
    ratio,
    run_benchmark,
    save_picture,
    three_digits,
)
from transformer_llm.foundations import InputError, write_json

ROOT = Path(__file__).parent.parent
POSITIVE = st.floats(1e-6, 1e6)


class Clock:
    "Time that passes only when something is done."

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def form(self, name: str, *seconds: float, gives: float | None = None):
        "A form that takes these seconds, one after the other, and the last one from then on."
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return gives

        return run


# --- taking turns -------------------------------------------------------------------------------------------------


def test_forms_take_turns():
    clock = Clock()
    runs = measure({"A": clock.form("A", 9, 1, 2, 3), "B": clock.form("B", 8, 4)}, 3, clock=clock)
    assert "".join(clock.log) == "AB" * 4  # one round to warm up
    assert runs == {"A": [1, 2, 3], "B": [4, 4, 4]}


def test_a_form_may_say_its_own_figure():
    clock = Clock()
    assert measure({"A": clock.form("A", 5, gives=7.0)}, 2, clock=clock) == {"A": [7.0, 7.0]}


def test_no_warm_up_and_a_clock_that_stands_still():
    clock = Clock()
    runs = measure({"A": clock.form("A", 0.0)}, 2, warm_up=0, clock=clock)
    assert len(clock.log) == 2 and all(0 < seconds < 1e-6 for seconds in runs["A"])


def test_a_sentence_stays_a_sentence():
    clock = Clock()
    runs = measure({"A": clock.form("A", 1), "B": "B is not installed"}, 2, clock=clock)
    assert runs == {"A": [1, 1], "B": "B is not installed"}


def test_a_peer_that_fails_becomes_a_sentence_and_ours_does_not():
    def broken():
        raise TypeError("forward() got an unexpected keyword\nand more")

    clock = Clock()
    runs = measure({"ours": clock.form("ours", 1), "theirs": broken}, 2, theirs=["theirs"], clock=clock)
    assert runs == {"ours": [1, 1], "theirs": "it failed with TypeError: forward() got an unexpected keyword"}
    with pytest.raises(TypeError):
        measure({"ours": broken}, 2)
    assert failure(ValueError()) == "it failed with ValueError" and len(failure(ValueError("x" * 999))) < 200


def test_a_peer_that_fails_later_is_not_run_again():
    calls = []

    def breaks_down():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of paper")
        return 1.0

    assert measure({"theirs": breaks_down}, 5, theirs=["theirs"]) == {
        "theirs": "it failed with RuntimeError: out of paper"
    }
    assert len(calls) == 2


@pytest.mark.parametrize("rounds", [0, -1])
def test_rounds_are_a_whole_number(rounds):
    with pytest.raises(InputError, match="rounds must be"):
        measure({}, rounds)


def test_interrupts_come_through():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"theirs": interrupted}, 2, theirs=["theirs"])


def test_turns_are_fair_where_a_machine_slows_down():
    def work(clock, name):
        def run():
            clock.log.append(name)
            clock.now += 1.05 ** len(clock.log)
        return run

    clock = Clock()
    runs = measure({name: work(clock, name) for name in "AB"}, 9, clock=clock)
    found = ratio(figure("A", runs["A"]), figure("B", runs["B"]), "lower")
    assert found["median"] == pytest.approx(1.05) and found["low"] == pytest.approx(1.05)
    one_by_one = Clock()
    runs = {name: measure({name: work(one_by_one, name)}, 9, clock=one_by_one)[name] for name in "AB"}
    assert ratio(figure("A", runs["A"]), figure("B", runs["B"]), "lower")["median"] > 1.5


# --- figures, ratios, lines ---------------------------------------------------------------------------------------


def test_a_figure_has_its_median_and_its_ends():
    one = figure("ours", [3.0, 1.0, 2.0])
    assert (one["median"], one["low"], one["high"], one["runs"]) == (2.0, 1.0, 3.0, [3.0, 1.0, 2.0])
    assert figure("ours", [1.0], share=0.123456)["share"] == 0.1235
    assert figure("theirs", "not there") == {"name": "theirs", "missing": "not there"}


@pytest.mark.parametrize("better, expected", [("higher", (2, 1, 4)), ("lower", (0.5, 0.25, 1))])
def test_ratios_are_taken_within_a_round(better, expected):
    ours, theirs = figure("a", [10.0, 40.0, 20.0]), figure("b", [10.0, 10.0, 10.0])
    assert tuple(ratio(ours, theirs, better).values()) == (expected[0], min(expected), max(expected))
    drifting = ratio(figure("a", [2.0, 20.0, 200.0]), figure("b", [1.0, 10.0, 100.0]), "higher")
    assert drifting == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_where_one_ran_less_often_all_pairs_count():
    assert ratio(figure("a", [1.0, 2.0, 4.0]), figure("b", [2.0]), "higher") == {"median": 1.0, "low": 0.5, "high": 2.0}


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=9))
def test_the_ratio_of_seconds_is_the_ratio_of_speeds(pairs):
    a, b = zip(*pairs)
    seconds = ratio(figure("a", a), figure("b", b), "lower")
    speeds = ratio(figure("a", [1 / x for x in a]), figure("b", [1 / x for x in b]), "higher")
    assert seconds["low"] <= seconds["median"] <= seconds["high"]
    assert seconds["low"] == pytest.approx(speeds["low"], rel=1e-2) and seconds["high"] == pytest.approx(
        speeds["high"], rel=1e-2
    )


def test_the_best_peer_counts_and_absent_ones_do_not():
    peers = [figure("slow", [1.0]), figure("absent", "is not installed"), figure("fast", [3.0])]
    assert (
        best(peers, "higher")["name"] == "fast"
        and best(peers, "lower")["name"] == "slow"
        and best(peers[1:2], "higher") is None
    )
    one = line("x", figure("ours", [6.0]), peers, unit="tokens/s", at_least=1.9)
    assert one["against"] == "fast" and one["ratio"]["median"] == 2 and one["met"] is True and len(one["peers"]) == 3


@pytest.mark.parametrize(
    "ours, peers", [([6.0], "is not installed"), ("no GPU", [6.0]), ("no GPU", "is not installed")]
)
def test_what_is_absent_is_neither_met_nor_missed(ours, peers):
    one = line("x", figure("ours", ours), [figure("theirs", peers)], unit="tokens/s", at_least=2)
    assert one["ratio"] is None and one["met"] is None
    text = format_section(dict(title="T", setting="S", lines=[one]))
    assert "not measured" in text and ("is not installed" in text or "no GPU" in text)


@pytest.mark.parametrize(
    "conditions, met",
    [
        ({}, True),
        ({"a": True}, True),
        ({"a": True, "b": False}, False),
        ({"a": None}, None),
        ({"a": None, "b": False}, False),
    ],
)
def test_conditions_decide_too(conditions, met):
    assert (
        line("x", figure("a", [4.0]), [figure("b", [2.0])], unit="s", at_least=2, conditions=conditions)["met"] is met
    )
    assert (
        line("x", figure("a", [3.0]), [figure("b", [2.0])], unit="s", at_least=2, conditions=conditions)["met"] is False
    )


@pytest.mark.parametrize("value, met", [(85.0, True), (84.0, False), (115.0, True), (116.0, False), (100.0, True)])
def test_a_prediction_may_err_on_both_sides(value, met):
    one = line("x", figure("predicted", [value]), [figure("measured", [100.0])], unit="bytes", within=0.15)
    assert one["met"] is met and goal_in_words(one["goal"]) == "1 ± 0.15"


def test_a_line_without_a_goal_is_neither():
    assert line("x", figure("a", [4.0]), [figure("b", [2.0])], unit="s")["met"] is None


@pytest.mark.parametrize(
    "value, words",
    [
        (0.004567, "0.00457"),
        (0.5, "0.500"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (4890.3, "4,890"),
        (0, "0"),
    ],
)
def test_three_digits(value, words):
    assert three_digits(value) == words


@pytest.mark.parametrize(
    "value, unit, words",
    [
        (950e6, "bytes", "950 MB"),
        (1.5e9, "bytes", "1.50 GB"),
        (2e13, "bytes", "20,000 GB"),
        (3.0, "s", "3.00 s"),
        (12, "bytes", "12.0 bytes"),
    ],
)
def test_numbers_with_units(value, unit, words):
    assert in_words(value, unit) == words


@given(st.floats(0, 1e18))
def test_every_number_has_words(value):
    assert float(three_digits(value).replace(",", "")) == pytest.approx(value, rel=6e-3, abs=1e-12)


# --- tables and pictures ------------------------------------------------------------------------------------------


def some_section(**changes) -> dict:
    lines = [
        line(
            "fast",
            figure("ours", [4.0, 5.0], share=0.5),
            [figure("theirs", [2.0, 2.0])],
            unit="tokens/s",
            at_least=2,
            conditions={"same losses": True},
            note="A note.",
        ),
        line(
            "slow",
            figure("ours", [4.0]),
            [figure("theirs", [2.0])],
            unit="s",
            better="lower",
            at_least=1,
            conditions={"same losses": False, "same text": None},
        ),
        line(
            "absent", figure("ours", [4.0]), [figure("theirs", "theirs is not installed")], unit="tokens/s", at_least=1
        ),
        line("on a GPU", figure("ours", "this machine has no GPU"), [], unit="tokens/s"),
        line("memory", figure("predicted", [9e8]), [figure("measured", [1e9])], unit="bytes", within=0.15),
    ]
    return dict(title="A title", setting="A setting.", quick=False, seconds=1.5, lines=lines) | changes


def test_the_table_says_ratios_first_and_everything_else_below():
    text = format_section(some_section())
    assert text.splitlines()[:3] == ["A title", "A setting.", ""] and text.splitlines()[3].split() == [
        "ratio",
        "spread",
        "goal",
        "met",
        "what",
    ]
    rows = [row for row in text.splitlines() if "×" in row]
    assert (
        [row.split()[0] for row in rows] == ["2.25", "0.500", "0.900"]
        and "2.00 to 2.50" in rows[0]
        and "≥ 2  " in rows[0]
        and "yes" in rows[0]
        and "NO" in rows[1]
    )
    for words in (
        "4.50 tokens/s (ours, 50%); 2.00 tokens/s (theirs)",
        "and same losses",
        "but NOT: same losses",
        "unknown: same text",
        "A note.",
        "not measured (theirs: theirs is not installed)",
        "not measured (ours: this machine has no GPU)",
        "1 ± 0.15",
    ):
        assert words in text
    assert all(row == row.rstrip() for row in text.splitlines()) and max(map(len, text.splitlines())) < 120


def test_the_picture_has_a_bar_for_each_ratio():
    import matplotlib

    matplotlib.use("Agg")
    ax = plot_section(some_section())
    assert len(ax.patches) == 3 and [label.get_text() for label in ax.get_yticklabels()] == [
        "fast",
        "slow",
        "absent",
        "on a GPU",
        "memory",
    ]
    assert sorted(round(patch.get_x() + patch.get_width(), 3) for patch in ax.patches) == [0.5, 0.9, 2.25]
    assert [text.get_text() for text in ax.texts] == ["not measured"] * 2
    empty = plot_section(some_section(lines=[]))
    titles = [one.get_title("left") or one.get_title() for one in (ax, empty)]  # the book's style puts it to the left
    assert titles == ["A title"] * 2


def test_all_sections_in_one_picture(tmp_path):
    save_picture(
        {"sections": {"a": some_section(), "b": some_section(), "empty": some_section(lines=[])}},
        tmp_path / "picture.png",
    )
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# --- the file of results ------------------------------------------------------------------------------------------


def some_results(**changes) -> dict:
    return (
        dict(
            format=FORMAT,
            draft=False,
            machine=describe_machine(),
            settings={"seed": 0, "text": None},
            sections={"generation": some_section()},
        )
        | changes
    )


def test_results_come_back_as_they_were_written(tmp_path):
    write_json(tmp_path / "results.json", some_results())
    back = load_results(tmp_path / "results.json")
    assert back == some_results() and find_section(back, "generation") == some_section()
    assert find_line(back, "generation", "slow")["met"] is False
    with pytest.raises(InputError, match="no line 'quick'; it has fast, slow"):
        find_line(back, "generation", "quick")
    with pytest.raises(InputError, match="no section 'speed'; they have generation"):
        find_section(back, "speed")


def test_the_committed_results_are_whole():
    results = load_results(ROOT / "data" / "benchmark.json")
    assert set(results["sections"]) <= set(SECTIONS)
    for section in results["sections"].values():
        assert section["lines"] and format_section(section)
        for one in section["lines"]:
            again = line(
                one["name"],
                one["ours"],
                one["peers"],
                unit=one["unit"],
                better=one["better"],
                conditions=one["conditions"],
                note=one["note"],
                **(one["goal"] or {}),
            )
            assert again == one


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", '"results"', "{}", '{"format": 1}', "\x00", "[" * 100_000]
)
def test_what_is_no_file_of_results(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="x.json (is not a readable JSON|holds no benchmark results)"):
        load_results(tmp_path / "x.json")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.json"):
        load_results(tmp_path / "absent.json")


@pytest.mark.parametrize("format", [0, 2, "1", None, [], "x" * 1000])
def test_another_format_is_refused_in_a_sentence(tmp_path, format):
    write_json(tmp_path / "x.json", some_results(format=format))
    with pytest.raises(
        InputError, match="has format .*, but this package reads format 1; run transformer-llm bench again"
    ) as error:
        load_results(tmp_path / "x.json")
    assert len(str(error.value)) < 300


def paths(value, before=()):
    "Every place in a JSON value."
    yield before
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(child, (*before, key))


REQUIRED = [
    path
    for path in paths(json.loads(json.dumps({"sections": {"generation": some_section()}})))
    if path and path[-1] not in ("title", "share")
]


@pytest.mark.parametrize("poison", [None, "text", float("nan"), float("inf"), [], {"a": 1}, True, -(10**400)], ids=repr)
def test_damage_anywhere_is_noticed_or_does_no_harm(tmp_path, poison):
    import matplotlib

    matplotlib.use("Agg")
    for path in REQUIRED:
        results = json.loads(json.dumps(some_results()))
        place = results
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = poison
        (tmp_path / "x.json").write_text(json.dumps(results), encoding="utf-8")
        try:
            back = load_results(tmp_path / "x.json")
        except InputError as error:
            assert "x.json" in str(error)
            continue
        for name in back["sections"]:  # what is let through can be printed
            format_section(back["sections"][name])


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_what_is_missing_is_noticed(tmp_path, path):
    results = json.loads(json.dumps(some_results()))
    place = results
    for key in path[:-1]:
        place = place[key]
    if (
        isinstance(place, list)
        or path[-1] in ("generation", "a", "same losses", "same text")
        or path[-1] in ("at_least", "within")
        or "missing" in place
    ):
        return  # one item less, or one condition less, is no damage that can be seen
    del place[path[-1]]
    (tmp_path / "x.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(InputError, match="x.json"):
        load_results(tmp_path / "x.json")


# --- the machine --------------------------------------------------------------------------------------------------


def test_the_machine_is_described_and_nobody_is_named():
    import platform

    machine = describe_machine()
    assert (
        machine["processor"]
        and machine["cores"] >= 1
        and machine["threads"] >= 1
        and machine["torch"]
        and machine["python"].count(".") == 2
    )
    text = json.dumps(machine)
    for secret in {platform.node(), str(Path.home())}:
        assert len(secret) < 4 or secret not in text
    assert machine["processor"] in machine_in_words(machine) and "torch" in machine_in_words(machine)
    assert "transformers not installed" in machine_in_words(
        machine | {"transformers": None, "memory": None, "instructions": []}
    )


def test_an_absent_package_has_no_version():
    assert benchmark.version_of("a-package-that-nobody-wrote") is None


# --- plans --------------------------------------------------------------------------------------------------------


def test_the_quick_plan_is_smaller_everywhere():
    long, quick = make_plan(), make_plan(quick=True)
    assert quick.quick and not long.quick
    smaller = 0
    for field in fields(Plan):
        a, b = getattr(long, field.name), getattr(quick, field.name)
        if field.name in ("quick", "seed", "text"):
            continue
        infinite = [float("inf") if value is None else value for value in (a, b)]
        assert infinite[1] <= infinite[0], field.name
        smaller += infinite[1] < infinite[0]
    assert smaller >= 5


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_plan_refuses_odd_seeds(seed):
    with pytest.raises(InputError, match="seed"):
        make_plan(seed=seed)


def test_a_plan_refuses_odd_texts(tmp_path):
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 200)
    for path, says in (
        (tmp_path / "short.txt", "too short"),
        (tmp_path / "binary.txt", "not UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent.txt", "absent.txt"),
    ):
        with pytest.raises(InputError, match=says):
            make_plan(text=path)


def test_sections_by_name():
    assert choose_sections() == [name for name, section in SECTIONS.items() if not section.on_request]
    everything = list(SECTIONS)
    assert (
        choose_sections(reversed(everything)) == everything and choose_sections([everything[0]] * 3) == everything[:1]
    )
    with pytest.raises(InputError, match="section must be one of"):
        choose_sections(["speed"])


# --- a whole run, of sections that cost nothing -------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch):
    "Three sections that only note that they ran."
    ran = []

    def section(name: str, error: BaseException | None = None):
        def run(plan):
            ran.append(name)
            if error:
                raise error
            return [
                line(
                    f"{name}, seed {plan.seed}",
                    figure("ours", [2.0]),
                    [figure("theirs", [1.0])],
                    unit="tokens/s",
                    at_least=1,
                )
            ]

        return run

    sections = {name: Section(name.title(), "Cheap.", section(name)) for name in ("one", "two", "three")}
    sections["asked"] = Section("Asked", "Cheap.", section("asked"), on_request=True)
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    return ran, sections, section


def test_a_run_writes_what_it_returns(tmp_path, cheap):
    said = []
    results = run_benchmark(output=tmp_path / "deep" / "r.json", tell=said.append, seed=3)
    assert (
        load_results(tmp_path / "deep" / "r.json") == results
        and list(results["sections"]) == ["one", "two", "three"] == cheap[0]
    )
    assert results["settings"] == {"seed": 3, "text": None} and results["draft"] is False
    assert any("one, seed 3" in text for text in said) and "cores" in said[0]


def test_a_run_without_a_file(cheap):
    assert list(run_benchmark(["two"], tell=lambda said: None)["sections"]) == ["two"]
    assert list(run_benchmark(["asked"], tell=lambda said: None)["sections"]) == ["asked"]


def test_ctrl_c_keeps_what_was_measured(tmp_path, cheap, monkeypatch):
    ran, sections, section = cheap
    monkeypatch.setitem(sections, "two", Section("Two", "Cheap.", section("two", KeyboardInterrupt())))
    said = []
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(output=tmp_path / "r.json", tell=said.append)
    assert list(load_results(tmp_path / "r.json")["sections"]) == ["one"] and "holds what was measured: one" in said[-1]
    monkeypatch.setitem(sections, "two", Section("Two", "Cheap.", section("two")))
    results = run_benchmark(["two"], output=tmp_path / "r.json", tell=said.append)
    assert list(results["sections"]) == ["one", "two"] == list(load_results(tmp_path / "r.json")["sections"])
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_ctrl_c_before_anything_was_measured(tmp_path, cheap, monkeypatch):
    ran, sections, section = cheap
    monkeypatch.setitem(sections, "one", Section("One", "Cheap.", section("one", KeyboardInterrupt())))
    said = []
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(output=tmp_path / "r.json", tell=said.append)
    assert not (tmp_path / "r.json").exists() and "before a section was complete" in said[-1]


def test_a_section_that_is_measured_again_replaces_the_old_one(tmp_path, cheap):
    quiet = dict(output=tmp_path / "r.json", tell=lambda said: None)
    run_benchmark(**quiet)
    results = run_benchmark(["three", "one"], quick=True, **quiet)
    assert [section["quick"] for section in results["sections"].values()] == [True, False, True]
    assert list(results["sections"]) == ["one", "two", "three"]


def test_a_draft_is_replaced(tmp_path, cheap):
    write_json(tmp_path / "r.json", some_results(draft=True))
    assert list(run_benchmark(["one"], output=tmp_path / "r.json", tell=lambda said: None)["sections"]) == ["one"]


def change_machine(results):
    results["machine"]["processor"] = "Another Processor"


def change_version(results):
    results["machine"]["torch"] = "1.0"


def change_seed(results):
    results["settings"]["seed"] = 1


@pytest.mark.parametrize(
    "change, says", [(change_machine, "processor"), (change_version, "torch"), (change_seed, "seed")]
)
def test_results_from_elsewhere_are_left_alone(tmp_path, cheap, change, says):
    results = some_results()
    change(results)
    write_json(tmp_path / "r.json", results)
    before = (tmp_path / "r.json").read_bytes()
    with pytest.raises(InputError, match=f"measured differently.*{says}.*--output"):
        run_benchmark(output=tmp_path / "r.json", tell=lambda said: None)
    assert (tmp_path / "r.json").read_bytes() == before and cheap[0] == []


def test_another_text_is_another_file(tmp_path, cheap):
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for number, path in enumerate(texts):
        path.write_text(f"line {number}\n" * 5000, encoding="utf-8")
    run = partial(run_benchmark, ["one"], output=tmp_path / "r.json", tell=lambda said: None)
    first = run(text=texts[0])
    assert first["settings"]["text"]["name"] == "a.txt"
    assert run()["settings"] == first["settings"]  # a section that needs no text fits both
    with pytest.raises(InputError, match="measured differently .text"):
        run(text=texts[1])


@pytest.mark.parametrize("content", ["my diary", "{}", "[1, 2]", '{"format": 99, "sections": {}}'])
def test_a_strangers_file_is_left_alone(tmp_path, cheap, content):
    (tmp_path / "diary").write_text(content, encoding="utf-8")
    with pytest.raises(
        InputError, match="already exists and is not a file of results that can be continued; give another --output"
    ):
        run_benchmark(output=tmp_path / "diary", tell=lambda said: None)
    assert (tmp_path / "diary").read_text(encoding="utf-8") == content and cheap[0] == []


def test_places_that_cannot_be_written_are_refused_before_measuring(tmp_path, cheap):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "r.json", "part of that path is a file|not a folder|Can't write"),
        (Path("/proc/r.json"), "Can't write"),
    ):
        if not output.parent.exists() and output.parts[1] == "proc":
            continue
        with pytest.raises(InputError, match=says):
            run_benchmark(output=output, tell=lambda said: None)
    assert cheap[0] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_after_measuring_still_shows_the_table(tmp_path, cheap, monkeypatch):
    def full(path, value):
        raise InputError("Can't write: the disk is full.")

    monkeypatch.setattr(benchmark, "write_json", full)
    said = []
    with pytest.raises(InputError, match="disk is full"):
        run_benchmark(["one"], output=tmp_path / "r.json", tell=said.append)
    assert any("one, seed 0" in text for text in said)


def test_a_name_that_is_no_section_is_refused_before_measuring(cheap):
    with pytest.raises(InputError, match="section must be one of one, two, three, asked, not 'four'"):
        run_benchmark(["one", "four"], tell=lambda said: None)
    assert cheap[0] == []


def test_sections_that_need_a_text_get_the_plays(tmp_path, cheap, monkeypatch):
    play = tmp_path / "plays.txt"
    play.write_text("To be or not to be\n" * 2000, encoding="utf-8")
    monkeypatch.setattr("transformer_llm.dataset.load_shakespeare", lambda: play)
    seen = []
    monkeypatch.setitem(
        cheap[1], "one", Section("One", "Cheap.", lambda plan: seen.append(plan.text) or [], needs_text=True)
    )
    assert run_benchmark(["one"], tell=lambda said: None)["settings"]["text"]["name"] == "plays.txt" and seen == [play]
    assert run_benchmark(["two"], tell=lambda said: None)["settings"]["text"] is None


# --- the sections themselves, on models that cost nothing ---------------------------------------------------------


@pytest.fixture(scope="module")
def small_config():
    return benchmark.gpt2_shape("tiny", vocab_size=61, context_length=32, d_model=32, n_layers=2, n_heads=2)


def small_plan(**changes) -> Plan:
    return replace(make_plan(quick=True), **dict(rounds=2, new_tokens=6, trajectory=2) | changes)


def names_of(lines: list[dict]) -> list[str]:
    return [one["name"] for one in lines]


@pytest.fixture
def no_transformers(monkeypatch):
    from transformer_llm import peers

    there = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("transformers", "tokenizers") else there(name, *rest),
    )


def training_section(config, plan) -> list[dict]:
    runs, losses = benchmark.training_runs(plan, config, batch_size=2, context_length=16, steps=1, rounds=plan.rounds)
    return benchmark.training_lines("small", config, runs, losses, 16)


def test_training_is_compared_at_equal_losses(small_config):
    pytest.importorskip("transformers")
    lines = training_section(small_config, small_plan())
    assert len(lines) == 5 and all(len(one["ours"]["runs"]) == 2 and 0 < one["ours"]["share"] for one in lines)
    for one in lines:
        assert one["ratio"] and all(one["conditions"].values()), one["conditions"]
        assert {peer["name"].split(", ")[0] for peer in one["peers"]} == {"transformers", "torch.nn.TransformerEncoder"}


def test_training_without_transformers(small_config, no_transformers):
    lines = training_section(small_config, small_plan())
    for one in lines:
        assert one["against"].startswith("torch.nn") and any(
            peer.get("missing") == "transformers is not installed" for peer in one["peers"]
        )


def test_other_losses_are_noticed(small_config):
    losses = {"Trainer, float32": [4.0, 3.0], "FastTrainer, float32": [4.0, 3.1], "gone": "it failed"}
    assert list(benchmark.same_losses(losses, ["FastTrainer, float32", "gone"], "float32").values()) == [False]
    assert list(benchmark.same_losses(losses, ["gone"], "float32").values()) == [True]


def test_the_shape_of_the_peers_is_gpt2s():
    assert [benchmark.size_in_words(benchmark.gpt2_shape(preset)) for preset in ("tiny", "gpt2")] == ["6.9 M", "124 M"]
    assert benchmark.size_in_words(benchmark.gpt2_shape("nano", context_length=256)) == "0.8 M"


def test_the_gpus_lines_run_on_a_cpu_too(monkeypatch, small_config):
    monkeypatch.setattr(benchmark, "gpt2_shape", lambda preset: small_config)
    lines = benchmark.gpu_lines(
        small_plan(rounds=1), device="cpu", compiled=False, sizes={"tiny": dict(batch_size=2, context_length=16)}
    )
    assert len(lines) == 5 and all(one["name"].startswith("GPU, tiny") for one in lines)
    import torch

    if not torch.cuda.is_available():
        assert benchmark.gpu_lines(small_plan())[0]["ours"]["missing"] == "this machine has no GPU"


@pytest.fixture
def some_text(tmp_path) -> Path:
    import random

    draw, words = (
        random.Random(0),
        "the cat sat on a mat and saw one red hat by the old oak tree near our small house".split(),
    )
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=9)) for _ in range(900)), encoding="utf-8")
    return path


def test_the_gpus_time_to_loss_runs_on_a_cpu_too(some_text):
    model = dict(d_model=16, n_layers=1, n_heads=2, context_length=16)
    training = dict(
        max_steps=6, batch_size=2, warmup_steps=0, eval_every=2, eval_batches=2, device="cpu", checkpoint_every=0
    )
    reached, = benchmark.gpu_training_loss(small_plan(text=some_text), model, training, loss=9.0)
    assert reached["ours"]["median"] > 0 and reached["met"] is None and "Best validation loss" in reached["note"]
    missed, = benchmark.gpu_training_loss(small_plan(text=some_text), model, training, loss=0.1)
    assert "its best validation loss was" in missed["ours"]["missing"]
    import torch

    if not torch.cuda.is_available():
        assert "no GPU" in benchmark.gpu_training_loss(small_plan(text=some_text))[0]["ours"]["missing"]


def test_seconds_until_a_loss():
    history = [
        dict(seconds=1.0, val_loss=None),
        dict(seconds=2.0, val_loss=3.0),
        dict(seconds=3.0, val_loss=1.5),
        dict(seconds=4.0, val_loss=1.4),
    ]
    assert benchmark.seconds_until(history, 1.5) == 3.0 and benchmark.seconds_until(history, 1.0) is None


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_generation_is_compared_at_equal_texts(small_config, preset):
    pytest.importorskip("transformers")
    lines = benchmark.generation_of(
        small_plan(large=True, quick=False, rounds=1), preset, small_config.replace(context_length=64)
    )
    same = [one["conditions"] for one in lines if one["conditions"]]
    assert len(same) == (3 if preset == "gpt2" else 2) and all(
        value is True for conditions in same for value in conditions.values()
    )
    assert all(one["ratio"] for one in lines), [one for one in lines if not one["ratio"]]
    assert ("batch 1, greedy, int8" in " ".join(names_of(lines))) == (preset == "gpt2") and len(lines) == (
        14 if preset == "gpt2" else 6
    )


def test_generation_without_transformers(small_config, no_transformers):
    lines = benchmark.generation_of(small_plan(), "tiny", small_config.replace(context_length=64))
    assert all(one["ratio"] is None and one["met"] is None for one in lines[:-1]) and lines[-1]["ratio"]


def test_a_writer_that_writes_too_little_is_no_rival(small_config):
    import torch

    runs = benchmark.writing_speeds({"theirs": lambda ids, n, sampled: ids}, torch.zeros(1, 4, dtype=torch.long), 5, 1)
    assert "where (1, 8) was asked for" in runs["theirs"]


def test_tokenizers_are_compared_at_equal_merges_and_ids(some_text):
    pytest.importorskip("tokenizers")
    lines = benchmark.tokenizer_lines(small_plan(text=some_text, rounds=1))
    assert names_of(lines)[:2] == ["training", "encoding"] and all(
        value is True for one in lines for value in one["conditions"].values()
    )
    assert all(one["ratio"] for one in lines)


def test_tokenizers_without_the_rival(some_text, no_transformers, monkeypatch):
    monkeypatch.setattr(benchmark, "stream_lines", lambda *options: [])
    training, encoding, textbook = benchmark.tokenizer_lines(small_plan(text=some_text, rounds=1))
    for one in (training, encoding):
        assert (
            one["ratio"] is None
            and one["met"] is None
            and all(peer["missing"] == "tokenizers is not installed" for peer in one["peers"])
        )
    assert textbook["ratio"]


def fake_runs(seconds: dict[str, float], losses: dict[str, float | None]):
    order = []

    def run(name: str, plan: Plan, seed: int) -> dict:
        order.append((name, seed))
        return {"seconds": seconds[name] + seed * 0.1, "val_loss": losses[name]}

    return run, order


SECONDS = {
    "plain": 4.0,
    "ngrams": 1.0,
    "documented": 100.0,
    "hf": 120.0,
    "tuned": 60.0,
    "hf tuned": 70.0,
    "under-1.60": 6.0,
    "minute": 55.0,
}
LOSSES = {
    "plain": 1.85,
    "ngrams": 1.86,
    "documented": 1.868,
    "hf": 1.861,
    "tuned": 1.86,
    "hf tuned": 1.85,
    "under-1.60": 1.59,
    "minute": 1.51,
}


def test_sprints_run_between_the_references():
    pytest.importorskip("transformers")
    run, order = fake_runs(SECONDS, LOSSES)
    lines = benchmark.training_loss(make_plan(), run)
    assert [name for name, _ in order] == [
        "plain",
        "ngrams",
        "documented",
        "plain",
        "ngrams",
        "hf",
        "plain",
        "ngrams",
        "tuned",
        "hf tuned",
        *["under-1.60"] * 3,
        "minute",
    ]
    assert [seed for name, seed in order if name == "plain"] == [
        seed for name, seed in order if name == "under-1.60"
    ] == [0, 1, 2] and {seed for name, seed in order if name in ("hf", "minute")} == {0}
    assert [round(one["ratio"]["median"], 1) for one in lines] == [24.4, 14.6, 90.9, 54.5, 9.8, 1.1] and [
        one["met"] for one in lines
    ] == 5 * [True] + [None]
    assert lines[0]["against"].startswith("as documented, our Trainer") and "1.868" in lines[0]["against"]


@pytest.mark.parametrize(
    "losses, met", [(dict(plain=1.869), False), (dict(documented=None), None), (dict(plain=1.868), True)]
)
def test_a_sprint_that_stops_short_of_the_loss_does_not_count(losses, met):
    run, _ = fake_runs(SECONDS, LOSSES | losses)
    assert benchmark.training_loss(make_plan(), run)[0]["met"] is met


@pytest.mark.parametrize("seconds, loss, met", [(59.9, 1.599, True), (60.1, 1.5, False), (50.0, 1.6, False)])
def test_the_minute_needs_both(seconds, loss, met):
    run, _ = fake_runs(SECONDS | {"under-1.60": seconds}, LOSSES | {"under-1.60": loss})
    assert benchmark.training_loss(make_plan(), run)[4]["met"] is met


def test_time_to_loss_without_transformers_and_with_one_that_fails(no_transformers, monkeypatch):
    run, order = fake_runs(SECONDS, LOSSES)
    lines = benchmark.training_loss(make_plan(), run)
    assert not any(name.startswith("hf") for name, _ in order) and "transformers is not installed" in format_section(
        dict(title="", setting="", lines=lines)
    )
    monkeypatch.setattr("transformer_llm.peers.why_missing", lambda name: None)

    def fails(name, plan, seed):
        if name.startswith("hf"):
            raise AttributeError("no such thing in this version")
        return run(name, plan, seed)

    lines = benchmark.training_loss(make_plan(), fails)
    assert lines[0]["met"] is True and any(
        "it failed with AttributeError" in peer.get("missing", "") for peer in lines[0]["peers"]
    )


def test_the_quick_form_scales_its_references(some_text):
    pytest.importorskip("transformers")
    plan = small_plan(text=some_text, reference_steps=2)
    for name in benchmark.REFERENCES:
        run = benchmark.run_once(name, plan, 0)
        assert run["val_loss"] is None and run["seconds"] > 0


def test_a_sprint_runs_whole(some_text):
    run = benchmark.run_once("ngrams", small_plan(text=some_text), 0)
    assert 0 < run["val_loss"] < 4 and run["seconds"] > 0


def test_a_program_of_its_own():
    assert benchmark.fresh_process("import sys; print('noise'); print(sys.argv[1])", "2.5") == 2.5
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        benchmark.fresh_process("1 / 0")


def test_peak_of_memory_is_the_process_own():
    big = bytearray(300_000_000)  # the parent's size is not the child's
    assert benchmark.fresh_process(benchmark.PEAK + "print(peak())") < 150_000_000 < len(big)
    grown = benchmark.fresh_process(
        benchmark.PEAK + "before = peak(); x = bytearray(50_000_000); print(peak() - before)"
    )
    assert 45_000_000 < grown < 60_000_000


def test_start_up_and_memory(monkeypatch):
    monkeypatch.setattr(
        benchmark,
        "MEMORY_CASES",
        {"demo": ("demo", 2, 16, "float32", False), "demo, checkpointing": ("demo", 2, 16, "float32", True)},
    )
    lines = benchmark.start_up_lines(small_plan(rounds=1)) + benchmark.memory_lines(small_plan())
    assert len(lines) == 7 and all(one["ours"]["median"] > 0 for one in lines)
