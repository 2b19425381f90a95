"""Sampling images and volumes at points that vary, and resizing, which is linear."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.rules.linalg import of_primal, refused
from lightning_sketch.jets.tensor import JetTensor, jet, primal_of

aten = torch.ops.aten

BILINEAR, NEAREST = range(2)
ZEROS, BORDER, REFLECTION = range(3)


def _position(grid: Any, size: int, padding: int, align: bool) -> tuple[Any, Tensor]:
    """From ``[-1, 1]`` to ``[0, size - 1]``, on the branch of the primal, and the slope of that."""
    scale = (size - 1) / 2 if align else size / 2
    x = (grid + 1) * scale if align else ((grid + 1) * size - 1) / 2
    slope = torch.full_like(primal_of(x), scale)
    if padding == REFLECTION:
        low, span = (0.0, float(size - 1)) if align else (-0.5, float(size))
        if span == 0:
            return x * 0, slope * 0
        slope = torch.where(primal_of(x) < low, -slope, slope)
        x = (x - low).abs()
        flips = torch.floor(primal_of(x) / span)
        rest, even = x - flips * span, flips % 2 == 0
        x, slope = torch.where(even, rest, span - rest) + low, torch.where(even, slope, -slope)
    if padding == ZEROS:
        return x, slope
    return x.clamp(0, size - 1), slope * ((primal_of(x) > 0) & (primal_of(x) < size - 1))


class _Cells:
    """The corners of the cell around every point, or the nearest entry, and their weights."""

    def __init__(self, x: Any, grid: Any, mode: int, padding: int, align: bool) -> None:
        self.sizes, self.nearest = x.shape[2:], mode == NEAREST
        # the grid's last dimension counts from the innermost one
        placed = [
            _position(grid.select(-1, len(self.sizes) - 1 - d), n, padding, align) for d, n in enumerate(self.sizes)
        ]
        self.at, self.slopes = [y for y, _ in placed], [slope for _, slope in placed]
        self.base = [primal_of(y).round() if self.nearest else primal_of(y).floor() for y in self.at]
        self.corners = list(itertools.product((0,) if self.nearest else (0, 1), repeat=len(self.sizes)))

    def index(self, corner: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor]:
        """Where a corner lies in the flattened volume, for every channel, and whether it lies inside."""
        index = torch.zeros_like(self.base[0], dtype=torch.long)
        inside = torch.ones_like(self.base[0], dtype=torch.bool)
        for y0, step, n in zip(self.base, corner, self.sizes, strict=True):
            place = y0.long() + step
            inside = inside & (place >= 0) & (place < n)
            index = index * n + place.clamp(0, n - 1)
        return index.flatten(1).unsqueeze(1).expand(-1, channels, -1), inside

    def weight(self, corner: tuple[int, ...], inside: Tensor, without: int | None = None) -> Any:
        """The product of the distances from the opposite faces, but for one dimension."""
        weight: Any = inside.to(self.base[0].dtype)
        for d, (y, y0, step) in enumerate(zip(self.at, self.base, corner, strict=True)):
            if not self.nearest and d != without:
                weight = weight * (y - y0 if step else 1 - (y - y0))
        return weight.flatten(1).unsqueeze(1)


@jet_rule(aten.grid_sampler_3d.default)
def grid_sampler_3d(x: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Trilinear interpolation, or the nearest entry; the cell is that of the primal."""
    primal = aten.grid_sampler_3d(primal_of(x), primal_of(grid), interpolation_mode, padding_mode, align_corners)
    cells, flat = _Cells(x, grid, interpolation_mode, padding_mode, align_corners), x.flatten(2)
    total: Any = 0.0
    for corner in cells.corners:
        index, inside = cells.index(corner, x.shape[1])
        total = total + flat.gather(2, index) * cells.weight(corner, inside)
    return of_primal(primal, total.reshape(primal.shape))


def _sampler_adjoint(op: Any) -> None:
    """Register the adjoints: gradients spread to the corners, and differences between corners along each dimension."""

    @jet_rule(op)
    def adjoint(
        grad: Any, x: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool,
        output_mask: Sequence[bool],
    ) -> tuple[Any, Any]:  # fmt: skip
        if interpolation_mode not in (BILINEAR, NEAREST):
            raise refused(op, "only bilinear and nearest interpolation have an adjoint")
        primals = op(
            *(primal_of(a) for a in (grad, x, grid)), interpolation_mode, padding_mode, align_corners, output_mask
        )
        cells = _Cells(x, grid, interpolation_mode, padding_mode, align_corners)
        flat, grads = x.flatten(2), grad.flatten(2)
        of_x: Any = torch.zeros(flat.shape, dtype=x.dtype, device=x.device)
        of_position: list[Any] = [torch.zeros_like(y0) for y0 in cells.base]
        for corner in cells.corners:
            index, inside = cells.index(corner, x.shape[1])
            if output_mask[0]:
                of_x = torch.scatter_add(of_x, 2, index, grads * cells.weight(corner, inside))
            if output_mask[1] and not cells.nearest:
                along = (grads * flat.gather(2, index)).sum(1, keepdim=True)
                for d, step in enumerate(corner):
                    slope = (along * cells.weight(corner, inside, without=d)).view(cells.base[d].shape)
                    of_position[d] = of_position[d] + (slope if step else -slope)
        of_grid = torch.stack([y * s for y, s in zip(of_position, cells.slopes, strict=True)][::-1], -1)
        return of_primal(primals[0], of_x.view(x.shape)) if output_mask[0] else None, of_primal(primals[1], of_grid)


_sampler_adjoint(aten.grid_sampler_2d_backward.default)
_sampler_adjoint(aten.grid_sampler_3d_backward.default)


@jet_rule(aten.cudnn_grid_sampler.default)
def cudnn_grid_sampler(x: Any, grid: Any) -> Any:
    """Bilinear, with zeros around the image and aligned corners."""
    return aten.grid_sampler_2d(x, grid, BILINEAR, ZEROS, True)


@jet_rule(aten.cudnn_grid_sampler_backward.default)
def cudnn_grid_sampler_backward(x: Any, grid: Any, grad: Any) -> Any:
    """The adjoints of the same."""
    return aten.grid_sampler_2d_backward(grad, x, grid, BILINEAR, ZEROS, True, [True, True])


def _resize(name: str) -> None:
    """Register a resizing operator and its adjoint; directions are folded into the batch."""
    op, adjoint = getattr(aten, name).default, getattr(aten, f"{name}_backward").default

    @jet_rule(op)
    def resize(x: JetTensor, output_size: Sequence[int], *args: Any) -> JetTensor:
        primal = op(x.primal, output_size, *args)
        return jet(primal, op(x.coefficients.flatten(0, 3), output_size, *args).view(*x.lead, *primal.shape), x.lead)

    @jet_rule(adjoint)
    def resize_backward(
        grad: JetTensor, output_size: Sequence[int], input_size: Sequence[int], *args: Any
    ) -> JetTensor:
        primal = adjoint(grad.primal, output_size, input_size, *args)
        folded = grad.coefficients.flatten(0, 3).contiguous()
        block = adjoint(folded, output_size, [folded.shape[0], *input_size[1:]], *args)
        return jet(primal, block.view(*grad.lead, *primal.shape), grad.lead)


for _name in (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_trilinear3d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
):
    _resize(_name)
