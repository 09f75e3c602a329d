"""Appendix 90 in strange places: permissions, pipes, devices, huge files, names that are no text, no home folder."""
import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, TypeCheckError

from transformer_llm import foundations
from transformer_llm.foundations import (
    InputError,
    atomic_write,
    cache_dir,
    check_choice,
    check_range,
    read_json,
    sha256_of,
    write_json,
    checked_by_kind,
)

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask, no pipes by name and no such names")


@pytest.fixture
def umask():
    "Set the umask, and set it back at the end."
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, mask, mode):
    umask(mask)
    write_json(tmp_path / "new.json", 1)
    assert mode_of(tmp_path / "new.json") == mode


@posix
def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "old.json"
    for mode in (0o600, 0o640, 0o444, 0o755):
        path.touch()
        path.chmod(mode)
        write_json(path, mode)
        assert mode_of(path) == mode and read_json(path) == mode


def test_long_names_have_room_for_the_temporary_one(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")
    write_json(path, 5)
    assert read_json(path) == 5 and [p.name for p in tmp_path.iterdir()] == [path.name]


@posix
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_a_pipe_or_a_device_is_never_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        with pytest.raises(InputError, match=f"{path.name} is a (pipe|device)"):
            write_json(path, 1)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()


@posix
def test_what_is_read_is_a_file_and_nothing_is_waited_for(tmp_path):
    pipe, zeros, folder = tmp_path / "pipe", tmp_path / "zeros", tmp_path / "folder"
    os.mkfifo(pipe)
    zeros.symlink_to("/dev/zero")
    folder.mkdir()
    script = """
import sys
from transformer_llm import foundations
for path, word in zip(sys.argv[1:], ("pipe", "device", "folder", "no such file")):
    for read in (foundations.read_json, foundations.sha256_of):
        try:
            read(path)
        except foundations.InputError as error:
            assert word in str(error) and path in str(error), error
        else:
            raise AssertionError(path)
"""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n{script}"
    paths = [pipe, zeros, folder, tmp_path / "missing"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", limited, *map(str, paths)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 20


def test_a_regular_file_is_told_from_the_rest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert foundations.check_regular_file(path) == path
    with foundations.open_regular(path) as file:
        assert file.read() == b"abc"
    wrong_paths = {tmp_path: "a folder, not a file", tmp_path / "none": "no such file", "a\0b": "Can't read"}
    for wrong, words in wrong_paths.items():
        for check in (foundations.check_regular_file, foundations.open_regular):
            with pytest.raises(InputError, match=words):
                check(wrong)


def test_a_json_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(10**12)  # a hole: a terabyte that takes no room
    with pytest.raises(InputError, match=r"large.json is larger than the 67,108,864 bytes"):
        read_json(path)
    path.write_text("[1, 2]")
    assert read_json(path, max_bytes=6) == [1, 2]
    with pytest.raises(InputError, match="larger than the 5 bytes"):
        read_json(path, max_bytes=5)


@pytest.mark.parametrize("content", [b"\xff", b"{", b"", b"[" * 100_000, b"1" * 5000])
def test_a_damaged_json_file_is_one_sentence(tmp_path, content):
    (tmp_path / "damaged.json").write_bytes(content)
    with pytest.raises(InputError, match="damaged.json is not a readable JSON file"):
        read_json(tmp_path / "damaged.json")


@posix
def test_a_name_that_is_not_utf8_is_printed_in_every_sentence(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    for refused in (lambda: read_json(name), lambda: sha256_of(name), lambda: foundations.user_path(name)):
        with pytest.raises(InputError) as raised:
            refused()
        assert str(raised.value).encode("utf-8") and r"\udcff\udcfe" in str(raised.value)
    with pytest.raises(InputError, match="is not UTF-8 text; rename"):
        write_json(tmp_path / "command.json", {"text_file": name})
    assert list(tmp_path.iterdir()) == []


def test_paths_that_people_give(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert foundations.user_path("~/x") == tmp_path / "x" and foundations.user_path(Path("a/b")) == Path("a/b")
    monkeypatch.setenv("TRANSFORMER_LLM_CACHE", "~/cache")
    assert cache_dir() == tmp_path / "cache"
    with pytest.raises(InputError, match="zero byte"):
        foundations.user_path("a\0b")
    for wrong in (5, None, b"a"):
        with pytest.raises(InputError, match="A path must be text, not "):
            foundations.user_path(wrong)


@posix
def test_a_home_folder_that_is_not_known_is_one_sentence(monkeypatch):
    with pytest.raises(InputError, match="home folder that ~nobody-of-this-name/x begins with"):
        foundations.user_path("~nobody-of-this-name/x")
    for name in ("HOME", "TRANSFORMER_LLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    with pytest.raises(InputError, match="set HOME or TRANSFORMER_LLM_CACHE"):
        cache_dir()
    with pytest.raises(InputError, match="set HOME"):
        foundations.user_path("~/x")


@pytest.mark.parametrize(
    "value, shown",
    [
        (10**309, "not 1e+309."),
        (-(10**309), "not -1e+309."),
        (-37 * 10**6000, "not -3.7e+6001."),
        (10**400 - 1, "not 1e+400."),
        (2**63, "not 9223372036854775808."),
        ("x" * 500, "x…."),
    ],
    ids=["large", "negative", "too long for repr", "nines", "seed", "text"],
)
def test_a_refused_value_is_shown_with_its_sign_and_size(value, shown):
    with pytest.raises(InputError) as raised:
        check_range("d_model", value, 0, 1)
    assert str(raised.value).endswith(shown) and len(str(raised.value)) < 120
    with pytest.raises(InputError) as raised:
        check_choice("norm", value, ["layernorm"])
    assert str(raised.value).endswith(shown) and len(str(raised.value)) < 120


def test_the_memory_of_the_machine_is_told():
    if hasattr(os, "sysconf"):
        assert foundations.memory_bytes() > 2**28


def test_json_is_written_as_it_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True], "ß": "\U0001f600"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value == json.loads((tmp_path / "x.json").read_bytes())
    with atomic_write(tmp_path / "deep" / "y") as file:
        file.write(b"1")
    assert read_json(tmp_path / "deep" / "y") == 1


# Shapes, checked once for each kind of call
# --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def added():
    @checked_by_kind
    def add(x: Float[torch.Tensor, "batch seq"], y: Float[torch.Tensor, "seq"], names: list[str] | None = None):
        return x + y

    return add


def test_a_wrong_call_is_refused_however_many_right_ones_came_before(added):
    for _ in range(3):
        added(torch.ones(2, 3), torch.ones(3))
    for wrong in ((torch.ones(2, 3), torch.ones(4)), (torch.ones(3), torch.ones(3)), (torch.ones(2, 3), 3.0)):
        for _ in range(2):
            with pytest.raises(TypeCheckError):
                added(*wrong)
    with pytest.raises(TypeCheckError):
        added(torch.ones(2, 3), torch.ones(3, dtype=torch.int64))
    added(torch.ones(2, 4), torch.ones(4))


def test_pairs_of_pairs_of_pairs_are_not_looked_through():
    "A tuple that holds the same tuple twice, many times over, has more items than there are atoms."

    @checked_by_kind
    def length(items: tuple) -> int:
        return len(items)

    pairs = ((1, 2), (3, 4))
    assert foundations._kind(pairs) == ((int, int), (int, int))
    assert foundations._kind((pairs, pairs)) is None
    for _ in range(99):
        pairs = (pairs, pairs)
    assert length(pairs) == length(pairs) == 2


def test_what_a_list_holds_is_looked_at_every_time(added):
    added(torch.ones(2, 3), torch.ones(3), ["a"])
    with pytest.raises(TypeCheckError):
        added(torch.ones(2, 3), torch.ones(3), [1])


def test_a_wrong_result_is_refused_after_right_ones():
    @checked_by_kind
    def halve(x: Float[torch.Tensor, "n"], wrong: bool) -> Float[torch.Tensor, "n"]:
        return x[:1] if wrong else x / 2

    halve(torch.ones(4), False)
    with pytest.raises(TypeCheckError):
        halve(torch.ones(4), True)
    halve(torch.ones(4), False)


def of_a_module(x):
    return x


def test_a_check_is_written_when_it_is_first_needed(monkeypatch):
    "Of a function inside another one at once: a signal handler can run while beartype holds a lock."
    import beartype

    written = []
    monkeypatch.setattr(beartype, "beartype", lambda conf: lambda function: written.append(function) or function)

    def of_a_function(x):
        return x

    later, at_once = checked_by_kind(of_a_module), checked_by_kind(of_a_function)
    assert {function.__name__ for function in written} == {"of_a_function"}
    assert later(1) == at_once(1) == 1
    assert {function.__name__ for function in written} == {"of_a_function", "of_a_module"}


def test_a_result_of_another_kind_is_checked_without_a_second_call():
    calls = []

    @checked_by_kind
    def first(x: "Float[torch.Tensor, 'n']", how_many: int) -> "tuple[Float[torch.Tensor, 'm'], Named]":
        calls.append(how_many)
        return (x[:how_many], Named()) if how_many < 3 else (x[None, :how_many], Named())

    for how_many in (1, 2, 2, 1):
        assert len(first(torch.ones(4), how_many)[0]) == how_many
    with pytest.raises(TypeCheckError, match="return value"):
        first(torch.ones(4), 3)
    assert calls == [1, 2, 2, 1, 3]


class Named:
    "Its name stands in quotes in an annotation."


def test_a_check_keeps_no_result_alive():
    @checked_by_kind
    def ones(n: int) -> Float[torch.Tensor, "n"]:
        return torch.ones(n)

    results = [weakref.ref(ones(n)) for n in (1, 2, 2, 3)]
    assert [result() for result in results] == [None] * 4


def test_a_dataclass_is_checked_when_it_is_made():
    @checked_by_kind
    @dataclasses.dataclass
    class Pair:
        left: Float[torch.Tensor, "n"]
        right: Float[torch.Tensor, "n"]

    for _ in range(2):
        assert len(Pair(torch.ones(2), torch.ones(2)).left) == 2
        with pytest.raises(TypeCheckError):
            Pair(torch.ones(2), torch.ones(3))


SHAPES = """
from transformer_llm import foundations
if {old}:
    foundations._own_checker = lambda: None
foundations.check_shapes()
import torch
from transformer_llm.attention import attention_plain
try:
    attention_plain(*[torch.ones(1, 2, 3, 4)] * 2, torch.ones(1, 2, 5, 4))
except Exception as error:
    print(type(error).__name__, attention_plain.__code__.co_name)
"""


@pytest.mark.parametrize("old", [False, True])
def test_shapes_are_checked_with_a_jaxtyping_that_has_no_place_for_a_checker(old):
    done = subprocess.run([sys.executable, "-c", SHAPES.format(old=old)], capture_output=True, text=True)
    assert done.stdout.split() == ["TypeCheckError", "wrapped_fn" if old else "check_and_call"], done.stderr
