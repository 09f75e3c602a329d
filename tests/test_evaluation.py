"""What chapter 10 can't try on its own page: windows of every size, batches, random n-gram tables, bad input, and a
real model's answers.
"""
import json
import math
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_llm import corpora, evaluation
from transformer_llm.evaluation import (
    HARNESS_WHEEL,
    NGram,
    Question,
    Scores,
    binomial_error,
    bootstrap_error,
    choose,
    compare_samples,
    encode_options,
    evaluate_text,
    join_scores,
    load_mmlu_examples,
    reliability,
    score_options,
    score_questions,
    score_text,
    score_tokens,
    sign_test,
    wilson_interval,
    window_spans,
)
from transformer_llm.foundations import InputError, set_seed, sha256_of
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer
from transformer_llm.transformer import GPT, GPTConfig

WORDS = (
    "the quick brown fox jumps over the lazy dog; the dog sleeps and the fox, being quick, is gone before noon\n" * 4
)


def small_model(vocab_size: int = 11, **changes) -> GPT:
    "A random model with strong opinions."
    set_seed(5)
    shape = dict(vocab_size=vocab_size, context_length=16, d_model=16, n_layers=2, n_heads=2, init_std=0.4)
    return GPT(GPTConfig(**shape | changes))


MODEL = small_model()
CHARACTERS = CharTokenizer.train(WORDS)
READER = small_model(CHARACTERS.vocab_size, context_length=64)
PIECES = BPETokenizer.train(WORDS, 300)
PIECES_READER = small_model(PIECES.vocab_size, context_length=64)


def score_plainly(model, ids: list[int], context_length: int, stride: int, start: tuple = ()) -> list[float]:
    "Token by token, each in the first window that predicts it."
    nats, ids = [math.log(model.config.vocab_size)], [*start, *ids]
    for t in range(1, len(ids)):
        begin = max(0, -(-(t - context_length) // stride)) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:t]]))[0, -1]
        nats.append(-logits.double().log_softmax(-1)[ids[t]].item())
    return nats[len(start):]


# Windows
# ---------------------------------------------------------------------------------------------------------------

@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_each_token_counts_once_in_the_first_window_that_predicts_it(n_tokens, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    spans = window_spans(n_tokens, context_length, stride)
    assert [t for _, first, end in spans for t in range(first, end)] == list(range(1, n_tokens))
    assert [begin for begin, _, _ in spans] == [number * stride for number in range(len(spans))]
    for begin, first, end in spans:
        assert begin < first < end <= n_tokens and end - begin - 1 <= context_length
        assert first - begin >= (context_length - stride + 1 if begin else 1)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 9), st.sampled_from([(), (3,), (3, 7)]), st.data())
def test_scores_are_those_of_the_plain_form(n_tokens, context_length, batch_size, start, data):
    stride = data.draw(st.integers(1, context_length))
    ids = data.draw(st.lists(st.integers(0, 10), min_size=n_tokens, max_size=n_tokens))
    scores = score_tokens(
        MODEL, torch.tensor(ids), context_length=context_length, stride=stride, batch_size=batch_size, start=start
    )
    assert len(scores.nats) == len(scores.ranks) == len(scores.confidence) == len(scores.context) == n_tokens
    assert torch.allclose(
        scores.nats,
        torch.tensor(score_plainly(MODEL, ids, context_length, stride, start), dtype=torch.double),
        atol=2e-5,
    )
    assert (
        (scores.context[1:] > 0).all()
        and (scores.context[0] == 0) == (not start)
        and scores.context.max() <= context_length
    )
    assert (
        (scores.ranks == 0) <= ((scores.nats + scores.confidence.log()).abs() < 1e-5)
    ).all()  # the first choice has the confidence


def test_tokens_may_be_a_list_or_an_array():
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = score_tokens(MODEL, torch.tensor(ids)).nats
    for row in (ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.int16), torch.tensor(ids, dtype=torch.int32)):
        assert torch.equal(score_tokens(MODEL, row).nats, wanted)
        assert NGram(3, 11).fit(row).num_parameters() == NGram(3, 11).fit(ids).num_parameters()


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 60))
def test_a_model_that_looks_back_a_little_is_scored_as_it_predicts(window, n_tokens):
    model = small_model(window=window)
    ids = torch.randint(0, 11, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens))
    for stride in (1, 5, 16):
        wanted = torch.tensor(score_plainly(model, ids.tolist(), 16, stride), dtype=torch.double)
        assert torch.allclose(score_tokens(model, ids, stride=stride).nats, wanted, atol=2e-5)


