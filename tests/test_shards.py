"""Token shards: parts that are made independently, an index that misses nothing, and batches of seed and step."""
import itertools
import json
import random

import numpy as np
import pytest
import torch

from transformer_llm import shards as module
from transformer_llm.cli import main
from transformer_llm.dataset import prepare_tokens, text_files
from transformer_llm.foundations import InputError
from transformer_llm.shards import (
    ShardTrainer,
    ShardWindows,
    TokenShards,
    merge_shards_index,
    part_of_files,
    prepare_shard,
    shuffled,
)
from transformer_llm.tokenizer import BPETokenizer
from transformer_llm.training import TrainingConfig
from transformer_llm.transformer import GPT, GPTConfig

SHAPE = GPTConfig(vocab_size=300, context_length=16, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Files of different lengths, in a folder and a folder in it."
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(9):
        path = folder / ("deep" if number % 2 else ".") / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        lines = (f"{draw.randint(0, 99)} + {draw.randint(0, 99)} = ü\n" for _ in range(20 + 40 * number))
        path.write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return BPETokenizer.train((corpus / "8.txt").read_text(encoding="utf-8"), 290)


@pytest.fixture(scope="module")
def prepared(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    for shard in (3, 0, 2, 1):
        assert prepare_shard(corpus, tokenizer, folder, shard, 4)
    merge_shards_index(folder)
    return folder


def copy(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# ---- preparation


def test_parts_divide_the_files(tmp_path):
    draw = random.Random(1)
    many = [[draw.randint(0, 50) for _ in range(12)] for _ in range(2)]
    for sizes in ([1], [0, 0, 0], [100, 1, 1, 1], [1, 1, 1, 100], [10] * 40, *many):
        files = [tmp_path / f"{number}.txt" for number in range(len(sizes))]
        for path, size in zip(files, sizes):
            path.write_bytes(b"x" * size)
        for of in range(1, len(files) + 1):
            parts = [part_of_files(files, shard, of) for shard in range(of)]
            assert all(parts) and list(itertools.chain(*parts)) == files
            assert sizes != [10] * 40 or of != 8 or {len(part) for part in parts} == {5}


def test_tokens_are_those_of_chapter_06(corpus, tokenizer, prepared, tmp_path):
    "One part holds what `prepare_tokens` writes; several hold the same but for what separates them."
    whole = prepare_tokens(corpus, tokenizer, tmp_path / "whole", val_fraction=0, progress=False)
    prepare_shard(corpus, tokenizer, tmp_path / "one", 0, 1)
    one = merge_shards_index(tmp_path / "one")
    assert np.array_equal(one.tokens_of(0), whole.train)
    four, end = TokenShards(prepared), tokenizer.special_tokens["<|endoftext|>"]
    joined = list(four.tokens_of(0))
    for shard in (1, 2, 3):
        joined += [end, *four.tokens_of(shard)]
    assert np.array_equal(joined, whole.train)


def test_preparing_again_does_nothing(corpus, tokenizer, prepared, tmp_path, monkeypatch):
    folder = copy(prepared, tmp_path / "t")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def never(*arguments):
        raise AssertionError("it tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tokens", never)
        assert not any(prepare_shard(corpus, tokenizer, folder, shard, 4) for shard in range(4))
    merge_shards_index(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_part_is_made_again(corpus, tokenizer, prepared, tmp_path, monkeypatch):
    "Whatever it left, the second call makes it whole."
    wanted = {path.name: path.read_bytes() for path in prepared.iterdir()}
    folder = copy(prepared, tmp_path / "t")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        (folder / "shard-00002-of-00004.bin").write_bytes(b"half")
        with pytest.raises(KeyboardInterrupt):
            prepare_shard(corpus, tokenizer, folder, 2, 4)
    with pytest.raises(InputError, match=r"lacks 1 of 4 shards \(2\)"):
        merge_shards_index(folder)
    assert prepare_shard(corpus, tokenizer, folder, 2, 4)
    merge_shards_index(folder)
    assert wanted == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_text_or_tokenizer_is_noticed(corpus, tokenizer, prepared, tmp_path):
    folder, changed = copy(prepared, tmp_path / "t"), tmp_path / "changed"
    changed.mkdir()
    for path in text_files(corpus):
        target = changed / path.relative_to(corpus)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8").replace("1", "2"), encoding="utf-8")
    assert prepare_shard(changed, tokenizer, folder, 1, 4)
    other = BPETokenizer.train((corpus / "8.txt").read_text(encoding="utf-8"), 280)
    assert prepare_shard(corpus, other, folder, 1, 4)
    with pytest.raises(InputError, match="Shard 1 was prepared with another tokenizer"):
        merge_shards_index(folder)


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "shard-00001-of-00004.bin").unlink(), "missing or damaged"),
    (lambda folder: (folder / "shard-00001-of-00004.bin").write_bytes(b"xy"), "missing or damaged"),
    (lambda folder: (folder / "shard-00001-of-00004.json").write_text("{}"), "damaged or of another version"),
    (lambda folder: (folder / "shard-00001-of-00004.json").write_text("{"), "not a readable JSON file"),
    (lambda folder: (folder / "shard-00001-of-00005.json").write_text("{}"), "parts of 4 and of 5"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no prepared parts"),
])
def test_damage_is_named_before_an_index_is_written(prepared, tmp_path, damage, sentence):
    folder = copy(prepared, tmp_path / "t")
    (folder / "index.json").unlink()
    damage(folder)
    with pytest.raises(InputError, match=sentence):
        merge_shards_index(folder)
    assert not (folder / "index.json").exists()


def test_an_index_is_checked(prepared, tmp_path):
    folder = copy(prepared, tmp_path / "t")
    content = (folder / "shard-00003-of-00004.bin").read_bytes()
    (folder / "shard-00003-of-00004.bin").write_bytes(content[:-2] + b"\0\0")
    with pytest.raises(InputError, match="prepare shard 3 again"):
        TokenShards(folder).verify()
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for wrong in ({}, [], index | {"shards": []}, index | {"shards": [{}]}, index | {"format_version": 9}):
        (folder / "index.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(InputError, match="damaged"):
            TokenShards(folder)


# ---- order


def test_permutations():
    for n in (1, 2, 7, 1000):
        assert sorted(shuffled(n, 3, n)) == list(range(n))
    assert len({tuple(shuffled(20, seed, epoch)) for seed in range(10) for epoch in range(10)}) == 100
    assert not np.array_equal(shuffled(20, 1, 0), shuffled(20, 0, 1))
    assert list(shuffled(8, 5)) == list(shuffled(8, 5))
    neighbours = sum(int(abs(np.diff(shuffled(1000, seed))).min() == 1) for seed in range(5))
    assert neighbours == 5 and (np.diff(shuffled(1000, 0)) == 1).sum() < 10  # the identity would have 999


@pytest.mark.parametrize("shuffle", [0, 1, 7, 10**6])
def test_each_window_once_an_epoch(prepared, shuffle):
    windows = ShardWindows(TokenShards(prepared, shuffle=shuffle), 16, seed=2)
    n = len(windows)
    everything = {(shard, start * 16) for shard, count in enumerate(windows.counts) for start in range(count)}
    epochs = [[windows.place(epoch * n + i) for i in range(n)] for epoch in range(3)]
    assert all(len(epoch) == len(everything) and set(epoch) == everything for epoch in epochs)
    in_order = epochs[0] == sorted(everything)
    assert in_order == (shuffle == 0) and (epochs[0] == epochs[1]) == in_order


def test_the_shuffle_stays_in_its_window(prepared):
    "So that a disk is read nearly in sequence: a window moves by less than `shuffle` places."
    plain = ShardWindows(TokenShards(prepared, shuffle=1), 16, seed=2)
    mixed = ShardWindows(TokenShards(prepared, shuffle=10), 16, seed=2)
    before = {plain.place(i): i for i in range(len(plain))}
    moved = [abs(before[mixed.place(i)] - i) for i in range(len(mixed))]
    assert max(moved) < 10 and sum(moved) > len(moved)


def test_windows_are_the_tokens(prepared):
    shards = TokenShards(prepared)
    windows = ShardWindows(shards, 16, seed=1)
    inputs, targets = windows.batch(5, 4)
    for row in range(4):
        shard, start = windows.place(20 + row)
        wanted = torch.from_numpy(shards.tokens_of(shard)[start : start + 17].astype(np.int64))
        assert torch.equal(inputs[row], wanted[:-1]) and torch.equal(targets[row], wanted[1:])


def test_batches_are_the_same_for_any_number_of_processes(prepared):
    def stream(processes, steps):
        readers = [ShardWindows(TokenShards(prepared, shuffle=50), 16, seed=4) for _ in range(processes)]
        rows = [slice(r * 12 // processes, (r + 1) * 12 // processes) for r in range(processes)]
        return [torch.cat([windows.batch(step, 12, own)[0] for windows, own in zip(readers, rows)]) for step in steps]

    wanted = stream(1, range(20))
    for processes in (2, 3, 4, 5):
        assert all(torch.equal(a, b) for a, b in zip(wanted, stream(processes, range(20))))
    assert all(torch.equal(a, b) for a, b in zip(wanted[13:], stream(3, range(13, 20))))  # begun in the middle
    windows = ShardWindows(TokenShards(prepared), 16)
    assert windows.batch(0, 4, slice(2, 2))[0].shape == (0, 16)


# ---- training


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_reads_on_exactly(prepared, tmp_path, accumulation):
    config = TrainingConfig(max_steps=9, batch_size=4, accumulation=accumulation, checkpoint_every=4,
                            keep_checkpoints=9, device="cpu")
    read = []

    class Reader(ShardTrainer):
        def next_batch(self):
            batch = super().next_batch()
            read.append(batch[0])
            return batch

    whole = Reader(GPT(SHAPE), TokenShards(prepared), config, run_directory=tmp_path / "run", progress=False)
    whole.train()
    first, read[:] = list(read), []
    assert len(first) == 9 * accumulation and not torch.equal(first[0], first[1])
    again = Reader.resume(tmp_path / "run" / "step-0000004", TokenShards(prepared), run_directory=tmp_path / "again",
                          progress=False)
    again.train()
    assert len(read) == 5 * accumulation
    assert all(torch.equal(a, b) for a, b in zip(first[4 * accumulation :], read))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))
    with pytest.raises(InputError, match="different"):
        Reader.resume(tmp_path / "run", TokenShards(prepared, shuffle=5), progress=False)


def test_trainer_refuses(prepared):
    config = TrainingConfig(max_steps=1, batch_size=2, device="cpu")
    with pytest.raises(InputError, match="data must be TokenShards"):
        ShardTrainer(GPT(SHAPE), ([1, 2, 3], None), config)
    with pytest.raises(InputError, match="vocabulary of 290 tokens, and the model one of 100"):
        ShardTrainer(GPT(SHAPE.replace(vocab_size=100)), TokenShards(prepared), config)
    with pytest.raises(InputError, match="No shard holds a window"):
        ShardWindows(TokenShards(prepared), 10**6)


# ---- the command


def test_command(corpus, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer.json")
    out = str(tmp_path / "out")
    prepare = ["shards", "prepare", "--text_file", str(corpus), "--tokenizer", str(tmp_path / "tokenizer.json"),
               "--out", out, "--of", "2", "--shard"]
    assert main([*prepare, "1"]) == 0 and "is prepared" in capsys.readouterr().out
    assert main([*prepare, "1"]) == 0 and "was there already" in capsys.readouterr().out
    assert main(["shards", "merge", out]) == 2 and "lacks 1 of 2 shards (0)" in capsys.readouterr().err
    assert main([*prepare, "0"]) == 0 and main(["shards", "merge", out]) == 0 and main(["shards", "verify", out]) == 0
    assert "all 2 shards are as they were prepared" in capsys.readouterr().out
    for words in ([*prepare, "2"], ["shards", "merge", str(corpus)], ["shards", "verify", str(tmp_path / "nowhere")]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
