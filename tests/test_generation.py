"""Generation: what the filters promise, and that caches, batches, windows and beams change no token."""
import copy
import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from transformer_llm.attention import KVCache
from transformer_llm.foundations import InputError, largest_difference
from transformer_llm.generation import (
    TextWindow,
    apply_temperature,
    beam_candidates,
    beam_search,
    evaluating,
    filter_logits,
    generate,
    generate_text,
    left_pad,
    min_p_filter,
    repetition_penalty,
    sample,
    stream,
    stop_ids,
    stream_text,
    top_k_filter,
    top_p_filter,
)
from transformer_llm.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from transformer_llm.transformer import GPT, GPT2_STYLE, GPTConfig

POSITIONS = ["learned", "sinusoidal", "rotary", "alibi", "none"]


def tiny(**changes) -> GPT:
    "A random model whose logits differ by several units, so that equal choices are no accident."
    torch.manual_seed(0)
    shape = dict(vocab_size=13, context_length=12, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.4)
    return GPT(GPTConfig(**shape | changes))


def prompts(batch=3, seq=4, vocab=13, seed=0):
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def kept(logits):
    return logits.isfinite()


# Filters ------------------------------------------------------------------------------------------------------------

# Quarters leave many ties, and no sum of exponentials of theirs stands within rounding of a threshold by design.
some_logits = st.integers(2, 30).flatmap(
    lambda n: st.lists(st.lists(st.integers(-40, 40), min_size=n, max_size=n), min_size=1, max_size=4)
).map(lambda rows: torch.tensor(rows, dtype=torch.double) / 4)
fraction = st.floats(0.01, 0.99)


@settings(max_examples=30)
@given(some_logits, st.integers(1, 40))
def test_top_k_keeps_the_k_best_and_what_equals_the_last_of_them(logits, k):
    result = top_k_filter(logits, k)
    for row, left in zip(logits, kept(result)):
        bound = row.sort(descending=True).values[min(k, len(row)) - 1]
        assert torch.equal(left, row >= bound)
    assert torch.equal(result[kept(result)], logits[kept(result)])
    assert torch.equal(top_k_filter(result, k), result)


@settings(max_examples=30)
@given(some_logits, fraction)
def test_top_p_keeps_enough_and_not_one_value_too_many(logits, p):
    result = top_p_filter(logits, p)
    for row, left in zip(logits, kept(result)):
        probabilities = row.softmax(-1)
        assert left[row.argmax()]
        assert probabilities[left].sum() >= p - 1e-9
        assert row[left].min() > row[~left].max() if (~left).any() else True  # the kept ones are the best ones
        without_the_last = left & (row > row[left].min())
        assert probabilities[without_the_last].sum() < p + 1e-9
    assert torch.equal(result[kept(result)], logits[kept(result)])


@settings(max_examples=30)
@given(some_logits, fraction)
def test_min_p_is_a_share_of_the_best(logits, p):
    probabilities = logits.softmax(-1)
    share = probabilities / probabilities.amax(-1, keepdim=True)
    assume(((share - p).abs() > 1e-9).all())
    assert torch.equal(kept(min_p_filter(logits, p)), share >= p)


@settings(max_examples=30)
@given(some_logits, fraction, fraction, st.integers(-80, 80), st.randoms(use_true_random=False))
def test_filters_ignore_shifts_and_follow_permutations(logits, p, q, shift, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    low, high = sorted((p, q))
    for function in (lambda z, x: top_k_filter(z, 1 + int(x * 20)), top_p_filter, min_p_filter):
        result = function(logits, p)
        moved = function(logits[:, order], p)
        assert torch.equal(result[:, order], moved)
        assert kept(result).any(1).all()
        softer = function(logits, low), function(logits, high)
        first, second = (kept(x) for x in (softer if function is not min_p_filter else softer[::-1]))
        assert not (first & ~second).any()  # a stricter setting keeps a part of what a milder one keeps
        assert torch.equal(kept(function(logits + shift / 4, p)), kept(result))  # quarters: the sum is exact


@settings(max_examples=30)
@given(some_logits, st.floats(0.05, 5))
def test_temperature_raises_ratios_to_a_power(logits, temperature):
    before, after = logits.log_softmax(-1), apply_temperature(logits, temperature).log_softmax(-1)
    ratios = (before[:, :1] - before) / temperature
    torch.testing.assert_close(after[:, :1] - after, ratios, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(some_logits, st.floats(1, 4), st.data())
def test_penalty_never_helps_a_seen_token_and_never_touches_others(logits, penalty, data):
    vocab = logits.shape[1]
    ids = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, vocab - 1), min_size=6, max_size=6), min_size=len(logits), max_size=len(logits)
            )
        )
    )
    result = repetition_penalty(logits, ids, penalty)
    for before, after, row in zip(logits, result, ids):
        seen = torch.isin(torch.arange(vocab), row)
        assert torch.equal(before[~seen], after[~seen])
        assert (after[seen] <= before[seen]).all()
    assert torch.equal(repetition_penalty(logits, ids, 1.0), logits)


