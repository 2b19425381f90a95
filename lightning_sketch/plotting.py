"""Figures of predictions and of stability; needs matplotlib, which the extra ``examples`` installs."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.effect import Effect, Prediction
from lightning_sketch.prediction.queries import InfluentialSet, RankedUnits, Ranking
from lightning_sketch.prediction.stability import StabilityProfile
from lightning_sketch.unlearning.audit import AuditReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 6  # more are not told apart in grey


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


def plot_stability_profile(profile: StabilityProfile, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw ``log2 ||F_r||`` over the orders, with the spread of directions as a band, and the line of their growth.

    Args:
        profile: of an output. Orders that vanish are left out.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, ax = _axes(ax)
    orders = np.arange(1, profile.degree + 1)
    norms = _drawable(profile.log2_norms)
    marker = "o" if profile.degree <= 20 else ""
    ax.plot(orders, norms, color="0.1", marker=marker, markersize=4, label=r"$\log_2\,||F_r||$", zorder=3)
    band = f"spread of directions, ±{profile.spread:.1f} bits"
    ax.fill_between(orders, norms - profile.spread, norms + profile.spread, color="0.85", linewidth=0, label=band)
    if np.isfinite(profile.growth):
        fitted = np.nanmean(norms) + profile.growth * (orders - orders[np.isfinite(norms)].mean())
        slope = f"growth, {profile.growth:+.2f} bits per order"
        ax.plot(orders, fitted, color="0.4", linewidth=1, linestyle="--", label=slope)
    ax.set_xlabel("order $r$")
    ax.set_ylabel(r"$\log_2\,||F_r||$ (bits, $F_r$ in units of the output)")
    _whole_numbers(ax)
    _legend(ax)
    return figure, ax


def plot_sensitivity(
    steps: Sequence[int], profiles: Sequence[StabilityProfile], ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """Draw how ``log2 ||F_r||`` of every order goes during training, with the spread of directions as bands.

    Of more than :data:`MOST_LINES` orders as many are drawn, from the first to the last at equal distances.

    Args:
        steps: optimizer steps done when each profile was taken.
        profiles: as many, all of the same degree.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: no profile, not as many ``steps``, degrees that differ, or matplotlib is not installed.
    """
    if not len(profiles) or len(steps) != len(profiles):
        raise ConfigurationError(f"`steps` holds {len(steps)} values and `profiles` {len(profiles)}: give as many.")
    degrees = {profile.degree for profile in profiles}
    if len(degrees) > 1:
        raise ConfigurationError(f"`profiles` are of the degrees {sorted(degrees)}: give profiles of one degree.")
    figure, ax = _axes(ax)
    norms = _drawable(np.stack([profile.log2_norms for profile in profiles]))
    spread = np.array([profile.spread for profile in profiles])
    for i, r in enumerate(_some(range(1, max(degrees) + 1))):
        line = norms[:, r - 1]
        ax.plot(steps, line, label=f"order {r}", zorder=3, **_style(i))
        ax.fill_between(steps, line - spread, line + spread, color="0.5", alpha=0.15, linewidth=0)
    ax.set_xlabel("optimizer steps")
    ax.set_ylabel(r"$\log_2\,||F_r||$ (bits, $F_r$ in units of the output)")
    _whole_numbers(ax)
    _legend(ax, "bands: spread of directions")
    return figure, ax


def plot_deletion_ray(
    effect: Effect,
    units: Sequence[int],
    of: str | Tensor = "mean",
    *,
    degrees: Sequence[int] | None = None,
    estimator: str = "auto",
    fractions: ArrayLike | None = None,
    truth: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Draw the output predicted along the deletion ``s * 1_D``, one line for each degree, with 95 % intervals as bands.

    The edge of a band is dashed like its line. Bands that are far wider than the lines are cut off by the axes.

    Args:
        effect: predicts the output.
        units: ``D``.
        of: ``"mean"`` over all entries of the output, or weights ``(*out)`` of a sum over them.
        degrees: which are drawn; ``None`` takes all, of more than :data:`MOST_LINES` as many at equal distances.
        estimator: as in :meth:`Effect.delete`.
        fractions: values of ``s``, the share of the units' loss weight that is deleted; ``None`` is 0 to 1.
        truth: fractions and what retraining with them gave, in the units of the output.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: any argument that can not be right, or matplotlib is not installed.
    """
    s = np.linspace(0, 1, 51) if fractions is None else _flat(fractions)
    if truth is not None and _flat(truth[0]).shape != _flat(truth[1]).shape:
        sizes = [_flat(values).size for values in truth]
        raise ConfigurationError(f"`truth` holds {sizes[0]} fractions and {sizes[1]} values: give as many.")
    one = effect._of(of)
    indicator = np.zeros(effect.num_units)
    indicator[effect._check_units(units)] = 1
    figure, ax = _axes(ax)
    drawn = [] if truth is None else [_flat(truth[1])]
    for i, degree in enumerate(_some(range(1, effect.degree + 1)) if degrees is None else degrees):
        p = one.delete_many(np.outer(s, indicator), estimator=estimator, degree=degree)
        low, high = (_flat(bound) for bound in p.interval(0.95))
        style = {**_style(i), "marker": ""}
        drawn.append(_flat(p.value))
        ax.plot(s, drawn[-1], label=f"degree {degree}", zorder=3, **style)
        ax.fill_between(s, low, high, color="0.5", alpha=0.15, linewidth=0)
        ax.plot(s, np.stack([low, high], axis=1), **{**style, "linewidth": 0.5})
    if truth is not None:
        ax.plot(*map(_flat, truth), "o", color="0.0", markerfacecolor="1.0", markersize=5, label="retrained", zorder=4)
    bottom, top = min(map(np.min, drawn)), max(map(np.max, drawn))
    if top > bottom:
        ax.set_ylim(bottom - 0.3 * (top - bottom), top + 0.3 * (top - bottom))
    ax.set_xlabel("deleted share $s$ of the units' weight in the loss")
    ax.set_ylabel("predicted output (mean, in its units)" if isinstance(of, str) else "predicted weighted output")
    _legend(ax, "bands: 95 % intervals")
    return figure, ax


