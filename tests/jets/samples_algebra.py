"""More arguments: linear algebra, and the operators that reduce, sample or search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .samples import _add, _default, aten, away, i, inf, p, r, steps, yes


def square(*shape: int) -> Tensor:
    """Regular, and its eigenvalues and singular values lie apart."""
    n = shape[-1]
    return 0.4 * r(*shape, n) + torch.diag(torch.arange(2.0, 2.0 + n).double())


def positive(*shape: int) -> Tensor:
    a = square(*shape)
    return a @ a.mT


def lower(*shape: int) -> Tensor:
    return square(*shape).tril()


BOTH = _default("linalg_inv_ex _linalg_det _linalg_slogdet linalg_lu linalg_lu_factor_ex linalg_qr linalg_matrix_exp")
_add(lambda: (square(3),), *BOTH)
_add(lambda: (square(2, 3).mT,), *BOTH)
_add(lambda: (square(2, 1, 1),), *BOTH)
_singular = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 0.2], [1.3, 1.0, 0.7]]).double()  # the last pivot is zero
_add(lambda: (_singular.clone(),), aten._linalg_det.default)
for _shape in ((4, 2), (2, 4), (2, 3, 2)):
    _add(lambda s=_shape: (r(*s),), *_default("linalg_lu linalg_lu_factor_ex linalg_qr _linalg_svd"))
    _add(lambda s=_shape: (r(*s), "r"), aten.linalg_qr.default)
    _add(lambda s=_shape: (r(*s), False, False), aten._linalg_svd.default)
    _add(lambda s=_shape: (r(*s),), aten.linalg_pinv.atol_rtol_tensor)
_add(lambda: (r(2, 4), "complete"), aten.linalg_qr.default)
_add(lambda: (square(2, 3),), aten._linalg_svd.default)
_add(lambda: (square(3), True), aten._linalg_svd.default)
_add(lambda: (positive(2, 3), {"hermitian": True}), aten.linalg_pinv.atol_rtol_tensor)
_add(lambda: (positive(2, 3),), *_default("linalg_cholesky_ex cholesky _linalg_eigh"))
_add(lambda: (positive(3), {"upper": True}), *_default("linalg_cholesky_ex cholesky"))
_add(lambda: (positive(3), "U"), aten._linalg_eigh.default)
_add(lambda: (positive(3), "L", False), aten._linalg_eigh.default)
_add(lambda: (square(2, 3), r(2, 3)), aten._linalg_solve_ex.default)
_add(lambda: (square(2, 3), r(3, 2)), aten._linalg_solve_ex.default)
_add(lambda: (square(3), r(2, 4, 3), {"left": False}), aten._linalg_solve_ex.default)
_add(lambda: (square(3), r(2, 3, 4), {"upper": True}), aten.linalg_solve_triangular.default)
_add(lambda: (square(2, 3), r(4, 3), {"upper": False, "left": False}), aten.linalg_solve_triangular.default)
_add(lambda: (square(3), r(3, 1), {"upper": True, "unitriangular": True}), aten.linalg_solve_triangular.default)
_add(lambda: (r(3, 2), square(3)), aten.triangular_solve.default)
_add(lambda: (r(2, 3, 2), square(3), False, True, True), aten.triangular_solve.default)
_add(lambda: (r(3, 2), lower(2, 3)), aten.cholesky_solve.default)
_add(lambda: (r(3, 2), lower(3).mT, True), aten.cholesky_solve.default)
_add(lambda: (lower(2, 3),), aten.cholesky_inverse.default)
_add(lambda: (lower(3).mT, True), aten.cholesky_inverse.default)
_add(lambda: torch.linalg.lu_factor(r(4, 2)), aten.lu_unpack.default)
_add(lambda: torch.linalg.lu_factor(r(2, 2, 4)), aten.lu_unpack.default)
_add(lambda: (*torch.linalg.lu_factor(r(2, 3, 3)), r(3, 2)), aten.linalg_lu_solve.default)
_add(lambda: (*torch.linalg.lu_factor(r(3, 3)), r(3, 2), {"adjoint": True}), aten.linalg_lu_solve.default)
_add(lambda: (*torch.linalg.lu_factor(r(3, 3)), r(2, 3), {"left": False}), aten.linalg_lu_solve.default)
_add(lambda: (r(4, 2), r(4, 3)), aten.linalg_lstsq.default)
_add(lambda: (r(2, 4, 2), r(2, 4), {"driver": "gelsd"}), aten.linalg_lstsq.default)
_add(lambda: (r(2, 4), r(2, 1)), aten.linalg_lstsq.default)
_add(lambda: (r(2, 4, 3), p(2, 2)), aten.linalg_householder_product.default)
for _left, _transpose, _other in ((True, False, (4, 2)), (False, True, (2, 4)), (True, True, (4, 1))):
    _add(lambda a=_left, b=_transpose, c=_other: (r(4, 3), p(3), r(*c), a, b), aten.ormqr.default)
# so that the oracle, which looks for the largest error, sees each scale
for _at in (0.0, 0.4, -3.0, 30.0, 49.0, 52.0, -70.0):
    _add(lambda x=_at: (torch.full((1,), x or 1e-9).double(),), *_default("i0 special_i1"))
    _add(lambda x=_at: (torch.full((1,), x or 0.05).double(),), *_default("special_i0e special_i1e"))

_add(lambda: (r(*(2, 3)), -0.5), aten.copysign.Scalar)
_add(lambda: (r(2, 3), r(3)), aten.nextafter.default)
_add(lambda: (away(2, 3),), aten.frexp.Tensor)
_add(lambda: (steps(2, 3), {"decimals": 0}), aten.round.decimals)
_add(lambda: (r(2, 3), p(3)), aten.normal.Tensor_Tensor)
_add(lambda: (r(2, 3), 0.7), aten.normal.Tensor_float)
_add(lambda: (0.7, p(2, 3)), aten.normal.float_Tensor)
_add(lambda: (r(3, 4), r(2, 2), [2, 2], [5, 1], 1), aten.as_strided_scatter.default)
_add(lambda: (r(3, 2, 2), r(2), r(2), r(2), p(2), 0.3, 0.1), aten._batch_norm_with_update.default)

_index = torch.tensor([[0, 1], [0, 0], [2, 0]])
for _kind in ("prod", "amax", "amin"):
    for _self in (True, False):
        _include = {"include_self": _self}
        _add(lambda k=_kind, o=_include: (r(3, 2), 0, _index, r(3, 3), k, o), aten.scatter_reduce.two)
        _add(lambda k=_kind, o=_include: (r(2, 3), 1, i(2, 0, 2), 0.9 * r(2, 3) + 0.1, k, o), aten.index_reduce.default)
_add(lambda: (r(3, 2), 0, i(0, 0), r(2, 2), "mean"), aten.index_reduce.default)
_add(lambda: (r(), 0, i(0), r(), "prod"), aten.index_reduce.default)
_add(lambda: (r(), 0, i(0, 0), r(2), "amax"), aten.scatter_reduce.two)
_add(lambda: (r(3, 2), 0, _index, r(3, 2), {"reduce": "multiply"}), aten.scatter.reduce)
_add(lambda: (r(3, 2), 0, _index, r(3, 2), {"reduce": "add"}), aten.scatter.reduce)
_add(lambda: (r(3, 2), 0, _index, 0.5, {"reduce": "multiply"}), aten.scatter.value_reduce)
for _kind in ("sum", "mean", "prod", "max", "min"):
    _add(lambda k=_kind: (r(5, 2), k, {"lengths": i(2, 0, 3), "initial": 1.0}), aten.segment_reduce.default)
    _add(lambda k=_kind: (r(5), k, {"offsets": i(0, 1, 5)}), aten.segment_reduce.default)

for _p in (2.0, 1.0, 3.0, inf, 0.0):
    _add(lambda p=_p: (r(2, 3), r(1, 3) + 0.1, p, None), aten._cdist_forward.default)
    _add(lambda p=_p: (r(3, 4), p), aten._pdist_forward.default)


def _distances(order: float) -> tuple[Any, ...]:
    a, b = r(3, 4), r(2, 4)
    return r(3, 2), a, b, order, torch.cdist(a, b, order).detach()


def _own_distances(order: float) -> tuple[Any, ...]:
    a = r(3, 4)
    return r(3), a, order, torch.pdist(a, order)


_add(lambda: (r(2, 3, 4), r(2, 2, 4), 2.0, None), aten._cdist_forward.default)
for _p in (2.0, 1.0, 3.0, 0.0):
    _add(lambda p=_p: _distances(p), aten._cdist_backward.default)
    _add(lambda p=_p: _own_distances(p), aten._pdist_backward.default)

_words, _starts = i(0, 3, 3, 1, 4), i(0, 2, 2)
BAGS = _default("_embedding_bag _embedding_bag_forward_only")
_add(lambda: (r(5, 3), _words, _starts, False, 0, False, r(5)), *BAGS)
_add(lambda: (r(5, 3), _words, _starts, False, 1, False, None, False, 3), *BAGS)
_add(lambda: (r(5, 3), _words, i(0, 2, 5), False, 0, False, None, True), *BAGS)
_add(lambda: (r(5, 3), _words, _starts, False, 2), *BAGS)


def _bags(mode: int, weights: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    _, bags, sizes, maxima = aten._embedding_bag(r(5, 3), _words, _starts, rest[0], mode, False, None, False, rest[1])
    return r(3, 3), _words, bags, sizes, maxima, 5, rest[0], mode, weights, rest[1]


_add(lambda: _bags(0, r(5), False, -1), aten._embedding_bag_dense_backward.default)
_add(lambda: _bags(1, None, False, 3), aten._embedding_bag_dense_backward.default)
_add(lambda: _bags(2, None, False, -1), aten._embedding_bag_dense_backward.default)
_add(
    lambda: (r(3, 3), r(5, 3), _words, _starts, i(0, 0, 2, 2, 2), 0, 3),
    aten._embedding_bag_per_sample_weights_backward.default,
)
_add(
    lambda: (r(3, 3), _words, _starts, i(0, 0, 2, 2, 2), i(2, 0, 3), i(), 5, False, 0, False, r(5)),
    aten._embedding_bag_backward.default,
)
_add(lambda: (r(5, 3), i(0, 3, 3), 1.0, 2.0), aten.embedding_renorm_.default)
_add(lambda: (r(5, 3), i(0, 3, 3), 0.5, 1.0), aten.embedding_renorm_.default)

# the gradient jumps between cells; some points lie outside the volume
_inside_cells = torch.tensor([-0.8, 0.15, 0.4, 0.4, -0.8, 1.4, 0.15, 1.4, 0.4, -1.45, 0.4, 0.15]).double()
_inside_cells = _inside_cells.view(1, 1, 2, 2, 3)
for _mode, _padding, _align in ((0, 0, True), (0, 1, False), (0, 2, True), (0, 2, False), (1, 0, False)):
    _add(
        lambda *a, m=_mode, q=_padding, c=_align: (r(1, 2, 3, 2, 3), 0.8 * r(1, 1, 1, 2, 3) + 0.05, m, q, c),
        aten.grid_sampler_3d.default,
    )
    _add(
        lambda m=_mode, q=_padding, c=_align: (
            r(1, 2, 1, 2, 2), r(1, 2, 3, 2, 3), _inside_cells, m, q, c, [True, True]
        ),
        aten.grid_sampler_3d_backward.default,
    )  # fmt: skip
    _add(
        lambda m=_mode, q=_padding, c=_align: (
            r(1, 2, 2, 3), r(1, 2, 3, 2), _inside_cells.view(1, 2, 3, 2), m, q, c, [True, True]
        ),
        aten.grid_sampler_2d_backward.default,
    )  # fmt: skip
_SIZES = {1: ([5], [7]), 2: ([5, 4], [3, 6]), 3: ([3, 2, 2], [4, 2, 3])}
for _n in (1, 2, 3):
    for _kind in (f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d"):
        _small, _large = _SIZES[_n]
        _add(lambda a=_small, b=_large: (r(1, 2, *a), b), getattr(aten, _kind).default)
        _add(lambda a=_small, b=_large: (r(1, 2, *b), b, [1, 2, *a]), getattr(aten, f"{_kind}_backward").default)
for _n, _kind in (
    *((1, "upsample_linear1d"), (2, "upsample_bilinear2d"), (3, "upsample_trilinear3d"), (2, "upsample_bicubic2d")),
    *((2, "_upsample_bilinear2d_aa"), (2, "_upsample_bicubic2d_aa")),
):
    for _align in (False, True):
        _small, _large = _SIZES[_n]
        _add(lambda a=_small, b=_large, c=_align: (r(1, 2, *a), b, c), getattr(aten, _kind).default)
        _add(
            lambda a=_small, b=_large, c=_align: (r(1, 2, *b), b, [1, 2, *a], c),
            getattr(aten, f"{_kind}_backward").default,
        )

_logs = torch.log_softmax(torch.linspace(-1, 1, 40).double().sin().reshape(5, 2, 4) * 3, 2)
_targets = torch.tensor([[1, 1, 3], [2, 0, 0]])
_add(lambda: (_logs, _targets, [5, 3], [3, 1]), aten._ctc_loss.default)
_add(lambda: (_logs, i(1, 2, 3), [5, 5], [1, 2]), aten._ctc_loss.default)
_add(lambda: (_logs, _targets, i(5, 3), i(2, 0)), aten._ctc_loss.Tensor)

for _dim in (0, 2):
    _add(lambda d=_dim: (r(3, 2, 2), p(3, 1, 1) if d == 0 else p(1, 1, 2), d), aten._weight_norm_interface.default)
    _add(
        lambda d=_dim: (r(3, 2, 2), *_normed(d), d),
        aten._weight_norm_interface_backward.default,
    )


def _normed(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    v, g = r(3, 2, 2), p(3, 1, 1) if dim == 0 else p(1, 1, 2)
    return v, g, aten._weight_norm_interface(v, g, dim)[1]


_add(lambda: (r(2, 3), yes(), [2, 4]), aten.masked_scatter_backward.default)
_add(lambda: (r(2, 3), torch.tensor([[True], [False]]).expand(2, 3), [3]), aten.masked_scatter_backward.default)
_add(lambda: (r(2, 3), torch.tensor([[4, -1], [0, -6]])), aten.take.default)
