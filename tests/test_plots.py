"""Pictures: odd inputs are drawn or refused with a sentence, and what is drawn are the numbers that were handed in."""
import math
import subprocess
import sys

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from transformer_llm import plots
from transformer_llm.foundations import InputError
from transformer_llm.transformer import CHOICES, GPT, GPTConfig

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("error")  # a sign that the font lacks, labels that find no place


@pytest.fixture(autouse=True)
def style():
    "The book's style; every picture is drawn to its end, and none is left open."
    plots.use_style()
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def texts(ax) -> list[str]:
    "What the reader sees at the x axis, after matplotlib read its mathematics."
    ax.figure.canvas.draw()
    return [label.get_text() for label in ax.get_xticklabels()]


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(vocab_size=11, context_length=6, d_model=8, n_layers=2, n_heads=2) | changes))


IDS = torch.tensor([[1, 2, 3, 4]])


# --- labels

@pytest.mark.parametrize(
    "token, label",
    [
        (" the", "␣the"),
        ("\n", "↵"),
        ("\t\r", "⇥␍"),
        ("", "(empty)"),
        ("$", r"\$"),
        ("$x$", r"\$x\$"),
        (7, "7"),
        ("\x00", "U+0000"),
        ("日本", "U+65E5U+672C"),
        ("\ud800", "U+D800"),
        ("é", "é"),
        ("�", "�"),
        ("abcdefghijklmn", "abcdefghijklmn"),
        ("abcdefghijklmno", "abcdefghijklm…"),
    ],
)
def test_token_label(token, label):
    assert plots.token_label(token) == label


def test_labels_are_drawn_without_mathematics_or_missing_signs():
    ax = plots.show_attention(torch.eye(6), ["$x$", r"\$", "_a^b", "日", "\n", "a" * 90])
    assert texts(ax)[0] == r"\$x\$"
    from matplotlib.cbook import is_math_text

    assert not any(is_math_text(label) for label in texts(ax))
    assert max(map(len, texts(ax))) == 14


# --- matrices

@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(1, 1),
        torch.full((3, 4), 7.0),
        torch.full((2, 2), NAN),
        torch.full((2, 2), -INF),
        torch.tensor([[1.0, NAN], [INF, -INF]]),
        torch.randn(5, 3).bfloat16(),
        torch.randn(3, 3, requires_grad=True),
        torch.randn(2, 2).double(),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_any_matrix_is_drawn(matrix, signed):
    ax = plots.show_matrix(matrix, signed=signed, annotate=True, label="value")
    assert len([t for t in ax.texts if t.get_text()]) == matrix.numel()
    low, high = ax.images[0].get_clim()
    assert math.isfinite(low) and math.isfinite(high) and low <= high


def test_infinite_cells_do_not_stretch_the_colours():
    ax = plots.show_matrix(torch.tensor([[0.25, -INF], [0.75, NAN]]))
    assert ax.images[0].get_clim() == (0.25, 0.75)


