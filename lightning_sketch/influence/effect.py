"""What deletions do to a model's outputs, and to its loss, at given points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_sketch.influence.deletions import many_deletions, one_deletion
from lightning_sketch.influence.fit import Fit, Mode
from lightning_sketch.influence.jacobian import Points


@dataclass(frozen=True, eq=False, repr=False)
class LossChange:
    """Predicted change of the loss at ``t`` points, in the units of the loss, float64.

    Args:
        baseline: ``(t,)``, the loss of the model as it is.
        change: ``(*m, t)``, the loss at the predicted outputs minus ``baseline``.
        linear: ``(*m, t)``, ``g' df`` with the gradient ``g`` of the loss (arXiv 2605.11239, eqs. 3 and 9).
        ridge: ``(*m)``, ``(Lam / n) a' K da``, first-order change of the ridge term that the paper counts to the loss
            of every point: add it to ``linear`` for the paper's loss change. It takes the model to be a minimum.
    """

    baseline: Tensor
    change: Tensor
    linear: Tensor
    ridge: Tensor

    def __repr__(self) -> str:
        return f"LossChange(shape={tuple(self.change.shape)}, mean change={float(self.change.mean()):.4g})"


@dataclass(frozen=True, eq=False, repr=False)
class OutputChange:
    """Predicted outputs after a deletion; of ``m`` deletions every field but ``baseline`` has them first. Float64.

    Args:
        baseline: ``(t, *out)``, outputs of the model as it is.
        value: ``(*m, t, *out)``, the outputs predicted without the deleted examples.
        change: ``(*m, t, *out)``, ``value - baseline`` (arXiv 2605.11239, eqs. 2 and 8).
        loss: the change of the loss; None if no targets were given.
    """

    baseline: Tensor
    value: Tensor
    change: Tensor
    loss: LossChange | None

    def __repr__(self) -> str:
        return f"OutputChange(shape={tuple(self.change.shape)}, mean change={float(self.change.mean()):.4g})"


class KernelEffect:
    """Predicts outputs and losses at prepared points under any deletion; see :meth:`KernelInfluence.prepare`.

    Args:
        fit: the fit.
        points: where to predict.
        targets: for losses; or None.
    """

    def __init__(self, fit: Fit, points: Points, targets: Tensor | None) -> None:
        self._fit = fit
        self._points = points
        self._targets = None if targets is None else fit.loss.targets(targets.detach(), points.outputs)
        self.baseline = points.outputs.reshape(-1, *points.output_shape)

    def delete(
        self, examples: Sequence[int] | None = None, *, weights: ArrayLike | None = None, mode: Mode = "newton"
    ) -> OutputChange:
        """Predict one deletion, given in exactly one of two ways.

        Args:
            examples: rows of the training data to delete.
            weights: ``(n,)``, the deletion weight ``x`` of every example: 1 deletes it, 0 keeps it, a fraction
                downweights it and a negative number upweights it.
            mode: ``"newton"``, ``"first_order"``; or ``"exact"``, which is ``"newton"`` where that is exact, and
                refused for losses other than the squared one.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        change, ridge = self._change(one_deletion(examples, weights, self._fit.points.outputs), mode)
        return self._result(change, ridge)

    def delete_many(
        self, sets: Sequence[Sequence[int]] | NDArray[Any] | Tensor, *, mode: Mode = "newton"
    ) -> OutputChange:
        """Predict ``m`` deletions.

        Args:
            sets: a list of lists of examples; or an array of deletion weights, ``(m, n)``.
            mode: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        answers = [self._change(x, mode) for x in many_deletions(sets, self._fit.points.outputs)]
        changes, ridges = zip(*answers, strict=True)
        return self._result(torch.stack(changes), torch.stack(ridges))

    def leave_one_out(self, *, mode: Mode = "newton") -> OutputChange:
        """Predict the deletion of each example alone: row ``i`` of ``(n, t, *out)`` deletes example ``i``.

        All come from one factor. The solver ``"matrix_free"`` has no factor and solves one system for each example.

        Args:
            mode: as in :meth:`delete`.

        Raises:
            ConfigurationError: any argument that can not be right.
        """
        fit = self._fit
        if fit.solver == "matrix_free":
            return self.delete_many([[i] for i in range(fit.n)], mode=mode)
        response, shared, own = fit.leave_one_out(mode)
        cross = response.cross(self._points)
        per_example = cross.reshape(len(cross), *own.shape[:2])
        change = (cross @ shared) + torch.einsum("tnc,ncr->ntr", per_example, own)
        y = fit.ridge_weights(response)
        ridge = (y * shared).sum() + (y.reshape(own.shape) * own).sum(dim=(1, 2))
        return self._result(fit.unpack(change), ridge / fit.n * fit.ridge)

    def _change(self, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        fit = self._fit
        answer = fit.answer(x, mode)
        da = answer.coefficients()
        change = self._points.times(fit.points, da)
        if self._points.basis is not None:
            change = change + self._points.basis @ answer.basis_change()
        return fit.unpack(change), fit.ridge / fit.n * (fit.kernel_dual * da).sum()

    def _result(self, change: Tensor, ridge: Tensor) -> OutputChange:
        loss = None if self._targets is None else self._loss(change, ridge, self._targets)
        return OutputChange(self.baseline, self.baseline + change, change, loss)

    def _loss(self, change: Tensor, ridge: Tensor, targets: Any) -> LossChange:
        loss, outputs = self._fit.loss, self._points.outputs
        df = change.reshape(-1, *outputs.shape)
        baseline = loss.value(outputs, targets)
        after = torch.stack([loss.value(outputs + d, targets) for d in df])
        linear = (loss.gradient(outputs, targets) * df).sum(dim=-1)
        shape = (*ridge.shape, len(outputs))
        return LossChange(baseline, (after - baseline).reshape(shape), linear.reshape(shape), ridge)
