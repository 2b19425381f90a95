"""The matrix-free solver: conjugate gradients on the dual system, for what is too large to factorise."""

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence.jacobian import Points
from lightning_sketch.influence.response import Response, blockwise

TOLERANCE = 1e-14  # of the residual that the recurrence keeps; outputs lose digits to cancellation
ACCEPTED = 1e-8  # of the true residual
MOST_ITERATIONS = 2000


class MatrixFreeResponse(Response):
    """``G`` by conjugate gradients on ``M = ridge I + S' K S``, where ``K v = J (J' v)`` is never formed.

    An iteration takes a product with ``J'`` and one with ``J`` over the training points. There is no factor to share,
    so a removal solves its own system, with the weights lowered.

    Args:
        points: training points.
        hessian: ``D``, ``(n, c, c)``.
        root: ``S``, ``(n, c, c)``.
        ridge: positive.
    """

    def __init__(self, points: Points, hessian: Tensor, root: Tensor, ridge: float) -> None:
        super().__init__(points, hessian, ridge)
        self._root = root

    def removed(self, u: Tensor, examples: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Response.removed`: here ``f`` comes first, and ``z = x D_S f_S`` from it."""
        kept = torch.ones(len(self.hessian), dtype=u.dtype, device=u.device)
        kept[examples] -= fractions
        kept = kept[:, None, None]
        lowered = MatrixFreeResponse(self.points, kept * self.hessian, kept.sqrt() * self._root, self.ridge)
        f = lowered.times(u)
        return u + blockwise((1 - kept) * self.hessian, f), f

    def _times(self, u: Tensor) -> Tensor:
        # K (u - S M^-1 S' K u) / ridge
        inner = self._solve(blockwise(self._root.mT, self._kernel(u)))
        return self._kernel(u - blockwise(self._root, inner)) / self.ridge

    def _kernel(self, v: Tensor) -> Tensor:
        return self.points.times(self.points, v)

    def _system(self, v: Tensor) -> Tensor:
        return self.ridge * v + blockwise(self._root.mT, self._kernel(blockwise(self._root, v)))

    def _solve(self, right: Tensor) -> Tensor:
        """Solve ``M x = right`` for every column, to a residual of ``TOLERANCE`` times the column's norm."""
        x = torch.zeros_like(right)
        residual, direction = right.clone(), right.clone()
        square = residual.square().sum(dim=0)
        goal = TOLERANCE**2 * square
        for _ in range(MOST_ITERATIONS):
            if (square <= goal).all():
                break
            product = self._system(direction)
            # A column that has arrived stays where it is
            step = torch.where(square > goal, square / (direction * product).sum(dim=0), 0.0)
            x += step * direction
            residual -= step * product
            previous, square = square, residual.square().sum(dim=0)
            direction = residual + torch.where(previous > 0, square / previous, 0.0) * direction
        # The residual of the recurrence falls on where the true one has met rounding
        left = float((right - self._system(x)).norm() / right.norm().clamp(min=torch.finfo(right.dtype).tiny))
        if left > ACCEPTED:
            raise ConfigurationError(
                f"`ridge` is {self.ridge:.3g}: conjugate gradients have a relative residual of {left:.1g} after at "
                f"most {MOST_ITERATIONS} iterations; raise the ridge, or use solver='dual' on fewer examples."
            )
        return x
