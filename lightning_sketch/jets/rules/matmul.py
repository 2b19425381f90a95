"""Matrix products: real GEMMs with ``R P K`` folded into rows or batch; only two coefficients multiply as complex."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of
from lightning_sketch.jets.series import add_bilinear
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten


def _accumulate(out: Tensor, x: Tensor, y: Tensor, sign: int) -> None:
    out.flatten(0, -3).baddbmm_(x.flatten(0, -3), y.flatten(0, -3), alpha=sign)


def _times_primal(ac: Tensor, b0: Tensor) -> Tensor:
    """``a_r b_0`` for all orders, parts and directions."""
    lead = ac.shape[:3]
    if b0.ndim == 2 and ac.is_contiguous():
        return (ac.flatten(0, -2) @ b0).view(*lead, ac.shape[-2], b0.shape[-1])
    return _batched(ac, b0.expand(*lead, *b0.shape), lead)


def _batched(a: Tensor, b: Tensor, lead: torch.Size) -> Tensor:
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3))
    return out.view(*lead, *a.shape[3:-1], b.shape[-1])


def product(a: Any, b: Any) -> Tensor:
    """Orders ``1..R`` of the matrix product of two matrices, or two batches of matrices of the same batch size."""
    a0, b0, ac, bc = primal_of(a), primal_of(b), block_of(a), block_of(b)
    if bc is None:
        assert ac is not None
        return _times_primal(ac, b0)
    lead = bc.shape[:3]
    if ac is None:
        return _batched(a0.expand(*lead, *a0.shape), bc, lead)
    out = _times_primal(ac, b0)
    out.flatten(0, -3).baddbmm_(a0.expand(*lead, *a0.shape).flatten(0, -3), bc.flatten(0, -3))
    add_bilinear(out, ac, bc, _accumulate)
    return out


@jet_rule(aten.mm.default, aten.bmm.default)
def mm(a: Any, b: Any) -> JetTensor:
    """``Y = A B``."""
    return jet(torch.matmul(primal_of(a), primal_of(b)), product(a, b), lead_of((a, b)))


@jet_rule(aten.addmm.default, aten.baddbmm.default)
def addmm(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> JetTensor:
    """``Y = beta X + alpha A B``."""
    return _weighted_sum(x, torch.matmul(a, b), beta, alpha)


def _weighted_sum(x: Any, y: Any, beta: float, alpha: float) -> Any:
    """``beta x + alpha y``; ``x`` may be NaN where ``beta`` is zero."""
    y = y if alpha == 1 else y * alpha
    if beta == 0:
        return y.expand(torch.broadcast_shapes(x.shape, y.shape))
    return y + (x if beta == 1 else x * beta)


@jet_rule(aten.addbmm.default)
def addbmm(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """``Y = beta X + alpha sum_i A_i B_i``."""
    return _weighted_sum(x, torch.bmm(a, b).sum(0), beta, alpha)


@jet_rule(aten._trilinear.default)
def trilinear(
    a: Any,
    b: Any,
    c: Any,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Any:
    """``Y = sum A B C``, each expanded by dimensions of size one."""
    for d in expand1:
        a = a.unsqueeze(d)
    for d in expand2:
        b = b.unsqueeze(d)
    for d in expand3:
        c = c.unsqueeze(d)
    product = a * b * c
    return product.sum(sumdim) if sumdim else product


@jet_rule(aten.mv.default)
def mv(a: Any, b: Any) -> JetTensor:
    """``y = A b``."""
    return torch.mm(a, b.unsqueeze(1)).squeeze(1)  # type: ignore[return-value]


@jet_rule(aten.dot.default, aten.vdot.default)
def dot(a: Any, b: Any) -> JetTensor:
    """``y = a . b``."""
    return (a * b).sum()


@jet_rule(aten.addmv.default)
def addmv(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> JetTensor:
    """``y = beta x + alpha A b``."""
    return _weighted_sum(x, torch.mv(a, b), beta, alpha)
