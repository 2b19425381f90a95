"""Figures: what is drawn, read back from the axes."""

import sys

import numpy as np
import pytest
import torch

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.plotting import (
    plot_deletion_ray,
    plot_influential_units,
    plot_predicted_against_retrained,
    plot_prediction,
    plot_sensitivity,
    plot_stability_profile,
)
from lightning_sketch.prediction import Effect, Prediction
from lightning_sketch.prediction.stability import StabilityProfile


@pytest.fixture(autouse=True)
def matplotlib_without_a_screen():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    yield
    pyplot.close("all")


@pytest.fixture
def prediction():
    change = torch.tensor([[0.3, -0.2], [0.1, 0.0]])
    return Prediction(
        baseline=torch.ones(2, 2),
        value=change + 1,
        change=change,
        stderr=torch.full((2, 2), 0.01),
        by_degree=torch.stack([change + 1, change + 1]),
        truncation=torch.tensor([[0.03, 0.0], [0.0, 0.0]]),
        reliable=torch.tensor(True),
        resummed=change + 1,
    )


def profile(*log2_norms, spread=0.5):
    norms = np.array(log2_norms, dtype=float)
    return StabilityProfile(norms, spread, norms, norms, 10)


@pytest.fixture
def effect():
    """``f(x) = (5, 7) + (2, 4) x_0 + (3, 1) x_1 + (0.2, 0) x_0^2 + (0, 0.4) x_1^2``, measured along both units."""
    coefficients = torch.tensor([[[2.0, 4.0], [3.0, 1.0]], [[0.2, 0.0], [0.0, 0.4]]], dtype=torch.complex128)
    return Effect(torch.tensor([5.0, 7.0], dtype=torch.float64), coefficients, np.eye(2), np.arange(2))


def band(collection):
    """Return a band's x, lower and upper edge."""
    (path,) = collection.get_paths()
    x = np.unique(path.vertices[:, 0])
    edges = [path.vertices[path.vertices[:, 0] == value, 1] for value in x]
    return x, [edge.min() for edge in edges], [edge.max() for edge in edges]


def bars(container):
    """Return the points' x and y, and the half heights of their bars."""
    line, _, (segments,) = container.lines
    half = [(segment[1, 1] - segment[0, 1]) / 2 for segment in segments.get_segments()]
    return line.get_xdata(), line.get_ydata(), half


def test_a_prediction_is_drawn_sorted_with_its_interval(prediction):
    """Oracle: the changes sorted by hand, and ``1.96 sqrt(stderr^2 + truncation^2)``."""
    figure, ax = plot_prediction(prediction)
    x, y, half = bars(ax.containers[0])
    np.testing.assert_allclose(y, [-0.2, 0.0, 0.1, 0.3], atol=1e-6)
    np.testing.assert_allclose(half, [0.0196, 0.0196, 0.0196, 0.0620], atol=1e-4)
    assert list(x) == [1, 2, 3, 4]
    assert ax.figure is figure
    assert "change" in ax.get_ylabel()
    assert "sorted" in ax.get_xlabel()


def test_a_prediction_draws_on_given_axes(prediction):
    """Oracle: the axes given."""
    figure, axes = sys.modules["matplotlib.pyplot"].subplots(1, 2)
    drawn, ax = prediction.plot(axes[1])
    assert drawn is figure
    assert ax is axes[1]
    assert len(ax.containers) == 1
    assert not axes[0].containers


def test_predicted_is_drawn_against_retrained_with_the_line_of_equality():
    """Oracle: the numbers given; the line through the origin with slope 1; a second series has another marker."""
    predicted, retrained = torch.tensor([[0.1, 0.2]], requires_grad=True), np.array([0.15, 0.18])
    figure, ax = plot_predicted_against_retrained(predicted, retrained, stderr=[0.01, 0.02], label="pairs")
    x, y, half = bars(ax.containers[0])
    np.testing.assert_allclose(x, [0.15, 0.18])
    np.testing.assert_allclose(y, [0.1, 0.2], atol=1e-7)
    np.testing.assert_allclose(half, [0.01, 0.02])
    again, same = plot_predicted_against_retrained([0.0], [0.1], ax=ax, label="singles")
    assert again is figure
    assert same is ax
    lines = [line for line in ax.lines if getattr(line, "get_slope", None) and line.get_slope() == 1]
    assert len(lines) == 1
    assert lines[0].get_xy1() == (0, 0)
    assert ax.get_xlabel() == "change after retraining"
    assert ax.get_ylabel() == "predicted change"
    first, second = (container.lines[0] for container in ax.containers)
    assert first.get_marker() != second.get_marker()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["predicted = retrained", "pairs", "singles"]


