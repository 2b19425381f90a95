"""Figures of predictions; needs matplotlib, which the extra ``examples`` installs."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.effect import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_prediction(prediction: Prediction, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw the predicted changes of all outputs, sorted, with their 95 % intervals (:meth:`Prediction.interval`).

    Args:
        prediction: of any shape; its outputs are flattened.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, ax = _axes(ax)
    low, high = prediction.interval(0.95)
    change, half = _flat(prediction.change), _flat(high - low) / 2
    order = np.argsort(change)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.errorbar(
        np.arange(1, len(order) + 1),
        change[order],
        yerr=half[order],
        fmt="o",
        markersize=3,
        color="0.1",
        ecolor="0.65",
        label="predicted change, 95 % interval",
    )
    ax.set_xlabel("output, sorted by predicted change")
    ax.set_ylabel("predicted change of the output")
    ax.legend(frameon=False)
    return figure, ax


def plot_predicted_against_retrained(
    predicted: ArrayLike | Tensor,
    retrained: ArrayLike | Tensor,
    stderr: ArrayLike | Tensor | None = None,
    ax: "Axes | None" = None,
    label: str | None = None,
) -> "tuple[Figure, Axes]":
    """Draw predicted against really retrained changes, with the line where they are equal.

    Drawing several series on the same ``ax`` gives each its own marker, so that they are told apart without colour.

    Args:
        predicted: predicted changes of any shape.
        retrained: changes after retraining, of the same shape.
        stderr: standard errors of ``predicted``, of the same shape; drawn as bars of one standard error.
        ax: axes to draw on; ``None`` makes a figure.
        label: name of the series in the legend.

    Raises:
        ConfigurationError: shapes differ, or matplotlib is not installed.
    """
    across, up = _flat(retrained), _flat(predicted)
    if across.shape != up.shape:
        raise ConfigurationError(f"`retrained` holds {across.size} values and `predicted` {up.size}: give as many.")
    bars = None if stderr is None else _flat(stderr)
    if bars is not None and bars.shape != up.shape:
        raise ConfigurationError(f"`stderr` holds {bars.size} values and `predicted` {up.size}: give as many.")
    figure, ax = _axes(ax)
    series = len(ax.containers)
    if not series:
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle="--", label="predicted = retrained")
    ax.errorbar(
        across,
        up,
        yerr=bars,
        fmt="osD^v"[series % 5],
        markersize=4,
        color=("0.1", "0.45", "0.3")[series % 3],
        ecolor="0.65",
        label=label,
        zorder=10 - series,  # the first series on top
    )
    ax.set_xlabel("change after retraining")
    ax.set_ylabel("predicted change")
    ax.legend(frameon=False)
    return figure, ax


def _flat(values: Any) -> np.ndarray:
    array = (
        values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    )
    return array.reshape(-1)


def _axes(ax: "Axes | None") -> "tuple[Figure, Axes]":
    if ax is None:
        figure, new = _pyplot().subplots(figsize=(5.0, 4.5), layout="constrained")
        return figure, new
    return ax.figure, ax  # type: ignore[return-value]


def _pyplot() -> ModuleType:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigurationError(
            "plotting needs matplotlib, which is not installed: run `pip install 'lightning_sketch[examples]'`."
        ) from error
    return plt
