"""Linear operators: the same operator on every coefficient, with dimensions counted from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of, missing_rule
from lightning_sketch.jets.rules.views import from_end
from lightning_sketch.jets.series import lift, spread
from lightning_sketch.jets.tensor import JetTensor, block_of, coefficient_dtype, jet, like_layout, primal_of

aten = torch.ops.aten


def _combine(a: Any, b: Any, alpha: Any, primal: Tensor) -> JetTensor:
    """``a + alpha b``, given the primal of the result."""
    ac, bc = block_of(a), block_of(b)
    n = primal.ndim
    if ac is None and bc is not None:
        block = spread(bc, primal.shape)
        if alpha != 1:
            block *= alpha
    elif bc is None and ac is not None:
        block = spread(ac, primal.shape)
    else:
        assert ac is not None
        assert bc is not None
        block = torch.add(lift(ac, n), lift(bc, n), alpha=alpha)
    return jet(primal, block, lead_of((a, b)))


@jet_rule(aten.add.Tensor, aten.add.Scalar)
def add(a: Any, b: Any, alpha: Any = 1) -> JetTensor:
    """``y = a + alpha b``."""
    return _combine(a, b, alpha, torch.add(primal_of(a), primal_of(b), alpha=alpha))


@jet_rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(a: Any, b: Any, alpha: Any = 1) -> JetTensor:
    """``y = a - alpha b``."""
    return _combine(a, b, -alpha, torch.sub(primal_of(a), primal_of(b), alpha=alpha))


@jet_rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(a: Any, b: Any, alpha: Any = 1) -> JetTensor:
    """``y = b - alpha a``."""
    return _combine(b, a, -alpha, torch.rsub(primal_of(a), primal_of(b), alpha=alpha))


@jet_rule(aten.neg.default)
def neg(x: JetTensor) -> JetTensor:
    """``y = -x``."""
    return jet(-x.primal, -x.coefficients, x.lead)


@jet_rule(aten.clone.default)
def clone(x: JetTensor, *, memory_format: torch.memory_format | None = None) -> JetTensor:
    """Copy; the coefficients take the memory order of the primal's copy."""
    primal = aten.clone(x.primal, memory_format=memory_format)
    return jet(primal, like_layout(primal, x.lead, torch.empty).copy_(x.coefficients), x.lead)


@jet_rule(aten._to_copy.default)
def to_copy(x: JetTensor, **kwargs: Any) -> Any:
    """Cast or move; a cast to integers follows the primal's branch, which is constant."""
    primal = aten._to_copy(x.primal, **kwargs)
    if not primal.dtype.is_floating_point and not primal.dtype.is_complex:
        return primal
    kwargs.pop("memory_format", None)
    kwargs["dtype"] = coefficient_dtype(primal.dtype)
    return jet(primal, aten._to_copy(x.coefficients, **kwargs), x.lead)


def _by_dims(op: Any, *names: str) -> None:
    """Register a linear operator of one tensor whose arguments ``names`` are dimensions."""
    arguments = op._schema.arguments
    tensor, rest = arguments[0].name, arguments[1:]

    @jet_rule(op)
    def linear_rule(*args: Any, **kwargs: Any) -> JetTensor:
        x = args[0] if args else kwargs.pop(tensor)
        bound = {a.name: v for a, v in zip(rest, args[1:], strict=False)} | kwargs
        primal = op(x.primal, **bound)
        ndim = max(x.ndim, 1)
        for name in names:
            default = next(a.default_value for a in rest if a.name == name)
            d = bound.get(name, default)
            bound[name] = [from_end(i, ndim) for i in d] if isinstance(d, (list, tuple)) else from_end(d, ndim)
        block = x.coefficients if x.ndim else x.coefficients.unsqueeze(-1)
        return jet(primal, op(block, **bound).view(*x.lead, *primal.shape), x.lead)


_by_dims(aten.flip.default, "dims")
_by_dims(aten.cumsum.default, "dim")
_by_dims(aten.index_select.default, "dim")
_by_dims(aten.tril.default)
_by_dims(aten.triu.default)


@jet_rule(aten.constant_pad_nd.default)
def constant_pad_nd(x: JetTensor, pad: Sequence[int], value: float = 0) -> JetTensor:
    """Pad the last dimensions; the padding is constant."""
    return jet(aten.constant_pad_nd(x.primal, pad, value), aten.constant_pad_nd(x.coefficients, pad, 0), x.lead)


