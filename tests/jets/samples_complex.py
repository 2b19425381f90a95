"""More arguments: Fourier transforms, and the operators that take complex tensors too."""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import _add, _default, aten, i, r, yes


def c(*shape: int) -> Tensor:
    return torch.complex(r(*shape), r(*shape))


def far(*shape: int) -> Tensor:
    """Away from zero."""
    return c(*shape) + (3 + 2j)


_add(lambda: (r(2, 3, 4), [1, 2], 0, True), aten._fft_r2c.default)
_add(lambda: (r(2, 3, 5), [2, 0], 1, False), aten._fft_r2c.default)
_add(lambda: (c(2, 3, 4), [2, 0], 2, False), aten._fft_c2c.default)
_add(lambda: (c(2, 3), [0], 1, True), aten._fft_c2c.default)
_add(lambda: (c(2, 3, 4), [1, 2], 2, 6), aten._fft_c2r.default)
_add(lambda: (c(3, 2), [0], 0, 5), aten._fft_c2r.default)
_add(lambda: (r(2, 3, 2),), aten.view_as_complex.default)
_add(lambda: (r(2, 3), r(3)), aten.complex.default)
_add(lambda: (c(2, 3),), *_default("view_as_real _conj _conj_physical neg clone sum mean tril triu"))
_add(lambda: (far(2, 3),), *_default("abs sgn angle"))
_add(lambda: (c(2, 3), {"dtype": torch.complex128}), aten._to_copy.default)
_add(lambda: (r(2, 3), {"dtype": torch.complex128}), aten._to_copy.default)
_add(lambda: (c(2, 3), [0, -1]), aten.flip.default, aten.sum.dim_IntList, aten.mean.dim)
_add(lambda: (c(2, 3), 1), aten.cumsum.default)
_add(lambda: (c(3, 2), 0, i(2, 0, 2)), aten.index_select.default)
_add(lambda: (c(3, 2), [1, -1, 0, 2]), aten.constant_pad_nd.default)
_add(lambda: ([c(2, 3), r(1, 3)],), aten.cat.default)
_add(lambda: ([c(2, 3), c(2, 3)], 1), aten.stack.default)
_add(lambda: (c(2, 3), [2, 1, 2]), aten.repeat.default)
_add(lambda: (c(2, 3), [1], [-1]), aten.roll.default)
_add(lambda: (c(3, 2), 0, torch.tensor([[0, 1], [2, 0]])), aten.gather.default)
_add(lambda: (c(3, 2), 0, torch.tensor([[0, 1], [2, 0]]), c(2, 2)), aten.scatter_add.default)
_add(lambda: (c(3, 4), [None, i(0, 3)], c(3, 2)), aten.index_put.default)
_add(lambda: (c(3, 4), 1, i(0, 2), c(3, 2)), aten.index_add.default)
_add(lambda: (c(3, 4), [None, i(0, 3, 0)]), aten.index.Tensor)
_add(lambda: (c(2, 4), [3, 2, 4], 0, 1), aten.select_backward.default)
_add(lambda: (c(2, 2), [2, 6], 1, 1, 5, 2), aten.slice_backward.default)
_add(lambda: (c(2, 3), [3, 4, 2], 0, 0, 1), aten.diagonal_backward.default)
_add(lambda: (c(3, 2), c(2, 4)), aten.mm.default)
_add(lambda: (c(2, 3, 2), c(2, 2, 4)), aten.bmm.default)
_add(lambda: (c(4), c(3, 2), c(2, 4)), aten.addmm.default)
_add(lambda: (c(1, 1, 4), c(2, 3, 2), c(2, 2, 4)), aten.baddbmm.default)
_add(lambda: (c(3, 2), c(2)), aten.mv.default)
_add(lambda: (c(3), c(3)), aten.dot.default)
for _a, _b in ((c, c), (r, c), (c, r)):
    _add(lambda a=_a, b=_b: (a(2, 3), b(3)), aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.mul.Tensor)
    _add(lambda a=_a, b=_b: (a(3), b(2, 1) + 4), aten.div.Tensor)
    _add(lambda a=_a, b=_b: (yes(), a(2, 3), b(2, 1)), aten.where.self)
_add(lambda: (c(2, 3), 2 - 1j), aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Scalar, aten.div.Scalar)
_add(lambda: (r(2, 3), 2 - 1j), aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_add(lambda: (c(2, 3), yes(), 1j), aten.masked_fill.Scalar)
_add(lambda: (c(2, 3), c(3)), aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.copy_.default)
