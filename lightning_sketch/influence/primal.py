"""The primal solver: one Cholesky factor of the size of the parameters, ``P x P``."""

import torch
from torch import Tensor

from lightning_sketch.influence.jacobian import NetworkPoints, Points
from lightning_sketch.influence.response import FactoredResponse, cholesky


class PrimalResponse(FactoredResponse):
    """``G = J H^-1 J'`` with the Gauss-Newton Hessian ``H = J' D J + ridge I`` (arXiv 2605.11239, eqs. 2 and 4).

    Args:
        points: training points of a network.
        hessian: ``D``, ``(n, c, c)``.
        ridge: positive.
    """

    def __init__(self, points: NetworkPoints, hessian: Tensor, ridge: float) -> None:
        super().__init__(points, hessian, ridge)
        self._network = points
        self._factor = cholesky(self._system(), ridge)

    def condition(self) -> float:
        """Return that of ``H``, from its eigenvalues."""
        values = torch.linalg.eigvalsh(self._system())
        return float(values[-1] / values[0])

    def _system(self) -> Tensor:
        h = self.hessian.new_zeros(self._network.num_parameters, self._network.num_parameters)
        for examples in self._network.tiles():
            rows = self._network.rows(examples)  # (m, c, P)
            h.addmm_(rows.flatten(0, 1).T, (self.hessian[examples] @ rows).flatten(0, 1))
        h.diagonal().add_(self.ridge)
        return h

    def _half(self, points: NetworkPoints, examples: Tensor) -> Tensor:
        """``L^-1 J[examples]'``, ``(P, k c)``, with ``H = L L'``."""
        return torch.linalg.solve_triangular(self._factor, points.rows(examples).flatten(0, 1).T, upper=False)

    def _times(self, u: Tensor) -> Tensor:
        return self._network.push(torch.cholesky_solve(self._network.pull(u), self._factor))

    def _block(self, examples: Tensor) -> Tensor:
        half = self._half(self._network, examples)
        return half.T @ half

    def _diagonal(self) -> Tensor:
        size = self.hessian.shape[1]
        halves = [self._half(self._network, examples).T for examples in self._network.tiles()]
        return torch.cat([(h := half.reshape(-1, size, half.shape[1])) @ h.mT for half in halves])

    def _cross(self, test: Points) -> Tensor:
        assert isinstance(test, NetworkPoints)
        left = [self._half(test, examples).T for examples in test.tiles()]
        return torch.cat([torch.cat(left) @ self._half(self._network, b) for b in self._network.tiles()], dim=1)
