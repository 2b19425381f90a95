"""Matrix products: real GEMMs with ``R P K`` folded into rows or batch; only two coefficients multiply as complex."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of
from lightning_sketch.jets.series import real_products, spread
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten

# Where no dimension is smaller, a matrix product costs more than sums of its factors.
_LARGE = 64
# Up to this degree every pair of orders is a product of its own; above, the pairs of one order are one long product.
_SEPARATE_ORDERS = 4
# A batch of primal matrices is repeated for every coefficient, which copies it, up to this many numbers.
_REPEATED = 1 << 14


def _pairs(a: Tensor, b: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Factors whose products add up to order 2, 3, ..., of series without their highest order, ``(R - 1, N, m, n)``."""
    orders, inner = len(a), a.shape[-1]
    if orders < _SEPARATE_ORDERS:
        for r in range(orders):
            yield [(a[i], b[r - i]) for i in range(r + 1)]
        return
    rows = a.permute(1, 2, 0, 3).flatten(2)  # a_1 a_2 ... side by side
    columns = b.flip(0).transpose(0, 1).flatten(1, 2)  # ... b_2 b_1 above each other
    for r in range(1, orders + 1):
        yield [(rows[:, :, : r * inner], columns[:, (orders - r) * inner :])]


def _add_products_of_coefficients(out: Tensor, ac: Tensor, bc: Tensor) -> None:
    """``out_r += sum_{i+j=r; i,j>=1} a_i b_j``."""
    if len(out) == 1:
        return
    large = min(*ac.shape[-2:], bc.shape[-1]) >= _LARGE
    for a, b, signs in real_products(ac[:-1], bc[:-1], large):
        for r, pairs in enumerate(_pairs(a.flatten(1, -3), b.flatten(1, -3)), 1):
            into = out[r].flatten(1, -3)
            if len(signs) > 1:  # both parts receive the same
                into += _sum_of_products(pairs)
                continue
            ((part, sign),) = signs.items()
            for x, y in pairs:
                into[part].baddbmm_(x, y, alpha=sign)


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.bmm(*pairs[0])
    for x, y in pairs[1:]:
        total.baddbmm_(x, y)
    return total


def _add_batched(out: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``out + a b``, written into ``out`` if there is one; one factor is a primal, the other ``(R, P, K, ...)``."""
    lead = max(a.shape[:-2], b.shape[:-2], key=len)
    if min(a.ndim, b.ndim) == 3 and min(a.numel(), b.numel()) > _REPEATED:
        keep = 0 if out is None else 1
        out = a.new_empty(*lead, a.shape[-2], b.shape[-1]) if out is None else out
        each = [m.flatten(0, 2) if m.ndim > 3 else m.expand(lead[:3].numel(), *m.shape) for m in (a, b)]
        for into, x, y in zip(out.flatten(0, 2), *each, strict=True):
            into.baddbmm_(x, y, beta=keep)
        return out
    x, y = (m.expand(*lead, *m.shape[-2:]).flatten(0, -3) for m in (a, b))
    if out is None:
        return torch.bmm(x, y).view(*lead, a.shape[-2], b.shape[-1])
    out.flatten(0, -3).baddbmm_(x, y)
    return out


def _add_times_primal(out: Tensor | None, ac: Tensor, b0: Tensor) -> Tensor:
    """``out_r + a_r b_0`` for all orders, parts and directions: one tall matrix where it is one."""
    if b0.ndim != 2 or not ac.is_contiguous():
        return _add_batched(out, ac, b0)
    rows = ac.flatten(0, -2)
    if out is None:
        return (rows @ b0).view(*ac.shape[:-1], b0.shape[-1])
    out.flatten(0, -2).addmm_(rows, b0)
    return out


def _add_product(out: Tensor | None, a: Any, b: Any) -> Tensor:
    """Orders ``1..R`` of the product of two matrices, or two batches of one size, added to ``out`` in place."""
    ac, bc = block_of(a), block_of(b)
    if ac is not None:
        out = _add_times_primal(out, ac, primal_of(b))
    if bc is not None:
        out = _add_batched(out, primal_of(a), bc)
    assert out is not None
    if ac is not None and bc is not None:
        _add_products_of_coefficients(out, ac, bc)
    return out


@jet_rule(aten.mm.default, aten.bmm.default)
def mm(a: Any, b: Any) -> JetTensor:
    """``Y = A B``."""
    return jet(torch.matmul(primal_of(a), primal_of(b)), _add_product(None, a, b), lead_of((a, b)))


def _add_to_product(op: Any) -> None:
    @jet_rule(op)
    def rule(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> JetTensor:
        primal = op(primal_of(x), primal_of(a), primal_of(b), beta=beta, alpha=alpha)
        xc = block_of(x) if beta else None
        out = None if xc is None else spread(xc if beta == 1 else xc * beta, primal.shape)
        if block_of(a) is not None or block_of(b) is not None:
            out = _add_product(out, a, b if alpha == 1 else b * alpha)
        return jet(primal, out, lead_of((x, a, b)))


for _op in (aten.addmm.default, aten.baddbmm.default):
    _add_to_product(_op)


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