def test_logits_of_a_table_over_many_tokens_stay_few(monkeypatch):
    table, most = NGram(2, 3000, context_length=64).fit(range(3000)), []
    forward = NGram.forward
    monkeypatch.setattr(
        NGram, "forward", lambda self, ids, **options: most.append(ids.numel()) or forward(self, ids, **options)
    )
    monkeypatch.setattr("transformer_llm.evaluation.SLICE", 200 * 3000)
    ids = torch.arange(1000)
    scores = score_tokens(table, ids, batch_size=64)
    assert max(most) <= 200 and len(scores.nats) == 1000


def test_a_wide_vocabulary_is_judged_in_slices(monkeypatch):
    ids = torch.randint(0, 11, (60,), generator=torch.Generator().manual_seed(1))
    whole = score_tokens(MODEL, ids)
    monkeypatch.setattr("transformer_llm.evaluation.SLICE", 1)
    sliced = score_tokens(MODEL, ids)
    assert torch.allclose(whole.nats, sliced.nats, atol=1e-6) and torch.equal(whole.ranks, sliced.ranks)


def test_the_model_is_given_back_as_it_was():
    model = small_model(dropout=0.5).train()
    ids = torch.arange(11).repeat(4)
    first, second = score_tokens(model, ids), score_tokens(model, ids)
    assert model.training and torch.equal(first.nats, second.nats) and not first.nats.requires_grad


@pytest.mark.parametrize(
    "changes",
    [*({"position": kind} for kind in ("learned", "sinusoidal", "rotary", "alibi", "none")), {"window": 3}],
    ids=str,
)
def test_options_don_t_depend_on_what_else_is_in_the_batch(changes):
    model = small_model(CHARACTERS.vocab_size, context_length=64, **changes)
    options = [" dog", " quick brown fox", " a", " the lazy dog sleeps"]
    together = score_options(model, CHARACTERS, "over the", options)
    for number, option in enumerate(options):
        pair = score_options(model, CHARACTERS, "over the", [option, " x"])
        text = score_text(model, CHARACTERS, "over the" + option)
        assert abs(pair.totals[0] - together.totals[number]) < 1e-4
        assert abs(text.nats[len("over the"):].sum() + together.totals[number]) < 1e-4
    # 65 characters, of which 64 are read
    last = score_options(model, CHARACTERS, "over the" + " dog" * 12, [" fox" + " dog" + "s", " x"])
    assert last.n_tokens[0] == 9 and last.totals.isfinite().all()
    assert together.n_tokens.tolist() == together.n_bytes.tolist() == [len(option) for option in options]
    lengths = {"sum": torch.ones(4), "token": together.n_tokens, "byte": together.n_bytes}
    for by in ("sum", "token", "byte"):
        assert choose(model, CHARACTERS, "over the", options, by=by) == (together.totals / lengths[by]).argmax()


