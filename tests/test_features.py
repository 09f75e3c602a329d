"""Chapter 20: dictionaries, their grading, probes and steering; proofs on small cases, and sentences for bad input."""
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from transformer_llm import plots
from transformer_llm.features import (
    DeadFeatures,
    Probe,
    TopK,
    Toy,
    control_labels,
    difference_of_means,
    feature_card,
    grade,
    match_pairs,
    random_like,
    record_rows,
    share_recovered,
    steer,
    train_dictionary,
)
from transformer_llm.foundations import InputError
from transformer_llm.transformer import GPT, GPTConfig

LAYER = "blocks.0.after"


@pytest.fixture(scope="module")
def model() -> GPT:
    "A small model whose layer matters: it has learned to repeat the token before."
    torch.manual_seed(0)
    made = GPT(GPTConfig(vocab_size=11, context_length=12, d_model=16, n_layers=2, n_heads=2))
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(11, (16, 12), generator=generator)
        loss = F.cross_entropy(made(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


@pytest.fixture
def windows() -> torch.Tensor:
    "Each token twice, so that the next one is the one before."
    return torch.randint(11, (20, 6), generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)


def test_the_gradient_of_top_k_is_the_one_worked_out_by_hand():
    scores = torch.tensor([[2.0, 5.0, 3.0]], requires_grad=True)
    three = TopK(3, 3, 2)
    three.dense(*three.keep(scores)).backward(torch.tensor([[10.0, 20.0, 30.0]]))
    assert scores.grad.tolist() == [[0, 20, 30]]


def test_scores_below_zero_are_not_kept():
    three = TopK(3, 3, 2)
    assert three.dense(*three.keep(torch.tensor([[-2.0, -5.0, 3.0]]))).tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_directions_have_length_one_after_each_step(steps):
    toy, generator = Toy(30, 12, 2), torch.Generator().manual_seed(7)
    dictionary = TopK(12, 40, 3, generator=generator).start(toy.draw(100, generator)[0], generator)
    before = dictionary.decoder.detach().clone()
    train_dictionary(dictionary, toy.draw(100, generator)[0], steps=steps, batch_size=32)
    assert not torch.equal(dictionary.decoder, before)
    assert (dictionary.decoder.norm(dim=1) - 1).abs().max() < 1e-6


def test_a_small_toy_is_taken_apart_and_the_untrained_dictionary_is_not():
    toy, generator = Toy(40, 16, 2, seed=3), torch.Generator().manual_seed(11)
    draw = lambda n, generator: toy.draw(n, generator)[0]
    dictionary = TopK(16, 80, 3, generator=generator).start(draw(2000, generator), generator)
    before = grade(dictionary.decoder, toy.directions)
    losses = train_dictionary(dictionary, draw, steps=300, batch_size=256, generator=generator)
    after = grade(dictionary.decoder, toy.directions)
    assert before.matched < 0.5 and after.matched >= 0.9
    assert losses[-1] < 0.5 * losses[0]


def test_training_is_the_same_for_equal_seeds_and_knows_no_scale():
    toy, made = Toy(30, 12, 2), []
    for factor in (1.0, 1.0, 1000.0):
        generator = torch.Generator().manual_seed(5)
        rows = toy.draw(500, generator)[0] * factor
        dictionary = TopK(12, 20, 2, generator=generator).start(rows, generator)
        losses = train_dictionary(dictionary, rows, steps=20, batch_size=64, generator=generator)
        made.append((dictionary.decoder.detach(), losses))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == made[1][1]
    assert torch.allclose(made[0][0], made[2][0], atol=1e-3)


def test_the_toy_says_which_features_are_on():
    toy = Toy(20, 8, 3, weakest=1.0, strongest=1.0)
    rows, on = toy.draw(50, torch.Generator().manual_seed(0))
    assert torch.allclose(rows, toy.directions[on].sum(1), atol=1e-6)
    assert all(len(set(one)) == 3 for one in on.tolist())
    rare = Toy(20, 8, 1, decay=1.0).draw(20_000, torch.Generator().manual_seed(0))[1].flatten().bincount(minlength=20)
    assert rare[0] / rare[9] == pytest.approx(10, rel=0.25)


def test_dead_latents_are_counted_in_rows_and_get_a_loss():
    dead = DeadFeatures(4, patience=10, help=2)
    dead.update(torch.tensor([[1.0], [0.0]]), torch.tensor([[0], [1]]))  # the second is at zero: not on
    assert dead.silent.tolist() == [0, 2, 2, 2]
    for _ in range(5):
        dead.update(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    assert dead.dead.tolist() == [False, True, True, True]
    dictionary = TopK(3, 4, 1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    dead.loss(dictionary, dictionary.scores(x), x).backward()
    assert (dictionary.decoder.grad[0] == 0).all() and (dictionary.decoder.grad[1:] != 0).any()
    assert DeadFeatures(4, help=0).loss(dictionary, dictionary.scores(x), x) == 0


def test_pairs_are_as_many_as_possible():
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        near = torch.rand(4, 5, generator=generator) < 0.35
        most = max(sum(bool(near[row, column]) for row, column in enumerate(columns))
                   for columns in itertools.permutations(range(5), 4))
        found = match_pairs(near)
        assert len(found) == most == len(set(found.values()))
        assert all(near[row, column] for column, row in found.items())


def test_one_latent_does_not_serve_two_features():
    known = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1]]), dim=1)
    one = grade(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), known)
    assert (one.found, one.matched, one.split, one.spare) == (1.0, 0.5, 0.0, 1)
    assert grade(known, known).matched == 1 and grade(known[[0, 0, 1]], known, 0.99).split == 0.5