def test_order_of_the_filters():
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    by_hand = min_p_filter(top_p_filter(top_k_filter(logits / 1.5, 20), 0.8), 0.1)
    assert torch.equal(filter_logits(logits, temperature=1.5, top_k=20, top_p=0.8, min_p=0.1), by_hand)


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 1e30]])
    for options in (dict(temperature=0.001), dict(top_p=0.5), dict(min_p=1.0), dict(top_k=1), dict(top_p=0.0)):
        assert not filter_logits(logits, **options).isnan().any()
        first, second = sample(logits, generator=torch.Generator().manual_seed(0), **options).tolist()
        assert first == 0 and second in (1, 2)


def test_tokens_that_were_removed_before_are_never_drawn():
    logits = torch.zeros(500, 6).index_fill(1, torch.tensor([0, 3, 5]), -torch.inf)
    for options in (dict(), dict(top_k=4), dict(top_k=100), dict(top_p=0.99), dict(min_p=0.01), dict(temperature=50.0)):
        assert set(sample(logits, generator=torch.Generator().manual_seed(0), **options).tolist()) == {1, 2, 4}


def test_a_batch_of_no_rows_and_of_one_token():
    for options in (dict(), dict(temperature=0), dict(top_k=3, top_p=0.5, min_p=0.1)):
        assert sample(torch.zeros(0, 5), **options).shape == (0,)
        assert sample(torch.zeros(2, 1), **options).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_follow_the_probabilities(dtype):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]], dtype=dtype)
    n = 40_000
    tokens = sample(logits.expand(n, -1), top_k=4, temperature=0.8, generator=torch.Generator().manual_seed(1))
    p = filter_logits(logits.double(), top_k=4, temperature=0.8).softmax(-1)[0]
    share = torch.bincount(tokens, minlength=5) / n
    assert share[4] == 0
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()


def test_each_row_is_drawn_on_its_own():
    logits = torch.zeros(2000, 10)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0))
    assert len(tokens.unique()) == 10 and (tokens[1:] == tokens[:-1]).float().mean() < 0.2


# Caches, windows, batches -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"n_kv_heads": 1},
        {"n_kv_heads": 4, "qk_norm": True},
        {"norm": "layernorm", "bias": True, "activation": "gelu", "tied_embeddings": False},
    ],
    ids=str,
)
def test_cached_equals_uncached_past_the_context(position, changes):
    model = tiny(position=position, **changes)
    for options in (
        dict(temperature=0),
        dict(temperature=1.2, top_k=8, top_p=0.95, min_p=0.02, repetition_penalty=1.1, generator=3),
    ):
        cached = generate(model, prompts(), 20, **options)
        assert torch.equal(cached, generate(model, prompts(), 20, use_cache=False, **options))


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_logits_equal_uncached_logits(position):
    model = tiny(position=position, window=4)
    windows = [TextWindow(model, prompts(), use_cache=use) for use in (True, False)]
    for _ in range(30):
        with evaluating(model):
            a, b = (window.next_logits() for window in windows)
            assert largest_difference(a, b) < 1e-4
            for window in windows:
                window.append(a.argmax(-1))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("use_cache, window", [(True, None), (False, None), (True, 3)])
def test_left_padded_batch_equals_one_by_one(position, use_cache, window):
    model = tiny(position=position, window=window)
    texts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], list(range(12))]
    ids, attention_mask = left_pad(texts, pad_token=12)
    # 20 tokens: each row slides at its own time
    options = dict(temperature=0, repetition_penalty=1.2, use_cache=use_cache)
    together = generate(model, ids, 20, attention_mask=attention_mask, **options)
    for text, row in zip(texts, together):
        alone = generate(model, torch.tensor([text]), 20, **options)
        assert torch.equal(row[-20 - len(text):], alone[0])


def test_what_was_written_is_penalised_too():
    model, ids = tiny().eval(), prompts(2, 3)
    expected = ids
    for _ in range(9):
        with torch.no_grad():
            logits = model(expected)[:, -1]
        expected = torch.cat([expected, repetition_penalty(logits, expected, 3.0).argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, ids, 9, temperature=0, repetition_penalty=3.0), expected)
    assert not torch.equal(generate(model, ids, 9, temperature=0), expected)


