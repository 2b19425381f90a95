"""Matrix factorisations, order by order: what is new in an order enters linearly, through the primal's factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.rules.linalg import Orders, cauchy, from_orders, inner, of_primal, orders_of, refused, times
from lightning_sketch.jets.tensor import JetTensor, primal_of

aten = torch.ops.aten


def _triangular(a: Tensor, b: Tensor, upper: bool, left: bool = True) -> Tensor:
    return torch.linalg.solve_triangular(a, b, upper=upper, left=left)


def _symmetric(a: Any, lower: bool) -> Any:
    """The symmetric matrix whose one triangle the kernel reads."""
    return a.tril() + a.tril(-1).mT if lower else a.triu() + a.triu(1).mT


def _cholesky(a: JetTensor, primal: Tensor, upper: bool) -> JetTensor:
    """``A = L L^T``: with ``E_r = A_r - sum_{0<i<r} L_i L_{r-i}^T``, ``L_r = L_0 Phi(L_0^-1 E_r L_0^-T)``.

    ``Phi`` keeps the lower triangle and half of the diagonal.
    """
    matrices = orders_of(_symmetric(a, not upper), a.lead)
    factors = [(primal.mT if upper else primal).to(matrices[0].dtype)]
    transposed = [factors[0].mT]
    for r in range(1, len(matrices)):
        e = _triangular(factors[0], matrices[r] - inner(factors, transposed, r), upper=False)
        e = _triangular(transposed[0], e, upper=True, left=False)
        factors.append(factors[0] @ (e.tril(-1) + torch.diag_embed(e.diagonal(0, -2, -1) / 2)))
        transposed.append(factors[r].mT)
    return from_orders(primal, transposed if upper else factors, a.lead)


@jet_rule(aten.linalg_cholesky_ex.default)
def cholesky_ex(a: JetTensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Any, Tensor]:
    """``A = L L^T``."""
    factor, info = aten.linalg_cholesky_ex(a.primal, upper=upper, check_errors=check_errors)
    return _cholesky(a, factor, upper), info


@jet_rule(aten.cholesky.default)
def cholesky(a: JetTensor, upper: bool = False) -> JetTensor:
    """``A = L L^T``."""
    return _cholesky(a, aten.cholesky(a.primal, upper), upper)


def _square_lu(a: JetTensor, lu: Tensor) -> tuple[Any, Any]:
    """``A = L U``, by the triangles of one matrix.

    With ``E_r = A_r - sum_{0<i<r} L_i U_{r-i}`` and ``N = L_0^-1 E_r``, ``L_0^-1 L_r`` is the strictly lower triangle
    ``M`` of ``N U_0^-1``, and ``U_r = N - M U_0``. The last pivot may be zero: ``M`` does not use it.
    """
    matrices = orders_of(a, a.lead)
    eye = torch.eye(a.shape[-1], dtype=matrices[0].dtype, device=a.device)
    lower, upper = [lu.tril(-1) + eye], [lu.triu().to(eye.dtype)]
    regular = upper[0].clone()
    regular[..., -1:, -1:] = 1
    for r in range(1, len(matrices)):
        n = _triangular(lower[0], matrices[r] - inner(lower, upper, r), upper=False)
        m = _triangular(regular, n, upper=True, left=False).tril(-1)
        lower.append(lower[0] @ m)
        upper.append((n - m @ upper[0]).triu())
    return from_orders(lower[0].real, lower, a.lead), from_orders(lu.triu(), upper, a.lead)


def _lu(a: JetTensor, lu: Tensor, pivots: Tensor) -> tuple[Any, Any]:
    """The factors of a matrix of any shape: the square part first, then ``L_2 = A_2 U^-1`` or ``U_2 = L^-1 A_2``."""
    rows, columns = a.shape[-2:]
    n = min(rows, columns)
    permutation = torch.lu_unpack(lu, pivots, unpack_data=False)[0]
    permuted: Any = permutation.mT @ a
    lower, upper = _square_lu(permuted[..., :n, :n], lu[..., :n, :n])
    if rows > n:
        rest = torch.linalg.solve_triangular(upper, permuted[..., n:, :], upper=True, left=False)
        lower = torch.cat([lower, rest], -2)
    if columns > n:
        rest = torch.linalg.solve_triangular(lower, permuted[..., n:], upper=False, unitriangular=True)
        upper = torch.cat([upper, rest], -1)
    return lower, upper


def _packed(a: JetTensor, lu: Tensor, pivots: Tensor) -> Any:
    lower, upper = _lu(a, lu, pivots)
    rows, columns = a.shape[-2:]
    n = min(rows, columns)
    square = lower[..., :n, :].tril(-1) + upper[..., :n]
    packed = torch.cat([square, lower[..., n:, :]], -2) if rows > n else torch.cat([square, upper[..., n:]], -1)
    return of_primal(lu, packed)


@jet_rule(aten.linalg_lu_factor_ex.default)
def lu_factor_ex(a: JetTensor, *, pivot: bool = True, check_errors: bool = False) -> tuple[Any, Tensor, Tensor]:
    """``A = P L U``, both factors in one matrix."""
    lu, pivots, info = aten.linalg_lu_factor_ex(a.primal, pivot=pivot, check_errors=check_errors)
    return _packed(a, lu, pivots), pivots, info


@jet_rule(aten.linalg_lu.default)
def lu(a: JetTensor, *, pivot: bool = True) -> tuple[Tensor, Any, Any]:
    """``A = P L U``; the permutation is that of the primal."""
    permutation, lower0, upper0 = aten.linalg_lu(a.primal, pivot=pivot)
    lower, upper = _lu(a, *aten.linalg_lu_factor_ex(a.primal, pivot=pivot)[:2])
    return permutation, of_primal(lower0, lower), of_primal(upper0, upper)


@jet_rule(aten.lu_unpack.default)
def lu_unpack(
    packed: JetTensor, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Tensor, Any, Any]:
    """The permutation and the two factors."""
    permutation, lower0, upper0 = aten.lu_unpack(packed.primal, pivots, unpack_data, unpack_pivots)
    if not unpack_data:
        return permutation, lower0, upper0
    n = min(packed.shape[-2:])
    return permutation, of_primal(lower0, packed[..., :n].tril(-1)), of_primal(upper0, packed[..., :n, :].triu())


def _as_factored(a: JetTensor) -> Any:
    """The determinants' kernels factor the transpose of a matrix that is contiguous, which spares them a copy."""
    return a.mT if a.is_contiguous() else a


