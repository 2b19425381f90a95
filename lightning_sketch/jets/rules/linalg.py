"""Linear systems, inverses and matrix functions, order by order: every order is one solve with the primal's matrix.

A series is a list of its orders here, of shape ``S`` (order 0) and ``(K, *S)``, complex where the coefficients are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.errors import UnsupportedOperatorError
from lightning_sketch.jets.registry import calling_module, jet_rule, lead_of
from lightning_sketch.jets.tensor import JetTensor, Lead, block_of, jet, primal_of

aten = torch.ops.aten

Orders = list[Tensor]


def refused(op: Any, why: str) -> UnsupportedOperatorError:
    """Return the error for a point or a variant at which the operator has no Taylor series."""
    return UnsupportedOperatorError(f"`{op}` (in {calling_module()}) has no Taylor series here: {why}.")


def orders_of(x: Any, lead: Lead) -> Orders:
    """Return orders ``0..R``; those of a constant are zero."""
    x0, block = primal_of(x), block_of(x)
    if block is None:
        block = x0.new_zeros(()).expand(*lead, *x0.shape)
    if lead[1] == 1:
        return [x0, *block[:, 0]]
    return [torch.complex(x0, torch.zeros_like(x0)), *torch.complex(block[:, 0], block[:, 1])]


def from_orders(primal: Tensor, orders: Orders, lead: Lead) -> JetTensor:
    """Make a JetTensor of orders ``1..R``."""
    series = torch.stack([y.expand(lead[2], *primal.shape) for y in orders[1:]])
    block = series.unsqueeze(1) if lead[1] == 1 else torch.stack([series.real, series.imag], 1)
    return jet(primal, block, lead)


def of_primal(primal: Tensor, y: Any) -> Any:
    """Return ``y`` with the primal that the kernel itself gave."""
    return jet(primal, block_of(y), y.lead) if type(y) is JetTensor else primal


def cauchy(a: Orders, b: Orders, r: int, first: int = 0) -> Tensor:
    """``sum a_i b_{r-i}`` over ``first <= i <= r``, and ``first <= r - i`` too where both factors lack low orders."""
    total = torch.zeros((), dtype=a[0].dtype, device=a[0].device)
    for i in range(first, r + 1):
        if i < len(a) and r - i < len(b):
            total = total + a[i] @ b[r - i]
    return total


def inner(a: Orders, b: Orders, r: int) -> Tensor:
    """``sum a_i b_{r-i}`` over ``1 <= i <= r - 1``."""
    return cauchy(a[:r], b[:r], r, 1)


def times(a: Orders, b: Orders) -> Orders:
    """All orders of the matrix product that are known."""
    return [cauchy(a, b, r) for r in range(min(len(a), len(b)))]


def solve_orders(a: Orders, b: Orders, x0: Tensor, inverse: Callable[[Tensor], Tensor]) -> Orders:
    """``A X = B``: ``X_r = A_0^-1 (B_r - sum_{i>=1} A_i X_{r-i})``."""
    x = [x0.to(a[0].dtype)]
    for r in range(1, len(a)):
        x.append(inverse(b[r] - cauchy(a, x, r, 1)))
    return x


def _batched(a: Any, b: Any) -> tuple[Any, Any]:
    """Expand the leading dimensions of two matrices to a common shape."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


@jet_rule(aten.linalg_inv_ex.default)
def inv_ex(a: JetTensor, *, check_errors: bool = False) -> tuple[Any, Tensor]:
    """``A X = I``."""
    inverse, info = aten.linalg_inv_ex(a.primal, check_errors=check_errors)
    orders = orders_of(a, a.lead)
    eye = torch.eye(a.shape[-1], dtype=orders[0].dtype, device=a.device)
    x0 = inverse.to(orders[0].dtype)
    return from_orders(inverse, solve_orders(orders, [eye, *[eye * 0] * a.lead[0]], x0, x0.matmul), a.lead), info


def _is_vector(a: Any, b: Any) -> bool:
    return b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])


