"""Prior covariances of what deletions do, and the Gram matrices of measurements under them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg.lapack import dpstrf

from lightning_sketch.prediction.estimators.arrays import matmul, power

_REDUNDANT = 1e-10  # prior variance, of 1, that a measurement must add to those already used
ROUNDING = 1e-12  # part of a prior variance below which it is rounding: zero by construction


@dataclass(frozen=True)
class Prior:
    """Mean and covariance of the numbers ``<F_r, u^(x r)>``, the latter up to the output's own scale ``s_r^2``.

    ``k(u, v) = (u . M v)^r + b sum_i (S_i^2 u_i v_i)^r``,
    ``M = (S (I + a 1 1^T) S + g Phi Phi^T + h Gamma Gamma^T) / (1 + a + g + h)``. ``S`` is diagonal: at order 1 the
    identity, above it the size of the first-order effects of each unit, for what has twice the effect at first order
    has four times that at the second.

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


class Vectors:
    """Vectors ``u`` in unit space, and what the priors' ``u . M conj(u)`` are made of.

    Args:
        array: ``(k, n)``, real or complex.
        maps: ``(n, q)`` each, ``Gamma`` of ``gradients`` and ``Phi`` of ``effects``, where priors use them.
        scale: ``(n,)``, ``S``; None for ones.
    """

    def __init__(
        self, array: np.ndarray, maps: Mapping[str, np.ndarray] | None = None, scale: np.ndarray | None = None
    ) -> None:
        self.array = array if scale is None else array * scale
        self.sums = self.array.sum(axis=1)
        self.shared = {name: matmul(array, shared) for name, shared in (maps or {}).items()}

    def conj(self) -> "Vectors":
        """Return the complex conjugates."""
        other = Vectors(self.array.conj())
        other.shared = {name: shared.conj() for name, shared in self.shared.items()}
        return other

    def sizes(self, prior: Prior) -> np.ndarray:
        """Return ``sqrt(u . M conj(u))``, ``(k,)``; 1 for ``u = 0``."""
        square = (np.abs(self.array) ** 2).sum(axis=1) + prior.common * np.abs(self.sums) ** 2
        for name, shared in self.shared.items():
            square = square + getattr(prior, name) * (np.abs(shared) ** 2).sum(axis=1)
        size = np.sqrt(square / total_weight(prior))
        return np.where(size > 0, size, 1)

    def variance(self, prior: Prior, r: int) -> np.ndarray:
        """Return ``k(u, u)``, ``(k,)``, of real vectors, scaled to ``u . M u = 1``."""
        result: np.ndarray = np.where(self.array.any(axis=1), 1.0, 0.0)
        if prior.diagonal and r > 1:
            powers = power(self.array / self.sizes(prior)[:, None], r)
            result += prior.diagonal * np.einsum("kn,kn->k", powers, powers)
        return result


class Pairs:
    """The kernels of order ``r`` of any prior between two sets of vectors; contracts each pair of them once."""

    def __init__(self, left: Vectors, right: Vectors, r: int) -> None:
        self.left, self.right, self.r = left, right, r

    @cached_property
    def _plain(self) -> np.ndarray:
        return matmul(self.left.array, self.right.array.T)

    @cached_property
    def _shared(self) -> dict[str, np.ndarray]:
        return {name: matmul(shared, self.right.shared[name].T) for name, shared in self.left.shared.items()}

    @cached_property
    def _powers(self) -> np.ndarray:
        return matmul(power(self.left.array, self.r), power(self.right.array, self.r).T)

    def kernel(self, prior: Prior) -> np.ndarray:
        """Return ``k(u, v)``, ``(left, right)``, of vectors scaled to ``u . M conj(u) = 1``."""
        left, right = self.left.sizes(prior)[:, None], self.right.sizes(prior)
        inner = self._plain
        if prior.common:
            inner = inner + prior.common * np.outer(self.left.sums, self.right.sums)
        for name, shared in self._shared.items():
            if weight := getattr(prior, name):
                inner = inner + weight * shared
        result = power(inner / (total_weight(prior) * left * right), self.r)
        if prior.diagonal and self.r > 1:
            result = result + prior.diagonal * (self._powers / left**self.r / right**self.r)
        return result


class Gram:
    """The Gram matrices of order ``r`` of any prior of the measurements ``[Re c, Im c]`` along some directions."""

    def __init__(self, directions: Vectors, r: int) -> None:
        self.directions, self.r = directions, r
        self._pairs = Pairs(directions, directions, r)
        self._conjugate = Pairs(directions, directions.conj(), r) if np.iscomplexobj(directions.array) else None

    def __call__(self, prior: Prior) -> np.ndarray:
        """Return ``(2 K, 2 K)``; only ``Re``, ``(K, K)``, if all directions are real."""
        a = self._pairs.kernel(prior)
        if self._conjugate is None:
            return a
        b = self._conjugate.kernel(prior)
        return np.block([[a.real + b.real, a.imag - b.imag], [a.imag + b.imag, b.real - a.real]]) / 2


def total_weight(prior: Prior) -> float:
    """Return ``1 + a + g + h``."""
    return 1 + prior.common + prior.gradients + prior.effects


def independent_rows(gram_of: Gram, prior: Prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return measurements that determine all others, most informative first, and the factor of their Gram matrix.

    Returns:
        The rows ``(p,)``, ``1 / sd`` of each under the prior ``(p,)``, and the lower Cholesky factor ``(p, p)`` of the
        Gram matrix that these scale to unit diagonal.
    """
    gram = gram_of(prior)
    diagonal = np.diagonal(gram)
    kept = np.flatnonzero(diagonal > ROUNDING)
    scale = 1 / np.sqrt(diagonal[kept])
    factor, pivots, rank, _ = dpstrf(gram[np.ix_(kept, kept)] * scale * scale[:, None], tol=_REDUNDANT, lower=1)
    chosen = pivots[:rank] - 1
    return kept[chosen], scale[chosen], np.tril(factor[:rank, :rank])