@pytest.mark.parametrize(
    "changes",
    [*({"position": kind} for kind in ("learned", "sinusoidal", "rotary", "alibi", "none")), {"window": 3}],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_questions_don_t_depend_on_their_batch(changes, batch_size):
    model = small_model(CHARACTERS.vocab_size, context_length=64, **changes)
    questions = [
        ("t", ["he dog", "o", "he fox, being quick"]),  # one token before the options
        ("over the", [" dog", " fox"]),
        ("the fox, being quick, is gone before", [" noon", " the dog sleeps and the fox", " a"]),
        # as much as the model can read, and no room for padding
        ("over the" + " dog" * 12, [" fox" + " dog" + "s", " x"]),
        ("the", ["s", "n"]),
    ]
    found = score_questions(model, CHARACTERS, questions, batch_size=batch_size)
    assert len(found) == len(questions)
    for scores, (question, options) in zip(found, questions):
        assert scores.n_tokens.tolist() == [len(option) for option in options]
        for total, option in zip(scores.totals, options):
            plain = score_plainly(model, CHARACTERS.encode(question + option), 64, 1)
            assert abs(total + sum(plain[len(question) :])) < 1e-4
    assert score_questions(model, CHARACTERS, []) == []


def test_a_model_whose_angles_follow_the_text_reads_whole_rows():
    scaling = {"kind": "dynamic", "factor": 2.0, "original_context_length": 8}
    model = small_model(CHARACTERS.vocab_size, context_length=64, rope_scaling=scaling)
    found = score_questions(model, CHARACTERS, [("the lazy", [" dog", " fox"]), ("over", [" the", " dog"])])
    for scores, pair in zip(found, [("the lazy dog", "the lazy fox"), ("over the", "over dog")]):
        ids = torch.tensor([CHARACTERS.encode(text) for text in pair])
        with torch.no_grad():
            log_p = model(ids[:, :-1]).double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        assert torch.allclose(scores.totals, log_p[:, -4:].sum(1), atol=1e-4)


def test_a_question_is_read_once(monkeypatch):
    read, hidden_states = [], GPT.hidden_states

    def counted(model, ids, **options):
        read.append(ids.numel())
        return hidden_states(model, ids, **options)

    monkeypatch.setattr(GPT, "hidden_states", counted)
    options = [" dog", " fox", " noon"]
    score_questions(READER, CHARACTERS, [("over the", options)])
    # the question, then of each option all but the last token, padded to the longest
    assert read == [len("over the"), 3 * (len(" noon") - 1)]


EXAMPLES = {
    "sums": "About sums.\n\nQ: 1 + 1 =\n(A) 1 (B) 2 (C) 3 (D) 4\nA: Count. The answer is (B).\n\n"
    "Q: Five options?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA: No. The answer is (E).\n\n"
    "Q: Over\ntwo lines\n(A) one\n(B) two words\n(C) 3\n(D) 4\nA: A reason.\nAnd another. The answer is (D).\n\n",
    "none": "About nothing.",
}


@pytest.fixture
def harness(tmp_path, monkeypatch):
    "A small wheel in the cache, as if it were the harness."
    monkeypatch.setenv("TRANSFORMER_LLM_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / HARNESS_WHEEL, "w") as wheel:
        wheel.writestr(evaluation.EXAMPLES, json.dumps(EXAMPLES))
    monkeypatch.setattr(evaluation, "HARNESS_SHA256", sha256_of(tmp_path / HARNESS_WHEEL))
    return tmp_path / HARNESS_WHEEL


def test_examples_of_a_benchmark(harness):
    assert load_mmlu_examples() == [
        Question("sums", "1 + 1 =", ("1", "2", "3", "4"), 1),
        Question("sums", "Over\ntwo lines", ("one", "two words", "3", "4"), 3),
    ]


def test_a_benchmark_that_can_not_be_fetched_is_refused_in_one_sentence(harness, monkeypatch):
    def run(command, **options):
        return corpora.subprocess.CompletedProcess(command, 1, "", "No matching distribution")

    harness.write_bytes(b"half a wheel")
    monkeypatch.setattr(corpora.subprocess, "run", run)
    with pytest.raises(InputError) as caught:
        load_mmlu_examples()
    assert all(part in str(caught.value) for part in (HARNESS_WHEEL, str(harness.parent), "MMLU"))
    assert "\n" not in str(caught.value)


@given(
    st.text("the dogfx ", min_size=1, max_size=12),
    st.lists(st.text("the dogfx ", min_size=1, max_size=8), min_size=2, max_size=4),
)
def test_question_and_option_are_tokenized_together(question, options):
    try:
        wholes, shared = encode_options(PIECES, question, options)
    except InputError as error:
        assert "too short" in str(error)
        return
    for whole, option in zip(wholes, options):
        assert whole == PIECES.encode(question + option) and PIECES.decode(whole) == question + option
        assert whole[:shared] == PIECES.encode(question)[:shared] and len(whole) > shared
        assert len(PIECES.decode(whole[:shared])) <= len(question)
    found = score_options(PIECES_READER, PIECES, question, options)
    for number, whole in enumerate(wholes):
        assert abs(found.totals[number] + sum(score_plainly(PIECES_READER, whole, 64, 1)[shared:])) < 1e-3


# Numbers
# ---------------------------------------------------------------------------------------------------------------

def test_units_of_a_uniform_model():
    "A model that knows nothing: the perplexity is the vocabulary's size, and one token in that many is right."
    model = small_model()
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    ids = torch.randint(0, 11, (400,), generator=torch.Generator().manual_seed(0))
    scores = score_tokens(model, ids, n_bytes=400)
    assert math.isclose(scores.perplexity, 11, rel_tol=1e-5) and math.isclose(
        scores.bits_per_byte, math.log2(11), rel_tol=1e-5
    )
    assert (
        scores.accuracy() == (ids[1:] == 0).double().mean() and scores.accuracy(11) == 1
    )  # of equal logits the lower id ranks first


def test_bits_per_byte_count_bytes():
    tokenizer = CharTokenizer.train("é日🙂")
    model = small_model(3)
    scores = score_text(model, tokenizer, "é日🙂é")
    assert scores.n_bytes == 2 + 3 + 4 + 2
    assert math.isclose(scores.bits_per_byte, scores.nats.sum().item() / 11 / math.log(2))


def test_special_names_in_a_strangers_text_are_text():
    tokenizer = BPETokenizer.train(WORDS, 300, special_tokens=["<|endoftext|>"])
    model = small_model(tokenizer.vocab_size, context_length=64)
    scores = score_text(model, tokenizer, "the <|endoftext|> fox")
    assert len(scores.nats) == len(tokenizer.encode("the <|endoftext|> fox", special=False)) > 6
    wholes, _ = encode_options(tokenizer, "the", [" <|endoftext|>", " fox"])
    assert tokenizer.special_tokens["<|endoftext|>"] not in wholes[0]


def test_a_text_stands_behind_the_tokens_that_begin_every_text():
    plain = BPETokenizer.train(WORDS, 300, special_tokens=["<|begin|>"])
    model, begin = small_model(plain.vocab_size, context_length=64), plain.special_tokens["<|begin|>"]
    tokenizer = BPETokenizer(plain.vocab, plain.merges, plain.special_tokens, prefix=(begin,))
    scores = score_text(model, tokenizer, "the fox")
    ids = plain.encode("the fox")
    assert scores.context.tolist() == [*range(1, len(ids) + 1)]
    assert torch.allclose(
        scores.nats, torch.tensor(score_plainly(model, ids, 64, 1, (begin,)), dtype=torch.double), atol=2e-5
    )
    assert score_text(model, tokenizer, "the fox", start=()).context[0] == 0
    wholes, shared = encode_options(tokenizer, "", ["the", "fox"])  # the question may be empty then
    assert shared == 1 and wholes[0] == [begin, *plain.encode("the")]
    found = score_options(model, tokenizer, "the", [" fox", " dog"])
    assert (
        abs(
            found.totals[0]
            + sum(score_plainly(model, plain.encode("the fox"), 64, 1, (begin,))[len(plain.encode("the")) :])
        )
        < 1e-4
    )


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 12))
def test_reliability_counts_each_prediction_once(pairs, bins):
    confidence = torch.tensor([p for p, _ in pairs], dtype=torch.double)
    ranks = torch.tensor([0 if right else 3 for _, right in pairs])
    rows = reliability(
        Scores(
            torch.zeros(len(pairs), dtype=torch.double), ranks, confidence, torch.ones(len(pairs), dtype=torch.long)
        ),
        bins,
    )
    assert sum(n for _, _, n in rows) == len(pairs) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert abs(sum(right * n for _, right, n in rows) - sum(right for _, right in pairs)) < 1e-6