def test_share_recovered_is_one_for_the_identity_and_zero_for_the_mean(model, windows):
    average = record_rows(model, LAYER, windows[:, :-1]).mean(0)
    assert share_recovered(model, LAYER, lambda x: x, windows).share == 1
    assert share_recovered(model, LAYER, lambda x: average.expand_as(x), windows).share == pytest.approx(0, abs=1e-6)
    worse = share_recovered(model, LAYER, lambda x: -x, windows)
    assert worse.share < 0.9 and worse.loss == share_recovered(model, LAYER, lambda x: x, windows).loss


def test_rows_are_the_layer_in_the_order_of_the_tokens(model, windows):
    rows = record_rows(model, LAYER, windows, batch_size=7)
    alone = record_rows(model, LAYER, windows[3:4])
    assert rows.shape == (windows.numel(), 16)
    assert torch.allclose(rows.view(20, 12, 16)[3], alone, atol=1e-5)


def test_a_probe_finds_the_direction_and_guessing_scores_one_half():
    generator = torch.Generator().manual_seed(0)
    truth, cloud = torch.tensor([1.0, -2.0, 0.5]), torch.randn(20_000, 3, generator=generator)
    side = torch.rand(20_000, generator=generator) < 0.1
    probe = Probe.fit(cloud + side[:, None] * truth, side)
    assert torch.allclose(probe.weight, truth, atol=0.15)
    useless = Probe(torch.zeros(3), torch.tensor(1.0))
    assert useless.accuracy(cloud, side) == 0.5


def test_control_labels_belong_to_types():
    types = torch.tensor([3, 1, 3, 0, 1, 3])
    seen = {tuple(control_labels(types, torch.Generator().manual_seed(seed)).tolist()) for seed in range(40)}
    assert len(seen) == 8 and all(a == c == f and b == e for a, b, c, _, e, f in seen)


def test_steering_adds_the_dose_and_leaves_the_model_as_it_was(model, windows):
    rows = record_rows(model, LAYER, windows)
    vector = difference_of_means(rows, rows[:, 0] > rows[:, 0].mean())
    before = model(windows)
    with steer(model, LAYER, vector, 2.0):
        assert torch.allclose(record_rows(model, LAYER, windows), rows + 2 * vector, atol=1e-4)
        assert not torch.allclose(model(windows), before, atol=1e-3)
    assert torch.equal(model(windows), before)
    assert random_like(vector, torch.Generator().manual_seed(0)).norm().item() == pytest.approx(vector.norm().item())


