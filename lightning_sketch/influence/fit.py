"""A penalised fit and its answer to deletions, in dual coefficients (arXiv 2605.11239)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence.dual import DualResponse
from lightning_sketch.influence.jacobian import NetworkPoints, Points
from lightning_sketch.influence.losses import Loss
from lightning_sketch.influence.matrix_free import MatrixFreeResponse
from lightning_sketch.influence.primal import PrimalResponse
from lightning_sketch.influence.response import FactoredResponse, Response, blockwise, by_example, solve

Convention = Literal["fixed", "per_example"]
Mode = Literal["first_order", "newton", "exact"]
Solver = Literal["auto", "dual", "primal", "matrix_free"]
LARGEST_DENSE = 20_000  # rows; 3 GiB in float64, and a solver holds two or three such matrices


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one deletion: the source ``u``, the change of training outputs ``f = G u``, and ``G``."""

    response: Response
    source: Tensor
    change: Tensor

    def coefficients(self) -> Tensor:
        """Return ``da``, ``(N, r)``."""
        return self.response.coefficients(self.source, self.change)

    def basis_change(self) -> Tensor:
        """Return ``db``, ``(q, r)``."""
        return self.response.basis_change(self.source)


class Fit:
    """The minimiser of ``sum_i w_i l(f_i, y_i) + (Lam/2) ||theta - centre||^2``; see :class:`KernelInfluence`.

    Args:
        points: training points.
        targets: as the loss takes them.
        loss: the loss.
        ridge: ``Lam``, or ``Lam / n`` in the convention ``"per_example"``.
        convention: ``"fixed"`` or ``"per_example"``.
        sample_weight: ``w``, ``(n,)``, or None.
        solver: ``"auto"``, ``"dual"``, ``"primal"`` or ``"matrix_free"``.
    """

    def __init__(
        self,
        points: Points,
        targets: Tensor,
        loss: Loss,
        ridge: float,
        convention: Convention,
        sample_weight: Tensor | None,
        solver: Solver,
    ) -> None:
        if not 0 < ridge < float("inf"):
            raise ConfigurationError(f"`ridge` is {ridge}: give a positive number.")
        if convention not in ("fixed", "per_example"):
            raise ConfigurationError(f"`convention` is {convention!r}: give 'fixed' or 'per_example'.")
        f = points.outputs
        if not torch.isfinite(f).all():
            raise ConfigurationError("the model's outputs hold NaN or infinity: give a trained model.")
        self.points = points
        self.loss = loss
        self.n = len(f)
        self.ridge = float(ridge) * (self.n if convention == "per_example" else 1)
        self.convention = convention
        self.solver = self._choose(solver)
        w = torch.ones_like(f[:, 0]) if sample_weight is None else sample_weight.detach().to(f)
        if w.shape != (self.n,) or not (torch.isfinite(w) & (w >= 0)).all():
            raise ConfigurationError(
                f"`sample_weight` has shape {tuple(w.shape)}: give {self.n} numbers of at least 0, one per example."
            )
        y = loss.targets(targets.detach(), f)
        self.weighted_gradient = self.pack(w[:, None] * loss.gradient(f, y))
        self.dual = -self.weighted_gradient / self.ridge  # a
        if points.block == f.shape[1]:
            self._hessian = w[:, None, None] * loss.hessian(f, y)
            self._root = w.sqrt()[:, None, None] * loss.root(f, y)
        else:  # the Hessian is a multiple of the identity
            self._hessian = w[:, None, None]
            self._root = self._hessian.sqrt()
        self._responses: dict[float, Response] = {}

    def pack(self, v: Tensor) -> Tensor:
        """Return ``(n, C)`` as rows of the kernel, ``(n c, C / c)``."""
        return v.reshape(-1, v.shape[-1] // self.points.block)

    def unpack(self, v: Tensor) -> Tensor:
        """Return ``(*m, n c, C / c)`` as ``(*m, n, *out)``."""
        n = v.shape[-2] // self.points.block
        return v.reshape(*v.shape[:-2], n, *self.points.output_shape)

    def answer(self, x: Tensor, mode: Mode) -> Answer:
        """Answer the deletion with weights ``x``, ``(n,)``.

        Raises:
            ConfigurationError: an unknown mode, an exact one for a loss that is not quadratic, or no ridge remains.
        """
        self.check_mode(mode)
        remaining = self._ridge_after(float(x.sum()))
        u = (self.ridge - remaining) * self.dual - self.ridge * self._weighted(x, self.dual)
        deleted = x.nonzero().flatten()
        if mode == "first_order" or not len(deleted):
            response = self.response(self.ridge)
            return Answer(response, u, response.times(u))
        response = self.response(remaining)
        return Answer(response, *response.removed(u, deleted, x[deleted]))

    def leave_one_out(self, mode: Mode) -> tuple[FactoredResponse, Tensor, Tensor]:
        """Answer the deletions of single examples together: that of example ``i`` has the source ``u + E_i s_i``.

        Returns:
            The response, ``u`` ``(N, r)`` and ``s`` ``(n, c, r)``.
        """
        self.check_mode(mode)
        remaining = self._ridge_after(1.0)
        u = (self.ridge - remaining) * self.dual
        own = -self.ridge * by_example(self.dual, self._hessian)
        response = self.response(self.ridge if mode == "first_order" else remaining)
        assert isinstance(response, FactoredResponse)
        if mode != "first_order":
            # z_i = (I - D_i G_ii)^-1 D_i f_i with f = G u, as in `removed`
            diagonal = response.diagonal()
            change = by_example(response.times(u), self._hessian) + diagonal @ own
            identity = torch.eye(self.points.block, dtype=u.dtype, device=u.device)
            own = own + solve(identity - self._hessian @ diagonal, self._hessian @ change)
        return response, u, own

    def response(self, ridge: float) -> Response:
        """Return the solver at a ridge; the last two are kept."""
        if ridge not in self._responses:
            while len(self._responses) > 1:
                del self._responses[next(iter(self._responses))]
            self._responses[ridge] = self._respond(ridge)
        return self._responses[ridge]

    def leverage(self) -> Tensor:
        """Return each example's largest eigenvalue of ``S_i' G_ii S_i``, in ``[0, 1)``, ``(n,)``."""
        response = self.response(self.ridge)
        assert isinstance(response, FactoredResponse)
        return torch.linalg.eigvalsh(self._root.mT @ response.diagonal() @ self._root)[:, -1]

    def ridge_weights(self, response: Response) -> Tensor:
        """Return ``y`` so that ``a' K da = y' u`` for the source ``u`` of ``da``, ``(N, r)``."""
        h = self.kernel_dual
        return (h - response.times(blockwise(self._hessian, h))) / response.ridge

    @cached_property
    def kernel_dual(self) -> Tensor:
        """``K a``, ``(N, r)``."""
        return self.points.times(self.points, self.dual)

    @cached_property
    def _kernel(self) -> Tensor:
        return self.points.cross(self.points)

    def check_mode(self, mode: Mode) -> None:
        """Refuse a mode that does not exist, or is not exact.

        Raises:
            ConfigurationError: see above.
        """
        if mode not in ("first_order", "newton", "exact"):
            raise ConfigurationError(f"`mode` is {mode!r}: give 'first_order', 'newton' or 'exact'.")
        if mode == "exact" and not self.loss.quadratic:
            raise ConfigurationError("`mode='exact'` needs the loss 'squared': use 'newton', one step, for this loss.")

    def _ridge_after(self, deleted: float) -> float:
        """``Lam'``, once examples of this total weight are deleted."""
        if self.convention == "fixed":
            return self.ridge
        remaining = self.ridge * (1 - deleted / self.n)
        if remaining <= 1e-12 * self.ridge:
            raise ConfigurationError(
                "the deletion leaves no example, and so no ridge in the convention 'per_example': keep some."
            )
        return remaining

    def _weighted(self, x: Tensor, v: Tensor) -> Tensor:
        return (x[:, None, None] * by_example(v, self._hessian)).flatten(0, 1)

    def _choose(self, solver: Solver) -> Solver:
        rows = self.n * self.points.block
        parameters = self.points.num_parameters if isinstance(self.points, NetworkPoints) else None
        sizes = {"dual": rows} if parameters is None else {"dual": rows, "primal": parameters}
        if solver not in ("auto", "dual", "primal", "matrix_free"):
            raise ConfigurationError(f"`solver` is {solver!r}: give 'auto', 'dual', 'primal' or 'matrix_free'.")
        if solver == "auto":
            smallest: Solver = "primal" if parameters is not None and parameters < rows else "dual"
            return smallest if sizes[smallest] <= LARGEST_DENSE else "matrix_free"
        if solver == "primal" and parameters is None:
            raise ConfigurationError("`solver='primal'` needs parameters, which a given kernel has not: use 'dual'.")
        if solver != "matrix_free" and sizes[solver] > LARGEST_DENSE:
            raise ConfigurationError(
                f"`solver={solver!r}` would factorise a matrix of {sizes[solver]:,} rows, "
                f"{sizes[solver] ** 2 * 8 / 2**30:,.0f} GiB: use solver='matrix_free', or fewer examples."
            )
        return solver

    def _respond(self, ridge: float) -> Response:
        if self.solver == "primal":
            assert isinstance(self.points, NetworkPoints)
            return PrimalResponse(self.points, self._hessian, ridge)
        if self.solver == "dual":
            return DualResponse(self.points, self._kernel, self._hessian, self._root, ridge)
        return MatrixFreeResponse(self.points, self._hessian, self._root, ridge)
