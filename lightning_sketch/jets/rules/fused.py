"""Kernels that fuse several operators, most of them met on GPUs only, in terms of operators that have rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.jets.registry import jet_rule, run_constant
from lightning_sketch.jets.tensor import JetTensor, jet

aten = torch.ops.aten


def _sum_of(*tensors: Any) -> Any:
    total: Any = 0.0
    for x in tensors:
        total = total if x is None else total + x
    return total


@jet_rule(aten._thnn_fused_lstm_cell.default)
def lstm_cell(
    input_gates: Any, hidden_gates: Any, cx: Any, input_bias: Any = None, hidden_bias: Any = None
) -> tuple[Any, Any, Any]:
    """``c = f c_0 + i g``, ``h = o tanh c``, and the gates."""
    i, f, g, o = _sum_of(input_gates, hidden_gates, input_bias, hidden_bias).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


@jet_rule(aten._thnn_fused_lstm_cell_backward_impl.default)
def lstm_cell_backward(
    grad_hy: Any, grad_cy: Any, cx: Any, cy: Any, workspace: Any, has_bias: bool
) -> tuple[Any, Any, Any]:
    """The gradients of the gates before their activation, of ``c_0`` and of the biases."""
    i, f, g, o = workspace.chunk(4, 1)
    c = cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = _sum_of(grad_hy * o * (1 - c * c), grad_cy)
    gates = torch.cat(
        [
            grad_c * g * i * (1 - i),
            grad_c * cx * f * (1 - f),
            grad_c * i * (1 - g * g),
            grad_hy * c * o * (1 - o),
        ],
        1,
    )
    return gates, grad_c * f, gates.sum(0) if has_bias else None


@jet_rule(aten._thnn_fused_gru_cell.default)
def gru_cell(
    input_gates: Any, hidden_gates: Any, hx: Any, input_bias: Any = None, hidden_bias: Any = None
) -> tuple[Any, Any]:
    """``n = tanh(i_n + r h_n)``, ``h = n + z (h_0 - n)``, and what the adjoint needs."""
    ir, iz, i_n = _sum_of(input_gates, input_bias).chunk(3, 1)
    hr, hz, hn = _sum_of(hidden_gates, hidden_bias).chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (i_n + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


@jet_rule(aten._thnn_fused_gru_cell_backward.default)
def gru_cell_backward(grad: Any, workspace: Any, has_bias: bool) -> tuple[Any, Any, Any, Any, Any]:
    """The gradients of both gates before their activation, of ``h_0`` and of the biases."""
    r, z, n, hx, hn = workspace.chunk(5, 1)
    of_z = grad * (hx - n) * z * (1 - z)
    of_n = grad * (1 - z) * (1 - n * n)
    of_r = of_n * hn * r * (1 - r)
    of_input, of_hidden = torch.cat([of_r, of_z, of_n], 1), torch.cat([of_r, of_z, of_n * r], 1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, grad * z, *biases


@jet_rule(aten._fused_dropout.default)
def fused_dropout(x: JetTensor, p: float, generator: Any = None) -> tuple[JetTensor, Tensor]:
    """``y = x mask / p``, kept with probability ``p``, the mask drawn by the primal's own kernel."""
    if x.block is None:
        return run_constant(aten._fused_dropout.default, x, p, generator)
    y, mask = aten._fused_dropout(x.primal, p, generator)
    return jet(y, x.coefficients * (mask * (1 / p)), x.lead), mask


@jet_rule(aten._masked_scale.default)
def masked_scale(x: Any, mask: Tensor, scale: float) -> Any:
    """``y = x mask scale``."""
    return x * (mask * scale)


def _others(x: Any, dim: int) -> list[int]:
    return [d for d in range(x.ndim) if d != dim]


@jet_rule(aten._weight_norm_interface.default)
def weight_norm(v: Any, g: Any, dim: int = 0) -> tuple[Any, Any]:
    """``w = g v / |v|``, the norms over all dimensions but one, and the norms."""
    norms = torch.linalg.vector_norm(v, 2, _others(v, dim), True)
    return v * (g / norms), norms


@jet_rule(aten._weight_norm_interface_backward.default)
def weight_norm_backward(grad: Any, v: Any, g: Any, norms: Any, dim: int) -> tuple[Any, Any]:
    """The gradients of ``v`` and ``g``."""
    along = (grad * v).sum(_others(v, dim), keepdim=True) / norms
    return (grad - v * (along / norms)) * (g / norms), along