def test_attention_of_one_token_and_of_the_last_queries_only():
    plots.show_attention(torch.ones(1, 1), ["a"])
    ax = plots.show_attention(torch.full((1, 3), 1 / 3), ["a", "b", "c"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c"] and texts(ax) == ["a", "b", "c"]
    figure = plots.show_attention_grid([torch.ones(1, 1, 1)], ["a"], title="one head")
    assert len(figure.axes) == 1


def test_a_grid_has_layers_as_rows():
    maps = [torch.rand(3, 4, 4) for _ in range(2)]
    figure = plots.show_attention_grid(maps, "abcd")
    for number, ax in enumerate(figure.axes):
        assert torch.allclose(torch.tensor(ax.images[0].get_array()), maps[number // 3][number % 3])
    assert figure.axes[4].get_title("left") == "layer 1, head 1"
    assert [
        label.get_text()
        for label in plots.show_attention_grid([torch.rand(1, 30, 30)], "x" * 30).axes[0].get_xticklabels()
    ] == []


# --- a run

def test_a_run_with_one_record():
    axes = plots.plot_training([{"step": 1, "loss": 2.0, "val_loss": None, "lr": 0.1}])
    assert len(axes) == 2 and axes[0].get_title("left") == "Loss over the steps"
    assert axes[0].lines[0].get_marker() == "o"  # a line of one point would not be seen


def test_validation_losses_that_are_no_numbers_are_not_the_lowest():
    rows = [
        {"step": 1, "loss": 2.0, "val_loss": NAN},
        {"step": 2, "loss": INF, "val_loss": 1.5},
        {"step": 3, "loss": 1.0, "val_loss": 0.0},
    ]
    assert plots.plot_training(rows, ["loss"])[0].get_title("left") == "Lowest validation loss 0.000, at step 3"


def test_other_quantities_and_axes_of_ones_own():
    rows = [{"step": s, "loss": 1 / s, "grad_norm": s, "mine": -s} for s in (1, 2, 3)]
    mine = plots.new_axes(rows=3)
    axes = plots.plot_training(rows, ("mine", "loss", "grad_norm"), title="$", axes=mine)
    assert axes == list(mine) and [ax.get_ylabel() for ax in axes] == ["mine", "loss (nats per token)", "gradient norm"]
    assert list(axes[0].lines[0].get_ydata()) == [-1, -2, -3] and axes[2].get_xlabel() == "step"
    single = plots.plot_training(rows, ["loss"], axes=[plots.new_axes()])
    assert len(single) == 1


@pytest.mark.parametrize(
    "rows, quantities", [([], ["loss"]), ([{"step": 1, "loss": 2.0}], ["lr"]), ([{"loss": 2.0}], ["loss"])]
)
def test_a_missing_quantity_is_named(rows, quantities):
    with pytest.raises(InputError, match=quantities[0]):
        plots.plot_training(rows, quantities)


# --- next tokens

def test_removed_tokens_are_crossed_out_and_the_rest_is_one_bar():
    before = torch.arange(20.0, 0, -1)
    after = before.masked_fill(torch.arange(20) >= 3, -INF)
    figure = plots.plot_next_token({"before": before, "top-k 3": after}, [*"abcdefghijklmnopqrst"], top=5)
    first, second = figure.axes
    assert list(first.lines[0].get_ydata()) == [] and list(second.lines[0].get_ydata()) == [3, 4, 5]
    assert [label.get_text() for label in first.get_yticklabels()] == [*"abcde", "15 others"]
    widths = [patch.get_width() for patch in second.patches]
    assert math.isclose(sum(widths[:6]), 1) and math.isclose(sum(widths[6:]), 1)
    assert second.get_title("left").endswith("3 of 20 tokens left")


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1),
        torch.zeros(1, 1),
        torch.tensor([-1e4, 0.0]),
        torch.randn(1, 7).bfloat16(),
        torch.full((4,), 3.0, requires_grad=True),
    ],
)
def test_odd_distributions_are_drawn(logits):
    plots.plot_next_token({"$a$ and $b$": logits}, lambda i: "\n $" * i, top=3)


def test_a_tiny_probability_is_not_removed():
    p = plots.next_token_probabilities({"x": torch.tensor([0.0, -200.0, -INF])})["x"]
    assert p[1] > 0 and p[2] == 0


def test_probabilities_by_their_logarithm():
    p = torch.tensor([0.5, 0.5, 0.0])
    assert torch.allclose(plots.next_token_probabilities({"x": p.log()})["x"].float(), p)


@pytest.mark.parametrize(
    "logits, tokens, message",
    [
        ({"x": torch.full((3,), -INF)}, "abc", "removes? every token"),
        ({"x": torch.tensor([0.0, NAN])}, "ab", "NaN"),
        ({"x": torch.tensor([0.0, INF])}, "ab", "inf"),
        ({"x": torch.zeros(2, 3)}, "abc", r"\(2, 3\)"),
        ({"x": torch.zeros(3), "y": torch.ones(4)}, "abc", "'y'"),
        ({"x": torch.tensor([0.2, 0.8])}, "ab", r"p\.log"),
        ({"x": torch.zeros(3)}, "ab", "3 logits and 2 tokens"),
    ],
)
def test_what_is_no_distribution_is_refused(logits, tokens, message):
    with pytest.raises(InputError, match=message):
        plots.plot_next_token(logits, tokens)


def test_top_must_be_a_number_of_tokens():
    with pytest.raises(InputError, match="top must be"):
        plots.plot_next_token({"x": torch.zeros(3)}, "abc", top=0)


# --- positions and embeddings

@pytest.mark.parametrize(
    "table",
    [
        torch.ones(1, 1),
        torch.zeros(3, 4),
        torch.full((4, 2), 5.0),
        torch.randn(6, 3).bfloat16(),
        torch.randn(2, 9, requires_grad=True),
    ],
)
def test_any_table_of_positions_is_drawn(table):
    plots.plot_positions(table, title="$1 and $2")
    cosine, decay = plots.position_similarity(table)
    assert cosine.shape == (len(table), len(table)) and decay.shape == (len(table),) and cosine.isfinite().all()


def test_likeness_by_distance_by_hand():
    cosine, decay = plots.position_similarity(torch.tensor([[1.0, 0], [0, 2], [-3, 0]]))
    assert cosine.tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]] and decay.tolist() == [1, 0, -1]


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 5), (2, 1), (5, 1), (3, 7), (7, 3)])
def test_principal_components_of_small_matrices(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    points, shares = plots.principal_components(x)
    assert points.shape == (rows, 2) and shares.shape == (2,) and points.isfinite().all() and shares.sum() <= 1 + 1e-6
    if columns <= 2:  # nothing is lost: distances stay
        assert torch.allclose(torch.cdist(points, points), torch.cdist(x, x), atol=1e-4)
    plots.plot_embedding(x, [f"$t_{i}$ \n" for i in range(rows)])


def test_a_constant_matrix_is_one_point():
    points, shares = plots.principal_components(torch.full((4, 3), 2.0).bfloat16())
    assert points.abs().max() < 1e-6 and shares.abs().max() < 1e-6
    assert (
        len(plots.plot_embedding(torch.full((9, 3), 2.0), "abcdefghi").texts) == 4
    )  # one on each side; more would cover them


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_rows():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    turned = plots.principal_components(x.flip(0))[0].flip(0)
    assert torch.allclose(plots.principal_components(x)[0], turned, atol=1e-5)


def test_labels_do_not_cover_each_other():
    ax = plots.plot_embedding(
        torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), ["word"] * 60, groups=["a", "b"] * 30
    )
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 5 < len(boxes) < 60 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_embeddings_that_cannot_be_drawn():
    with pytest.raises(InputError, match="NaN"):
        plots.plot_embedding(torch.tensor([[1.0, NAN]]), ["a"])
    with pytest.raises(InputError, match="2 rows, 1 labels"):
        plots.plot_embedding(torch.ones(2, 2), ["a"])
    with pytest.raises(InputError, match="1 groups"):
        plots.plot_embedding(torch.ones(2, 2), ["a", "b"], groups=["x"])


