"""Random draws whose location and scale vary: the draw itself is that of the user's own run."""

from __future__ import annotations

from typing import Any

import torch

from lightning_sketch.jets.registry import jet_rule
from lightning_sketch.jets.tensor import primal_of

aten = torch.ops.aten


@jet_rule(aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)
def normal(mean: Any, std: Any = 1.0, *, generator: Any = None) -> Any:
    """``mean + std e``: the kernels draw ``e`` first and scale it.

    Autograd treats the result as constant; retraining would not.
    """
    tensors = [primal_of(a) for a in (mean, std) if isinstance(a, torch.Tensor)]
    shape = torch.broadcast_shapes(*(a.shape for a in tensors))
    return tensors[0].new_empty(shape).normal_(generator=generator) * std + mean