@jet_rule(aten._linalg_det.default)
def det(a: JetTensor) -> tuple[Any, Any, Tensor]:
    """The product of the pivots, and the factors, which autograd wants."""
    primal, lu, pivots = aten._linalg_det(a.primal)
    packed = _packed(_as_factored(a), lu, pivots)
    diagonal = packed.diagonal(0, -2, -1)
    permutation = torch.lu_unpack(lu, pivots, unpack_data=False)[0]
    return of_primal(primal, diagonal.prod(-1) * torch.linalg.det(permutation)), packed, pivots


@jet_rule(aten._linalg_slogdet.default)
def slogdet(a: JetTensor) -> tuple[Tensor, Any, Any, Tensor]:
    """The sign and the sum of the logarithms of the pivots' sizes."""
    sign, logabsdet, lu, pivots = aten._linalg_slogdet(a.primal)
    packed = _packed(_as_factored(a), lu, pivots)
    return sign, of_primal(logabsdet, packed.diagonal(0, -2, -1).abs().log().sum(-1)), packed, pivots


@jet_rule(aten.linalg_qr.default)
def qr(a: JetTensor, mode: str = "reduced") -> tuple[Any, Any]:
    """``A = Q R``, ``Q^T Q = I``.

    With ``E_r = A_r - sum_{0<i<r} Q_i R_{r-i}``, ``S = -sum_{0<i<r} Q_i^T Q_{r-i}``, ``F = E_r R_0^-1`` and ``M =
    Q_0^T F = X + T``, where ``X + X^T = S`` and ``T`` is upper triangular: ``R_r = T R_0``, ``Q_r = Q_0 (X - M) + F``.
    """
    rows, columns = a.shape[-2:]
    if mode == "complete" and rows > columns:
        raise refused(aten.linalg_qr.default, "the columns that complete a basis are arbitrary; use `mode='reduced'`")
    q0, r0 = aten.linalg_qr(a.primal, "reduced")
    n = min(rows, columns)
    matrices = orders_of(a[..., :n], a.lead)
    q, upper = [q0.to(matrices[0].dtype)], [r0[..., :n].to(matrices[0].dtype)]
    transposed = [q[0].mT]
    for r in range(1, len(matrices)):
        f = _triangular(upper[0], matrices[r] - inner(q, upper, r), upper=True, left=False)
        m, s = transposed[0] @ f, -inner(transposed, q, r) + torch.zeros_like(upper[0])
        low = m.tril(-1)
        x = low + torch.diag_embed(s.diagonal(0, -2, -1) / 2) + (s - low.mT).triu(1)
        upper.append((m - x).triu() @ upper[0])
        q.append(q[0] @ (x - m) + f)
        transposed.append(q[r].mT)
    full_q: Any = from_orders(q0, q, a.lead)
    full_r: Any = from_orders(r0[..., :n], upper, a.lead)
    if columns > n:
        full_r = torch.cat([full_r, full_q.mT @ a[..., n:]], -1)
    kept = aten.linalg_qr(a.primal, mode)
    return (kept[0] if mode == "r" else of_primal(kept[0], full_q)), of_primal(kept[1], full_r)


