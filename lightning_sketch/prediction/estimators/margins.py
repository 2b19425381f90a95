"""Losses as functions of margins, whose series are nearer to linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_sketch.jets import JetTensor
from lightning_sketch.prediction.estimators.base import Estimator, Expansion
from lightning_sketch.prediction.estimators.kernel import KernelEstimator

# Losses below so many units of their rounding have no margin: it would be rounding.
_LEAST_LOSS = 100.0
_ROUNDING = 1e-9  # of an order's coefficients, allowed on the way to margins and back


@dataclass(frozen=True)
class Margins:
    """The margins of losses at the end of the run, and series of the one from those of the other.

    A loss that is minus the log-likelihood of an example, ``l = -log p``, is ``-log sigmoid(m)`` of its margin
    ``m = log(p / (1 - p))`` (Park et al., *TRAK*, arXiv 2303.14186, section 3), whatever the model. Here a margin is
    shifted and scaled so that its value and its first order are those of the loss,
    ``l_0 + l'(m_0) (m - m_0)``; only higher orders differ.

    Args:
        losses: ``(O,)`` float64, at the end of the run.
        having: ``(O,)`` bool, which of them have margins; the others are left as they are.
    """

    losses: np.ndarray
    having: np.ndarray

    @classmethod
    def of(cls, losses: Tensor) -> Margins:
        """Return the margins of losses ``(*out)``, in the dtype that they were computed in."""
        flat = losses.detach().cpu().double().reshape(-1).numpy()
        return cls(flat, flat > _LEAST_LOSS * torch.finfo(losses.dtype).eps)

    def of_losses(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the coefficients of the margins from those of the losses, orders from 1 on, ``(R, K, O)``."""
        result, having = coefficients.copy(), self.having
        _, series = _compose(_margin, self.losses[having], coefficients[..., having])
        result[..., having] = series * self._slope
        return result

    def to_losses(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the coefficients of the losses from those of the margins, orders from 1 on, ``(R, m, O)``."""
        result, having = coefficients.copy(), self.having
        _, series = _compose(_loss, self._margin, coefficients[..., having] / self._slope)
        result[..., having] = series
        return result

    def slopes(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the coefficients of ``dl / dm`` from those of the margins, orders from 0 on, ``(R, m, O)``."""
        result, having = np.zeros(coefficients.shape), self.having
        result[0] = 1
        value, series = _compose(_loss_slope, self._margin, coefficients[..., having] / self._slope)
        result[0][:, having] = value / self._slope
        result[1:, :, having] = series[:-1] / self._slope
        return result

    def changes(self, changes: np.ndarray) -> np.ndarray:
        """Return the changes of the losses under changes of the margins, ``(m, O)``."""
        result, having = changes.copy(), self.having
        margins = self._margin + changes[:, having] / self._slope
        result[:, having] = _loss(torch.from_numpy(margins)).numpy() - self.losses[having]
        return result

    @cached_property
    def _margin(self) -> np.ndarray:
        margins: np.ndarray = _margin(torch.from_numpy(self.losses[self.having])).numpy()
        return margins

    @cached_property
    def _slope(self) -> np.ndarray:
        slope: np.ndarray = np.expm1(-self.losses[self.having])
        return slope


class MarginEstimator(Estimator):
    """Regression of margins, from which the Taylor terms of losses follow.

    The terms of a loss are composed of those of its margin. Where the directions span a deletion they are those of
    :class:`KernelEstimator`, whatever the loss. Elsewhere it has less to estimate: how a loss bends with its own
    margin is known, which is most of its second order (``examples/benchmarks/README.md``).

    The standard error of an order ``q`` of the margin is, in a sum of the terms of the loss up to degree ``r``,
    multiplied by the derivative of that sum, the series of ``dl / dm`` up to order ``r - q``.

    Args:
        kernel: of the margins.
        margins: of the outputs.
    """

    def __init__(self, kernel: KernelEstimator, margins: Margins) -> None:
        self._kernel, self._margins = kernel, margins

    def expand(self, x: np.ndarray, degree: int) -> Expansion:
        """See :meth:`Estimator.expand`; ``beyond`` holds the orders left out, were the margin a polynomial."""
        margins, errors = self._kernel.each_order(x, degree)
        terms = self._margins.to_losses(margins)
        slopes = np.abs(self._margins.slopes(margins).cumsum(axis=0))
        stderr = np.stack([self._kernel.join_errors(errors[:r] * slopes[:r][::-1])[-1] for r in range(1, degree + 1)])
        return Expansion(terms, stderr, self._margins.changes(margins.sum(axis=0)) - terms.sum(axis=0))

    def measured(self, x: np.ndarray) -> np.ndarray:
        """See :meth:`Estimator.measured`."""
        return self._kernel.measured(x)


def best_of_losses(kernel: KernelEstimator, coefficients: np.ndarray, margins: Margins) -> Estimator:
    """Return the estimator of losses or of margins, whichever better predicts every direction from the others.

    Compared are densities of the second order, on which losses and margins first differ. Losses whose
    coefficients do not come back from those of their margins, for rounding (at degrees of 20 and more) or overflow, are
    left as they are.

    Args:
        kernel: of the losses.
        coefficients: ``(R, K, O)`` complex128, of the losses.
        margins: of the losses.
    """
    if len(coefficients) == 1:
        return kernel
    with np.errstate(all="ignore"):
        of_margins = margins.of_losses(coefficients)
        error = np.abs(margins.to_losses(of_margins) - coefficients).max(axis=1)
        exact = (error <= _ROUNDING * np.abs(coefficients).max(axis=1)).all(axis=0)
    margins = replace(margins, having=margins.having & exact)
    if not margins.having.any():
        return kernel
    other = kernel.with_higher_orders(np.where(margins.having, of_margins, coefficients))
    return MarginEstimator(other, margins) if other.density(2) > kernel.density(2) else kernel


def _margin(loss: Tensor) -> Tensor:
    return -(loss + torch.log(-torch.expm1(-loss)))


def _loss(margin: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(margin)


def _loss_slope(margin: Tensor) -> Tensor:
    return -torch.sigmoid(-margin)


def _compose(
    function: Callable[[Tensor], Tensor], values: np.ndarray, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return an elementwise function of values ``(O,)``, and its coefficients from theirs, ``(R, K, O)``."""
    parts = [coefficients.real, coefficients.imag] if np.iscomplexobj(coefficients) else [coefficients]
    block = torch.from_numpy(np.stack(parts, axis=1))
    jet = function(JetTensor(torch.from_numpy(values), block))
    assert isinstance(jet, JetTensor)
    found = jet.coefficients.numpy()
    series = found[:, 0] + 1j * found[:, 1] if np.iscomplexobj(coefficients) else found[:, 0]
    return jet.primal.numpy(), series
