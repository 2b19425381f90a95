"""Convolutions of any dimension, stride, padding, dilation, groups and transposition, and their adjoints.

A convolution is bilinear in input and weight, and its two adjoints are bilinear in (output gradient, weight) and
(output gradient, input). Where one factor is a primal, ``R P K`` is folded into the batch or the channels of the
other; a product of two coefficients is one grouped convolution with the directions as groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, lead_of
from lightning_sketch.jets.series import real_products, spread
from lightning_sketch.jets.tensor import JetTensor, block_of, jet, primal_of

aten = torch.ops.aten

# A bilinear map of N independent pairs, (N, *A), (N, *B) -> (N, *Y)
Pairwise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Geometry:
    """The constant arguments of a convolution."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, copies: int = 1, bias: Tensor | None = None) -> Tensor:
        """Convolve, with ``copies`` independent convolutions side by side in the channels."""
        return aten.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            copies * self.groups,
        )

    def adjoint(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: int, copies: int = 1) -> Tensor:
        """Return the gradient of the input (``wanted = 0``) or of the weight (1)."""
        mask = [wanted == 0, wanted == 1, False]
        result: Tensor = aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            copies * self.groups, mask,
        )[wanted]  # fmt: skip
        return result


def _into_channels(x: Tensor) -> Tensor:
    """``(N, B, C, *)`` to ``(B, N C, *)``."""
    return x.transpose(0, 1).flatten(1, 2)


def _from_channels(y: Tensor, copies: int) -> Tensor:
    """``(B, N C, *)`` to ``(N, B, C, *)``."""
    return y.unflatten(1, (copies, -1)).transpose(0, 1)


def _bilinear(a: Any, b: Any, primal: Tensor, fold_a: Pairwise, fold_b: Pairwise, pairs: Pairwise) -> Tensor:
    """Orders ``1..R`` of a bilinear map: ``fold_a(A, b_0)``, ``fold_b(a_0, B)``, and ``pairs`` for two coefficients."""
    a0, b0, ac, bc = primal_of(a), primal_of(b), block_of(a), block_of(b)
    lead = (ac if ac is not None else bc).shape[:3]  # type: ignore[union-attr]
    out: Tensor | None = None
    if ac is not None:
        out = fold_a(ac.flatten(0, 2), b0).contiguous()
    if bc is not None:
        term = fold_b(a0, bc.flatten(0, 2))
        out = term.contiguous() if out is None else out.add_(term)
    assert out is not None
    out = out.view(*lead, *primal.shape)
    if ac is not None and bc is not None and lead[0] > 1:
        for x, y, signs in real_products(ac[:-1], bc[:-1], expensive=True):
            for i, factor in enumerate(x):  # with all its partners at once
                partners = y[: len(x) - i]
                products = pairs(factor.expand(len(partners), *factor.shape).flatten(0, 1), partners.flatten(0, 1))
                for part, sign in signs.items():
                    out[i + 1 :, part].add_(products.unflatten(0, partners.shape[:2]), alpha=sign)
    return out


@jet_rule(aten.convolution.default)
def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> JetTensor:
    """``y = x * w + b``."""
    g = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    lead = lead_of((x, weight, bias))
    primal = g.forward(primal_of(x), primal_of(weight), bias=primal_of(bias))

    def fold_x(xc: Tensor, w0: Tensor) -> Tensor:
        return g.forward(xc.flatten(0, 1), w0).unflatten(0, xc.shape[:2])

    def pairs(xc: Tensor, wc: Tensor) -> Tensor:
        n = xc.shape[0]
        return _from_channels(g.forward(_into_channels(xc), wc.flatten(0, 1), n), n)

    def fold_w(x0: Tensor, wc: Tensor) -> Tensor:
        if groups == 1 and not transposed:  # one convolution with more output channels
            return _from_channels(g.forward(x0, wc.flatten(0, 1)), wc.shape[0])
        return pairs(x0.expand(wc.shape[0], *x0.shape), wc)

    varies = block_of(x) is not None or block_of(weight) is not None
    out = _bilinear(x, weight, primal, fold_x, fold_w, pairs) if varies else None
    bc = block_of(bias)
    if bc is not None:
        shift = bc.reshape(*lead, 1, -1, *[1] * (primal.ndim - 2))
        out = spread(shift, primal.shape) if out is None else out.add_(shift)
    return jet(primal, out, lead)


@jet_rule(aten.convolution_backward.default)
def convolution_backward(
    grad: Any, x: Any, weight: Any, bias_sizes: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Sequence[bool],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The adjoints of ``y = x * w + b``."""
    g = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    lead = lead_of((grad, x, weight))
    x0, w0, g0 = primal_of(x), primal_of(weight), primal_of(grad)
    primals = aten.convolution_backward(
        g0, x0, w0, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
    )

    def input_pairs(gc: Tensor, wc: Tensor) -> Tensor:
        n = gc.shape[0]
        like = x0.new_empty(()).expand(x0.shape[0], n * x0.shape[1], *x0.shape[2:])
        return _from_channels(g.adjoint(_into_channels(gc), like, wc.flatten(0, 1), 0, n), n)

    def input_fold_grad(gc: Tensor, w: Tensor) -> Tensor:
        like = x0.new_empty(()).expand(gc.shape[0] * x0.shape[0], *x0.shape[1:])
        return g.adjoint(gc.flatten(0, 1), like, w, 0).unflatten(0, gc.shape[:2])

    def input_fold_weight(grad0: Tensor, wc: Tensor) -> Tensor:
        return input_pairs(grad0.expand(wc.shape[0], *grad0.shape), wc)

    def weight_pairs(gc: Tensor, xc: Tensor) -> Tensor:
        n = gc.shape[0]
        like = w0.new_empty(()).expand(n * w0.shape[0], *w0.shape[1:])
        return g.adjoint(_into_channels(gc), _into_channels(xc), like, 1, n).unflatten(0, (n, -1))

    def weight_fold_grad(gc: Tensor, x_: Tensor) -> Tensor:
        n = gc.shape[0]
        if groups == 1 and not transposed:  # one adjoint with more output channels
            like = w0.new_empty(()).expand(n * w0.shape[0], *w0.shape[1:])
            return g.adjoint(_into_channels(gc), x_, like, 1).unflatten(0, (n, -1))
        return weight_pairs(gc, x_.expand(n, *x_.shape))

    def weight_fold_input(grad0: Tensor, xc: Tensor) -> Tensor:
        return weight_pairs(grad0.expand(xc.shape[0], *grad0.shape), xc)

    def adjoint(position: int, a: Any, b: Any, *maps: Pairwise) -> Any:
        primal = primals[position]
        if not output_mask[position]:
            return None
        if block_of(a) is None and block_of(b) is None:
            return jet(primal, None, lead)
        return jet(primal, _bilinear(a, b, primal, *maps), lead)

    of_bias = block_of(grad.sum([0, *range(2, g0.ndim)])) if output_mask[2] else None
    return (
        adjoint(0, grad, weight, input_fold_grad, input_fold_weight, input_pairs),
        adjoint(1, grad, x, weight_fold_grad, weight_fold_input, weight_pairs),
        jet(primals[2], of_bias, lead) if output_mask[2] else None,
    )
