"""Questions about many deletions at once: which units matter, how they interact, which sets move an output most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_sketch.prediction.effect import Effect


@dataclass(frozen=True, eq=False, repr=False)
class RankedUnits:
    """Units in the order of what deleting each alone changes, the largest change first.

    Shape:
        ``*of`` is empty, or the output's shape where every entry has a ranking of its own.

    Args:
        units: ``(k, *of)`` int64.
        change: ``(k, *of)``, predicted change of the output.
        stderr: ``(k, *of)``, its standard error.
        truncation: ``(k, *of)``, size of its last Taylor term.
    """

    units: Tensor
    change: Tensor
    stderr: Tensor
    truncation: Tensor

    def __repr__(self) -> str:
        if self.units.ndim > 1:
            return f"RankedUnits(k={len(self.units)}, rankings={tuple(self.units.shape[1:])})"
        return _table(["unit"], self)


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """Both ends of a ranking.

    Args:
        raising: units whose deletion raises the output most, the largest change first.
        lowering: units whose deletion lowers it most, the most negative change first.
    """

    raising: RankedUnits
    lowering: RankedUnits

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the change of every unit's deletion, with 95 % intervals; returns figure and axes."""
        from lightning_sketch.plotting import plot_influential_units

        return plot_influential_units(self, ax)

    def __repr__(self) -> str:
        return (
            f"deletions that raise the output most\n{self.raising!r}\ndeletions that lower it most\n{self.lowering!r}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class InfluentialSet:
    """Units in the order in which a greedy search deleted them; the first ``i + 1`` together give row ``i``.

    Args:
        units: ``(m,)`` int64.
        change: ``(m,)``, predicted change of the output.
        stderr: ``(m,)``, its standard error.
        truncation: ``(m,)``, size of its last Taylor term.
    """

    units: Tensor
    change: Tensor
    stderr: Tensor
    truncation: Tensor

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the change as one unit more and more is deleted, with 95 % intervals; returns figure and axes."""
        from lightning_sketch.plotting import plot_influential_units

        return plot_influential_units(self, ax)

    def __repr__(self) -> str:
        return _table(["and unit"], self)


@dataclass(frozen=True, eq=False, repr=False)
class Interaction:
    """``f(u,v) - f(u) - f(v) + f(0)`` of one pair of units, ``(*out)``, or of ``m`` pairs, ``(m, *out)``.

    Args:
        value: the predicted interaction; negative where the pair has less effect than the sum of its parts.
        stderr: at most the standard error of ``value``, the sum of those of the three deletions: how their errors are
            correlated is not used. It is tight where single units were measured, by the design ``basis``.
        truncation: size of the last Taylor term of ``value``.
    """

    value: Tensor
    stderr: Tensor
    truncation: Tensor

    def __repr__(self) -> str:
        value, stderr, truncation = (float(t.double().mean()) for t in (self.value, self.stderr, self.truncation))
        mean = "mean " if self.value.numel() > 1 else ""
        return (
            f"Interaction(shape={tuple(self.value.shape)}, {mean}value={value:.4g} +- {stderr:.2g}, "
            f"truncation={truncation:.2g})"
        )


def rank(effect: Effect, k: int, estimator: str, degree: int | None) -> Ranking:
    """See :meth:`Effect.rank`; every entry of the effect's output has a ranking of its own."""
    k = _count(k, "k", effect.num_units)
    alone = effect.leave_one_out(estimator=estimator, degree=degree)
    order = alone.change.argsort(dim=0, stable=True)

    def rows(units: Tensor) -> RankedUnits:
        fields = (alone.change, alone.stderr, alone.truncation)
        return RankedUnits(units.cpu(), *(field.gather(0, units) for field in fields))

    return Ranking(rows(order.flip(0)[:k]), rows(order[:k]))


def interaction(effect: Effect, u: Any, v: Any, estimator: str, degree: int | None) -> Interaction:
    """See :meth:`Effect.interaction`."""
    highest = effect.degree if degree is None else degree
    if isinstance(highest, Integral) and highest == 1:
        raise ConfigurationError(
            "`degree` is 1, to which units do not interact: use a sketch and a `degree` of 2 or more."
        )
    first, second = np.asarray(u), np.asarray(v)
    if first.shape != second.shape or first.ndim > 1 or {first.dtype.kind, second.dtype.kind} - {"i", "u"}:
        raise ConfigurationError(f"`u` and `v` are {u!r} and {v!r}: give two units, or two sequences of as many units.")
    pairs = np.stack([first, second], axis=-1).reshape(-1, 2).tolist()
    same = next((a for a, b in pairs if a == b), None)
    if same is not None:
        raise ConfigurationError(f"`u` and `v` pair unit {same} with itself: give two different units.")
    sets = [*pairs, *([a] for a, _ in pairs), *([b] for _, b in pairs)]
    p = effect.delete_many(sets, estimator=estimator, degree=degree)
    both, alone_u, alone_v = p.change.reshape(3, len(pairs), *effect.baseline.shape)
    value = both - alone_u - alone_v
    last = (p.by_degree[-1] - p.by_degree[-2]).reshape(3, *value.shape)
    stderr = p.stderr.reshape(3, *value.shape).sum(dim=0)
    result = (value, stderr, (last[0] - last[1] - last[2]).abs())
    return Interaction(*(t[0] for t in result)) if first.ndim == 0 else Interaction(*result)


def most_influential(effect: Effect, m: int, toward: str, estimator: str, degree: int | None) -> InfluentialSet:
    """See :meth:`Effect.most_influential`; the output is one number."""
    m = _count(m, "m", effect.num_units)
    if toward not in ("up", "down"):
        raise ConfigurationError(f"`toward` is {toward!r}: give 'up' or 'down'.")
    sign = 1 if toward == "up" else -1
    chosen: list[int] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    deleted = np.zeros(effect.num_units)
    for _ in range(m):
        left = np.flatnonzero(deleted == 0)
        x = np.tile(deleted, (len(left), 1))
        x[np.arange(len(left)), left] = 1
        p = effect.delete_many(x, estimator=estimator, degree=degree)
        best = int((sign * p.change).argmax())
        chosen.append(int(left[best]))
        rows.append((p.change[best], p.stderr[best], p.truncation[best]))
        deleted[chosen[-1]] = 1
    return InfluentialSet(torch.tensor(chosen), *(torch.stack(column) for column in zip(*rows, strict=True)))


def _count(given: Any, name: str, most: int) -> int:
    if isinstance(given, bool) or not isinstance(given, Integral) or not 1 <= int(given) <= most:
        raise ConfigurationError(f"`{name}` is {given!r}: give an integer from 1 to {most}, the number of units.")
    return int(given)


def _table(heading: Sequence[str], found: RankedUnits | InfluentialSet) -> str:
    columns = (found.units, found.change, found.stderr, found.truncation)
    cells = [
        [str(int(unit)), f"{float(change):+.4g}", f"{float(stderr):.2g}", f"{float(truncation):.2g}"]
        for unit, change, stderr, truncation in zip(*columns, strict=True)
    ]
    return table([[*heading, "change", "stderr", "truncation"], *cells])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of as many cells each as text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
