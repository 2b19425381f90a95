"""How outputs answer to a source: what every solver, dual, primal or matrix-free, has in common.

``N = n c`` rows are examples with ``c`` outputs each, the outputs of an example next to each other.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence.jacobian import Points


class Response(ABC):
    """The map ``G`` from a source ``u`` to the change ``f = G u`` of the training outputs, symmetric ``(N, N)``.

    It solves the Newton system of a penalised fit in its dual coefficients (arXiv 2605.11239, eq. 13, divided by the
    factor ``K`` that all its terms share): ``D f + ridge da = u``, ``f = K da + B db``, ``B' da = 0``, where ``D`` is
    the Hessian of the weighted losses in the outputs, ``K`` the kernel, ``B`` the derivative by the parameters that are
    not penalised and ``db`` their change. Without these, ``G = K (ridge I + D K)^-1 = J H^-1 J'`` with the Gauss-Newton
    Hessian ``H = J' D J + ridge I``.

    Args:
        points: training points.
        hessian: ``D``, ``(n, c, c)``.
        ridge: coefficient of half the squared norm of the penalised parameters, positive.
    """

    def __init__(self, points: Points, hessian: Tensor, ridge: float) -> None:
        self.points = points
        self.hessian = hessian
        self.ridge = ridge

    @abstractmethod
    def _times(self, u: Tensor) -> Tensor:
        """``G u`` without unpenalised parameters, ``(N, r)``."""

    @abstractmethod
    def removed(self, u: Tensor, examples: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source and the change of training outputs once weights in ``D`` are lowered, too.

        With ``D_S -> (1 - x) D_S`` the system keeps its form with the source ``u + z``, where ``z`` lies on ``S`` and
        ``z = x D_S f_S``.

        Args:
            u: ``(N, r)``.
            examples: ``S``, ``(k,)``.
            fractions: ``x``, ``(k,)``.
        """

    def times(self, u: Tensor) -> Tensor:
        """Return ``G u`` for sources ``(N, r)``."""
        f = self._times(u)
        if self.points.basis is not None:
            f = f + self._swept @ self.basis_change(u)
        return f

    def basis_change(self, u: Tensor) -> Tensor:
        """Return ``db``, the change of the ``q`` unpenalised parameters, ``(q, r)``."""
        return self._inverse @ self._swept.T @ u

    def coefficients(self, u: Tensor, f: Tensor) -> Tensor:
        """Return ``da = (u - D f) / ridge``, ``(N, r)``, for the change ``f = G u``."""
        return (u - blockwise(self.hessian, f)) / self.ridge

    @cached_property
    def _swept(self) -> Tensor:
        """``B - G D B``, ``(N, q)``: what unpenalised parameters change once the penalised ones have answered."""
        basis = self.points.basis
        if basis is None:
            return self.hessian.new_zeros(self.hessian.shape[:2].numel(), 0)
        return basis - self._times(blockwise(self.hessian, basis))

    @cached_property
    def _inverse(self) -> Tensor:
        """Pseudo-inverse of the Schur complement ``B' (D - D G D) B``, ``(q, q)``.

        It is singular where outputs may shift without any loss, as those of a softmax.
        """
        basis = self.points.basis
        if basis is None:
            return self.hessian.new_zeros(0, 0)
        return torch.linalg.pinv(basis.T @ blockwise(self.hessian, self._swept), hermitian=True, rtol=1e-10)


class FactoredResponse(Response):
    """A response with a factor that all removals share."""

    @abstractmethod
    def condition(self) -> float:
        """Return the condition number of the matrix that is factorised, from its eigenvalues."""

    @abstractmethod
    def _block(self, examples: Tensor) -> Tensor:
        """Rows and columns of ``G`` of ``k`` examples without unpenalised parameters, ``(k c, k c)``."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """Diagonal blocks of the same, ``(n, c, c)``."""

    @abstractmethod
    def _cross(self, test: Points) -> Tensor:
        """Rows of the same for the outputs at other points, ``(T c, N)``."""

    def diagonal(self) -> Tensor:
        """Return ``G`` of each example with itself, ``(n, c, c)``."""
        swept = by_example(self._swept, self.hessian)
        return self._diagonal() + swept @ self._inverse @ swept.mT

    def cross(self, test: Points) -> Tensor:
        """Return ``G_t``, so that ``G_t u`` is the change of outputs at test points, ``(T c, N)``."""
        cross = self._cross(test)
        if self.points.basis is not None:
            assert test.basis is not None
            swept = test.basis - cross @ blockwise(self.hessian, self.points.basis)
            cross = cross + swept @ self._inverse @ self._swept.T
        return cross

    def removed(self, u: Tensor, examples: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Response.removed`: ``(I - x D_S G_SS) z = x D_S (G u)_S``, a system of size ``k c``.

        ``D_S G_SS`` is the leverage.
        """
        swept = by_example(self._swept, self.hessian)[examples].flatten(0, 1)
        block = self._block(examples) + swept @ self._inverse @ swept.T
        weighted = fractions[:, None, None] * self.hessian[examples]
        change = by_example(self.times(u), self.hessian)[examples].flatten(0, 1)
        left = torch.eye(len(block), dtype=block.dtype, device=block.device) - blockwise(weighted, block)
        u = by_example(u, self.hessian).clone()
        u[examples] += by_example(solve(left, blockwise(weighted, change)), weighted)
        u = u.flatten(0, 1)
        return u, self.times(u)


def by_example(v: Tensor, blocks: Tensor) -> Tensor:
    """Return rows ``(n c, r)`` as ``(n, c, r)``, as many as ``blocks`` ``(n, c, c)`` has."""
    return v.reshape(blocks.shape[0], blocks.shape[1], -1)


def blockwise(blocks: Tensor, v: Tensor) -> Tensor:
    """Multiply a block-diagonal matrix, ``(n, c, c)``, by ``(n c, r)``."""
    return (blocks @ by_example(v, blocks)).flatten(0, 1)


def solve(left: Tensor, right: Tensor) -> Tensor:
    """Solve the small system of a removal, or a batch of them.

    Raises:
        ConfigurationError: if its condition number is above 1e12.
    """
    inverse, failed = torch.linalg.inv_ex(left)
    condition = torch.linalg.matrix_norm(left, 1) * torch.linalg.matrix_norm(inverse, 1)
    if failed.any() or not (condition < 1e12).all():
        raise ConfigurationError(
            "`ridge` is too small for this deletion: the deleted examples alone determine a direction of the fit "
            "(leverage 1), which nothing determines without them; raise the ridge."
        )
    return torch.linalg.solve(left, right)


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """Return the lower factor of a positive definite matrix.

    Raises:
        ConfigurationError: if it is not positive definite in float64.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ConfigurationError(
            f"`ridge` is {ridge:.3g}, with which the system is not positive definite in float64: raise it, or check "
            "that the kernel is positive semidefinite."
        )
    return factor