def test_errors_shrink_with_the_root():
    assert math.isclose(binomial_error(0.3, 100), 10 * binomial_error(0.3, 10_000)) and binomial_error(1, 5) == 0
    draw = np.random.default_rng(0)
    few, many = (bootstrap_error(draw.normal(2, 1, n), np.ones(n), draws=2000) for n in (25, 2500))
    assert 7 < few / many < 14
    assert bootstrap_error([2, 4, 6], [1, 2, 3]) == 0  # the same ratio everywhere
    assert bootstrap_error([1, 2, 5], [1, 1, 1], seed=1) == bootstrap_error([1, 2, 5], [1, 1, 1], seed=1)


# The n-gram table
# ------------------------------------------------------------------------------------------------------

def witten_bell(tokens: list[int], history: tuple, w: int, vocab_size: int) -> float:
    "Equation (10.4), by going through the text again for every history."
    lower = witten_bell(tokens, history[1:], w, vocab_size) if history else 1 / vocab_size
    followers = Counter(
        tokens[end] for end in range(len(history), len(tokens)) if tuple(tokens[end - len(history) : end]) == history
    )
    if not followers:
        return lower
    return (followers[w] + len(followers) * lower) / (followers.total() + len(followers))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_ngram_is_the_recursion_and_adds_up_to_one(tokens, ids, order):
    table = NGram(order, 5).fit(tokens)
    p = table(torch.tensor([ids]))[0].exp()
    assert torch.allclose(p.sum(-1), torch.ones(len(ids), dtype=torch.double)) and (p > 0).all()
    for end in range(1, len(ids) + 1):
        history = tuple(ids[max(0, end - order + 1):end]) if order > 1 else ()
        assert torch.allclose(
            p[end - 1],
            torch.tensor([witten_bell(tokens, history, w, 5) for w in range(5)], dtype=torch.double),
            atol=1e-12,
        )


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 5))
def test_sorting_and_counting_give_the_same_table(tokens, order):
    dense, kept = NGram(order, 301).fit(tokens), evaluation.DENSE
    evaluation.DENSE = 0
    try:
        by_sorting = NGram(order, 301).fit(tokens)
    finally:
        evaluation.DENSE = kept
    for one, other in zip(dense.levels, by_sorting.levels, strict=True):
        for name in ("codes", "tokens", "counts", "first", "total"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_ngram_reads_padded_batches_and_its_window_changes_nothing():
    table = NGram(4, CHARACTERS.vocab_size, context_length=32).fit(CHARACTERS.encode(WORDS))
    ids = torch.tensor(CHARACTERS.encode(WORDS[:150]))
    nats = score_tokens(table, ids, stride=16).nats
    assert torch.equal(nats, score_tokens(table, ids, stride=29).nats)  # at least three tokens before each that counts
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[None, :10]], 1)
    mask = torch.arange(15)[None] >= 5
    assert torch.allclose(table(padded, attention_mask=mask)[:, 5:], table(ids[None, :10]))
    assert torch.allclose(table(ids[None, :10], last_only=True), table(ids[None, :10])[:, -1:])
    assert choose(table, CHARACTERS, "jumps over the", [" lazy", " noon"]) == 0
    assert table.fit([0, 1]).num_parameters() == 3 and table.fit([0, 1]) is table  # counts anew