@jet_rule(aten.cat.default)
def cat(tensors: Sequence[Any], dim: int = 0) -> JetTensor:
    """Concatenate; constant parts get zero coefficients."""
    primal = torch.cat([primal_of(x) for x in tensors], dim)
    lead = lead_of(tensors)
    legacy_empty = [x for x in tensors if x.ndim == 1 and x.shape[0] == 0 and primal.ndim != 1]
    used = [x for x in tensors if not any(x is e for e in legacy_empty)]
    return jet(primal, torch.cat([_dense_block(x, lead) for x in used], from_end(dim, primal.ndim)), lead)


@jet_rule(aten.stack.default)
def stack(tensors: Sequence[Any], dim: int = 0) -> JetTensor:
    """Stack along a new dimension; constant parts get zero coefficients."""
    primal = torch.stack([primal_of(x) for x in tensors], dim)
    lead = lead_of(tensors)
    return jet(primal, torch.stack([_dense_block(x, lead) for x in tensors], from_end(dim, primal.ndim)), lead)


def _dense_block(x: Any, lead: tuple[int, int, int]) -> Tensor:
    block = block_of(x)
    if block is not None:
        return block
    x0 = primal_of(x)
    return x0.new_zeros(()).expand(*lead, *x0.shape)


@jet_rule(aten.repeat.default)
def repeat(x: JetTensor, repeats: Sequence[int]) -> JetTensor:
    """Tile."""
    block = lift(x.coefficients, len(repeats))
    return jet(x.primal.repeat(repeats), block.repeat(1, 1, 1, *repeats), x.lead)


@jet_rule(aten.roll.default)
def roll(x: JetTensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> JetTensor:
    """Roll along dimensions, or along the flattened tensor."""
    primal = aten.roll(x.primal, shifts, dims)
    if not dims:
        block = x.coefficients.flatten(3).roll(shifts, -1) if x.ndim else x.coefficients.clone()
        return jet(primal, block.view(*x.lead, *x.shape), x.lead)
    return jet(primal, x.coefficients.roll(shifts, [from_end(d, x.ndim) for d in dims]), x.lead)


@jet_rule(aten.where.self)
def where(condition: Tensor, a: Any, b: Any) -> JetTensor:
    """Choose by a condition, which is on the primal's branch."""
    primal = torch.where(condition, primal_of(a), primal_of(b))
    zero = torch.zeros((), dtype=primal.dtype, device=primal.device)
    ac, bc = (zero if c is None else lift(c, primal.ndim) for c in (block_of(a), block_of(b)))
    block = torch.where(condition, ac, bc)
    lead = lead_of((a, b))
    return jet(primal, block.expand(*lead, *primal.shape), lead)


@jet_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(x: Any, mask: Tensor, value: Any) -> JetTensor:
    """Overwrite where the mask is set."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    return where(mask, value, x)


def _backward_of_view(op: Any, forward: Any) -> None:
    """Register the adjoint of a view: write the gradient into zeros of the input's shape, through the view itself."""

    @jet_rule(op)
    def adjoint(grad: JetTensor, input_sizes: Sequence[int], *args: Any) -> Any:
        out = torch.zeros_like(grad).new_zeros(input_sizes)
        forward(out, *args).copy_(grad)
        return out


_backward_of_view(aten.select_backward.default, aten.select.int)
_backward_of_view(aten.slice_backward.default, aten.slice.Tensor)
_backward_of_view(aten.diagonal_backward.default, aten.diagonal.default)


def _scatter_of_view(op: Any, view: Any) -> None:
    """Register a copy of the first argument whose view is replaced by the second."""

    @jet_rule(op)
    def scatter_rule(x: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        out = torch.zeros_like(source).new_empty(x.shape).copy_(x) if type(x) is not JetTensor else x.clone()
        view(out, *args, **kwargs).copy_(source)
        return out


_scatter_of_view(aten.diagonal_scatter.default, aten.diagonal.default)


@jet_rule(aten.as_strided_scatter.default)
def as_strided_scatter(
    x: Any, source: Any, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """A copy of the first argument whose strided view is replaced by the second."""
    x0 = primal_of(x)
    if x0.storage_offset() or not x0.is_contiguous():
        raise missing_rule(aten.as_strided_scatter.default)
    out = x.clone() if type(x) is JetTensor else torch.zeros_like(source).new_empty(x.shape).copy_(x)
    out.as_strided(size, stride, storage_offset).copy_(source)
    return out
