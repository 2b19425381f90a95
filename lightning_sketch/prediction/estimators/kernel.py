"""Gaussian-process regression of Taylor terms."""

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import solve_triangular

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.estimators.arrays import matmul, measurements, times_power
from lightning_sketch.prediction.estimators.base import Estimator, Expansion
from lightning_sketch.prediction.estimators.grams import ROUNDING, Gram, Pairs, Prior, Vectors, independent_rows
from lightning_sketch.prediction.estimators.priors import (
    MAX_LIKELIHOOD_ROWS,
    MEASUREMENTS_PER_WEIGHT,
    Choice,
    choose_prior,
    few_outputs,
)
from lightning_sketch.prediction.influence import RIDGES, Influence

_UNITS_AT_ONCE = 256
# Outputs' worth of equal effects that are added to those of every unit, which few outputs do not tell apart.
_EQUAL_EFFECTS = 32
_NO_EFFECT = 1e-6  # first-order effects of an output, beside the largest, below which they may be rounding


@dataclass(frozen=True)
class _Order:
    """One order's factors: with the covariances ``k`` of a query, ``k^T G^-1 k = |whitener @ k|^2``."""

    choice: Choice
    rows: np.ndarray  # (p,) which of the measurements [Re c_1 .. Re c_K, Im c_1 .. Im c_K] are used
    whitener: np.ndarray  # (p, p)
    whitened: np.ndarray  # (p, O), whitener @ y
    scale: np.ndarray  # (O,), s_r

    @property
    def prior(self) -> Prior:
        return self.choice.prior


