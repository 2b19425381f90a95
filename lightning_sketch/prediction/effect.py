"""What a sketch says of one output: predictions of any deletion, with their errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import norm
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction import queries
from lightning_sketch.prediction.estimators import FAILURE_PROBABILITY, Estimator, make_estimator
from lightning_sketch.prediction.estimators.margins import Margins
from lightning_sketch.prediction.influence import Influence
from lightning_sketch.prediction.tail import resum, tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Share of the second order's prior variance that must be measured: below it the prior alone makes the standard error.
LEAST_MEASURED = 0.25


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The predicted output after a deletion, and how far to trust it.

    ``value = baseline + change`` and ``by_degree[-1] = value``, all in the dtype, device and units of the output.

    Shape:
        ``*out`` is the output's shape. From :meth:`Effect.delete_many` every field but ``baseline`` has the deletions,
        ``m``, before ``*out``.

    Args:
        baseline: ``(*out)``, the output of the run as it was.
        value: ``(*out)``, the output predicted had the deleted units not been trained on.
        change: ``(*out)``, ``value - baseline``.
        stderr: ``(*out)``, standard error of ``change`` that comes from having sketched finitely many directions.
        by_degree: ``(degree, *out)``, the value predicted by the series up to each degree ``1..degree``.
        truncation: ``(*out)``, standard deviation of what the orders left out may hold
            (:func:`~lightning_sketch.prediction.tail.tail`).
        reliable: bool, ``()`` or ``(m,)``: one answer for all outputs of a deletion. False if the prediction's error
            may be as large as what the orders above the first change: the deletion is too large for the series, or the
            directions are too few; or if the directions hardly measure the second order of this deletion. Retrain then.
            A prediction of degree 1 can not know, and is never reliable.
        resummed: ``(*out)``, ``value`` plus an estimate of the orders left out where the terms allow one, else
            ``value``: of losses predicted through their margins what the margins say, of other outputs the next order
            (:func:`~lightning_sketch.prediction.tail.resum`). Closer to the truth for slowly converging series;
            ``value`` is the plain sum, exact for a polynomial of the sketch's degree.
    """

    baseline: Tensor
    value: Tensor
    change: Tensor
    stderr: Tensor
    by_degree: Tensor
    truncation: Tensor
    reliable: Tensor
    resummed: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return ``value -/+ z sqrt(stderr^2 + truncation^2)``, ``z`` being the two-sided normal quantile of ``level``.

        Where a diverging series leaves no finite value the interval is the whole line.

        Raises:
            ConfigurationError: ``level`` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ConfigurationError(f"`level` is {level}: give a probability between 0 and 1.")
        half = float(norm.ppf((1 + level) / 2)) * torch.hypot(self.stderr, self.truncation)
        unknown = ~(self.value.isfinite() & half.isfinite())
        lower, upper = self.value - half, self.value + half
        return lower.masked_fill(unknown, -torch.inf), upper.masked_fill(unknown, torch.inf)

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the sorted predicted changes with their 95 % intervals; returns figure and axes."""
        from lightning_sketch.plotting import plot_prediction  # drawing is optional, so its room loads on demand

        return plot_prediction(self, ax)

    def __repr__(self) -> str:
        if not self.change.numel():
            return f"Prediction(shape={tuple(self.change.shape)})"
        change, stderr, truncation = (float(t.double().mean()) for t in (self.change, self.stderr, self.truncation))
        mean = "mean " if self.change.numel() > 1 else ""
        doubtful, count = int((~self.reliable).sum()), self.reliable.numel()
        which = f"{doubtful} of {count} " if count > 1 else ""
        remedy = "better retrain" if len(self.by_degree) > 1 else "use degree 2 or more, or retrain"
        doubt = f"; {which}unreliable, {remedy}" if doubtful else ""
        return (
            f"Prediction(shape={tuple(self.change.shape)}, {mean}change={change:.4g} +- {stderr:.2g}, "
            f"truncation={truncation:.2g}{doubt})"
        )


class Effect:
    """Predicts an output of the trained model under any deletion: ``f(x) = f(0) + sum_r <F_r, x^(x r)>``.

    ``x_u = 1`` deletes unit ``u``, 0 keeps it, a fraction downweights it and a negative number upweights it.

    Args:
        baseline: ``(*out)`` floating point, the output of the run as it was.
        coefficients: ``(R, K, *out)`` complex, coefficients of orders ``1..R`` along each direction; the imaginary part
            is zero for real directions. Those of a :class:`DeletionPredictor` are complex128, whatever the model's
            dtype.
        directions: ``(K, n)`` complex128.
        units: ``(num_examples,)`` integers, the unit of each training example, -1 for none.
        features: ``(n, q)`` float64, whose inner products are a prior covariance of the units that the kernel estimator
            may use (:meth:`~lightning_sketch.features.UnitFeatures.flattened`); or None.
        influence: of the units on the entries of the output, from which it may take a prior mean; or None.
        losses: whether the output holds losses, which the kernel estimator then may take for functions of margins
            (:class:`~lightning_sketch.prediction.estimators.margins.MarginEstimator`).

    Raises:
        ConfigurationError: shapes that do not fit each other, or numbers that are not finite.

    Example:
        >>> coefficients = torch.tensor([[2.0, 3.0], [0.2, 0.0]], dtype=torch.complex128)  # orders 1, 2 along e_0, e_1
        >>> effect = Effect(torch.tensor(5.0), coefficients, np.eye(2), np.arange(2))
        >>> effect.delete(units=[0])
        Prediction(shape=(), change=2.2 +- 0, truncation=0.02)
    """

    def __init__(
        self,
        baseline: Tensor,
        coefficients: Tensor,
        directions: np.ndarray,
        units: np.ndarray,
        features: np.ndarray | None = None,
        influence: Influence | None = None,
        losses: bool = False,
    ) -> None:
        directions = np.asarray(directions, dtype=np.complex128)
        shape = tuple(baseline.shape)
        if not baseline.is_floating_point():
            raise ConfigurationError(f"`baseline` is {baseline.dtype}: give an output of floating-point numbers.")
        if directions.ndim != 2:
            raise ConfigurationError(f"`directions` has shape {directions.shape}: give (K, n).")
        if coefficients.ndim < 2 or not len(coefficients) or tuple(coefficients.shape[1:]) != (len(directions), *shape):
            raise ConfigurationError(
                f"`coefficients` has shape {tuple(coefficients.shape)}: give (R, K, *out) with K = {len(directions)} "
                f"directions and the output's shape {shape}."
            )
        if not (
            torch.isfinite(baseline).all() and torch.isfinite(coefficients).all() and np.isfinite(directions).all()
        ):
            raise ConfigurationError(
                "`baseline`, `coefficients` or `directions` holds NaN or infinity: the run diverged along a direction, "
                "so sketch again at a lower degree, in float64 or with a larger optimizer eps."
            )
        units = np.asarray(units)
        if units.ndim != 1 or units.dtype.kind not in "iu" or units.max(initial=-1) >= directions.shape[1]:
            raise ConfigurationError(
                f"`units` must give each example an integer below {directions.shape[1]}, the columns of `directions`."
            )
        if features is not None and (features.ndim != 2 or len(features) != directions.shape[1]):
            raise ConfigurationError(f"`features` has shape {features.shape}: give ({directions.shape[1]}, q).")
        self.baseline = baseline.detach()
        self.coefficients = coefficients.detach()
        self._directions = directions
        self._units = units
        self._features = features
        self._influence = influence
        self._margins = Margins.of(baseline) if losses else None
        self._examples_per_unit = np.bincount(units[units >= 0], minlength=self.num_units)
        self._baseline = self.baseline.cpu().double().numpy().reshape(-1)
        self._flat = self.coefficients.cpu().to(torch.complex128).numpy().reshape(self.degree, len(directions), -1)
        self._estimators: dict[tuple[str, float], Estimator] = {}

    @property
    def degree(self) -> int:
        """``R``, the highest order available."""
        return len(self.coefficients)

    @property
    def num_units(self) -> int:
        """``n``."""
        return int(self._directions.shape[1])

    def delete(
        self,
        units: Sequence[int] | np.ndarray | None = None,
        *,
        examples: Sequence[int] | np.ndarray | None = None,
        weights: ArrayLike | None = None,
        estimator: str = "auto",
        degree: int | None = None,
        failure_probability: float = FAILURE_PROBABILITY,
    ) -> Prediction:
        """Predict one deletion, given in exactly one of three ways.

        Args:
            units: units to delete.
            examples: rows of the training dataset to delete; they must make up whole units.
            weights: ``(n,)``, the deletion weight ``x`` of every unit.
            estimator: ``auto``, ``kernel``, ``mean`` or ``median_of_means``.
            degree: highest order used, ``1..R``; ``None`` is ``R``.
            failure_probability: ``delta`` of ``median_of_means``, which decides its number of groups.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        given = [value is not None for value in (units, examples, weights)]
        if sum(given) != 1:
            raise ConfigurationError(
                f"give exactly one of `units`, `examples` and `weights`, not {sum(given)} of them."
            )
        if weights is not None:
            x = self._check_weights(weights, (self.num_units,))[None]
        else:
            x = np.zeros((1, self.num_units))
            x[0, self._check_units(units) if units is not None else self._units_of(examples)] = 1
        return self._predict(x, tuple(self.baseline.shape), estimator, degree, failure_probability)

    def delete_many(
        self,
        sets: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
        *,
        examples: Sequence[Sequence[int]] | None = None,
        estimator: str = "auto",
        degree: int | None = None,
        failure_probability: float = FAILURE_PROBABILITY,
    ) -> Prediction:
        """Predict ``m`` deletions in one contraction, given in one of two ways.

        Args:
            sets: a list of lists of units; or an array of deletion weights ``x``, ``(m, n)``.
            examples: a list of lists of rows of the training dataset; each must make up whole units.
            estimator: as in :meth:`delete`.
            degree: as in :meth:`delete`.
            failure_probability: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        if (sets is None) is (examples is None):
            raise ConfigurationError("give exactly one of `sets` and `examples`.")
        if isinstance(sets, np.ndarray | Tensor):
            x = self._check_weights(sets, (len(sets) if sets.ndim else 0, self.num_units))
        else:
            if sets is not None:
                rows = [self._check_units(units) for units in sets]
            else:
                rows = [self._units_of(rows_of_data) for rows_of_data in examples or []]
            x = np.zeros((len(rows), self.num_units))
            for row, units in zip(x, rows, strict=True):
                row[units] = 1
        return self._predict(x, (len(x), *self.baseline.shape), estimator, degree, failure_probability)

    def leave_one_out(self, *, estimator: str = "auto", degree: int | None = None) -> Prediction:
        """Predict the deletion of each unit alone, in one contraction: row ``u`` of ``(n, *out)`` deletes unit ``u``.

        Args:
            estimator: as in :meth:`delete`.
            degree: as in :meth:`delete`.
        """
        return self.delete_many(np.eye(self.num_units), estimator=estimator, degree=degree)

    def reduce(self, weights: Tensor | None = None) -> "Effect":
        """Return the effect on one number, ``sum(weights * output)``, with the standard errors of that number.

        The errors of the entries of an output are correlated, so its standard error does not follow from theirs. An
        estimator chooses its prior for that number, so where directions do not tell all, its prediction may differ a
        little from the weighted sum of the predictions.

        Args:
            weights: ``(*out)``; ``None`` is the mean.

        Raises:
            ConfigurationError: weights of another shape, or that are not finite.
        """
        if weights is None:
            weights = torch.full_like(self.baseline, 1 / max(1, self.baseline.numel()))
        if not isinstance(weights, Tensor) or weights.shape != self.baseline.shape:
            given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ConfigurationError(
                f"`weights` is {given}: give a tensor of the output's shape {tuple(self.baseline.shape)}."
            )
        flat = weights.detach().cpu().double().numpy().reshape(-1)
        if not np.isfinite(flat).all():
            raise ConfigurationError("`weights` holds NaN or infinity: give finite numbers.")
        baseline = torch.tensor(flat @ self._baseline).to(self.baseline)
        influence = None
        if self._influence is not None:
            influence = self._influence.of(flat[None] @ self._influence.gradients)
        coefficients = torch.from_numpy(self._flat @ flat)
        return Effect(baseline, coefficients, self._directions, self._units, self._features, influence)

    def rank(
        self, k: int = 10, of: str | Tensor = "mean", *, estimator: str = "auto", degree: int | None = None
    ) -> "queries.Ranking":
        """Find the units whose deletion alone raises or lowers an output most.

        Of a loss, those that raise it are the most helpful units and those that lower it the most harmful; of a margin
        or an accuracy it is the other way round.

        Args:
            k: how many units of either kind, at most ``n``.
            of: ``"mean"`` over all entries of the output; weights ``(*out)`` of a sum over them; or ``"each"`` for a
                ranking of its own for every entry.
            estimator: as in :meth:`delete`.
            degree: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        effect = self if isinstance(of, str) and of == "each" else self._of(of)
        return queries.rank(effect, k, estimator, degree)

    def interaction(
        self,
        u: int | Sequence[int],
        v: int | Sequence[int],
        *,
        estimator: str = "auto",
        degree: int | None = None,
    ) -> "queries.Interaction":
        """Predict how far deleting two units differs from the sum of deleting each: ``f(u,v) - f(u) - f(v) + f(0)``.

        Args:
            u: a unit, or ``m`` of them.
            v: another unit, or ``m`` of them: pairs are ``(u[i], v[i])``.
            estimator: as in :meth:`delete`.
            degree: as in :meth:`delete`, at least 2: the first order knows no interaction.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        return queries.interaction(self, u, v, estimator, degree)

    def most_influential(
        self,
        m: int,
        of: str | Tensor = "mean",
        *,
        toward: str = "up",
        estimator: str = "auto",
        degree: int | None = None,
    ) -> "queries.InfluentialSet":
        """Search for the ``m`` units whose joint deletion changes an output most.

        The search is greedy on the predicted series: it deletes the unit that moves the output furthest, then the one
        that does so beside it, and so on. It finds the best set where units do not interact, and a good one where they
        interact weakly.

        Args:
            m: how many units, at most ``n``.
            of: ``"mean"`` over all entries of the output, or weights ``(*out)`` of a sum over them.
            toward: ``"up"`` raises the output, ``"down"`` lowers it.
            estimator: as in :meth:`delete`.
            degree: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        return queries.most_influential(self._of(of), m, toward, estimator, degree)

    def plot_ray(
        self, units: Sequence[int], of: str | Tensor = "mean", ax: "Axes | None" = None, **options: Any
    ) -> "tuple[Figure, Axes]":
        """Draw the output predicted while units lose more and more of their weight; returns figure and axes.

        Args:
            units: as in :meth:`delete`.
            of: as in :meth:`most_influential`.
            ax: axes to draw on; ``None`` makes a figure.
            options: ``degrees``, ``estimator``, ``fractions`` and ``truth`` of
                :func:`~lightning_sketch.plotting.plot_deletion_ray`.
        """
        from lightning_sketch.plotting import plot_deletion_ray

        return plot_deletion_ray(self, units, of, ax=ax, **options)

    @cached_property
    def _mean(self) -> "Effect":
        return self.reduce()

    def _of(self, of: str | Tensor) -> "Effect":
        if isinstance(of, str):
            if of != "mean":
                raise ConfigurationError(
                    f"`of` is {of!r}: give 'mean' or weights of the output's shape (to `rank` also 'each')."
                )
            return self._mean
        return self.reduce(of)

    def _predict(
        self,
        x: np.ndarray,
        shape: tuple[int, ...],
        estimator: str,
        degree: int | None,
        failure_probability: float = FAILURE_PROBABILITY,
    ) -> Prediction:
        if degree is None:
            degree = self.degree
        elif isinstance(degree, bool) or not isinstance(degree, Integral) or not 1 <= degree <= self.degree:
            raise ConfigurationError(f"`degree` is {degree!r}: this sketch has degrees 1 to {self.degree}.")
        key = (estimator, failure_probability)
        if key not in self._estimators:
            self._estimators[key] = make_estimator(
                estimator,
                self._directions,
                self._flat,
                failure_probability,
                self._features,
                self._influence,
                self._margins,
            )
        expansion = self._estimators[key].expand(x, int(degree))
        terms, stderr = expansion.terms, expansion.stderr
        profile = np.sqrt(np.mean(np.abs(self._flat[int(degree) - 1]) ** 2, axis=0))
        truncation, reliable = tail(terms, np.diff(stderr, axis=0, prepend=0).clip(0), profile)
        if degree > 1:
            reliable &= self._estimators[key].measured(x) >= LEAST_MEASURED
        change = terms.sum(axis=0)
        if expansion.beyond is None:
            beyond = resum(terms, reliable)
        else:
            truncation = np.maximum(truncation, np.abs(expansion.beyond))
            beyond = np.where(reliable[:, None], expansion.beyond, 0)

        def tensor(array: np.ndarray, *leading: int) -> Tensor:
            return torch.from_numpy(array).reshape((*leading, *shape)).to(self.baseline)

        return Prediction(
            baseline=self.baseline,
            value=tensor(change + self._baseline),
            change=tensor(change),
            stderr=tensor(stderr[-1]),
            by_degree=tensor(np.cumsum(terms, axis=0) + self._baseline, int(degree)),
            truncation=tensor(truncation),
            resummed=tensor(change + beyond + self._baseline),
            reliable=torch.from_numpy(reliable).reshape(shape[: len(shape) - self.baseline.ndim]),
        )

    def _check_units(self, units: Sequence[int] | np.ndarray) -> np.ndarray:
        index = _indices(units, "units")
        if len(index) and not (index.min() >= 0 and index.max() < self.num_units):
            raise ConfigurationError(f"`units` holds {units}: this sketch has units 0 to {self.num_units - 1}.")
        return index

    def _units_of(self, examples: Any) -> np.ndarray:
        index = _indices(examples, "examples")
        if len(index) and not (index.min() >= 0 and index.max() < len(self._units)):
            raise ConfigurationError(
                f"`examples` holds {examples}: this sketch has examples 0 to {len(self._units) - 1}."
            )
        units = self._units[index]
        if (units < 0).any():
            raise ConfigurationError(
                f"`examples` holds {index[np.argmin(units)]}, which belongs to no unit: sketch again with one for it."
            )
        deleted = np.bincount(units, minlength=self.num_units)
        if len(partly := np.flatnonzero((deleted > 0) & (deleted < self._examples_per_unit))):
            unit = int(partly[0])
            raise ConfigurationError(
                f"`examples` holds {deleted[unit]} of the {self._examples_per_unit[unit]} examples of unit {unit}: "
                "a sketch of groups can not delete part of one, so delete the whole unit or sketch with finer `units`."
            )
        return np.flatnonzero(deleted)

    def _check_weights(self, weights: Any, shape: tuple[int, ...]) -> np.ndarray:
        try:
            x = np.asarray(weights.detach().cpu() if isinstance(weights, Tensor) else weights, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"`weights` is {type(weights).__name__}: give real numbers of shape {shape}."
            ) from error
        if x.shape != shape:
            raise ConfigurationError(
                f"`weights` has shape {x.shape}: give {shape}, one weight per unit (lists of units go in lists)."
            )
        if not np.isfinite(x).all():
            raise ConfigurationError("`weights` holds NaN or infinity: give finite numbers.")
        return x


def _indices(given: Any, name: str) -> np.ndarray:
    """Return distinct integers as ``(k,)`` int64."""
    try:
        index = np.asarray(given)
    except ValueError as error:
        raise ConfigurationError(f"`{name}` is {given!r}: give a flat list of integers.") from error
    if index.ndim != 1 or (index.dtype.kind not in "iu" and len(index)):
        raise ConfigurationError(f"`{name}` is {given!r}: give a flat list of integers.")
    if len(index) != len(set(index.tolist())):
        raise ConfigurationError(f"`{name}` holds {given!r}, with an entry twice: list every one once.")
    return index.astype(np.int64)