def test_a_stability_profile_is_drawn_over_its_orders():
    """Oracle: the numbers given, and the straight line through them; an order that vanishes is left out."""
    figure, ax = profile(-1.0, -3.0, -np.inf, -7.0).plot()
    norms, growth = ax.lines
    np.testing.assert_array_equal(norms.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(norms.get_ydata(), [-1, -3, np.nan, -7])
    np.testing.assert_allclose(growth.get_ydata(), [-1, -3, -5, -7])
    assert "-2.00 bits per order" in growth.get_label()
    assert ax.figure is figure
    assert "order" in ax.get_xlabel()
    assert "bits" in ax.get_ylabel()
    _, ax = plot_stability_profile(profile(-1.0, -3.0, -5.0, spread=0.5))
    x, low, high = band(ax.collections[0])
    np.testing.assert_array_equal(x, [1, 2, 3])
    np.testing.assert_allclose(low, [-1.5, -3.5, -5.5])
    np.testing.assert_allclose(high, [-0.5, -2.5, -4.5])
    assert "0.5 bits" in ax.collections[0].get_label()
    _, ax = plot_stability_profile(profile(-1.0))  # one order has no growth
    assert len(ax.lines) == 1


def test_sensitivity_is_drawn_over_steps_one_line_for_each_order():
    """Oracle: the numbers given."""
    figure, ax = plot_sensitivity([10, 20, 40], [profile(0, -1), profile(1, -2), profile(2, -3, spread=1.0)])
    first, second = ax.lines
    np.testing.assert_array_equal(first.get_xdata(), [10, 20, 40])
    np.testing.assert_array_equal(first.get_ydata(), [0, 1, 2])
    np.testing.assert_array_equal(second.get_ydata(), [-1, -2, -3])
    assert first.get_linestyle() != second.get_linestyle()
    _, low, high = band(ax.collections[1])
    np.testing.assert_array_equal(low, [-1.5, -2.5, -4])
    np.testing.assert_array_equal(high, [-0.5, -1.5, -2])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["order 1", "order 2"]
    assert ax.figure is figure
    assert ax.get_xlabel() == "optimizer steps"
    assert "bits" in ax.get_ylabel()


def test_of_many_orders_six_are_drawn():
    """Oracle: the first and the last of 100 orders, and equal distances between."""
    _, ax = plot_sensitivity([1, 2], [profile(*range(100)), profile(*range(100))])
    drawn = [int(line.get_label().removeprefix("order ")) for line in ax.lines]
    assert drawn[0] == 1
    assert drawn[-1] == 100
    assert len(drawn) == 6
    assert set(np.diff(drawn)) <= {19, 20, 21}
    for line, order in zip(ax.lines, drawn, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), [order - 1, order - 1])


def test_a_deletion_ray_is_drawn_with_a_line_and_a_band_for_each_degree(effect):
    """Oracle: the polynomial of the mean output, ``6 + 3 s + 0.1 s^2`` for unit 0, and ``Effect.delete``."""
    truth = ([0.0, 1.0], [6.0, 9.2])
    figure, ax = effect.plot_ray([0], fractions=[0.0, 0.5, 1.0, 1.5], truth=truth)
    s = np.array([0.0, 0.5, 1.0, 1.5])
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["degree 1", "degree 2", "retrained"]
    np.testing.assert_allclose(lines["degree 1"].get_ydata(), 6 + 3 * s)
    np.testing.assert_allclose(lines["degree 2"].get_ydata(), 6 + 3 * s + 0.1 * s**2)
    np.testing.assert_array_equal(lines["degree 2"].get_xdata(), s)
    np.testing.assert_array_equal(lines["retrained"].get_xydata(), np.transpose(truth))
    mean = effect.reduce(torch.full((2,), 0.5, dtype=torch.float64))
    assert len(ax.collections) == 2
    for degree, collection in enumerate(ax.collections, start=1):
        expected = [mean.delete(weights=[x, 0.0], degree=degree).interval(0.95) for x in s]
        _, low, high = band(collection)
        np.testing.assert_allclose(low, [float(low) for low, _ in expected])
        np.testing.assert_allclose(high, [float(high) for _, high in expected])
    assert ax.figure is figure
    assert "share" in ax.get_xlabel()
    assert "output" in ax.get_ylabel()


def test_a_deletion_ray_of_chosen_outputs_and_degrees_draws_on_given_axes(effect):
    """Oracle: the polynomial of the first output, ``5 + 5 s + 0.2 s^2`` for both units."""
    figure, axes = sys.modules["matplotlib.pyplot"].subplots(1, 2)
    drawn, ax = effect.plot_ray([0, 1], torch.tensor([1.0, 0.0]), axes[1], degrees=[2])
    assert drawn is figure
    assert ax is axes[1]
    (line,) = [line for line in ax.lines if line.get_label() == "degree 2"]
    s = np.linspace(0, 1, 51)
    np.testing.assert_allclose(line.get_ydata(), 5 + 5 * s + 0.2 * s**2)
    assert not axes[0].lines