@pytest.mark.parametrize("vocab_size", [69, 49_152])
def test_memory_for_a_table_is_bounded(vocab_size):
    tokens = np.random.default_rng(0).zipf(1.4, 200_000).clip(max=vocab_size) - 1
    tracemalloc.start()
    try:
        NGram(8, vocab_size).fit(tokens)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 250 * len(tokens) + 150e6


# Samples
# ---------------------------------------------------------------------------------------------------------------

def test_samples_stand_side_by_side_and_are_repeatable():
    models = {
        "counts": (NGram(3, CHARACTERS.vocab_size).fit(CHARACTERS.encode(WORDS)), CHARACTERS),
        "network": (READER, CHARACTERS),
        "pieces": (PIECES_READER, PIECES),
    }
    rows = compare_samples(models, ["the fox", "dog"], 20, seed=3)
    assert [row[:2] for row in rows] == [(prompt, name) for prompt in ("the fox", "dog") for name in models]
    assert all(len(row[2]) == 20 for row in rows) and rows == compare_samples(models, ["the fox", "dog"], 20, seed=3)
    assert rows != compare_samples(models, ["the fox", "dog"], 20, seed=4)


# Bad input
# -------------------------------------------------------------------------------------------------------------

def broken_model(vocab_size: int = 11) -> GPT:
    "One whose training has failed: all weights of its embedding are NaN."
    model = small_model(vocab_size)
    torch.nn.init.constant_(model.token_embedding.weight, math.nan)
    return model