# --- statistics

def test_statistics_by_hand():
    numbers = plots.tensor_statistics(torch.tensor([0.0, 3.0]), torch.tensor([[0.0], [-1.0]]))
    assert numbers == pytest.approx({"mean": 0.5, "std": 1.5, "rms": math.sqrt(2.5), "zeros": 0.5, "not_finite": 0.0})
    huge, small = (plots.tensor_statistics(torch.full((4,), size))["rms"] for size in (1e30, 1e-30))
    assert huge == pytest.approx(1e30) and small == pytest.approx(1e-30)  # whose squares are no float32 numbers
    assert plots.tensor_statistics(torch.zeros(3))["rms"] == 0
    assert plots.tensor_statistics(torch.tensor([NAN, INF, 1.0, 0.0]))["not_finite"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer(dtype):
    model = tiny(n_layers=1).to(dtype)
    statistics = plots.collect_statistics(model, lambda: model(IDS, IDS)[1])
    assert [*statistics] == ["blocks.0"] and statistics["blocks.0"]["gradient_rms"] > 0
    plots.plot_statistics(statistics, title="one layer")


def test_numbered_layers_are_found_at_any_depth_and_not_inside_one_another():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.ModuleDict(
                {"h": nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)])}
            )

        def forward(self, x):
            for block in self.transformer["h"]:
                x = block(x)
            return x

    model = Model()
    assert [*plots.collect_statistics(model, lambda: model(torch.ones(1, 3)))] == ["transformer.h.0", "transformer.h.1"]
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert [*plots.collect_statistics(model, lambda: model(torch.ones(1, 3)))] == ["0", "1"]


def test_gradients_are_those_of_backward_and_none_is_left_behind():
    model = tiny()
    statistics = plots.collect_statistics(model, lambda: model(IDS, IDS)[1])
    assert all(p.grad is None for p in model.parameters())
    model(IDS, IDS)[1].backward()
    for name, numbers in statistics.items():
        gradients = torch.cat([p.grad.flatten() for p in model.get_submodule(name).parameters()])
        assert numbers["weight_gradient_rms"] == pytest.approx(gradients.square().mean().sqrt().item(), rel=1e-4)


