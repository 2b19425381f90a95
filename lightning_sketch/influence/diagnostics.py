"""Whether a model is one that influence functions may be trusted on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sketch.influence.fit import Fit
from lightning_sketch.influence.jacobian import NetworkPoints

STATIONARY = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class Stationarity:
    """How far the model is from a minimum of the penalised loss, ``r = J' w g + Lam (theta - centre)``.

    First order and Newton in the convention ``"fixed"`` need no minimum to give the answer of the model to a removal;
    the convention ``"per_example"`` and the ridge part of a loss change do. For a given kernel, whose parameters are
    not known, everything is measured by what it changes in the training outputs (times ``J``).

    Args:
        residual: ``||r||``, unpenalised parameters included.
        relative: ``||r|| / (||J' w g|| + Lam ||theta - centre||)``, from 0 at a minimum to 1.
        representer_gap: ``||theta - centre - J' a|| / ||theta - centre||``, 0 at a minimum.
    """

    residual: float
    relative: float
    representer_gap: float

    @property
    def stationary(self) -> bool:
        """Whether ``relative`` is at most 1e-3."""
        return self.relative <= STATIONARY


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics:
    """What to look at before influence functions are believed.

    Args:
        stationarity: see there; None for a given kernel without ``centre_outputs``.
        linearity_gap: ``||f(theta) - f(centre) - J (theta - centre)|| / ||f(theta) - f(centre)||`` over the training
            outputs: 0 for a model linear in its parameters. None without a ``centre``. How linear the model is over a
            single deletion is :meth:`KernelInfluence.linearity_gap`.
        condition: condition number of the factorised matrix; float64 loses as many digits as it has. None for the
            solver ``"matrix_free"``.
        leverage: ``(n,)``, of each example, from 0 to 1: how far the fit follows it. Near 1, first order is far from
            Newton, which divides by ``1 - leverage``. None for the solver ``"matrix_free"``.
    """

    stationarity: Stationarity | None
    linearity_gap: float | None
    condition: float | None
    leverage: Tensor | None

    def __repr__(self) -> str:
        def number(value: float | None) -> str:
            return "not known" if value is None else f"{value:.3g}"

        relative = None if self.stationarity is None else self.stationarity.relative
        leverage = None if self.leverage is None else float(self.leverage.max())
        return (
            f"Diagnostics(stationarity={number(relative)}, linearity gap={number(self.linearity_gap)}, "
            f"condition={number(self.condition)}, largest leverage={number(leverage)})"
        )


def of_network(fit: Fit, points: NetworkPoints, centre: tuple[Tensor, Tensor] | None) -> Stationarity:
    """Measure the gradient of the penalised loss at the trained parameters; the centre None is zero."""
    displacement = points.network.trained[0] - (0 if centre is None else centre[0])
    of_losses = points.pull(fit.weighted_gradient)[:, 0]
    of_unpenalized = of_losses[:0] if points.basis is None else (points.basis.T @ fit.weighted_gradient)[:, 0]
    of_ridge = fit.ridge * displacement
    return _stationarity(of_losses, of_unpenalized, of_ridge)


def of_kernel(fit: Fit, centre_outputs: Tensor) -> Stationarity:
    """Measure the same by what it changes in the training outputs, ``J r = Lam (f - centre_outputs - B b - K a)``.

    The coefficients ``b`` of the basis, which are not known, are those of least squares.
    """
    of_ridge = fit.ridge * fit.pack(fit.points.outputs - centre_outputs)
    basis, of_basis = fit.points.basis, of_ridge[:0]
    if basis is not None:
        of_basis = basis.T @ fit.weighted_gradient
        of_ridge = of_ridge - basis @ torch.linalg.lstsq(basis, of_ridge - fit.ridge * fit.kernel_dual).solution
    return _stationarity(-fit.ridge * fit.kernel_dual, of_basis, of_ridge)


def _stationarity(of_losses: Tensor, of_unpenalized: Tensor, of_ridge: Tensor) -> Stationarity:
    residual = torch.cat([of_losses + of_ridge, of_unpenalized]).norm()
    scale = torch.cat([of_losses, of_unpenalized]).norm() + of_ridge.norm()
    gap = (of_losses + of_ridge).norm() / of_ridge.norm()
    return Stationarity(float(residual), float(residual / scale) if scale else 0.0, float(gap))


def step_gap(points: NetworkPoints, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> float:
    """Return how far outputs are from linear between two sets of parameters, relative to their change."""
    change = points.outputs_at(*end) - points.outputs_at(*start)
    linear = points.push((end[0] - start[0])[:, None])
    if points.basis is not None:
        linear = linear + points.basis @ (end[1] - start[1])[:, None]
    return float((change - linear.reshape(change.shape)).norm() / change.norm())