BAD = {
    "empty": (lambda: score_text(READER, CHARACTERS, ""), "text is empty"),
    "unknown character": (lambda: score_text(READER, CHARACTERS, "the Fox"), "Character 'F' at position 4"),
    "half a character": (lambda: score_text(PIECES_READER, PIECES, "the \ud800"), "lone surrogate"),
    "another tokenizer": (lambda: score_text(small_model(3), CHARACTERS, "the"), "use its own tokenizer"),
    "negative id": (lambda: score_tokens(MODEL, torch.tensor([1, -2])), "token -2"),
    "stride 0": (
        lambda: score_tokens(MODEL, torch.arange(5), stride=0),
        "stride must be a whole number from 1 to 16, not 0",
    ),
    "stride too long": (
        lambda: score_tokens(MODEL, torch.arange(5), context_length=4, stride=5),
        "stride must be a whole number from 1 to 4, not 5",
    ),
    "context too long": (
        lambda: score_tokens(MODEL, torch.arange(5), context_length=17),
        "context_length must be a whole number from 1 to 16",
    ),
    "batch size": (lambda: score_tokens(MODEL, torch.arange(5), batch_size=0), "batch_size"),
    "start token": (
        lambda: score_tokens(MODEL, torch.arange(5), start=(11,)),
        "A start token must be a whole number from 0 to 10",
    ),
    "NaN": (lambda: score_tokens(broken_model(), torch.arange(5)), "hold NaN or infinity"),
    "NaN in a choice": (
        lambda: choose(broken_model(CHARACTERS.vocab_size), CHARACTERS, "the", [" fox", " dog"]),
        "hold NaN or infinity",
    ),
    "rows of tokens": (
        lambda: score_tokens(MODEL, torch.arange(6).view(2, 3)),
        "one row of whole numbers, not torch.int64 of shape (2, 3)",
    ),
    "fractions": (lambda: score_tokens(MODEL, torch.tensor([0.5, 1.0])), "one row of whole numbers"),
    "text for tokens": (lambda: score_tokens(MODEL, "the"), "one row of whole numbers, not str"),
    "no bytes": (lambda: score_tokens(MODEL, torch.arange(5)).bits_per_byte, "number of bytes"),
    "accuracy of one token": (lambda: score_tokens(MODEL, torch.tensor([4])).accuracy(), "at least two tokens"),
    "top 0": (lambda: score_tokens(MODEL, torch.arange(5)).accuracy(0), "k must be"),
    "nothing to join": (lambda: join_scores([]), "no scores"),
    "order 0": (lambda: NGram(0, 5), "order must be a whole number from 1"),
    "no vocabulary": (lambda: NGram(2, 0), "vocab_size"),
    "nothing to count": (lambda: NGram(2, 5).fit([]), "at least one token"),
    "fractions to count": (lambda: NGram(2, 5).fit([0.5, 1.7]), "one row of whole numbers"),
    "text to count": (lambda: NGram(2, 5).fit("the fox"), "one row of whole numbers, not str"),
    "rows to count": (lambda: NGram(2, 5).fit([[0, 1], [2, 3]]), "one row of whole numbers"),
    "token outside": (lambda: NGram(2, 5).fit([0, 5]), "all from 0 to 4"),
    "not fitted": (lambda: NGram(2, 5)(torch.tensor([[1]])), "counted nothing yet"),
    "foreign prompt": (lambda: NGram(2, 5).fit([1])(torch.tensor([[5]])), "knows only 0 to 4"),
    "one option": (lambda: choose(READER, CHARACTERS, "the", [" fox"]), "at least two texts"),
    "options in one text": (lambda: choose(READER, CHARACTERS, "the", "fox"), "at least two texts"),
    "empty option": (lambda: choose(READER, CHARACTERS, "the", ["", " fox"]), "none of them empty"),
    "no question": (lambda: choose(READER, CHARACTERS, "", [" dog", " fox"]), "too short"),
    "merged question": (lambda: choose(PIECES_READER, PIECES, "t", ["he", "o"]), "too short"),
    "long question": (lambda: choose(READER, CHARACTERS, "the " * 16, ["dog", "fox"]), "context_length is 64"),
    "unknown rule": (
        lambda: choose(READER, CHARACTERS, "the", [" dog", " fox"], by="luck"),
        "by must be one of sum, token, byte",
    ),
    "share": (lambda: binomial_error(1.5, 10), "share must be"),
    "no questions": (lambda: binomial_error(0.5, 0), "n must be"),
    "one piece": (lambda: bootstrap_error([1.0], [1.0]), "two pieces or more"),
    "different lengths": (lambda: bootstrap_error([1.0, 2.0], [1.0]), "not 2 and 1 numbers"),
    "empty piece": (lambda: bootstrap_error([1.0, 2.0], [1.0, 0.0]), "above zero"),
    "NaN piece": (lambda: bootstrap_error([1.0, math.nan], [1.0, 1.0]), "NaN or infinite"),
    "seed below zero": (lambda: bootstrap_error([1.0, 2.0], [1.0, 1.0], seed=-1), "seed must be"),
    "no bins": (lambda: reliability(score_tokens(MODEL, torch.arange(5)), 0), "bins"),
    "one prompt as text": (lambda: compare_samples({"x": (READER, CHARACTERS)}, "the", 5), "prompts must be a list"),
    "no length": (lambda: compare_samples({"x": (READER, CHARACTERS)}, ["the"], 0), "length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_sentence(case):
    function, words = BAD[case]
    with pytest.raises(InputError) as found:
        function()
    message = str(found.value)
    assert words in message and message.endswith(".") and "\n" not in message, message


# A real model
# ----------------------------------------------------------------------------------------------------------

FACTS = [
    ("The capital of France is", " Paris", " Rome"),
    ("The opposite of hot is", " cold", " green"),
    ("Honey is made by", " bees", " cows"),
    ("The day after Monday is", " Tuesday", " Friday"),
    ("We see with our", " eyes", " knees"),
    ("The sun rises in the", " east", " north"),
]


# All of it at once
# ------------------------------------------------------------------------------------------------------

VERSE = "".join(np.random.default_rng(0).choice(list("the cat sat on a mat é\n"), 3000))


class Doubtful(GPT):
    "Changes the logits of one token."

    change = float("-inf")

    def unembed(self, states):
        logits = super().unembed(states)
        logits[..., 3] = self.change
        return logits


@pytest.mark.parametrize("tokenizer", [CharTokenizer.train(VERSE), BPETokenizer.train(VERSE, 280)], ids=["a", "b"])
def test_an_evaluation_is_what_its_parts_say(tokenizer):
    model = small_model(tokenizer.vocab_size)
    report = evaluate_text(model, tokenizer, VERSE, stride=5)
    scores = score_text(model, tokenizer, VERSE, stride=5)
    assert (report.n_bytes, report.n_tokens) == (len(VERSE.encode()), len(scores.nats))
    assert (report.n_predicted, report.context_length, report.stride) == (len(scores.nats) - 1, 16, 5)
    found = report.model.bits_per_byte, report.model.perplexity, report.model.accuracy
    assert found == (scores.bits_per_byte, scores.perplexity, scores.accuracy())
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert "±" in str(report) and "5-gram" in str(report)
    halves = [VERSE[:1500], VERSE[1500:]]
    for order in (1, 3):
        table = evaluate_text(model, tokenizer, VERSE, order=order).table
        ids = tokenizer.encode(VERSE)
        half = len(ids) // 2
        first = score_tokens(NGram(order, tokenizer.vocab_size).fit(ids[half:]), ids[:half]).nats
        second = NGram(order, tokenizer.vocab_size, 5000).fit(ids[:half])
        second = score_tokens(second, ids[half:], start=ids[half - max(1, order - 1):half]).nats
        assert table.perplexity == pytest.approx(torch.cat([first, second]).mean().exp().item())
    counted = NGram(5, tokenizer.vocab_size).fit(tokenizer.encode(halves[0]))
    known = evaluate_text(model, tokenizer, halves[1], reference=halves[0])
    assert known.table.bits_per_byte == pytest.approx(score_text(counted, tokenizer, halves[1]).bits_per_byte)


def test_the_errors_of_an_evaluation_are_the_spread_between_texts():
    "Texts from one source: their results spread as one text's error promises."
    draw = np.random.default_rng(1)
    tokenizer = CharTokenizer.train("abcdefghijk")
    model = small_model(tokenizer.vocab_size)
    reports = [
        evaluate_text(model, tokenizer, "".join(draw.choice(list("abcdefghijk"), 600)), order=1)
        for _ in range(16)
    ]
    for name in ("bits_per_byte", "perplexity", "accuracy"):
        values, errors = ([getattr(r.model, which) for r in reports] for which in (name, f"{name}_error"))
        assert 0.5 < np.std(values) / np.mean(errors) < 2, name


def test_an_evaluation_of_little_text_has_no_error():
    report = evaluate_text(READER, CHARACTERS, WORDS[:60])
    assert report.n_pieces == 0 and report.model.bits_per_byte_error is report.table.accuracy_error is None
    assert "too short for an error" in str(report) and json.dumps(report.to_dict(), allow_nan=False)


def test_an_evaluation_reads_the_tokens_that_begin_every_text():
    tokenizer = CharTokenizer.train(WORDS)
    tokenizer.prefix = (3,)
    report = evaluate_text(READER, tokenizer, WORDS[:60])
    assert report.n_predicted == report.n_tokens == 60
    assert report.model.bits_per_byte == score_text(READER, tokenizer, WORDS[:60]).bits_per_byte


@pytest.mark.parametrize("case, says", [
    ((READER, CHARACTERS, ""), "empty"),
    ((READER, CHARACTERS, "t"), "one token"),
    ((READER, None, WORDS), "own tokenizer"),
    ((MODEL, CHARACTERS, WORDS), "knows only 0 to 10"),
    ((READER, CHARACTERS, "the Q"), "Q"),
    ((Doubtful(READER.config), CHARACTERS, WORDS), "probability zero"),
], ids=lambda case: case if isinstance(case, str) else "")
def test_an_evaluation_that_can_not_be(case, says):
    with pytest.raises(InputError, match=says) as caught:
        evaluate_text(*case)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="stride"):
        evaluate_text(READER, CHARACTERS, WORDS, stride=65)


def test_logits_that_are_not_numbers_are_no_evaluation():
    for change in (float("nan"), float("inf")):
        Doubtful.change, before = change, Doubtful.change
        try:
            with pytest.raises(InputError, match="NaN or infinity"):
                evaluate_text(Doubtful(READER.config), CHARACTERS, WORDS)
        finally:
            Doubtful.change = before


def test_smollm2_prefers_what_is_right():
    from transformer_llm.pretrained import load_pretrained, load_pretrained_tokenizer

    try:
        model, tokenizer = load_pretrained("smollm2"), load_pretrained_tokenizer("smollm2")
    except InputError as error:
        pytest.skip(f"SmolLM2 can't be fetched: {error}")
    for question, right, wrong in FACTS:
        assert choose(model, tokenizer, question, [wrong, right]) == 1, question
    sense, nonsense = (
        score_text(model, tokenizer, text).bits_per_byte
        for text in ("The cat sat on the mat.", "Mat the on sat cat the.")
    )
    assert sense < nonsense - 0.5


# --- few questions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(18, 24), (24, 24), (0, 7), (1, 3), (500, 1000)])
def test_each_end_of_wilsons_interval_is_z_of_its_own_errors_away(k, n):
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(k / n - end) == pytest.approx(1.96 * binomial_error(end, n))


def test_the_sign_test_counts_coin_tosses():
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 2**5
    assert sign_test(0, 0) == sign_test(4, 4) == 1
    assert sign_test(18, 7) == pytest.approx(2 * sum(math.comb(25, k) for k in range(8)) / 2**25)


@pytest.mark.parametrize(
    "call", [lambda: wilson_interval(5, 4), lambda: wilson_interval(0, 0), lambda: sign_test(-1, 2)]
)
def test_counts_that_can_not_be_are_refused(call):
    with pytest.raises(InputError):
        call()
