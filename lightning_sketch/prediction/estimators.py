"""Estimators of the Taylor terms ``<F_r, x^(x r)>`` of a deletion ``x`` from coefficients along sketched directions.

``c_jr = <F_r, psi_j^(x r)>`` is the order-``r`` coefficient of an output along direction ``psi_j`` in ``C^n``;
``F_r`` is a real symmetric tensor. An estimator is made once from the directions and the coefficients, and called with
any number of deletions; it returns every term and the standard error of their sum. All arithmetic is float64.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.linalg.lapack import dpstrf

from lightning_sketch.errors import ConfigurationError

ESTIMATORS = ("auto", "kernel", "mean", "median_of_means")
# The kernel's factors cost O(m^3) operations once and O(m^2) bytes per order; `auto` takes it up to this m.
MAX_KERNEL_MEASUREMENTS = 4096
# `delta` of the median of means.
FAILURE_PROBABILITY = 1e-3
# Weights `a` of the common mode in the kernel's prior M = I + a 1 1^T.
COMMON_MODE_GRID = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

_MAX_LIKELIHOOD_ROWS = 512  # enough to choose `a`, and keeps the grid cheap beside the one full factorisation
_MAX_LIKELIHOOD_OUTPUTS = 1024
_REDUNDANT = 1e-10  # prior variance, of 1, that a measurement must add to those already used
_ROUNDING = 1e-12  # part of a prior variance below which it is rounding: zero by construction


class Estimator(Protocol):
    """Maps deletions to Taylor terms and the standard error of their sum."""

    def __call__(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the terms of orders ``1..degree``, ``(degree, m, O)``, and their sum's standard error, ``(m, O)``.

        Args:
            x: ``(m, n)`` float64, one deletion per row.
            degree: highest order used.
        """


def make_estimator(name: str, directions: np.ndarray, coefficients: np.ndarray) -> Estimator:
    """Return the estimator of that name.

    Args:
        name: one of :data:`ESTIMATORS`; ``auto`` is the kernel estimator up to :data:`MAX_KERNEL_MEASUREMENTS` real
            measurements (2 per complex direction, 1 per real one) and the mean beyond.
        directions: ``(K, n)`` complex128.
        coefficients: ``(R, K, O)`` complex128.

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
        return KernelEstimator(directions, coefficients)
    if name == "mean":
        return MeanEstimator(directions, coefficients)
    return MedianOfMeansEstimator(directions, coefficients)


class MeanEstimator:
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

    def __call__(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return terms ``(degree, m, O)`` and standard errors ``(m, O)`` of the deletions ``x``, ``(m, n)``."""
        products = _matmul(x, self._directions.T)
        terms = np.empty((degree, len(x), self._real.shape[2]))
        stderr = np.empty(terms.shape[1:])
        for row in range(len(x)):  # one deletion at a time: all samples of all deletions would not fit in memory
            terms[:, row], stderr[row] = self._reduce(self._samples(products[row], degree))
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
        total = samples.sum(axis=0)
        return samples.mean(axis=1), total.std(axis=0, ddof=1) / math.sqrt(len(total))