def test_padding_tokens_are_never_read_nor_penalised():
    model, mask = tiny(), torch.tensor([[False, False, True, True]])
    results = [
        generate(
            model, torch.tensor([[pad, pad, 5, 6]]), 20, temperature=0, repetition_penalty=1.5, attention_mask=mask
        )
        for pad in (0, 9)
    ]
    assert torch.equal(results[0][:, 2:], results[1][:, 2:])


def test_superfluous_padding_is_dropped():
    model = tiny()
    ids, mask = torch.tensor([[0] * 20 + [5, 6]]), torch.tensor([[False] * 20 + [True] * 2])
    result = generate(model, ids, 15, temperature=0, attention_mask=mask)
    assert torch.equal(result[:, 20:], generate(model, ids[:, 20:], 15, temperature=0)) and result.shape == (1, 37)


def test_the_sliding_rule():
    model = tiny()
    window, seen = TextWindow(model, prompts(1, 12)), []
    for _ in range(14):
        with evaluating(model):
            logits = window.next_logits()
        seen.append(window.n_read)
        window.append(logits.argmax(-1))
    assert seen == [12, 6, 7, 8, 9, 10, 11, 12, 6, 7, 8, 9, 10, 11]


def test_after_a_slide_the_text_is_that_of_the_newest_half():
    model = tiny()
    text = generate(model, prompts(1, 12), 1, temperature=0)  # 13 tokens: one too many
    assert torch.equal(
        generate(model, text[:, -6:], 1, temperature=0)[:, -1], generate(model, prompts(1, 12), 2, temperature=0)[:, -1]
    )


@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_short_contexts(context):
    model = tiny(context_length=context)
    cached = generate(model, prompts(2, 1), 20, temperature=0)
    assert torch.equal(cached, generate(model, prompts(2, 1), 20, temperature=0, use_cache=False)) and cached.shape == (
        2,
        21,
    )


def test_each_token_is_read_once_with_the_cache():
    model, read = tiny(), []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape[1]))
    generate(model, prompts(2, 3), 12)
    assert read == [3] + [1] * 9 + [6, 1]  # the tenth new token is read into a full window, the next one slides it
    read.clear()
    generate(model, prompts(2, 3), 9, use_cache=False)
    assert read == list(range(3, 12))


def test_the_cache_is_no_larger_than_needed(monkeypatch):
    sizes, init = [], KVCache.__init__
    monkeypatch.setattr(
        KVCache,
        "__init__",
        lambda self, b, h, capacity, d, **o: (sizes.append(capacity), init(self, b, h, capacity, d, **o))[1],
    )
    generate(tiny(), prompts(1, 3), 4)
    assert set(sizes) == {7}


# Seeds, stop tokens, modes ------------------------------------------------------------------------------------------

