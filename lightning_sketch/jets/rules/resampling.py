"""Sampling volumes at points that vary, and antialiased resizing, which is linear."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.tensor import JetTensor, jet, primal_of

aten = torch.ops.aten

BILINEAR, NEAREST = range(2)
ZEROS, BORDER, REFLECTION = range(3)


def _position(grid: Any, size: int, padding: int, align: bool) -> Any:
    """From ``[-1, 1]`` to ``[0, size - 1]``, on the branch of the primal."""
    x = (grid + 1) * ((size - 1) / 2) if align else ((grid + 1) * size - 1) / 2
    if padding == REFLECTION:
        low, span = (0.0, float(size - 1)) if align else (-0.5, float(size))
        if span == 0:
            return x * 0
        x = (x - low).abs()
        flips = torch.floor(primal_of(x) / span)
        rest = x - flips * span
        x = torch.where(flips % 2 == 0, rest, span - rest) + low
    return x if padding == ZEROS else x.clamp(0, size - 1)


@jet_rule(aten.grid_sampler_3d.default)
def grid_sampler_3d(x: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Trilinear interpolation, or the nearest entry; the cell is that of the primal."""
    primal = aten.grid_sampler_3d(primal_of(x), primal_of(grid), interpolation_mode, padding_mode, align_corners)
    sizes, flat = x.shape[2:], x.flatten(2)
    # the grid's last dimension counts from the innermost one
    at = [_position(grid.select(-1, 2 - d), n, padding_mode, align_corners) for d, n in enumerate(sizes)]
    base = [primal_of(y).round() if interpolation_mode == NEAREST else primal_of(y).floor() for y in at]
    total: Any = None
    for corner in [(0, 0, 0)] if interpolation_mode == NEAREST else itertools.product((0, 1), repeat=3):
        index = torch.zeros_like(base[0], dtype=torch.long)
        weight: Any = torch.ones_like(base[0])
        for y, y0, step, n in zip(at, base, corner, sizes, strict=True):
            place = y0.long() + step
            weight = weight * ((place >= 0) & (place < n))
            if interpolation_mode == BILINEAR:
                weight = weight * (y - y0 if step else 1 - (y - y0))
            index = index * n + place.clamp(0, n - 1)
        index = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        term = flat.gather(2, index) * weight.flatten(1).unsqueeze(1)
        total = term if total is None else total + term
    return of_primal(primal, total.reshape(primal.shape))


@jet_rule(aten._upsample_bilinear2d_aa.default)
def upsample_bilinear2d_aa(x: JetTensor, output_size: Sequence[int], *args: Any) -> JetTensor:
    """Resize; directions are folded into the batch."""
    primal = aten._upsample_bilinear2d_aa(x.primal, output_size, *args)
    block: Tensor = aten._upsample_bilinear2d_aa(x.coefficients.flatten(0, 3), output_size, *args)
    return jet(primal, block.view(*x.lead, *primal.shape), x.lead)


@jet_rule(aten._upsample_bilinear2d_aa_backward.default)
def upsample_bilinear2d_aa_backward(
    grad: JetTensor, output_size: Sequence[int], input_size: Sequence[int], *args: Any
) -> JetTensor:
    """The adjoint."""
    primal = aten._upsample_bilinear2d_aa_backward(grad.primal, output_size, input_size, *args)
    folded = grad.coefficients.flatten(0, 3).contiguous()
    sizes = [folded.shape[0], *input_size[1:]]
    block: Tensor = aten._upsample_bilinear2d_aa_backward(folded, output_size, sizes, *args)
    return jet(primal, block.view(*grad.lead, *primal.shape), grad.lead)