def plot_influential_units(found: Ranking | InfluentialSet, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw what deleting the most influential units changes, with 95 % intervals.

    Args:
        found: units one by one, from :meth:`Effect.rank`, of one output; or a growing set of units, from
            :meth:`Effect.most_influential`.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: a ranking of each entry of an output, or matplotlib is not installed.
    """
    parts = [found.raising, found.lowering] if isinstance(found, Ranking) else [found]
    if any(part.units.ndim > 1 for part in parts):
        raise ConfigurationError("`found` ranks for each entry of the output: draw a ranking of one, of='mean'.")
    figure, ax = _axes(ax)
    units, change, half = (np.concatenate(rows) for rows in zip(*map(_bars, parts), strict=True))
    place = np.arange(len(units))
    if isinstance(found, Ranking):
        place[len(parts[0].units) :] += 1  # a gap between both ends
    ax.barh(place, change, xerr=half, color="0.7", ecolor="0.1", capsize=2)
    ax.axvline(0, color="0.1", linewidth=0.8)
    more = "and " if isinstance(found, InfluentialSet) else ""
    ax.set_yticks(place, [f"{more if i else ''}{unit:.0f}" for i, unit in enumerate(units)])
    ax.invert_yaxis()
    ax.set_xlabel("predicted change of the output (in its units), 95 % interval")
    ax.set_ylabel("deleted unit" if isinstance(found, Ranking) else "deleted units, one more a row")
    return figure, ax


def plot_audit(report: AuditReport, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw the mean losses of an audit's models on the forget, retain and test sets, on a logarithmic axis.

    Args:
        report: of :func:`~lightning_sketch.unlearning.audit`.
        ax: axes to draw on; ``None`` makes a figure.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, ax = _axes(ax)
    sets = ("forget", "retain", "test")
    for series, (model, values) in enumerate(report.values.items()):
        losses = [values[f"{name}_loss"] for name in sets]
        ax.errorbar(
            np.arange(len(sets)) + 0.15 * (series - 1.5),
            [loss.value for loss in losses],
            yerr=[[loss.value - loss.low for loss in losses], [loss.high - loss.value for loss in losses]],
            fmt="osD^"[series],
            markersize=5,
            color=("0.6", "0.1", "0.3", "0.75")[series],
            ecolor="0.65",
            label={"reference": report.reference, "random": "random perturbation"}.get(model, model),
        )
    ax.set_yscale("log")
    ax.set_xticks(range(len(sets)), [f"{name} ({report.sizes[name]})" for name in sets])
    ax.set_ylabel("mean loss (nats)")
    ax.set_title(f"audit: {report.verdict}")
    ax.legend(frameon=False)
    return figure, ax


def _bars(part: RankedUnits | InfluentialSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return units, changes and half the widths of their 95 % intervals, as :meth:`Prediction.interval` has them."""
    half = norm.ppf(0.975) * np.hypot(_flat(part.stderr), _flat(part.truncation))
    return _flat(part.units), _flat(part.change), half


def _some(orders: range) -> list[int]:
    """Return at most :data:`MOST_LINES`, the first and the last among them."""
    places = np.linspace(0, len(orders) - 1, min(MOST_LINES, len(orders))).round()
    return [orders[int(place)] for place in places]


def _style(line: int) -> dict[str, Any]:
    """Return what tells lines apart without colour."""
    dashes = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
    greys = ["0.1", "0.45", "0.3", "0.0", "0.55", "0.2"]
    return {"linestyle": dashes[line % 6], "color": greys[line % 6], "marker": "osD^vx"[line % 6], "markersize": 4}


def _legend(ax: "Axes", title: str | None = None) -> None:
    ax.legend(title=title, facecolor="1.0", edgecolor="1.0", framealpha=0.85)  # legible on a band


def _drawable(logs: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(logs), logs, np.nan)


def _whole_numbers(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


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