def test_same_seed_same_text():
    model = tiny()
    texts = [generate(model, prompts(), 20, generator=seed) for seed in (5, 5, 6)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0], generate(model, prompts(), 20, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    generate(model, prompts(), 5, generator=1)
    assert torch.equal(state, torch.get_rng_state())  # a seed leaves the global generator alone


def test_stream_gives_what_generate_collects():
    model = tiny()
    steps = list(stream(model, prompts(), 20, generator=2))
    assert all(step.shape == (3,) and step.dtype == torch.long for step in steps)
    assert torch.equal(torch.stack(steps, 1), generate(model, prompts(), 20, generator=2)[:, 4:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_tokens(use_cache):
    model, stops = tiny(), (3, 7)
    free = generate(model, prompts(8), 25, generator=1, use_cache=use_cache)
    stopped = generate(model, prompts(8), 25, generator=1, stop_tokens=stops, use_cache=use_cache)
    ends = []
    for row, full in zip(stopped[:, 4:].tolist(), free[:, 4:].tolist()):
        end = next((i for i, token in enumerate(full) if token in stops), len(full))
        ends.append(end)
        assert row[: end + 1] == full[: len(row)][: end + 1]
        assert all(token == row[end] for token in row[end:]) if end < len(row) else True
    assert stopped.shape[1] == 4 + min(25, max(ends) + 1)
    assert min(ends) < max(ends)  # rows did end at different times


def test_stop_token_in_the_prompt_does_not_stop():
    assert (
        generate(tiny(), torch.full((1, 3), 3), 5, stop_tokens=[3], temperature=0, repetition_penalty=50.0).shape[1] > 4
    )


def test_nothing_to_write():
    assert torch.equal(generate(tiny(), prompts(), 0), prompts())
    assert torch.equal(beam_search(tiny(), prompts(), 0), prompts())
    assert list(stream(tiny(), prompts(), 0)) == []


def test_modes_come_back_and_results_are_ordinary_tensors():
    model = tiny(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    steps = stream(model, prompts(), 5, temperature=0)
    next(steps)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    steps.close()
    first, second = (generate(model, prompts(), 20, temperature=0) for _ in range(2))
    assert torch.equal(first, second)  # no dropout while writing
    assert [module.training for module in model.modules()] == modes
    model(first[:, :12], first[:, 1:13])[1].backward()  # what was written can be learned from


def test_modes_come_back_after_an_error():
    model = tiny().train()
    with pytest.raises(RuntimeError):
        with evaluating(model):
            raise RuntimeError
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# Beams --------------------------------------------------------------------------------------------------------------

def every_text(model, prompt, n, stops, length_penalty):
    "The score of each text of up to n tokens that ends with its first stop token, filled up."
    scores = {}
    texts = torch.tensor(list(product(range(model.config.vocab_size), repeat=n)))
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], 1))
    logp = logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, texts[:, :, None])[:, :, 0]
    for text, steps in zip(texts.tolist(), logp):
        end = next((i + 1 for i, token in enumerate(text) if token in stops), n)
        filled = tuple(text[:end]) + (text[end - 1],) * (n - end)
        scores[filled] = float(steps[:end].sum()) / end**length_penalty
    return sorted(scores.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("stops", [(), (2,), (0, 3)], ids=str)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_equal_exhaustive_search(stops, length_penalty):
    model = tiny(vocab_size=4).eval()
    ids = torch.tensor([[1, 3], [2, 0]])
    beams, scores = beam_candidates(model, ids, 4, n_beams=256, length_penalty=length_penalty, stop_tokens=stops)
    for row, prompt in enumerate(ids.tolist()):
        truth = every_text(model, prompt, 4, stops, length_penalty)
        n = len(truth)
        assert [tuple(b) for b in beams[row, : n // 2, 2:].tolist()] == [text for text, _ in truth[: n // 2]]
        assert largest_difference(scores[row, :n], torch.tensor([score for _, score in truth])) < 1e-4
        assert (scores[row, n:] == -torch.inf).all()
        assert torch.equal(
            beam_search(model, ids, 4, n_beams=256, length_penalty=length_penalty, stop_tokens=stops), beams[:, 0]
        )


@pytest.mark.parametrize("position", POSITIONS)
def test_one_beam_is_greedy_and_the_cache_changes_nothing(position):
    model = tiny(position=position)
    assert torch.equal(beam_search(model, prompts(), 20, n_beams=1), generate(model, prompts(), 20, temperature=0))
    cached, uncached = (
        beam_candidates(model, prompts(), 20, n_beams=3, stop_tokens=[4], use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached[0], uncached[0]) and largest_difference(cached[1], uncached[1]) < 1e-3
    assert (cached[1][:, 1:] <= cached[1][:, :-1]).all()  # best first


def test_beams_of_a_batch_equal_beams_one_by_one():
    model = tiny()
    together = beam_search(model, prompts(5), 10, n_beams=4)
    for row, prompt in zip(together, prompts(5)):
        assert torch.equal(row, beam_search(model, prompt[None], 10, n_beams=4)[0])


def beams_plainly(model, prompt, n, n_beams, length_penalty, stops):
    "Beam search in loops: ended texts leave the race for a pool, and nothing that ended is forgotten."
    live, ended = [((), 0.0)], []
    for step in range(1, n + 1):
        longer = []
        for text, total in live:
            with torch.no_grad():
                logp = model(torch.tensor([[*prompt, *text]]))[0, -1].log_softmax(-1).tolist()
            longer += [((*text, token), total + logp[token]) for token in range(len(logp))]
        ended += [(text, total / step**length_penalty) for text, total in longer if text[-1] in stops]
        live = sorted((pair for pair in longer if pair[0][-1] not in stops), key=lambda pair: -pair[1])[:n_beams]
    ended += [(text, total / n**length_penalty) for text, total in live]
    return sorted(ended, key=lambda pair: -pair[1])[:n_beams]


@pytest.mark.parametrize("n_beams", [1, 2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -0.7])
def test_beams_keep_every_ended_text_that_is_good_enough(n_beams, length_penalty):
    torch.manual_seed(8)
    for stops in ((1,), (0, 5)):
        model = tiny(vocab_size=8, n_layers=1, init_std=0.7).eval()
        ids = prompts(3, 3, vocab=8)
        beams, scores = beam_candidates(
            model, ids, 6, n_beams=n_beams, length_penalty=length_penalty, stop_tokens=stops
        )
        for row, prompt in enumerate(ids.tolist()):
            wanted = beams_plainly(model, prompt, 6, n_beams, length_penalty, stops)
            assert largest_difference(scores[row], torch.tensor([score for _, score in wanted])) < 1e-4
            for text, (best, _) in zip(beams[row, :, 3:].tolist(), wanted):
                assert tuple(text) == best + best[-1:] * (len(text) - len(best))


def score_of(model, text, seq, stop, length_penalty):
    "Equation (8.6) of one text behind a prompt of `seq` tokens."
    new = text[seq:]
    end = new.index(stop) + 1 if stop in new else len(new)
    with torch.no_grad():
        logp = model(torch.tensor([text[: seq + end]]))[0, seq - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(new[:end])[:, None]).sum().item() / end**length_penalty


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_are_never_worse_than_those_of_transformers(length_penalty):
    "48 rows; with `early_stopping=\"never\"`, which searches as long as anything can be found."
    from transformer_llm.peers import hf_gpt2

    for seed in range(3):
        torch.manual_seed(seed)
        shape = dict(vocab_size=8, context_length=24, d_model=16, n_layers=1, n_heads=2, init_std=0.8)
        model, ids = GPT(GPTConfig(**GPT2_STYLE | shape)).eval(), torch.randint(8, (4, 3))
        theirs, mask = hf_gpt2(model).eval(), torch.ones_like(ids)
        for n_beams in (2, 4):
            ours = beam_search(model, ids, 8, n_beams=n_beams, length_penalty=length_penalty, stop_tokens=[1])
            written = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=8, num_beams=n_beams, do_sample=False, eos_token_id=1,
                pad_token_id=1, early_stopping="never", length_penalty=length_penalty,
            )
            for a, b in zip(ours.tolist(), written.tolist()):
                assert score_of(model, a, 3, 1, length_penalty) > score_of(model, b, 3, 1, length_penalty) - 1e-5


def test_an_ended_text_outlives_beginnings_that_look_better():
    "The search goes on while a beginning could still win, and no row depends on how long the others take."
    model = tiny(vocab_size=8, n_layers=1, init_std=0.7)
    ids = prompts(6, 3, vocab=8)
    options = dict(n_beams=4, length_penalty=1.0, stop_tokens=[1])
    together = beam_candidates(model, ids, 12, **options)
    for row, prompt in enumerate(ids):
        alone = beam_candidates(model, prompt[None], 12, **options)
        assert largest_difference(together[1][row], alone[1][0]) < 1e-4
        width = alone[0].shape[2]
        assert torch.equal(together[0][row, 0, :width], alone[0][0, 0])
    # wherever the search ends, no ended text of less steps is better
    for n in (1, 3, 6):
        shorter = beam_candidates(model, ids, n, n_beams=4, length_penalty=0.0, stop_tokens=[1])[1][:, 0]
        assert (beam_candidates(model, ids, 12, n_beams=4, length_penalty=0.0, stop_tokens=[1])[1][:, 0] <= 0).all()
        ended = beam_search(model, ids, n, n_beams=4, length_penalty=0.0, stop_tokens=[1])[:, -1] == 1
        longer = beam_candidates(model, ids, 12, n_beams=4, length_penalty=0.0, stop_tokens=[1])[1][:, 0]
        assert (longer[ended] >= shorter[ended] - 1e-5).all()


def test_when_every_token_ends_a_text_the_best_is_found():
    model = tiny(vocab_size=5)
    ids = prompts(2, 3, vocab=5)
    beams, scores = beam_candidates(model, ids, 7, n_beams=8, stop_tokens=range(5))
    with torch.no_grad():
        logp = model.eval()(ids)[:, -1].log_softmax(-1).sort(descending=True)
    assert beams.shape == (2, 8, 4) and torch.equal(beams[:, :5, 3], logp.indices)
    assert largest_difference(scores[:, :5], logp.values) < 1e-5 and (scores[:, 5:] == -torch.inf).all()


# Text ---------------------------------------------------------------------------------------------------------------

def test_text_streamed_equals_text_generated():
    tokenizer = CharTokenizer.train("abcdefghijkl\n")
    model = tiny(vocab_size=tokenizer.vocab_size)
    whole = generate_text(model, tokenizer, "abc", 30, generator=4)
    assert whole == ["abc" + "".join(stream_text(model, tokenizer, "abc", 30, generator=4))]
    assert len(whole[0]) == 33
    stops = tokenizer.encode("e")
    cut = generate_text(model, tokenizer, "abc", 30, generator=4, stop_tokens=stops)[0]
    assert (
        cut
        == whole[0].split("e")[0]
        == "abc" + "".join(stream_text(model, tokenizer, "abc", 30, generator=4, stop_tokens=stops))
    )


@pytest.mark.parametrize("seed", range(5))
def test_streams_of_bytes_give_whole_characters(seed):
    tokenizer = BPETokenizer.train("日本語の文 émotion 🙂", 270)
    model = tiny(vocab_size=tokenizer.vocab_size, context_length=64)
    pieces = list(stream_text(model, tokenizer, "日本", 60, generator=seed))
    assert len(pieces) < 60  # bytes were held back
    assert generate_text(model, tokenizer, "日本", 60, generator=seed) == ["日本" + "".join(pieces)]


def test_special_tokens_end_a_text_by_default():
    tokenizer = BPETokenizer.train("plain text", 257)
    model = tiny(vocab_size=257)
    end = tokenizer.special_tokens["<|endoftext|>"]
    free = generate(model, torch.tensor([tokenizer.encode("a")] * 40), 40, generator=0, temperature=3.0)
    assert (free == end).any()  # so there is something to end
    texts = generate_text(model, tokenizer, "a", 40, num_samples=40, generator=0, temperature=3.0)
    rows = free.tolist()
    assert texts == [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def test_several_prompts_and_samples():
    tokenizer = CharTokenizer.train("abcdefghijkl\n")
    model = tiny(vocab_size=tokenizer.vocab_size)
    texts = generate_text(model, tokenizer, ["a", "bcd"], 5, num_samples=3, generator=0)
    assert [text[0] for text in texts] == list("aaabbb") and [len(text) for text in texts] == [6] * 3 + [8] * 3


def test_left_pad():
    ids, attention_mask = left_pad([[1], [2, 3, 4]], pad_token=9)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4]] and attention_mask.tolist() == [[False, False, True], [True] * 3]


# Errors -------------------------------------------------------------------------------------------------------------

WRITERS = {
    "stream": lambda model, ids: list(stream(model, ids, 4)),
    "generate": lambda model, ids: generate(model, ids, 4, temperature=0),
    "generate, no cache": lambda model, ids: generate(model, ids, 4, top_k=3, use_cache=False),
    "generate, stops": lambda model, ids: generate(model, ids, 4, stop_tokens=[1]),
    "beam search": lambda model, ids: beam_search(model, ids, 4),
    "beam search, stops": lambda model, ids: beam_search(model, ids, 4, stop_tokens=[1], use_cache=False),
}


@pytest.mark.parametrize("path", WRITERS)
def test_logits_that_are_not_numbers_are_refused(path):
    "A damaged weight; one that only some tokens meet; numbers that outgrow float16."
    write = WRITERS[path]
    for name, value in (("blocks.1.feedforward.down.weight", torch.nan), ("final_norm.weight", torch.inf)):
        model = tiny()
        with torch.no_grad():
            model.get_parameter(name)[..., 3] = value
        with pytest.raises(InputError, match=f"logits are not numbers.*{name} holds NaN or infinity; load the model"):
            write(model, prompts())
    model = tiny()
    with torch.no_grad():
        model.token_embedding.weight[7] = torch.nan  # in one row of the batch only, and in every row's logits
    with pytest.raises(InputError, match="logits are not numbers"):
        write(model, torch.tensor([[1, 2], [3, 7]]))
    large = tiny()
    with torch.no_grad():
        for block in large.blocks:
            block.feedforward.down.weight.mul_(3000)
            block.feedforward.up.weight.mul_(30)
    write(large, prompts())  # large numbers are numbers
    with pytest.raises(InputError, match="float16 ends at 65,504: use bfloat16"):
        write(copy.deepcopy(large).half(), prompts())
    write(copy.deepcopy(large).bfloat16(), prompts())


def test_a_model_may_forbid_tokens_but_not_all():
    class Picky(GPT):
        def unembed(self, x):
            logits = super().unembed(x)
            return logits.index_fill(-1, torch.tensor(self.closed), -torch.inf)

    model = Picky(tiny().config)
    model.closed = [0, 3]
    assert not torch.isin(generate(model, prompts() % 3 + 4, 9)[:, 4:], torch.tensor([0, 3])).any()
    model.closed = list(range(13))
    with pytest.raises(InputError, match="logits are not numbers"):
        generate(model, prompts(), 3)


def test_special_tokens_alone_end_a_text():
    "A token that was added without being special, as `<think>` often is, is a part of the text."
    class Marked(CharTokenizer):
        special_tokens = {"<end>": 3}
        added_tokens = {"<end>": 3, "<think>": 5}

    tokenizer = Marked.train("abcdefghijkl")
    assert stop_ids(tokenizer, None) == (3,) and stop_ids(tokenizer, [5]) == (5,)
    assert stop_ids(tokenizer, None, vocab_size=3) == ()  # the model can't write it
    assert stop_ids(CharTokenizer.train("ab"), None) == ()


def test_a_thought_is_written_on_and_an_end_ends(tmp_path):
    "The same with a tokenizer from a file, where `<think>` is added with `special: false`."
    plain = BPETokenizer.train("plain text", 258, special_tokens=("<|endoftext|>", "<think>"))
    parts = json.loads(plain.to_json())
    for token in parts["added_tokens"]:
        token["special"] = token["content"] != "<think>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    thought, end = tokenizer.encode("<think>")[0], tokenizer.special_tokens["<|endoftext|>"]
    assert stop_ids(tokenizer, None) == (end,)
    model = tiny(vocab_size=tokenizer.vocab_size)
    rows = generate(model, torch.tensor([tokenizer.encode("a")] * 40), 40, generator=0, temperature=3.0).tolist()
    texts = generate_text(model, tokenizer, "a", 40, num_samples=40, generator=0, temperature=3.0)
    assert texts == [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]
    assert any("<think>" in text.removesuffix("<think>") for text in texts) and any(thought in row for row in rows)


SENTENCES = """
import torch
from transformer_llm import CharTokenizer, GPT, GPTConfig, generate, generate_text, stream_text
from transformer_llm.decoding import Decoder, speculative
from transformer_llm.foundations import InputError
from transformer_llm.generation import beam_search, stream
model = GPT(GPTConfig(vocab_size=4, context_length=8, d_model=8, n_layers=1, n_heads=2))
tokenizer, ids, decoder = CharTokenizer.train("abcd"), torch.tensor([[1, 2]]), Decoder(model)
for call in (
    lambda: generate(model, "abc", 4),
    lambda: decoder.generate("abc", 4),
    lambda: beam_search(model, "abc", 4),
    lambda: speculative(model, model, "abc", 4),
    lambda: generate(model, [[1, 2]], 4),
    lambda: generate(model, None, 4),
    lambda: generate(ids, model, 4),
    lambda: generate(model, torch.tensor([1, 2]), 4),
    lambda: generate(model, ids + 2, 4),
    lambda: generate(model, ids, "4"),
    lambda: generate(model, ids, 4, attention_mask="left"),
    lambda: generate(model, ids, 4, generator="seed"),
    lambda: generate(model, ids, 4, sampling=dict(top_k=3)),
    lambda: generate_text(model, None, "abc"),
    lambda: generate_text(None, tokenizer, "abc"),
    lambda: generate_text(model, tokenizer, None),
    lambda: generate_text(model, tokenizer, ["a", 5]),
    lambda: generate_text(model, "tokenizer.json", "abc"),
    lambda: stream_text(model, None, "abc"),
    lambda: stream_text(model, tokenizer, ["abc"]),
    lambda: stream_text(tokenizer, model, "abc"),
):
    try:
        print("NOTHING", call())
    except InputError as error:
        print(error)
for call, name in (
    (lambda: generate(model, ids, 4, temprature=1), "generate"),
    (lambda: stream(model, ids, 4, temprature=1), "stream"),
    (lambda: generate_text(model, tokenizer, "a", 4, temprature=1), "generate_text"),
    (lambda: stream_text(model, tokenizer, "a", 4, temprature=1), "stream_text"),
    (lambda: decoder.generate(ids, 4, temprature=1), "Decoder.generate"),
    (lambda: beam_search(model, ids, 4, temprature=1), "beam_search"),
    (lambda: speculative(model, model, ids, 4, temprature=1), "speculative"),
):
    try:
        print("NOTHING", call())
    except TypeError as error:
        assert f"{name}()" in str(error) and "temprature" in str(error), (name, error)
"""


def test_what_can_not_be_is_said_in_one_sentence():
    "In a process of its own, as a user's: here a check of types would speak first."
    done = subprocess.run([sys.executable, "-c", SENTENCES], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    starts = [
        *["ids must be a tensor"] * 6, "model must be a GPT", "Prompts, and attention_mask", "The prompt holds token 4",
        "max_new_tokens", "attention_mask must be", "generator, if a seed", "sampling must be a Sampling",
        "tokenizer must be", "model must be a GPT", "A prompt must be text, not None", "A prompt must be text, not 5",
        "tokenizer must be", "tokenizer must be", "A prompt must be text", "model must be a GPT",
    ]
    assert len(lines) == len(starts) and all(line.startswith(start) for line, start in zip(lines, starts)), lines


TYPES = """
import torch
from transformer_llm import GPT, GPTConfig, generate
from transformer_llm.decoding import Decoder
from transformer_llm.foundations import InputError
from transformer_llm.generation import beam_search, stream
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=13, context_length=8, d_model=8, n_layers=1, n_heads=2)).eval()
ids = torch.tensor([[1, 2, 12]])

def refuses(call, word):
    try:
        raise SystemExit(f"nothing refused, {word}: {call()}")
    except InputError as error:
        assert word in str(error), error

for write in (
    lambda ids, **o: generate(model, ids, 3, generator=1, **o).tolist(),
    lambda ids, **o: Decoder(model).generate(ids, 3, generator=1, **o).tolist(),
    lambda ids, **o: torch.stack(list(stream(model, ids, 3, generator=1, **o))).tolist(),
    lambda ids, **o: beam_search(model, ids, 3, **o).tolist(),
):
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64):
        assert write(ids.to(dtype)) == write(ids), dtype
    for wrong in (ids.float(), ids.half(), ids > 1, ids.to(torch.complex64)):
        refuses(lambda: write(wrong), "whole numbers")
    for wrong, word in ((ids - 2, "-1"), (ids + 1, "13"), (torch.full((1, 2), 2**63, dtype=torch.uint64), "token")):
        refuses(lambda: write(wrong), word)
    for stops in (3, "3", [1.5], [-1], [13], ["a"], [None], [2**70]):
        refuses(lambda: write(ids, stop_tokens=stops), "stop_tokens")
    wanted = write(ids, stop_tokens=[3, 4])
    for stops in (torch.tensor([3, 4]), {3, 4}, iter([3, 4, 3]), dict(a=3, b=4).values(), (3, 4)):
        assert write(ids, stop_tokens=stops) == wanted, stops
"""


def test_prompts_and_stop_tokens_of_every_type():
    "Whole numbers of any type are read alike; floats, truth values and ids that the model doesn't know are refused."
    done = subprocess.run([sys.executable, "-c", TYPES], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]

@pytest.mark.parametrize(
    "options, word",
    [
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=1e-9), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=-3), "top_k"),
        (dict(top_p=1.01), "top_p"),
        (dict(top_p=-1), "top_p"),
        (dict(min_p=2), "min_p"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty"),
        (dict(generator=True), "generator"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_at_once(options, word):
    with pytest.raises(InputError, match=word):
        stream(tiny(), prompts(), 5, **options)  # no token was asked for yet


@pytest.mark.parametrize("function", [stream, generate, beam_search], ids=lambda f: f.__name__)
def test_prompts_that_cannot_be(function):
    model = tiny()
    for ids, message in [
        (prompts()[:, :0], "empty"),
        (prompts(1, 13), "13 tokens.*12"),
        (torch.tensor([[13]]), "token 13"),
        (torch.tensor([[-1]]), "token -1"),
        (prompts()[:0], "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            function(model, ids, 5)
    with pytest.raises(InputError, match="max_new_tokens"):
        function(model, prompts(), -1)


def test_temperatures_too_small_to_divide_by():
    for temperature in (0, 1e-9):
        for function in (apply_temperature, lambda logits, t: filter_logits(logits, temperature=t)):
            with pytest.raises(InputError, match="at least 0.001.*temperature=0"):
                function(torch.zeros(1, 3), temperature)
    assert apply_temperature(torch.ones(1, 3), 0.001).allclose(torch.tensor(1000.0))


def test_masks_that_cannot_be():
    model, ids = tiny(), prompts(1, 3)
    for mask, message in [([[True, True, False]], "left"), ([[True, False, True]], "left"), ([[False] * 3], "empty")]:
        with pytest.raises(InputError, match=message):
            stream(model, ids, 5, attention_mask=torch.tensor(mask))


def test_texts_that_cannot_be():
    tokenizer = CharTokenizer.train("abcdefghijkl\n")
    model = tiny(vocab_size=tokenizer.vocab_size)
    for function in (generate_text, stream_text):
        for prompt, message in [("", "empty"), ("a" * 20, "20 tokens"), ("ß", "position 0")]:
            with pytest.raises(InputError, match=message):
                function(model, tokenizer, prompt, 5)
    with pytest.raises(InputError, match="empty"):
        generate_text(model, tokenizer, ["a", ""], 5)
    with pytest.raises(InputError, match="num_samples"):
        generate_text(model, tokenizer, "a", 5, num_samples=0)
    with pytest.raises(InputError, match="n_beams"):
        beam_search(model, prompts(), 5, n_beams=0)


def test_a_prompt_stands_behind_the_tokenizers_prefix():
    "Llama 3's texts begin with a token of their own; the model reads it, and nobody sees it."
    text = "the old ox and the old fox " * 9
    plain = BPETokenizer.train(text, 262, special_tokens=["<|begin|>"])
    begin = plain.special_tokens["<|begin|>"]
    marked = BPETokenizer(plain.vocab, plain.merges, plain.special_tokens, prefix=(begin,))
    model = tiny(vocab_size=plain.vocab_size)
    ids = torch.tensor([[begin, *plain.encode("the ")]])
    wanted = plain.decode(generate(model, ids, 9, temperature=0)[0, 1:])
    assert generate_text(model, marked, "the ", 9, temperature=0, stop_tokens=())[0] == wanted
    assert "the " + "".join(stream_text(model, marked, "the ", 9, temperature=0, stop_tokens=())) == wanted
    assert wanted != generate_text(model, plain, "the ", 9, temperature=0, stop_tokens=())[0]