class MedianOfMeansEstimator(MeanEstimator):
    """Median over groups of directions of the group's mean, order by order: robust against heavy tails.

    The number of groups ``g`` is ``ceil(8 ln(1/delta))`` for the failure probability ``delta`` =
    :data:`FAILURE_PROBABILITY`, and at most ``K // 2`` (Lugosi & Mendelson, *Mean estimation and regression under
    heavy-tailed distributions*, theorem 2); groups are contiguous, so that orthonormal blocks stay together.

    The standard error is ``sqrt(pi / (2 g)) sd``, that of the median of ``g`` normal values, with ``sd`` the sample
    standard deviation over groups of the group's summed orders.

    Args:
        directions: ``(K, n)`` complex128, of the designs ``sphere`` or ``orthonormal``; at least 4.
        coefficients: ``(R, K, O)`` complex128.

    Raises:
        ConfigurationError: a direction that is real or not of unit norm, or fewer than four directions.
    """

    _name = "median_of_means"
    _min_directions = 4

    def _reduce(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_directions = samples.shape[1]
        num_groups = min(math.ceil(8 * math.log(1 / FAILURE_PROBABILITY)), num_directions // 2)
        starts = np.arange(num_groups) * num_directions // num_groups
        sizes = np.diff(starts, append=num_directions)
        means = np.add.reduceat(samples, starts, axis=1) / sizes[:, None]
        spread = means.sum(axis=0).std(axis=0, ddof=1)
        return np.median(means, axis=1), math.sqrt(math.pi / (2 * num_groups)) * spread


@dataclass(frozen=True)
class _Order:
    """One order's factors: with the covariances ``k`` of a query, ``k^T G^-1 k = |whitener @ k|^2``."""

    common: float  # a of M = I + a 1 1^T
    rows: np.ndarray  # (p,) which of the measurements [Re c_1 .. Re c_K, Im c_1 .. Im c_K] are used
    whitener: np.ndarray  # (p, p)
    whitened: np.ndarray  # (p, O), whitener @ y
    variance: np.ndarray  # (O,), s_r^2


class KernelEstimator:
    """Gaussian-process regression of ``F_r`` on the measurements, independently per order; mixes any designs.

    Prior: ``F_r`` is Gaussian in ``Sym^r`` with ``cov(<F_r, u^(x r)>, <F_r, v^(x r)>) = s_r^2 (u . M v)^r`` and
    ``M = I + a 1 1^T``. Measurements are ``Re c_jr`` and, for complex directions, ``Im c_jr``. With their Gram matrix
    ``G``, values ``y`` and covariances ``k`` with the deletion ``x``, the term is ``k^T G^-1 y`` and its variance
    ``s_r^2 ((x . M x)^r - k^T G^-1 k)`` (Rasmussen & Williams, *Gaussian Processes for Machine Learning*, equations
    2.25 and 2.26); ``s_r^2 = y^T G^-1 y / p`` per output, and ``a`` per order, shared by the outputs, maximise the
    marginal likelihood (equation 2.30). Where the directions span the deletion the term is exact and its variance zero.

    Measurements may depend on each other: more directions than units always do at order 1. A Cholesky factorisation
    with diagonal pivoting keeps ``p`` independent ones and leaves out those that they determine (LAPACK ``dpstrf``;
    Higham, *Accuracy and Stability of Numerical Algorithms*, section 10.3). So ``G`` needs no jitter, which would blur
    exact answers and decide the marginal likelihood, and ``p`` counts what was really measured.

    Args:
        directions: ``(K, n)`` complex128.
        coefficients: ``(R, K, O)`` complex128.
    """

    def __init__(self, directions: np.ndarray, coefficients: np.ndarray) -> None:
        self._real = not directions.imag.any()
        self._directions = directions.real.copy() if self._real else directions.copy()
        self._sums = self._directions.sum(axis=1)
        self._coefficients = coefficients
        self._orders: dict[int, _Order] = {}

    def __call__(self, x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return terms ``(degree, m, O)`` and standard errors ``(m, O)`` of the deletions ``x``, ``(m, n)``."""
        products, sums, squares = _matmul(x, self._directions.T), x.sum(axis=1), np.einsum("mn,mn->m", x, x)
        terms = np.empty((degree, len(x), self._coefficients.shape[2]))
        variance = np.zeros(terms.shape[1:])
        for r in range(1, degree + 1):
            order = self._order(r)
            inner = _power(products + order.common * sums[:, None] * self._sums, r)  # (psi . M x)^r
            z = _matmul(_measurements(inner.T)[order.rows].T, order.whitener.T)
            terms[r - 1] = _matmul(z, order.whitened)
            prior = (squares + order.common * sums**2) ** r  # (x . M x)^r
            left = prior - np.einsum("mp,mp->m", z, z)
            left[left < _ROUNDING * prior] = 0
            variance += left[:, None] * order.variance
        return terms, np.sqrt(variance)

    def _order(self, r: int) -> _Order:
        if r not in self._orders:
            self._orders[r] = self._factor(r)
        return self._orders[r]

    def _factor(self, r: int) -> _Order:
        values = _measurements(self._coefficients[r - 1])
        inner = _InnerProducts(self._directions)
        rows, scale, factor = _independent_rows(inner, r, 0.0)
        few = slice(_MAX_LIKELIHOOD_ROWS)
        common = _choose_common(self._directions, rows[few], values[rows[few]], r)
        if common:
            rows, scale, factor = _independent_rows(inner, r, common)
        whitener = solve_triangular(factor, np.eye(len(rows)), lower=True) * scale
        whitened = whitener @ values[rows]
        return _Order(common, rows, whitener, whitened, np.mean(whitened**2, axis=0))


class _InnerProducts:
    """Inner products of directions, from which the Gram matrix of any order and prior follows."""

    def __init__(self, directions: np.ndarray) -> None:
        sums = directions.sum(axis=1)
        self._real = not np.iscomplexobj(directions)
        self._plain, self._plain_sums = directions @ directions.T, np.outer(sums, sums)
        if not self._real:
            self._hermitian, self._hermitian_sums = directions @ directions.conj().T, np.outer(sums, sums.conj())

    def __len__(self) -> int:
        return len(self._plain)

    def gram(self, r: int, common: float) -> np.ndarray:
        """Return the Gram matrix of the measurements ``[Re c, Im c]``; only ``Re`` if all directions are real."""
        a = _power(self._plain + common * self._plain_sums, r)  # (Psi M Psi^T)^r
        if self._real:
            return a
        b = _power(self._hermitian + common * self._hermitian_sums, r)  # (Psi M Psi^H)^r
        return np.block([[a.real + b.real, a.imag - b.imag], [a.imag + b.imag, b.real - a.real]]) / 2


def _independent_rows(inner: _InnerProducts, r: int, common: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return measurements that determine all others, most informative first, and the factor of their Gram matrix.

    Returns:
        The rows ``(p,)``, ``1 / sd`` of each under the prior ``(p,)``, and the lower Cholesky factor ``(p, p)`` of the
        Gram matrix that these scale to unit diagonal.
    """
    gram = inner.gram(r, common)
    diagonal = np.diagonal(gram)
    size = diagonal.reshape(-1, len(inner)).sum(axis=0)  # Re plus Im: (psi . M conj(psi))^r
    kept = np.flatnonzero(diagonal > _ROUNDING * np.tile(size, len(diagonal) // len(inner)))
    if not len(kept):
        raise ConfigurationError("`directions` are all zero, which measures nothing: sketch along others.")
    scale = 1 / np.sqrt(diagonal[kept])
    factor, pivots, rank, _ = dpstrf(gram[np.ix_(kept, kept)] * scale * scale[:, None], tol=_REDUNDANT, lower=1)
    chosen = pivots[:rank] - 1
    return kept[chosen], scale[chosen], np.tril(factor[:rank, :rank])


def _choose_common(directions: np.ndarray, rows: np.ndarray, y: np.ndarray, r: int) -> float:
    """Return the ``a`` of the grid that maximises the marginal likelihood, with ``s_r^2`` of each output profiled out.

    Args:
        directions: ``(K, n)``.
        rows: ``(p,)``, the measurements used; independent, so that ``G`` is regular for every ``a``.
        y: ``(p, O)``, their values.
        r: order.
    """
    y = y[:, y.any(axis=0)]  # an output that never changes has s_r = 0 and says nothing of `a`
    y = y[:, :: max(1, y.shape[1] // _MAX_LIKELIHOOD_OUTPUTS)]
    y = y / np.abs(y).max(axis=0)  # so that no square below underflows
    used, position = np.unique(rows % len(directions), return_inverse=True)
    part = position + len(used) * (rows // len(directions))
    inner = _InnerProducts(directions[used])
    best, best_likelihood = 0.0, -math.inf
    for common in COMMON_MODE_GRID:
        gram = inner.gram(r, common)[np.ix_(part, part)]
        try:
            factor = cholesky(gram, lower=True)
        except LinAlgError:  # the common mode drowns what tells measurements apart, as does any larger
            break
        variance = np.mean(solve_triangular(factor, y, lower=True) ** 2, axis=0)
        # log p(y | a) = -1/2 (p log s^2 + log det G) + const, summed over outputs
        likelihood = -len(y) * np.log(variance).sum() / 2 - y.shape[1] * np.log(np.diagonal(factor)).sum()
        if likelihood > best_likelihood:
            best, best_likelihood = common, likelihood
    return best


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply by torch, whose threads wait for each other far less than numpy's where the processor is shared."""
    product: np.ndarray = (torch.from_numpy(a.astype(b.dtype, copy=False)) @ torch.from_numpy(b)).numpy()
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