def test_a_card_shows_where_a_latent_speaks(model, windows):
    rows, tokens = record_rows(model, LAYER, windows), [chr(97 + i) for i in windows.flatten().tolist()]
    dictionary = TopK(16, 24, 2, generator=torch.Generator().manual_seed(0)).start(rows)
    dense = dictionary.dense(*dictionary.codes(rows))
    latent = int((dense > 0).sum(0).argmax())
    card = feature_card(dictionary, latent, rows, tokens, n_texts=3, before=2, after=1)
    assert card.share == pytest.approx((dense[:, latent] > 0).float().mean().item())
    assert max(card.loudest[0][1]) == pytest.approx(dense[:, latent].max().item())
    assert all(len(words) == len(strengths) <= 4 and max(strengths) > 0 for words, strengths in card.anywhere)
    figure = plots.show_cards([card, card, card])
    title = figure.axes[0].get_title("left") or figure.axes[0].get_title()  # the book's style puts it to the left
    assert len(figure.axes) >= 3 and f"latent {latent}" in title


@pytest.mark.parametrize("wrong, words", [
    (lambda model: TopK(4, 8, 9), "k "),
    (lambda model: TopK(4, 8, 0), "k "),
    (lambda model: Toy(n_on=600), "n_on"),
    (lambda model: Toy(weakest=0.0), "weakest"),
    (lambda model: Toy(decay=-1.0), "decay"),
    (lambda model: DeadFeatures(4, patience=0), "patience"),
    (lambda model: grade(torch.randn(4, 3), torch.randn(4, 2)), "equal length"),
    (lambda model: grade(torch.randn(4, 3), torch.randn(4, 3), 1.5), "threshold"),
    (lambda model: train_dictionary(TopK(4, 8, 2), torch.full((9, 4), float("nan")), steps=2), "finite"),
    (lambda model: train_dictionary(TopK(4, 8, 2), torch.randn(9, 4), steps=0), "steps"),
    (lambda model: TopK(4, 8, 2).start(torch.randn(5, 3)), "Rows of 4 numbers"),
    (lambda model: Probe.fit(torch.randn(4, 2), torch.ones(4, dtype=torch.bool)), "both kinds"),
    (lambda model: Probe.fit(torch.randn(4, 2), torch.ones(3, dtype=torch.bool)), "each row needs one"),
    (lambda model: difference_of_means(torch.randn(4, 2), torch.zeros(4, dtype=torch.bool)), "both kinds"),
    (lambda model: feature_card(TopK(4, 8, 2), 8, torch.randn(5, 4), list("abcde")), "latent"),
    (lambda model: feature_card(TopK(4, 8, 2), 1, torch.randn(5, 4), list("abcd")), "each row needs its token"),
    (lambda model: feature_card(TopK(4, 8, 2), 1, torch.zeros(5, 4), list("abcde")), "doesn't speak"),
    (lambda model: record_rows(model, "blocks.9.after", torch.zeros(1, 4, dtype=torch.int64)), "nearest"),
    (lambda model: share_recovered(model, LAYER, lambda x: x, torch.zeros(2, 4, dtype=torch.int64)), "to recover"),
    (lambda model: plots.show_cards([]), "no card"),
])
def test_bad_input_is_refused_in_one_sentence(model, wrong, words):
    with pytest.raises(InputError, match=words) as raised:
        wrong(model)
    assert "\n" not in str(raised.value)


def test_a_vector_of_the_wrong_length_is_refused(model, windows):
    with pytest.raises(InputError, match="16 numbers"), steer(model, LAYER, torch.zeros(15)):
        model(windows)


def test_the_stored_runs_have_three_seeds_and_find_nine_of_ten():
    stored = json.loads((Path(__file__).parents[1] / "data" / "features.json").read_text(encoding="utf-8"))
    whole = [run for run in stored["recipe"] if not run["without"]]
    assert [run["seed"] for run in whole] == [0, 1, 2] and all(run["matched"] >= 0.9 for run in whole)
    assert all(run["seconds"] < 120 for run in whole)
    for card in stored["smollm2"][0]["cards"]:
        for tokens, strengths in card["loudest"] + card["anywhere"]:
            assert len(tokens.split("¦")) == len(strengths.split())