@jet_rule(aten._linalg_solve_ex.default)
def solve_ex(a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> tuple[Any, Any, Tensor, Tensor]:
    """``A X = B`` or ``X A = B``; autograd wants the factors too."""
    a0, b0, lead = primal_of(a), primal_of(b), lead_of((a, b))
    primal, lu0, pivots, info = aten._linalg_solve_ex(a0, b0, left=left, check_errors=check_errors)
    lu = of_primal(lu0, aten.linalg_lu_factor_ex(a)[0]) if block_of(a) is not None else lu0
    vector = _is_vector(a0, b0)
    a, b = _batched(a, b.unsqueeze(-1) if vector else b)
    x0 = primal.unsqueeze(-1) if vector else primal
    if not left:
        a, b, x0 = a.mT, b.mT, x0.mT
    matrices = orders_of(a, lead)
    factors, own_pivots = torch.linalg.lu_factor(matrices[0])
    x = solve_orders(matrices, orders_of(b, lead), x0, lambda e: torch.linalg.lu_solve(factors, own_pivots, e))
    x = x if left else [y.mT for y in x]
    return from_orders(primal, [y.squeeze(-1) for y in x] if vector else x, lead), lu, pivots, info


def _triangle(a: Any, upper: bool, unitriangular: bool) -> Any:
    if not unitriangular:
        return a.triu() if upper else a.tril()
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return (a.triu(1) if upper else a.tril(-1)) + eye


@jet_rule(aten.linalg_solve_triangular.default)
def solve_triangular(a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """``A X = B`` or ``X A = B``, ``A`` triangular."""
    lead = lead_of((a, b))
    primal = aten.linalg_solve_triangular(
        primal_of(a), primal_of(b), upper=upper, left=left, unitriangular=unitriangular
    )
    a, b = _batched(_triangle(a, upper, unitriangular), b)
    x0 = primal
    if not left:
        a, b, x0, upper = a.mT, b.mT, x0.mT, not upper
    matrices = orders_of(a, lead)
    x = solve_orders(
        matrices, orders_of(b, lead), x0, lambda e: torch.linalg.solve_triangular(matrices[0], e, upper=upper)
    )
    return from_orders(primal, x if left else [y.mT for y in x], lead)


@jet_rule(aten.triangular_solve.default)
def triangular_solve(
    b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Any, Any]:
    """``A X = B`` or ``A^T X = B``, and ``A``."""
    left, up = (a.mT, not upper) if transpose else (a, upper)
    solution = torch.linalg.solve_triangular(left, b, upper=up, unitriangular=unitriangular)
    return solution, _batched(a, b)[0].clone()


@jet_rule(aten.linalg_lu_solve.default)
def lu_solve(lu: Any, pivots: Tensor, b: Any, *, left: bool = True, adjoint: bool = False) -> Any:
    """``A X = B`` with ``A = P L U``: ``X = U^-1 L^-1 P^T B``; with the transpose ``X = P L^-T U^-T B``."""
    primal = aten.linalg_lu_solve(primal_of(lu), pivots, primal_of(b), left=left, adjoint=adjoint)
    permutation = torch.lu_unpack(primal_of(lu), pivots, unpack_data=False)[0]
    if not left:  # X A = B is A^T X^T = B^T
        adjoint, b = not adjoint, b.mT
    lower = {"upper": False, "unitriangular": True}
    if adjoint:
        y = torch.linalg.solve_triangular(lu.mT, b, upper=False)
        x = permutation @ torch.linalg.solve_triangular(lu.mT, y, upper=True, unitriangular=True)
    else:
        y = torch.linalg.solve_triangular(lu, permutation.mT @ b, **lower)
        x = torch.linalg.solve_triangular(lu, y, upper=True)
    return of_primal(primal, x if left else x.mT)


@jet_rule(aten.cholesky_solve.default)
def cholesky_solve(b: Any, factor: Any, upper: bool = False) -> Any:
    """``L L^T X = B``."""
    lower = factor.mT if upper else factor
    y = torch.linalg.solve_triangular(lower, b, upper=False)
    x = torch.linalg.solve_triangular(lower.mT, y, upper=True)
    return of_primal(aten.cholesky_solve(primal_of(b), primal_of(factor), upper), x)


@jet_rule(aten.cholesky_inverse.default)
def cholesky_inverse(factor: JetTensor, upper: bool = False) -> Any:
    """``(L L^T)^-1 = L^-T L^-1``."""
    lower = factor.mT if upper else factor
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    inverse: Any = torch.linalg.solve_triangular(lower, eye, upper=False)
    return of_primal(aten.cholesky_inverse(factor.primal, upper), inverse.mT @ inverse)


@jet_rule(aten.linalg_matrix_exp.default)
def matrix_exp(a: JetTensor) -> JetTensor:
    """The series as a matrix of its own, block ``(i, j)`` being ``A_{i-j}``: its exponential holds that of the series.

    Block Toeplitz matrices multiply as truncated series do.
    """
    orders = [y.expand(a.lead[2], *a.shape) for y in orders_of(a, a.lead)]
    zero = torch.zeros_like(orders[0])
    size, n = len(orders), a.shape[-1]
    rows = [torch.cat([orders[i - j] if j <= i else zero for j in range(size)], -1) for i in range(size)]
    column = torch.linalg.matrix_exp(torch.cat(rows, -2))[..., :n]
    return from_orders(torch.linalg.matrix_exp(a.primal), list(column.split(n, -2)) if n else orders, a.lead)


def _reflectors(vectors: Any, tau: Any) -> list[tuple[Any, Any]]:
    """The columns ``v_i``, whose entry ``i`` is one and above it zero, and ``tau_i v_i``."""
    lower = vectors.tril(-1) + torch.eye(*vectors.shape[-2:], dtype=vectors.dtype, device=vectors.device)
    columns = [lower.narrow(-1, i, 1) for i in range(tau.shape[-1])]
    return [(v, v * tau.narrow(-1, i, 1).unsqueeze(-1)) for i, v in enumerate(columns)]


@jet_rule(aten.linalg_householder_product.default)
def householder_product(vectors: Any, tau: Any) -> Any:
    """The first columns of ``Q = prod (I - tau_i v_i v_i^T)``."""
    q: Any = torch.eye(*vectors.shape[-2:], dtype=vectors.dtype, device=vectors.device).expand(vectors.shape)
    for v, scaled in reversed(_reflectors(vectors, tau)):
        q = q - scaled @ (v.mT @ q)
    return of_primal(aten.linalg_householder_product(primal_of(vectors), primal_of(tau)), q)


@jet_rule(aten.ormqr.default)
def ormqr(vectors: Any, tau: Any, other: Any, left: bool = True, transpose: bool = False) -> Any:
    """``Q C``, ``Q^T C``, ``C Q`` or ``C Q^T``, where ``Q`` is square."""
    primal = aten.ormqr(primal_of(vectors), primal_of(tau), primal_of(other), left, transpose)
    y = other if left else other.mT  # C Q = (Q^T C^T)^T
    reflectors = _reflectors(vectors, tau)
    for v, scaled in reflectors if transpose == left else reversed(reflectors):
        y = y - scaled @ (v.mT @ y)
    return of_primal(primal, y if left else y.mT)
