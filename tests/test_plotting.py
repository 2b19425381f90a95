"""Figures: what is drawn, read back from the axes."""

import sys

import numpy as np
import pytest
import torch

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.plotting import plot_predicted_against_retrained, plot_prediction
from lightning_sketch.prediction import Prediction


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


def test_the_figure_is_grey_and_can_be_written(tmp_path, prediction):
    """Oracle: the pixels of the PNG, whose three channels must be equal."""
    pyplot = sys.modules["matplotlib.pyplot"]
    for name, (figure, _) in {
        "prediction.png": plot_prediction(prediction),
        "against.png": plot_predicted_against_retrained([0.1, 0.2], [0.1, 0.3], [0.1, 0.1], label="pairs"),
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


def test_a_missing_matplotlib_names_the_extra(monkeypatch, prediction):
    """Oracle: the sentence itself, with the import made to fail."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ConfigurationError, match=r"needs matplotlib.*lightning_sketch\[examples\]"):
        plot_prediction(prediction)