def test_influential_units_are_drawn_as_bars(effect):
    """Oracle: what deleting each unit changes, ``Effect.delete``, whose intervals the whiskers must be."""
    figure, ax = effect.rank(2).plot()
    mean = effect.reduce(torch.full((2,), 0.5, dtype=torch.float64))
    container = next(c for c in ax.containers if hasattr(c, "patches"))
    drawn = dict(zip([int(t.get_text()) for t in ax.get_yticklabels()][:2], container.patches[:2], strict=True))
    assert list(drawn) == [0, 1]  # unit 0 raises the mean by 3.1, unit 1 by 2.2
    whiskers = container.errorbar.lines[2][0].get_segments()
    for unit, bar, whisker in zip(drawn, drawn.values(), whiskers, strict=False):
        p = mean.delete(units=[unit])
        np.testing.assert_allclose(bar.get_width(), float(p.change))
        low, high = (float(bound - p.baseline) for bound in p.interval(0.95))
        np.testing.assert_allclose(np.sort(whisker[:, 0]), [low, high])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "1", "0"]
    assert len({bar.get_y() for bar in container.patches}) == 4
    assert ax.figure is figure
    assert "change" in ax.get_xlabel()
    assert "unit" in ax.get_ylabel()


def test_an_influential_set_is_drawn_as_it_grows(effect):
    """Oracle: what deleting unit 0, and both, changes, ``Effect.delete``."""
    mean = effect.reduce(torch.full((2,), 0.5, dtype=torch.float64))
    expected = [float(mean.delete(units=units).change) for units in ([0], [0, 1])]
    figure, axes = sys.modules["matplotlib.pyplot"].subplots()
    drawn, ax = effect.most_influential(2).plot(axes)
    assert drawn is figure
    container = next(c for c in ax.containers if hasattr(c, "patches"))
    np.testing.assert_allclose([bar.get_width() for bar in container.patches], expected)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "and 1"]


def test_the_figure_is_grey_and_can_be_written(tmp_path, prediction, effect):
    """Oracle: the pixels of the PNG, whose three channels must be equal."""
    pyplot = sys.modules["matplotlib.pyplot"]
    for name, (figure, _) in {
        "prediction.png": plot_prediction(prediction),
        "against.png": plot_predicted_against_retrained([0.1, 0.2], [0.1, 0.3], [0.1, 0.1], label="pairs"),
        "profile.png": profile(-1, -3, -4).plot(),
        "sensitivity.png": plot_sensitivity([1, 2], [profile(-1, -3), profile(0, -3)]),
        "ray.png": effect.plot_ray([0], truth=([1.0], [9.0])),
        "units.png": effect.rank(2).plot(),
    }.items():
        figure.savefig(tmp_path / name)
        pixels = pyplot.imread(tmp_path / name)[..., :3]
        np.testing.assert_allclose(pixels.max(axis=-1), pixels.min(axis=-1), atol=0.01)
        assert pixels.min() < 0.3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(([1, 2], [1]), "`retrained` holds 1 values"), (([1, 2], [1, 2], [1]), "`stderr` holds 1 values")],
)
def test_series_of_different_lengths_are_refused(arguments, named):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=named):
        plot_predicted_against_retrained(*arguments)


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda effect: plot_sensitivity([1], []), "`steps` holds 1 values and `profiles` 0"),
        (lambda effect: plot_sensitivity([], []), "`steps` holds 0 values and `profiles` 0"),
        (
            lambda effect: plot_sensitivity([1, 2], [profile(1), profile(1, 2)]),
            r"`profiles` are of the degrees \[1, 2\]",
        ),
        (lambda effect: effect.plot_ray([0], truth=([0, 1], [5])), "`truth` holds 2 fractions and 1 values"),
        (lambda effect: effect.plot_ray([2]), r"`units` holds \[2\]"),
        (lambda effect: effect.plot_ray([0], "median"), "`of` is 'median'"),
        (lambda effect: effect.plot_ray([0], degrees=[3]), "`degree` is 3"),
        (lambda effect: effect.rank(1, "each").plot(), "`found` ranks for each entry"),
    ],
)
def test_what_cannot_be_drawn_is_refused(effect, draw, named):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=named):
        draw(effect)


@pytest.mark.parametrize(
    "draw",
    [
        lambda prediction, effect: plot_prediction(prediction),
        lambda prediction, effect: plot_stability_profile(profile(1, 2)),
        lambda prediction, effect: plot_sensitivity([1], [profile(1, 2)]),
        lambda prediction, effect: plot_deletion_ray(effect, [0]),
        lambda prediction, effect: plot_influential_units(effect.rank(1)),
    ],
)
def test_a_missing_matplotlib_names_the_extra(monkeypatch, prediction, effect, draw):
    """Oracle: the sentence itself, with the import made to fail."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ConfigurationError, match=r"needs matplotlib.*lightning_sketch\[examples\]"):
        draw(prediction, effect)