def _check_apart(op: Any, values: Tensor, what: str) -> None:
    """Refuse where two neighbours in a sorted list are the same number: there they are no functions of the matrix."""
    if values.shape[-1] < 2 or not values.numel():
        return
    tolerance = 1e3 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    if bool((values.diff(dim=-1).abs() <= tolerance).any()):
        raise refused(op, f"two {what} coincide, or nearly")


def _reciprocal_differences(values: Tensor) -> Tensor:
    """``1 / (v_j - v_i)`` and zero on the diagonal."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    eye = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return gaps.masked_fill(eye, torch.inf).reciprocal()


@jet_rule(aten._linalg_eigh.default)
def eigh(a: JetTensor, UPLO: str = "L", compute_v: bool = True) -> tuple[Any, Any]:
    """``A V = V D``, ``V^T V = I``.

    With ``V_r = V_0 X`` and ``G = V_0^T (sum_{i>=1} A_i V_{r-i} - sum_{0<i<r} V_i D_{r-i})``: ``D_r = diag G``,
    ``X_ij = G_ij / (d_j - d_i)`` and ``X_ii = -sum_{0<i<r} (V_i^T V_{r-i})_ii / 2``.
    """
    values0, vectors0 = aten._linalg_eigh(a.primal, UPLO, True)
    _check_apart(aten._linalg_eigh.default, values0, "eigenvalues")
    matrices = orders_of(_symmetric(a, UPLO.upper() == "L"), a.lead)
    dtype = matrices[0].dtype
    v, d = [vectors0.to(dtype)], [torch.diag_embed(values0).to(dtype)]
    transposed, inverse_gaps = [v[0].mT], _reciprocal_differences(values0)
    for r in range(1, len(matrices)):
        g = transposed[0] @ (cauchy(matrices, v, r, 1) - inner(v, d, r))
        norm = inner(transposed, v, r) + torch.zeros_like(d[0])
        d.append(torch.diag_embed(g.diagonal(0, -2, -1)))
        v.append(v[0] @ (g * inverse_gaps - torch.diag_embed(norm.diagonal(0, -2, -1) / 2)))
        transposed.append(v[r].mT)
    values = from_orders(values0, [y.diagonal(0, -2, -1) for y in d], a.lead)
    return values, from_orders(vectors0, v, a.lead) if compute_v else aten._linalg_eigh(a.primal, UPLO, False)[1]


@jet_rule(aten._linalg_svd.default)
def svd(
    a: JetTensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Any, Any, Any]:
    """``A = U S V^T``, ``U^T U = V^T V = I``.

    With ``E_r`` the part of ``A_r`` that lower orders do not give, ``P = sum_{0<i<r} U_i^T U_{r-i}``, ``Q`` likewise of
    ``V``, and ``D = U_0^T E_r V_0 + (P S_0 + S_0 Q) / 2 = K S_0 - S_0 H + S_r``, ``K`` and ``H`` antisymmetric:
    ``S_r = diag D``, ``K_ij = (D_ij s_j + D_ji s_i) / (s_j^2 - s_i^2)``, ``H_ij = (D_ij s_i + D_ji s_j) / (same)``.
    """
    op, (rows, columns) = aten._linalg_svd.default, a.shape[-2:]
    if not a.numel():
        return run_constant(op, a, full_matrices, compute_uv, driver=driver)
    if compute_uv and full_matrices and rows != columns:
        raise refused(op, "the vectors that complete a basis are arbitrary; use `full_matrices=False`")
    u0, s0, vh0 = aten._linalg_svd(a.primal, False, True, driver=driver)
    _check_apart(op, torch.cat([s0, torch.zeros_like(s0[..., :1])], -1), "singular values (or one and zero)")
    matrices = orders_of(a, a.lead)
    dtype = matrices[0].dtype
    u, v, s = [u0.to(dtype)], [vh0.mT.to(dtype)], [torch.diag_embed(s0).to(dtype)]
    ut, vt = [u[0].mT], [v[0].mT]
    inverse_gaps, left, right = _reciprocal_differences(s0 * s0), s0.unsqueeze(-1), s0.unsqueeze(-2)
    for r in range(1, len(matrices)):
        # orders below r of the factors, the missing top ones as zero
        known = [cauchy(u, s, q) for q in range(r)] + [inner(u, s, r) + torch.zeros_like(u[0])]
        e = matrices[r] - cauchy(known, [*vt], r, 1)
        p, q = (inner(x, y, r) / 2 + torch.zeros_like(s[0]) for x, y in ((ut, u), (vt, v)))
        core = ut[0] @ e @ v[0]
        d = core + p * right + q * left
        k = (d * right + d.mT * left) * inverse_gaps
        h = (d * left + d.mT * right) * inverse_gaps
        s.append(torch.diag_embed(d.diagonal(0, -2, -1)))
        across = (e @ v[0] - u[0] @ core) / right if rows > columns else 0.0
        u.append(u[0] @ (k - p) + across)
        across = (e.mT @ u[0] - v[0] @ core.mT) / right if rows < columns else 0.0
        v.append(v[0] @ (h - q) + across)
        ut.append(u[r].mT)
        vt.append(v[r].mT)
    values = from_orders(s0, [y.diagonal(0, -2, -1) for y in s], a.lead)
    if not compute_uv:
        empty = aten._linalg_svd(a.primal, full_matrices, False, driver=driver)
        return empty[0], values, empty[2]
    return from_orders(u0, u, a.lead), values, from_orders(vh0, vt, a.lead)


@jet_rule(aten.linalg_pinv.atol_rtol_tensor)
def pinv(a: JetTensor, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> JetTensor:
    """``X' = -X A' X + X X^T A'^T (I - A X) + (I - X A) A'^T X^T X`` (Golub & Pereyra, 1973), at constant rank."""
    primal = aten.linalg_pinv.atol_rtol_tensor(
        a.primal, atol=primal_of(atol), rtol=primal_of(rtol), hermitian=hermitian
    )
    matrices = orders_of(_symmetric(a, True) if hermitian else a, a.lead)
    slope = [matrices[r] * r for r in range(1, len(matrices))]
    slope_t = [y.mT for y in slope]
    x = [primal.to(matrices[0].dtype)]
    for r in range(1, len(matrices)):
        xt = [y.mT for y in x]
        right, left = _complement(times(matrices, x)), _complement(times(x, matrices))
        change = [-y for y in times(times(x, slope), x)]
        for more in (times(times(times(x, xt), slope_t), right), times(times(left, slope_t), times(xt, x))):
            change = [y + z for y, z in zip(change, more, strict=True)]
        x.append(change[r - 1] / r)
    # A X A = A holds to every order just where the rank stays what the kernel took it for; a matrix of which it keeps
    # nothing, because of a large `rtol`, has the constant inverse zero.
    kept = (primal != 0).any(-1, True).any(-2, True) | ~(a.primal != 0).any(-1, True).any(-2, True)
    residual = [(y - z) * kept for y, z in zip(times(times(matrices, x), matrices), matrices, strict=True)]
    sizes, inverse_sizes = _sizes(matrices), _sizes(x)
    scale = [cauchy(times(sizes, inverse_sizes), sizes, r) for r in range(len(sizes))]
    tolerance = torch.finfo(primal.dtype).eps ** 0.4
    if not bool(torch.stack([y <= tolerance * z for y, z in zip(_sizes(residual), scale, strict=True)]).all()):
        raise refused(aten.linalg_pinv.atol_rtol_tensor, "the rank of the matrix is not constant")
    return from_orders(primal, x, a.lead)


def _sizes(x: Orders) -> Orders:
    """The largest entry of every order, as a matrix of one entry."""
    return [y.abs().max().reshape(1, 1) if y.numel() else y.new_zeros(1, 1).abs() for y in x]


def _complement(x: Orders) -> Orders:
    eye = torch.eye(x[0].shape[-1], dtype=x[0].dtype, device=x[0].device)
    return [eye - x[0], *(-y for y in x[1:])]


@jet_rule(aten.linalg_lstsq.default)
def lstsq(a: Any, b: Any, rcond: float | None = None, *, driver: str | None = None) -> tuple[Any, Any, Tensor, Any]:
    """``X = A^+ B``, and the squared residuals where the kernel gives them."""
    primal, residuals, rank, values = aten.linalg_lstsq(primal_of(a), primal_of(b), rcond, driver=driver)
    vector = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if vector else b
    x = torch.linalg.pinv(a, rtol=rcond) @ right
    if residuals.numel():
        gap = a @ x - right
        residuals = of_primal(residuals, (gap * gap).sum(-2).reshape(residuals.shape))
    if values.numel():
        values = of_primal(values, torch.linalg.svdvals(a))
    return of_primal(primal, x.squeeze(-1) if vector else x), residuals, rank, values
