"""The dual solver: one Cholesky factor of the size of the outputs, ``N x N`` (arXiv 2605.11239)."""

from functools import cached_property

import torch
from torch import Tensor

from lightning_sketch.influence.jacobian import Points
from lightning_sketch.influence.response import FactoredResponse, blockwise, by_example, cholesky


class DualResponse(FactoredResponse):
    """``G = (K - K Q K) / ridge`` with ``Q = S M^-1 S'``, ``M = ridge I + S' K S`` and ``D = S S'``.

    ``M`` has the non-zero spectrum of the primal Hessian. Neither ``K`` is inverted nor ``D``, which is singular for a
    softmax.

    Args:
        points: training points.
        kernel: ``K``, ``(N, N)``, positive semidefinite.
        hessian: ``D``, ``(n, c, c)``.
        root: ``S``, ``(n, c, c)``.
        ridge: positive.
    """

    def __init__(self, points: Points, kernel: Tensor, hessian: Tensor, root: Tensor, ridge: float) -> None:
        super().__init__(points, hessian, ridge)
        self._kernel = kernel
        self._root = root
        self._factor = cholesky(self._system(), ridge)

    def condition(self) -> float:
        """Return that of ``M``, from its eigenvalues."""
        values = torch.linalg.eigvalsh(self._system())
        return float(values[-1] / values[0])

    def _system(self) -> Tensor:
        m = blockwise(self._root.mT, blockwise(self._root.mT, self._kernel).T)
        m.diagonal().add_(self.ridge)
        return m

    def _half(self, columns: Tensor) -> Tensor:
        """``L^-1 S' K[:, columns]`` with ``M = L L'``."""
        return torch.linalg.solve_triangular(self._factor, blockwise(self._root.mT, columns), upper=False)

    @cached_property
    def _half_kernel(self) -> Tensor:
        return self._half(self._kernel)

    def _times(self, u: Tensor) -> Tensor:
        # K (u - S M^-1 S' K u) / ridge
        inner = torch.cholesky_solve(blockwise(self._root.mT, self._kernel @ u), self._factor)
        return self._kernel @ (u - blockwise(self._root, inner)) / self.ridge

    def _block(self, examples: Tensor) -> Tensor:
        size = self.hessian.shape[1]
        rows = (examples[:, None] * size + torch.arange(size, device=examples.device)).flatten()
        columns = self._kernel[:, rows]
        half = self._half(columns)
        return (columns[rows] - half.T @ half) / self.ridge

    def _diagonal(self) -> Tensor:
        n, size, _ = self.hessian.shape
        halves = by_example(self._half_kernel.T, self.hessian)  # (n, c, N)
        own = torch.diagonal(self._kernel.reshape(n, size, n, size), dim1=0, dim2=2).permute(2, 0, 1)
        return (own - halves @ halves.mT) / self.ridge

    def _cross(self, test: Points) -> Tensor:
        kernel = test.cross(self.points)
        return (kernel - self._half(kernel.T).T @ self._half_kernel) / self.ridge
