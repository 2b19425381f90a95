"""What gradients alone say of a deletion: a prior mean for the kernel estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_sketch.features import UnitFeatures

# Ridges of the influence functions, in mean eigenvalues of the second moment of the gradients among the units.
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence functions of units on outputs, and how deletions interact through the curvature of their losses.

    Order 1: ``g_u(s) . (C_s + l I)^-1 . g_t`` with the gradient ``g_u(s)`` of unit ``u`` at a point ``s`` of training,
    their second moment ``C_s``, a ridge ``l`` of :data:`RIDGES` and the gradient ``g_t`` of an output at the end (Koh &
    Liang, *Understanding black-box predictions via influence functions*, arXiv 1703.04730, equation 2, with the ridge
    in the place of what training has not unlearned).

    Higher orders: deleting unit ``u`` takes its curvature away, ``k_u g_u g_u^T`` for a loss that is a function of one
    number. With the first-order effects ``E_ut`` of units on outputs and ``W_vu`` of unit ``v`` on the loss of
    ``u``, all orders are ``sum_u y_u E_ut`` with ``y_u = x_u (1 + k_u sum_v y_v W_vu)``, a Newton step with that
    curvature (Pregibon, *Logistic regression diagnostics*, section 4). ``k_u`` is ``1 / (exp(l_u) - 1)`` for minus the
    log-likelihood ``l_u`` of one of two classes.

    Args:
        features: of the units; the last point must be the end of training.
        gradients: ``(O, m)``, of the outputs at the end of training, projected as the features are.
        displacements: ``(K, m)`` complex, the first-order coefficients of the parameters along the directions,
            projected likewise.
        num_points: how many of the points order 1 takes, the last of as many even runs of them; None is all.
    """

    features: UnitFeatures
    gradients: np.ndarray
    displacements: np.ndarray
    num_points: int | None = None

    def of(self, gradients: np.ndarray) -> Influence:
        """Return the influences on other outputs."""
        return replace(self, gradients=gradients)

    def at_points(self, count: int) -> Influence:
        """Return the influences at so many of the points, at least one."""
        return replace(self, num_points=max(1, min(count, len(self.features.array))))

    @property
    def of_units(self) -> Influence:
        """The influences on the units' own losses."""
        return self.of(self.features.array[-1].astype(np.float64))

    @cached_property
    def unit_coefficients(self) -> np.ndarray:
        """First-order coefficients of the units' own losses along the directions, ``(K, n)``."""
        products: np.ndarray = self.displacements @ self.features.array[-1].T
        return products

    @cached_property
    def curvatures(self) -> np.ndarray:
        """``k_u``, ``(n,)``, scaled to a mean of 1; 0 for losses that are no minus log-likelihoods."""
        losses = self.features.losses[-1].astype(np.float64)
        curvature = np.where(losses > 0, 1 / np.expm1(np.clip(losses, np.finfo(np.float32).eps, 700)), 0.0)
        result: np.ndarray = curvature / max(float(curvature.mean()), np.finfo(np.float64).tiny)
        return result

    @cached_property
    def _factors(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each point taken: left singular vectors ``(n, p)``, filters ``(ridges, p)``, right factors ``(p, O)``."""
        found = []
        recorded = len(self.features.array)
        count = self.num_points or recorded
        for point in (-(-recorded * i // count) - 1 for i in range(1, count + 1)):
            gradients, (left, squares) = self.features.array[point], self.features.spectra[point]
            mean = squares.sum() / len(left) + np.finfo(np.float64).tiny
            filters = np.stack([mean / (squares + ridge * mean) for ridge in RIDGES])
            found.append((left, filters, (left.T @ gradients) @ self.gradients.T / mean))
        return found

    def first(self, vectors: np.ndarray, outputs: slice = slice(None)) -> np.ndarray:
        """Return the order-1 terms of deletions ``(k, n)``, one for each point and ridge, ``(Q, k, O)``."""
        parts = [
            (vectors @ left * each) @ right[:, outputs] for left, filters, right in self._factors for each in filters
        ]
        return np.stack(parts)

    def first_sum(self, vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the order-1 terms of deletions ``(k, n)`` summed with ``weights``, ``(Q,)``: ``(k, O)``."""
        total = np.zeros((len(vectors), len(self.gradients)), dtype=vectors.dtype)
        for (left, filters, right), some in zip(self._factors, weights.reshape(-1, len(RIDGES)), strict=True):
            total += (vectors @ left * (some @ filters)) @ right
        return total

    def higher(self, vectors: np.ndarray, r: int, effects: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the terms of order ``r`` of deletions ``(k, n)`` up to a factor of the curvatures, ``(k, O)``.

        Args:
            vectors: the deletions.
            r: order, at least 2.
            effects: ``(n, O)``, first-order effects of units on outputs.
            own: ``(n, n)``, of units on the units' losses.
        """
        changes = vectors
        for _ in range(r - 1):
            changes = vectors * self.curvatures * (changes @ own)
        return changes @ effects
