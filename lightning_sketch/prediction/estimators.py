"""Estimators of the Taylor terms ``<F_r, x^(x r)>`` of a deletion ``x`` from coefficients along sketched directions.

``c_jr = <F_r, psi_j^(x r)>`` is the order-``r`` coefficient of an output along direction ``psi_j`` in ``C^n``;
``F_r`` is a real symmetric tensor. An estimator is made once from the directions and the coefficients, and called with
any number of deletions; it returns every term and the standard error of their sum. All arithmetic is float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.linalg.lapack import dpstrf

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.influence import Influence

ESTIMATORS = ("auto", "kernel", "mean", "median_of_means")
# The kernel's factors cost O(m^3) operations once and O(m^2) bytes per order; `auto` takes it up to this m.
MAX_KERNEL_MEASUREMENTS = 4096
# Default `delta` of the median of means.
FAILURE_PROBABILITY = 1e-3
# Weights of a `Prior`.
COMMON_MODE_GRID = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DIAGONAL_GRID = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
GRADIENTS_GRID = (0.0, 1.0, 10.0, 100.0, 1000.0)
EFFECTS_GRID = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

# Measurements that a prior with a mean needs for each weight of it.
MEASUREMENTS_PER_WEIGHT = 3

_MAX_LIKELIHOOD_ROWS = 256  # enough to choose a prior, and keeps the grids cheap beside the one full factorisation
_MAX_LIKELIHOOD_OUTPUTS = 256
_UNITS_AT_ONCE = 256
_NO_EFFECT = 1e-6  # first-order effects of an output, beside the largest, below which they may be rounding
_REDUNDANT = 1e-10  # prior variance, of 1, that a measurement must add to those already used
_ROUNDING = 1e-12  # part of a prior variance below which it is rounding: zero by construction


class Estimator(ABC):
    """Maps deletions to Taylor terms and the standard errors of their sums."""

    @abstractmethod
    def by_degree(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the terms of orders ``1..degree`` and the standard error of their sum up to each, ``(degree, m, O)``.

        Args:
            x: ``(m, n)`` float64, one deletion per row.
            degree: highest order used.
        """

    def measured(self, x: np.ndarray) -> np.ndarray:
        """Return how far standard errors of the second order rest on measurements and not on a prior, in 0 to 1.

        Args:
            x: ``(m, n)`` float64, one deletion per row.

        Returns:
            ``(m,)``; 1 for estimators without a prior.
        """
        return np.ones(len(x))

    def __call__(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the terms, ``(degree, m, O)``, and the standard error of their whole sum, ``(m, O)``."""
        terms, stderr = self.by_degree(x, degree)
        return terms, stderr[-1]


def make_estimator(
    name: str,
    directions: np.ndarray,
    coefficients: np.ndarray,
    failure_probability: float = FAILURE_PROBABILITY,
    features: np.ndarray | None = None,
    influence: Influence | None = None,
) -> Estimator:
    """Return the estimator of that name.

    Args:
        name: one of :data:`ESTIMATORS`; ``auto`` is the kernel estimator up to :data:`MAX_KERNEL_MEASUREMENTS` real
            measurements (2 per complex direction, 1 per real one) and the mean beyond.
        directions: ``(K, n)`` complex128.
        coefficients: ``(R, K, O)`` complex128.
        failure_probability: ``delta`` of the median of means.
        features: ``(n, q)`` float64, features of the units for the prior of the kernel; or None.
        influence: of the units on the outputs, for its prior mean; or None.

    Raises:
        ConfigurationError: unknown name, or directions that the estimator can not use.
    """
    if name not in ESTIMATORS:
        raise ConfigurationError(f"`estimator` is {name!r}: choose one of {', '.join(ESTIMATORS)}.")
    if name == "auto":
        measurements = len(directions) + int(directions.imag.any(axis=1).sum())
        if measurements <= MAX_KERNEL_MEASUREMENTS:
            name = "kernel"
        elif _on_complex_sphere(directions).all():
            name = "mean"
        else:
            raise ConfigurationError(
                f"`estimator='auto'` has {measurements} measurements, above {MAX_KERNEL_MEASUREMENTS}, of directions "
                "that the mean can not use: pass `estimator='kernel'`, slow at first, or sketch fewer directions."
            )
    if name == "kernel":
        return KernelEstimator(directions, coefficients, features, influence)
    if name == "mean":
        return MeanEstimator(directions, coefficients)
    return MedianOfMeansEstimator(directions, coefficients, failure_probability)


class MeanEstimator(Estimator):
    """The paper's unbiased estimator: the mean over directions (Gunn, arXiv 2604.07328).

    ``e_jr = C(n+r-1, r) Re(c_jr conj(psi_j . x)^r)`` has the mean ``<F_r, x^(x r)>`` because
    ``E[psi^(x r) conj(psi)^(x r)] = P_sym / C(n+r-1, r)`` for ``psi`` uniform on the unit sphere of ``C^n``.

    The standard error is the sample standard deviation over directions of ``sum_r e_jr`` (the orders of one direction
    are correlated) over ``sqrt(K)``. For orthonormal directions, whose mean varies less than that of
    independent ones, it is conservative.

    Args:
        directions: ``(K, n)`` complex128, uniform on the sphere: of the designs ``sphere`` or ``orthonormal``.
        coefficients: ``(R, K, O)`` complex128.

    Raises:
        ConfigurationError: a direction that is real or not of unit norm, or fewer than two directions.
    """

    _name = "mean"
    _min_directions = 2

    def __init__(self, directions: np.ndarray, coefficients: np.ndarray) -> None:
        usable = _on_complex_sphere(directions)
        if not usable.all():
            raise ConfigurationError(
                f"`estimator={self._name!r}` needs complex directions of unit norm, unlike direction "
                f"{int(np.argmin(usable))}: use 'kernel', or sketch with the design 'sphere' or 'orthonormal'."
            )
        if len(directions) < self._min_directions:
            raise ConfigurationError(
                f"`estimator={self._name!r}` has {len(directions)} directions and needs at least "
                f"{self._min_directions} for a standard error: use 'kernel' or sketch more directions."
            )
        self._directions = directions.copy()
        self._real, self._imag = coefficients.real.copy(), coefficients.imag.copy()

    def by_degree(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return terms and standard errors of their sums up to each degree, ``(degree, m, O)``."""
        products = _matmul(x, self._directions.T)
        terms = np.empty((degree, len(x), self._real.shape[2]))
        stderr = np.empty(terms.shape)
        for row in range(len(x)):  # one deletion at a time: all samples of all deletions would not fit in memory
            terms[:, row], stderr[:, row] = self._reduce(self._samples(products[row], degree))
        return terms, stderr

    def _samples(self, products: np.ndarray, degree: int) -> np.ndarray:
        """Return ``e_jr``, ``(degree, K, O)``, of one deletion with ``psi_j . x = products[j]``."""
        num_units = self._directions.shape[1]
        # Re(c conj(q)) = Re c Re q + Im c Im q, with q = C(n+r-1, r) (psi . x)^r.
        # The binomial goes into the base: alone it may be more than float64 holds, and the power less.
        roots = [2 ** (math.log2(math.comb(num_units + r - 1, r)) / r) for r in range(1, degree + 1)]
        q = np.stack([_power(root * products, r) for r, root in enumerate(roots, start=1)])[..., None]
        samples: np.ndarray = self._real[:degree] * q.real + self._imag[:degree] * q.imag
        return samples

    def _reduce(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = samples.cumsum(axis=0)
        return samples.mean(axis=1), sums.std(axis=1, ddof=1) / math.sqrt(samples.shape[1])


class MedianOfMeansEstimator(MeanEstimator):
    """Median over groups of directions of the group's mean, order by order: robust against heavy tails.

    The number of groups ``g`` is ``ceil(8 ln(1/delta))`` for the failure probability ``delta``, and at most ``K // 2``
    (Lugosi & Mendelson, *Mean estimation and regression under heavy-tailed distributions*, theorem 2); groups are
    contiguous, so that orthonormal blocks stay together.

    The standard error is ``sqrt(pi / (2 g)) sd``, that of the median of ``g`` normal values, with ``sd`` the sample
    standard deviation over groups of the group's summed orders.

    Args:
        directions: ``(K, n)`` complex128, of the designs ``sphere`` or ``orthonormal``; at least 4.
        coefficients: ``(R, K, O)`` complex128.
        failure_probability: ``delta``, the probability that the error is beyond the guarantee; between 0 and 1.

    Raises:
        ConfigurationError: a direction that is real or not of unit norm, fewer than four directions, or a
            ``failure_probability`` out of its range.
    """

    _name = "median_of_means"
    _min_directions = 4

    def __init__(
        self,
        directions: np.ndarray,
        coefficients: np.ndarray,
        failure_probability: float = FAILURE_PROBABILITY,
    ) -> None:
        super().__init__(directions, coefficients)
        if not 0 < failure_probability < 1:
            raise ConfigurationError(
                f"`failure_probability` is {failure_probability}: give a number between 0 and 1, such as 0.001."
            )
        self._failure_probability = failure_probability

    def _reduce(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_directions = samples.shape[1]
        num_groups = min(math.ceil(8 * math.log(1 / self._failure_probability)), num_directions // 2)
        starts = np.arange(num_groups) * num_directions // num_groups
        sizes = np.diff(starts, append=num_directions)
        means = np.add.reduceat(samples, starts, axis=1) / sizes[:, None]
        spread = means.cumsum(axis=0).std(axis=1, ddof=1)
        return np.median(means, axis=1), math.sqrt(math.pi / (2 * num_groups)) * spread


@dataclass(frozen=True)
class Prior:
    """Mean and covariance of the numbers ``<F_r, u^(x r)>``, the latter up to the output's own scale ``s_r^2``.

    ``k(u, v) = (u . M v)^r + b sum_i (u_i v_i)^r``, ``M = (I + a 1 1^T + g Phi Phi^T + h Gamma Gamma^T) / (1+a+g+h)``.

    Args:
        common: ``a``, what all units share ("less data").
        diagonal: ``b``, what a unit does by itself, ``F_r[u, .., u]``, beyond what it does together with others;
            without meaning at order 1.
        effects: ``g``, what units of like first-order effects share. ``Phi``, ``(n, O)``, holds the first-order effects
            of the units on the outputs, every output scaled alike and to a mean of 1 on the diagonal of ``Phi Phi^T``.
            For one output it says that the output is nearly a function of its own first-order change.
        gradients: ``h``, what units of like gradients share. ``Gamma``, ``(n, q)``, holds features of the units, scaled
            to a mean of 1 on the diagonal of ``Gamma Gamma^T``; 0 where there are none.
        informed: whether the mean is a sum of terms of :class:`~lightning_sketch.prediction.influence.Influence`, with
            weights that all outputs share; else it is zero.
    """

    common: float = 0.0
    diagonal: float = 0.0
    effects: float = 0.0
    gradients: float = 0.0
    informed: bool = False


@dataclass(frozen=True)
class _Order:
    """One order's factors: with the covariances ``k`` of a query, ``k^T G^-1 k = |whitener @ k|^2``."""

    prior: Prior
    rows: np.ndarray  # (p,) which of the measurements [Re c_1 .. Re c_K, Im c_1 .. Im c_K] are used
    whitener: np.ndarray  # (p, p)
    whitened: np.ndarray  # (p, O), whitener @ y
    scale: np.ndarray  # (O,), s_r
    weights: np.ndarray | None  # (Q,), of the terms of the mean


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
    (:meth:`_Fit.held_out_density`). A mean is tried from
    :data:`MEASUREMENTS_PER_WEIGHT` measurements for each of its weights on: leading eigenvectors are alike in what
    unlearns them, so few of them do not tell the ridges apart that matter for the rest.

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
        self._known: dict[frozenset[str], _Vectors] = {}
        self._maps: dict[str, np.ndarray] = {}  # what units share, by the prior's weight of it
        if features is not None and features.any():
            self._maps["gradients"] = features * (math.sqrt(len(features)) / np.linalg.norm(features))
        self._features, self._influence = features, influence
        self._orders: dict[int, _Order] = {}

    def by_degree(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return terms and standard errors of their sums up to each degree, ``(degree, m, O)``."""
        norms = np.linalg.norm(x, axis=1)[:, None]
        unit = x / np.where(norms > 0, norms, 1)
        terms = np.empty((degree, len(x), self._coefficients.shape[2]))
        errors = np.empty(terms.shape)
        for r in range(1, degree + 1):
            terms[r - 1], errors[r - 1] = self._term(unit, norms, r)
        for r in range(2, degree + 1):
            join = np.hypot if self._order(r).prior.informed else np.add
            errors[r - 1] = join(errors[r - 2], errors[r - 1])
        return terms, errors

    def _term(self, unit: np.ndarray, norms: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the term of order ``r`` of the deletions ``norms * unit`` and its standard error, ``(m, O)``."""
        order = self._order(r)
        asked = _Vectors(unit, self._used(order.prior))
        sizes = norms * asked.sizes(order.prior)[:, None]  # sqrt(x . M x)
        z = self._whitened(asked, r)
        term = _times_power(_matmul(z, order.whitened), sizes, r)
        if order.weights is not None:
            term += _times_power(self._mean(unit, r, order.weights), norms, r)
        prior = asked.variance(order.prior, r)
        left = prior - np.einsum("mp,mp->m", z, z)
        left[left < _ROUNDING * prior] = 0
        return term, _times_power(np.sqrt(left)[:, None] * order.scale, sizes, r)

    def measured(self, x: np.ndarray) -> np.ndarray:
        """Return the share of the second order's prior variance that the directions explain, ``(m,)``."""
        norms = np.linalg.norm(x, axis=1)[:, None]
        prior = self._order(2).prior
        asked = _Vectors(x / np.where(norms > 0, norms, 1), self._used(prior))
        z, variance = self._whitened(asked, 2), asked.variance(prior, 2)
        explained: np.ndarray = np.einsum("mp,mp->m", z, z) / np.where(variance > 0, variance, 1)
        return np.where(variance > 0, explained, 1.0)

    def _whitened(self, asked: "_Vectors", r: int) -> np.ndarray:
        """Return ``whitener @ k`` for the covariances ``k`` of deletions with the measurements, ``(m, p)``."""
        order = self._order(r)
        k = _measurements(_Pairs(self._vectors(order.prior), asked, r).kernel(order.prior))[order.rows]
        return _matmul(k.T, order.whitener.T)

    def _order(self, r: int) -> _Order:
        if r not in self._orders:
            self._orders[r] = self._factor(r)
        return self._orders[r]

    def _vectors(self, prior: Prior) -> "_Vectors":
        """Return the directions with what the prior needs of them."""
        maps = self._used(prior)
        if frozenset(maps) not in self._known:
            self._known[frozenset(maps)] = _Vectors(self._directions, maps)
        return self._known[frozenset(maps)]

    def _used(self, prior: Prior) -> dict[str, np.ndarray]:
        return {name: shared for name, shared in self._maps.items() if getattr(prior, name)}

    def _find_effects(self) -> None:
        """Make ``Phi``, ``(n, q)``, of at most :data:`_MAX_LIKELIHOOD_OUTPUTS` outputs that change at all."""
        if "effects" not in self._maps:
            n = self._directions.shape[1]
            effects = self._effects(_few_outputs(self._coefficients))
            norms = np.linalg.norm(effects, axis=0)
            effects = effects[:, norms > _NO_EFFECT * norms.max(initial=0)]
            if effects.size:
                effects *= math.sqrt(n / effects.shape[1]) / np.linalg.norm(effects, axis=0)
            self._maps["effects"] = effects

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
        coefficients = _times_power(self._influence.unit_coefficients, 1 / self._norms, 1)
        if not np.iscomplexobj(self._directions):
            coefficients = coefficients.real
        estimator = KernelEstimator(self._directions, coefficients[None], self._features, self._influence.of_units)
        order = self._order(1)
        estimator._orders[1] = estimator._solve(1, order.prior, order.weights)
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
        values = _measurements(_times_power(self._coefficients[r - 1], 1 / self._norms, r))
        rows = _independent_rows(_Gram(self._vectors(Prior()), r), Prior())[0]
        if r > 1 and any(EFFECTS_GRID):
            self._find_effects()
        maps = {name: shared for name, shared in self._maps.items() if r > 1 or name != "effects"}
        terms = self._mean_terms(self._directions, r, _few_outputs(values))
        prior, weights = _choose_prior(self._directions, maps, r, rows[:_MAX_LIKELIHOOD_ROWS], values, terms)
        return self._solve(r, prior, weights)

    def _solve(self, r: int, prior: Prior, weights: np.ndarray | None) -> _Order:
        """Regress the measurements of an order under a given prior."""
        values = _measurements(_times_power(self._coefficients[r - 1], 1 / self._norms, r))
        if weights is not None:
            values = values - _measurements(self._mean(self._directions, r, weights))
        known = self._vectors(prior)
        rows, spread, factor = _independent_rows(_Gram(known, r), prior)
        whitener = solve_triangular(factor, np.eye(len(rows)), lower=True) * spread
        sizes = known.sizes(prior)[rows % len(self._directions), None]
        whitened = whitener @ _times_power(values[rows], 1 / sizes, r)
        largest = np.abs(whitened).max(axis=0, initial=0)
        largest[largest == 0] = 1
        scale = largest * np.sqrt(np.mean((whitened / largest) ** 2, axis=0))
        return _Order(prior, rows, whitener, whitened, scale, weights)


class _Vectors:
    """Vectors ``u`` in unit space, and what the priors' ``u . M conj(u)`` are made of.

    Args:
        array: ``(k, n)``, real or complex.
        maps: ``(n, q)`` each, ``Gamma`` of ``gradients`` and ``Phi`` of ``effects``, where priors use them.
    """

    def __init__(self, array: np.ndarray, maps: Mapping[str, np.ndarray] | None = None) -> None:
        self.array = array
        self.sums = array.sum(axis=1)
        self.shared = {name: _matmul(array, shared) for name, shared in (maps or {}).items()}

    def conj(self) -> "_Vectors":
        other = _Vectors(self.array.conj())
        other.shared = {name: shared.conj() for name, shared in self.shared.items()}
        return other

    def sizes(self, prior: Prior) -> np.ndarray:
        """Return ``sqrt(u . M conj(u))``, ``(k,)``; 1 for ``u = 0``."""
        square = (np.abs(self.array) ** 2).sum(axis=1) + prior.common * np.abs(self.sums) ** 2
        for name, shared in self.shared.items():
            square = square + getattr(prior, name) * (np.abs(shared) ** 2).sum(axis=1)
        size = np.sqrt(square / _total(prior))
        return np.where(size > 0, size, 1)

    def variance(self, prior: Prior, r: int) -> np.ndarray:
        """Return ``k(u, u)``, ``(k,)``, of real vectors, scaled to ``u . M u = 1``."""
        result: np.ndarray = np.where(self.array.any(axis=1), 1.0, 0.0)
        if prior.diagonal and r > 1:
            powers = _power(self.array / self.sizes(prior)[:, None], r)
            result += prior.diagonal * np.einsum("kn,kn->k", powers, powers)
        return result


class _Pairs:
    """The kernels of order ``r`` of any prior between two sets of vectors; contracts each pair of them once."""

    def __init__(self, left: _Vectors, right: _Vectors, r: int) -> None:
        self.left, self.right, self.r = left, right, r

    @cached_property
    def _plain(self) -> np.ndarray:
        return _matmul(self.left.array, self.right.array.T)

    @cached_property
    def _shared(self) -> dict[str, np.ndarray]:
        return {name: _matmul(shared, self.right.shared[name].T) for name, shared in self.left.shared.items()}

    @cached_property
    def _powers(self) -> np.ndarray:
        return _matmul(_power(self.left.array, self.r), _power(self.right.array, self.r).T)

    def kernel(self, prior: Prior) -> np.ndarray:
        """Return ``k(u, v)``, ``(left, right)``, of vectors scaled to ``u . M conj(u) = 1``."""
        left, right = self.left.sizes(prior)[:, None], self.right.sizes(prior)
        inner = self._plain
        if prior.common:
            inner = inner + prior.common * np.outer(self.left.sums, self.right.sums)
        for name, shared in self._shared.items():
            if weight := getattr(prior, name):
                inner = inner + weight * shared
        result = _power(inner / (_total(prior) * left * right), self.r)
        if prior.diagonal and self.r > 1:
            result = result + prior.diagonal * (self._powers / left**self.r / right**self.r)
        return result


class _Gram:
    """The Gram matrices of order ``r`` of any prior of the measurements ``[Re c, Im c]`` along some directions."""

    def __init__(self, directions: _Vectors, r: int) -> None:
        self.directions, self.r = directions, r
        self._pairs = _Pairs(directions, directions, r)
        self._conjugate = _Pairs(directions, directions.conj(), r) if np.iscomplexobj(directions.array) else None

    def __call__(self, prior: Prior) -> np.ndarray:
        """Return ``(2 K, 2 K)``; only ``Re``, ``(K, K)``, if all directions are real."""
        a = self._pairs.kernel(prior)
        if self._conjugate is None:
            return a
        b = self._conjugate.kernel(prior)
        return np.block([[a.real + b.real, a.imag - b.imag], [a.imag + b.imag, b.real - a.real]]) / 2


def _total(prior: Prior) -> float:
    return 1 + prior.common + prior.gradients + prior.effects


def _independent_rows(gram_of: _Gram, prior: Prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return measurements that determine all others, most informative first, and the factor of their Gram matrix.

    Returns:
        The rows ``(p,)``, ``1 / sd`` of each under the prior ``(p,)``, and the lower Cholesky factor ``(p, p)`` of the
        Gram matrix that these scale to unit diagonal.
    """
    gram = gram_of(prior)
    diagonal = np.diagonal(gram)
    kept = np.flatnonzero(diagonal > _ROUNDING)
    scale = 1 / np.sqrt(diagonal[kept])
    factor, pivots, rank, _ = dpstrf(gram[np.ix_(kept, kept)] * scale * scale[:, None], tol=_REDUNDANT, lower=1)
    chosen = pivots[:rank] - 1
    return kept[chosen], scale[chosen], np.tril(factor[:rank, :rank])


def _choose_prior(
    directions: np.ndarray,
    maps: Mapping[str, np.ndarray],
    r: int,
    rows: np.ndarray,
    values: np.ndarray,
    terms: np.ndarray | None = None,
) -> tuple[Prior, np.ndarray | None]:
    """Return the prior of an order and the weights of its mean, ``(Q,)`` or None, as :class:`KernelEstimator` says.

    Args:
        directions: ``(K, n)``, of unit norm.
        maps: as of :class:`_Vectors`.
        r: order.
        rows: ``(p,)``, the measurements used; independent, so that ``G`` is regular for every prior.
        values: ``(m, O)``, all measurements.
        terms: ``(Q, m, O)``, what a mean may be made of, of few outputs; or None.
    """
    y = values[rows][:, _few_outputs(values)]
    changing = y.any(axis=0)  # an output that never changes has s_r = 0 and says nothing of the prior
    y = y[:, changing]
    if not y.size:
        return Prior(), None
    largest = np.abs(y).max(axis=0)
    y = y / largest  # so that no square below underflows
    terms = None if terms is None else terms[:, rows][:, :, changing] / largest
    used, position = np.unique(rows % len(directions), return_inverse=True)
    part = position + len(used) * (rows // len(directions))
    gram = _Gram(_Vectors(directions[used], maps), r)
    fits: dict[Prior, _Fit | None] = {}

    def fit(prior: Prior) -> _Fit | None:
        if prior not in fits:
            fits[prior] = _Fit.of(gram, prior, part, position, y, terms if prior.informed else None)
        return fits[prior]

    def likelihood(prior: Prior) -> float:
        found = fit(prior)
        return -math.inf if found is None else found.likelihood

    def improve(prior: Prior) -> Prior:
        for _ in range(2):
            for weight in reversed(active):
                prior = max((_with(prior, weight, value) for value in grids[weight]), key=likelihood)
        return prior

    grids: dict[str, tuple[float, ...]] = {"common": COMMON_MODE_GRID}
    if "gradients" in maps:
        grids["gradients"] = GRADIENTS_GRID
    if r > 1:
        grids |= {"diagonal": DIAGONAL_GRID, "effects": EFFECTS_GRID}
    best = Prior()
    for name, grid in grids.items():
        best = _with(best, name, min(grid))
    kinds: list[Prior] = []
    active: list[str] = []
    for name in grids:
        active.append(name)
        best = improve(best)
        kinds.append(best)
    if terms is not None and len(rows) >= MEASUREMENTS_PER_WEIGHT * len(terms):
        kinds.append(improve(replace(best, informed=True)))

    def held_out(prior: Prior) -> float:
        found = fit(prior)
        return -math.inf if found is None else found.held_out_density()

    chosen = max(dict.fromkeys(kinds), key=held_out)
    found = fit(chosen)
    return chosen, None if found is None or found.regression is None else found.regression.weights


def _with(prior: Prior, name: str, weight: float) -> Prior:
    return replace(prior, **{name: weight})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Regression:
    """Weights of the terms of a mean by generalised least squares, all outputs together, each in units of its scale.

    The weights have a normal prior: each term may explain as much as there is. It decides only where terms are nearly
    the same on all measurements.
    """

    terms: np.ndarray  # (Q, p, O), G^-1 H / s, every term scaled to a mean square of 1
    linear: np.ndarray  # (p, O), G^-1 y / s
    normal: np.ndarray  # (Q, Q)
    right: np.ndarray  # (Q,)
    sizes: np.ndarray  # (Q,), what the terms were divided by

    @classmethod
    def of(cls, root: np.ndarray, y: np.ndarray, terms: np.ndarray) -> "_Regression":
        """Regress ``y``, ``(p, O)``, on ``terms``, ``(Q, p, O)``, with ``root^T root = G^-1``."""
        whitened, explained = root @ y, root @ terms
        scale = np.sqrt(np.maximum((whitened**2).mean(axis=0), np.finfo(np.float64).tiny))
        whitened, explained = whitened / scale, explained / scale
        sizes = np.sqrt((explained**2).mean(axis=(1, 2)))
        sizes[sizes == 0] = 1
        explained /= sizes[:, None, None]
        flat = explained.reshape(len(terms), -1)
        return cls(root.T @ explained, root.T @ whitened, flat @ flat.T, flat @ whitened.reshape(-1), sizes)

    def solve(self, normal: np.ndarray, right: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.linalg.solve(normal + np.eye(len(normal)), right)
        return weights

    @cached_property
    def weights(self) -> np.ndarray:
        """Of the terms as they were given."""
        weights: np.ndarray = self.solve(self.normal, self.right) / self.sizes
        return weights

    def without(self, rows: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return the weights that the other measurements give, from those of ``rows`` and their block of ``G^-1``."""
        terms, linear = self.terms[:, rows], self.linear[rows]
        solved = np.linalg.solve(block, terms)
        normal = self.normal - np.einsum("qpo,rpo->qr", terms, solved)
        return self.solve(normal, self.right - np.einsum("qpo,po->q", solved, linear)) / self.sizes


@dataclass(frozen=True)
class _Fit:
    """The regression on some measurements under one prior."""

    inverse: np.ndarray  # (p, p), G^-1
    linear: np.ndarray  # (p, O), G^-1 y
    quadratic: np.ndarray  # (O,), (y - H w)^T G^-1 (y - H w)
    direction: np.ndarray  # (p,), of each measurement
    likelihood: float
    terms: np.ndarray | None  # (Q, p, O), G^-1 H
    regression: _Regression | None

    @classmethod
    def of(
        cls,
        gram_of: _Gram,
        prior: Prior,
        part: np.ndarray,
        direction: np.ndarray,
        y: np.ndarray,
        terms: np.ndarray | None = None,
    ) -> "_Fit | None":
        """Return the fit, or None where ``G`` is singular to rounding: the prior drowns what tells measurements apart.

        Args:
            gram_of: of the directions.
            prior: the prior.
            part: ``(p,)``, rows of the Gram matrix.
            direction: ``(p,)``, the direction of each.
            y: ``(p, O)``.
            terms: ``(Q, p, O)``, what the mean is made of, where the prior has one.
        """
        gram = gram_of(prior)[np.ix_(part, part)]
        spread = np.sqrt(np.diagonal(gram))
        try:
            factor = cholesky(gram / np.outer(spread, spread), lower=True)
        except LinAlgError:
            return None
        # A common factor of the scales is a factor of s, and would only underflow.
        log_scale = -gram_of.r * np.log(gram_of.directions.sizes(prior)[direction]) - np.log(spread)
        log_scale -= log_scale.max()
        root = solve_triangular(factor, np.diag(np.exp(log_scale)), lower=True)
        regression, solved, left = None, None, y
        if terms is not None:
            regression, solved = _Regression.of(root, y, terms), np.asarray(root.T @ (root @ terms))
            left = y - np.tensordot(regression.weights, terms, axes=1)
        whitened = root @ left
        quadratic = np.maximum((whitened**2).sum(axis=0), np.finfo(np.float64).tiny)
        # log p(y) = -1/2 (p log s^2 + log det G) + const, summed over outputs, with s^2 = y^T G^-1 y / p
        half_log_det = np.log(np.diagonal(factor)).sum() - log_scale.sum()
        likelihood = -len(y) * np.log(quadratic / len(y)).sum() / 2 - y.shape[1] * half_log_det
        inverse = root.T @ root
        return cls(inverse, inverse @ y, quadratic, direction, float(likelihood), solved, regression)

    def held_out_density(self) -> float:
        """Return the log density of every direction's measurements given those of all others, summed.

        With ``B`` the direction's block of ``G^-1`` and ``alpha`` its part of ``G^-1 (y - H w)``, its measurements miss
        their prediction by ``B^-1 alpha``, of covariance ``s^2 B^-1`` (Rasmussen & Williams, equations 5.10 to 5.13,
        there for one measurement; two belong to a complex direction). The weights ``w`` are those that the other
        directions give.
        """
        scale = self.quadratic / len(self.linear)
        density = -len(self.linear) * float(np.log(scale).sum()) / 2
        for j in range(int(self.direction.max()) + 1):
            rows = np.flatnonzero(self.direction == j)
            block, alpha = self.inverse[np.ix_(rows, rows)], self.linear[rows]
            if self.regression is not None and self.terms is not None:
                terms: np.ndarray = self.terms[:, rows]
                alpha = alpha - np.tensordot(self.regression.without(rows, block), terms, axes=1)
            missed = (alpha * np.linalg.solve(block, alpha)).sum(axis=0)
            density -= float((missed / scale - np.linalg.slogdet(block)[1]).sum()) / 2
        return density


def _few_outputs(values: np.ndarray) -> slice:
    return slice(None, None, -(-values.shape[-1] // _MAX_LIKELIHOOD_OUTPUTS) or 1)


def _times_power(values: np.ndarray, base: np.ndarray, exponent: int) -> np.ndarray:
    """Return ``values * base^exponent``, in two halves: the power alone may be more than float64 holds."""
    half = exponent // 2
    result: np.ndarray = values * base**half * base ** (exponent - half)
    return result


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply by torch, whose threads wait for each other far less than numpy's where the processor is shared."""
    dtype = np.result_type(a, b)
    product: np.ndarray = (torch.from_numpy(a.astype(dtype)) @ torch.from_numpy(b.astype(dtype))).numpy()
    return product


def _on_complex_sphere(directions: np.ndarray) -> np.ndarray:
    unit_norm: np.ndarray = np.abs(np.linalg.norm(directions, axis=1) - 1) <= 1e-8
    return unit_norm & directions.imag.any(axis=1)


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    result = base
    for _ in range(exponent - 1):  # numpy's own complex power goes through logarithms: slower and less exact
        result = result * base
    return result


def _measurements(values: np.ndarray) -> np.ndarray:
    """Return ``[Re, Im]`` stacked on the first axis; real arrays have no second half."""
    return np.concatenate([values.real, values.imag]) if np.iscomplexobj(values) else values
