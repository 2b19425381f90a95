"""Complex values between real ones, as in spectral models: Fourier transforms, and what is done to their results.

The primal and the coefficients of a complex tensor are complex: ``y = u + i v`` with coefficients ``u_r + i v_r``. The
imaginary unit of a direction is another one, kept in ``P`` as for real tensors. So whatever is linear over the real
numbers acts on every part for itself, and products and quotients are those of real series, in complex arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sketch.jets.registry import complex_rule, holds_for_complex, jet_rule
from lightning_sketch.jets.rules.linalg import of_primal
from lightning_sketch.jets.tensor import JetTensor, jet, like_layout, primal_of, wrap

aten = torch.ops.aten


def _transform(x: JetTensor, dim: Sequence[int], op: Any, *args: Any) -> JetTensor:
    block = op(x.coefficients, [d % x.ndim + 3 for d in dim], *args)  # the kernels count from the front
    return jet(op(x.primal, dim, *args), block, x.lead)


@jet_rule(aten._fft_r2c.default)
def fft_r2c(x: JetTensor, dim: Sequence[int], normalization: int, onesided: bool) -> JetTensor:
    """From real to complex: linear."""
    return _transform(x, dim, aten._fft_r2c, normalization, onesided)


@jet_rule(aten._fft_c2c.default)
def fft_c2c(x: JetTensor, dim: Sequence[int], normalization: int, forward: bool) -> JetTensor:
    """From complex to complex: linear."""
    return _transform(x, dim, aten._fft_c2c, normalization, forward)


@jet_rule(aten._fft_c2r.default)
def fft_c2r(x: JetTensor, dim: Sequence[int], normalization: int, last_dim_size: int) -> JetTensor:
    """From complex to real: linear, over the real numbers."""
    return _transform(x, dim, aten._fft_c2r, normalization, last_dim_size)


@jet_rule(aten.view_as_real.default)
def view_as_real(x: JetTensor) -> JetTensor:
    """Real and imaginary part in a last dimension, in the same storage."""
    return wrap(torch.view_as_real(x.primal), [torch.view_as_real(x.coefficients)], x.lead)


@jet_rule(aten.view_as_complex.default)
def view_as_complex(x: JetTensor) -> JetTensor:
    """The last dimension as real and imaginary part, in the same storage, where the parts lie side by side."""
    primal = torch.view_as_complex(x.primal)
    if not x.numel():
        return jet(primal, None, x.lead)
    if x.coefficients.stride(-1) != 1:
        x._cell[0] = like_layout(x.primal, x.lead, torch.empty).copy_(x.coefficients)
    return wrap(primal, [torch.view_as_complex(x.coefficients)], x.lead)


@jet_rule(aten._conj.default, aten._conj_physical.default)
def conj(x: JetTensor) -> JetTensor:
    """The conjugate, written out: the coefficients' parts stay as they are."""
    return jet(x.primal.conj_physical(), None if x.block is None else x.block.conj_physical(), x.lead)


@jet_rule(aten.complex.default)
def complex_of(real: Any, imag: Any) -> Any:
    """``real + i imag``."""
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(real, imag), -1))


@complex_rule(aten.abs.default)
def abs_rule(x: JetTensor) -> Any:
    """The root of the sum of squares, whose series is zero where it is zero."""
    return of_primal(x.primal.abs(), torch.linalg.vector_norm(torch.view_as_real(x), 2, -1))


@complex_rule(aten.sgn.default)
def sgn(x: JetTensor) -> Any:
    """``x / |x|``, zero at zero."""
    parts = torch.view_as_real(x)
    size = torch.linalg.vector_norm(parts, 2, -1, True)
    away = primal_of(size) != 0
    y = torch.where(away, parts / torch.where(away, size, 1.0), 0.0)
    return of_primal(x.primal.sgn(), torch.view_as_complex(y))


@complex_rule(aten.angle.default)
def angle(x: JetTensor) -> Any:
    """The angle between the parts."""
    real, imag = torch.view_as_real(x).unbind(-1)
    return of_primal(x.primal.angle(), torch.atan2(imag, real))


_FACTORIES = "empty_like zeros_like ones_like full_like new_empty new_empty_strided new_zeros new_ones new_full"
_LINEAR = (
    "_fft_c2c _fft_c2r _conj_physical neg clone _to_copy flip cumsum index_select tril triu constant_pad_nd cat stack "
    "repeat roll gather scatter_add index_put index_add select_backward slice_backward diagonal_backward sum mean"
)
_PRODUCTS = "mm bmm addmm baddbmm mv dot"
holds_for_complex(*(getattr(aten, name).default for name in f"{_FACTORIES} {_LINEAR} {_PRODUCTS}".split()))
for _name in ("add", "sub", "rsub", "mul", "div", "eq", "ne"):
    holds_for_complex(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)
holds_for_complex(aten.sum.dim_IntList, aten.mean.dim, aten.where.self, aten.masked_fill.Scalar, aten.index.Tensor)