class KernelEstimator(Estimator):
    """Gaussian-process regression of ``F_r`` on the measurements, independently per order; mixes any designs.

    Prior: ``F_r`` is Gaussian in ``Sym^r`` with ``cov(<F_r, u^(x r)>, <F_r, v^(x r)>) = s_r^2 k(u, v)``, ``k`` a
    :class:`Prior`. Measurements are ``Re c_jr`` and, for complex directions, ``Im c_jr``. With their Gram matrix ``G``,
    values ``y`` and covariances ``k`` with the deletion ``x``, the term is ``k^T G^-1 y`` and its variance
    ``s_r^2 (k(x, x) - k^T G^-1 k)`` (Rasmussen & Williams, *Gaussian Processes for Machine Learning*, equations 2.25
    and 2.26), with ``s_r^2 = y^T G^-1 y / p`` per output. Where the directions span the deletion the term is exact and
    its variance zero, whatever the prior. Standard errors of orders are added, not their squares: what the directions
    did not see of one order they did not see of the next, and the errors of orders were found to have the same sign
    (``examples/benchmarks/README.md``). A mean takes away what the orders have in common: the error of an order that
    has one was found to be nearly independent of those before (same place), and is added in squares.

    Where the influences of the units are given, the prior of an order may have a mean ``H w`` of their terms
    ``H``, whose weights, shared by the outputs, are fitted by generalised least squares (equations 2.39 to 2.41, there
    of each output alone); ``y - H w`` then takes the place of ``y``. An output's own measurements say nothing of what
    no direction measured, but what they say together of influence functions holds there, too.

    The prior of an order, shared by the outputs, is chosen among kinds of growing richness: with ``a``; also with
    ``h``, where features of the units are given; with ``b``; with ``g``; and with a mean. Within
    a kind the weights, zero included, maximise the marginal likelihood (equation 2.30) on grids, one weight after the
    other; among kinds the best is that which best predicts every stored direction from the others
    (:meth:`Fit.held_out_density`). A mean takes as
    many of the recorded points as leave :data:`MEASUREMENTS_PER_WEIGHT` measurements for each of its weights, and is
    not tried with less: leading eigenvectors are alike in what unlearns them, so few of them do not tell the ridges
    apart that matter for the rest.

    Measurements may depend on each other: more directions than units always do at order 1. A Cholesky factorisation
    with diagonal pivoting keeps ``p`` independent ones and leaves out those that they determine (LAPACK ``dpstrf``;
    Higham, *Accuracy and Stability of Numerical Algorithms*, section 10.3). So ``G`` needs no jitter, which would blur
    exact answers and decide the marginal likelihood, and ``p`` counts what was really measured.

    Directions and deletions are scaled to ``u . M conj(u) = 1`` before any power is taken and the powers of the scales
    are put back at the end, so that high orders of large sets stay within float64.

    Args:
        directions: ``(K, n)`` complex128.
        coefficients: ``(R, K, O)`` complex128.
        features: ``(n, q)`` float64, of the units, whose inner products are a prior covariance; or None.
        influence: of the units on the outputs; or None.
    """

    def __init__(
        self,
        directions: np.ndarray,
        coefficients: np.ndarray,
        features: np.ndarray | None = None,
        influence: Influence | None = None,
    ) -> None:
        norms = np.linalg.norm(directions, axis=1)
        if not norms.any():
            raise ConfigurationError("`directions` are all zero, which measures nothing: sketch along others.")
        self._norms = np.where(norms > 0, norms, 1)[:, None]
        unit = directions / self._norms
        self._directions = unit if directions.imag.any() else unit.real.copy()
        self._coefficients = coefficients if directions.imag.any() else coefficients.real
        self._known: dict[tuple[frozenset[str], bool], Vectors] = {}
        self._maps: dict[str, np.ndarray] = {}  # what units share, by the prior's weight of it
        if features is not None and features.any():
            self._maps["gradients"] = features * (math.sqrt(len(features)) / np.linalg.norm(features))
        self._features, self._influence = features, influence
        self._orders: dict[int, _Order] = {}

    def expand(self, x: np.ndarray, degree: int) -> Expansion:
        """See :meth:`Estimator.expand`."""
        terms, errors = self.each_order(x, degree)
        return Expansion(terms, self.join_errors(errors))

    def each_order(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the terms and the standard error of each, ``(degree, m, O)``."""
        norms = np.linalg.norm(x, axis=1)[:, None]
        unit = x / np.where(norms > 0, norms, 1)
        terms = np.empty((degree, len(x), self._coefficients.shape[2]))
        errors = np.empty(terms.shape)
        for r in range(1, degree + 1):
            terms[r - 1], errors[r - 1] = self._term(unit, norms, r)
        return terms, errors

    def join_errors(self, errors: np.ndarray) -> np.ndarray:
        """Return the standard errors of sums up to each degree from those of their terms, ``(degree, m, O)``."""
        joined = errors.copy()
        for r in range(2, len(errors) + 1):
            join = np.hypot if self._order(r).prior.informed else np.add
            joined[r - 1] = join(joined[r - 2], errors[r - 1])
        return joined

    def density(self, r: int) -> float:
        """Return the log density of order ``r`` of every direction given all others, the mean over the outputs."""
        return self._order(r).choice.density

    def with_higher_orders(self, coefficients: np.ndarray) -> "KernelEstimator":
        """Return the estimator of outputs that differ in orders from 2 on.

        Args:
            coefficients: ``(R, K, O)`` complex128; order 1 as it was.
        """
        self._order(2)  # what rests on the first order is the same: computed once
        other = copy.copy(self)
        other._coefficients = coefficients if np.iscomplexobj(self._directions) else coefficients.real
        other._orders = {1: self._order(1)}
        return other

    def _term(self, unit: np.ndarray, norms: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the term of order ``r`` of the deletions ``norms * unit`` and its standard error, ``(m, O)``."""
        order = self._order(r)
        asked = Vectors(unit, self._used(order.prior), self._scale(r))
        sizes = norms * asked.sizes(order.prior)[:, None]  # sqrt(x . M x)
        z = self._whitened(asked, r)
        term = times_power(matmul(z, order.whitened), sizes, r)
        if order.choice.weights is not None:
            term += times_power(self._mean(unit, r, order.choice.weights), norms, r)
        prior = asked.variance(order.prior, r)
        left = prior - np.einsum("mp,mp->m", z, z)
        left[left < ROUNDING * prior] = 0
        return term, times_power(np.sqrt(left)[:, None] * order.scale, sizes, r)

    def measured(self, x: np.ndarray) -> np.ndarray:
        """Return the share of the second order's prior variance that the directions explain, ``(m,)``."""
        norms = np.linalg.norm(x, axis=1)[:, None]
        prior = self._order(2).prior
        asked = Vectors(x / np.where(norms > 0, norms, 1), self._used(prior), self._scale(2))
        z, variance = self._whitened(asked, 2), asked.variance(prior, 2)
        explained: np.ndarray = np.einsum("mp,mp->m", z, z) / np.where(variance > 0, variance, 1)
        return np.where(variance > 0, explained, 1.0)

    def _whitened(self, asked: "Vectors", r: int) -> np.ndarray:
        """Return ``whitener @ k`` for the covariances ``k`` of deletions with the measurements, ``(m, p)``."""
        order = self._order(r)
        k = measurements(Pairs(self._vectors(order.prior, r), asked, r).kernel(order.prior))[order.rows]
        return matmul(k.T, order.whitener.T)

    def _order(self, r: int) -> _Order:
        if r not in self._orders:
            self._orders[r] = self._factor(r)
        return self._orders[r]

    def _vectors(self, prior: Prior, r: int) -> "Vectors":
        """Return the directions with what the prior of an order needs of them."""
        maps = self._used(prior)
        key = frozenset(maps), r > 1
        if key not in self._known:
            self._known[key] = Vectors(self._directions, maps, self._scale(r))
        return self._known[key]

    def _scale(self, r: int) -> np.ndarray | None:
        """Return ``S`` of :class:`Prior`, ``(n,)``; None, for ones, at order 1."""
        return None if r == 1 else self._unit_sizes

    @cached_property
    def _unit_sizes(self) -> np.ndarray:
        """Sizes of the first-order effects of the units, ``(n,)``; also makes ``Phi``, which they are the rows' of."""
        effects = self._maps["effects"] = self._scaled_effects()
        squares, outputs = np.square(effects).sum(axis=1), effects.shape[1]
        sizes: np.ndarray = np.sqrt((outputs * squares + _EQUAL_EFFECTS) / (outputs + _EQUAL_EFFECTS))
        return sizes

    def _used(self, prior: Prior) -> dict[str, np.ndarray]:
        return {name: shared for name, shared in self._maps.items() if getattr(prior, name)}

    def _scaled_effects(self) -> np.ndarray:
        """Return ``Phi``, ``(n, q)``, of at most :data:`MAX_LIKELIHOOD_OUTPUTS` outputs that change at all."""
        effects = self._effects(few_outputs(self._coefficients))
        norms = np.linalg.norm(effects, axis=0)
        effects = effects[:, norms > _NO_EFFECT * norms.max(initial=0)]
        if effects.size:
            effects *= math.sqrt(len(effects) / effects.shape[1]) / np.linalg.norm(effects, axis=0)
        return effects

    def _effects(self, outputs: slice) -> np.ndarray:
        """Return the first-order effects of all units on some outputs, ``(n, O)``."""
        n = self._directions.shape[1]
        parts = []
        for start in range(0, n, _UNITS_AT_ONCE):
            units = np.eye(min(_UNITS_AT_ONCE, n - start), n, start)
            parts.append(self._term(units, np.ones((len(units), 1)), 1)[0][:, outputs])
        return np.concatenate(parts)

    @cached_property
    def _first_effects(self) -> np.ndarray:
        return self._effects(slice(None))

    @cached_property
    def _own_effects(self) -> np.ndarray:
        """First-order effects of units on the units' own losses, ``(n, n)``."""
        assert self._influence is not None
        coefficients = times_power(self._influence.unit_coefficients, 1 / self._norms, 1)
        if not np.iscomplexobj(self._directions):
            coefficients = coefficients.real
        estimator = KernelEstimator(self._directions, coefficients[None], self._features, self._influence.of_units)
        estimator._orders[1] = estimator._solve(1, self._order(1).choice)
        return estimator._effects(slice(None))

    def _mean_terms(self, unit: np.ndarray, r: int, outputs: slice) -> np.ndarray | None:
        """Return the measurements along vectors of what the mean is made of, ``(Q, m, O)``; None where it is zero."""
        if self._influence is None:
            return None
        if r == 1:
            terms = self._influence.first(unit, outputs)
        else:
            terms = self._influence.higher(unit, r, self._first_effects[:, outputs], self._own_effects)[None]
        return np.concatenate([terms.real, terms.imag], axis=1) if np.iscomplexobj(terms) else terms

    def _mean(self, unit: np.ndarray, r: int, weights: np.ndarray) -> np.ndarray:
        """Return the mean of order ``r``, ``(k, O)``."""
        assert self._influence is not None
        if r == 1:
            return self._influence.first_sum(unit, weights)
        return weights[0] * self._influence.higher(unit, r, self._first_effects, self._own_effects)

    def _factor(self, r: int) -> _Order:
        values = measurements(times_power(self._coefficients[r - 1], 1 / self._norms, r))
        rows = independent_rows(Gram(self._vectors(Prior(), r), r), Prior())[0][:MAX_LIKELIHOOD_ROWS]
        maps = {name: shared for name, shared in self._maps.items() if r > 1 or name != "effects"}
        if r == 1 and self._influence is not None:
            self._influence = self._influence.at_points(len(rows) // (MEASUREMENTS_PER_WEIGHT * len(RIDGES)))
        terms = self._mean_terms(self._directions, r, few_outputs(values))
        return self._solve(r, choose_prior(self._directions, maps, r, rows, values, terms, self._scale(r)))

    def _solve(self, r: int, choice: Choice) -> _Order:
        """Regress the measurements of an order under a given prior."""
        prior, weights = choice.prior, choice.weights
        values = measurements(times_power(self._coefficients[r - 1], 1 / self._norms, r))
        if weights is not None:
            values = values - measurements(self._mean(self._directions, r, weights))
        known = self._vectors(prior, r)
        rows, spread, factor = independent_rows(Gram(known, r), prior)
        whitener = solve_triangular(factor, np.eye(len(rows)), lower=True) * spread
        sizes = known.sizes(prior)[rows % len(self._directions), None]
        whitened = whitener @ times_power(values[rows], 1 / sizes, r)
        largest = np.abs(whitened).max(axis=0, initial=0)
        largest[largest == 0] = 1
        scale = largest * np.sqrt(np.mean((whitened / largest) ** 2, axis=0))
        return _Order(choice, rows, whitener, whitened, scale)