def test_without_gradients_there_are_none():
    model = tiny()
    with torch.no_grad():
        statistics = plots.collect_statistics(model, lambda: model(IDS, IDS)[1])
    assert "gradient_rms" not in statistics["blocks.0"]
    plots.plot_statistics(statistics)
    frozen = tiny().requires_grad_(False)
    frozen.blocks[1].requires_grad_(True)
    statistics = plots.collect_statistics(frozen, lambda: frozen(IDS, IDS)[1])
    assert "gradient_rms" not in statistics["blocks.0"] and statistics["blocks.1"]["weight_gradient_rms"] > 0
    plots.plot_statistics({"frozen": statistics, "other": statistics})


def test_hooks_are_removed_whatever_happens():
    model = tiny()
    with pytest.raises(ZeroDivisionError):
        plots.collect_statistics(model, lambda: model(IDS) / 0 if 1 / 0 else None)
    with pytest.raises(InputError, match="context_length"):
        plots.collect_statistics(model, lambda: model(torch.zeros(1, 99, dtype=torch.long)))
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_are_not_there_or_not_called_are_named():
    model = tiny()
    with pytest.raises(InputError, match="token_embedding"):
        plots.collect_statistics(model, lambda: model(IDS), layers="layer.*")
    with pytest.raises(InputError, match="none of these was called"):
        plots.collect_statistics(model, lambda: None)


def test_layers_that_give_tuples_and_layers_called_twice():
    class Pair(nn.Module):
        def forward(self, x):
            return 2 * x, None

    model = nn.Sequential(Pair())
    statistics = plots.collect_statistics(model, lambda: (model(torch.ones(2)), model(3 * torch.ones(2))))
    assert statistics["0"]["mean"] == 4  # of 2, 2, 6, 6


def test_the_first_layer_that_is_not_finite_is_marked():
    model = tiny(n_layers=4)
    with torch.no_grad():
        model.blocks[2].attention.v_proj.weight[0, 0] = NAN
        figure = plots.plot_statistics(plots.collect_statistics(model, lambda: model(IDS)))
    assert list(figure.axes[0].lines[-1].get_xdata()) == [2, 2]


def test_many_layers_of_different_names_are_drawn():
    layers = {f"model.layers.{n}.mlp": {"rms": 1.0 + n, "zeros": 0.0, "not_finite": 0.0} for n in range(30)}
    figure = plots.plot_statistics(layers)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][:3] == ["0", "3", "6"]
    assert figure.get_supxlabel() == "layer (model.layers.*.mlp)"
    plots.plot_statistics({"embedding": {"rms": 0.0, "zeros": 1.0}, "head": {"rms": 1.0, "zeros": 0.0}})


# --- the diagram

@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(n_layers=1),
        dict(norm_placement="post"),
        dict(norm_placement="output", qk_norm=True, qk_norm_whole=True),
        dict(qkv_bias=True),
        dict(norm_placement="post", norm="layernorm", bias=True),
        dict(tied_embeddings=False, output_bias=True),
        dict(n_kv_heads=1, head_dim=6, qk_norm=True, window=3),
        dict(activation="gelu", bias=True, norm="layernorm"),
        *[dict(position=p) for p in CHOICES["position"]],
    ],
    ids=str,
)
def test_the_diagram_counts_what_the_model_holds(changes):
    model = tiny(**changes)
    ax = plots.draw_model(model)
    assert ax.get_title("left").startswith(f"{model.num_parameters():,} numbers")
    shown = [text.get_text() for text in ax.texts]
    assert sum(math.prod(int(n.replace(",", "")) for n in text.split(" × ")) for text in shown
               if text and all(part.replace(",", "").isdigit() for part in text.split(" × "))) == model.num_parameters()
    assert shown.count("+") == 2 and "(batch, seq, 11) logits" in shown and f"blocks: {model.config.n_layers}" in shown


# --- the module

def test_importing_the_module_imports_no_matplotlib():
    code = "import sys, transformer_llm.plots; sys.exit(any(m in sys.modules for m in ('matplotlib', 'seaborn')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pictures_without_the_books_style():
    import matplotlib

    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"backend": "agg"}):
        plots.plot_next_token({"x": torch.randn(5)}, "abcde")
        plots.draw_model(GPTConfig())
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")
