"""Arguments for every operator with a rule: ordinary tensors; those of dtype float64 are made to vary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten


def r(*shape: int, low: float = -1.5, high: float = 1.5) -> Tensor:
    """Uniform values at least 0.01 from zero, from one another and from integers."""
    count = math.prod(shape)
    grid = torch.linspace(low, high, count + 2, dtype=torch.float64)[1:-1]
    return (grid[torch.randperm(count)] + 0.1 * (high - low) / (count + 2)).reshape(shape)


def p(*shape: int) -> Tensor:
    return r(*shape, low=0.15, high=0.9)


def away(*shape: int) -> Tensor:
    return r(*shape, low=1.2, high=2.8)


def steps(*shape: int) -> Tensor:
    """Far from integers and half-integers."""
    return torch.randint(-3, 3, shape) + 0.3 * torch.rand(shape, dtype=torch.float64).round() + 0.35


def i(*values: int) -> Tensor:
    return torch.tensor(values)


def yes() -> Tensor:
    return torch.tensor([True, False, True])


X, V, IMAGE, VOLUME = (2, 3), (3,), (1, 2, 4, 5), (1, 2, 4, 4, 4)
inf = math.inf

# one tuple of positional arguments per sample; a last dictionary holds keyword arguments
Samples = dict[OpOverload, list[Callable[[], tuple[Any, ...]]]]
SAMPLES: Samples = {}


def _add(arguments: Callable[[], tuple[Any, ...]], *operators: OpOverload) -> None:
    for op in operators:
        SAMPLES.setdefault(op, []).append(arguments)


def _default(names: str) -> list[OpOverload]:
    return [getattr(aten, name).default for name in names.split()]


_add(lambda: (r(*X),), *_default("abs alias asinh atan clone cos cosh detach erf erfc exp exp2 expm1 isinf isnan"))
_add(
    lambda: (r(*X),), *_default("isneginf isposinf lift_fresh logical_not log_sigmoid_forward max mean min neg nonzero")
)
_add(lambda: (r(*X),), *_default("relu sgn sigmoid sign signbit silu sin sinh squeeze sum t tan"))
_add(lambda: (r(*X),), *_default("tanh tril triu gelu softplus argmax argmin all any count_nonzero"))
_add(lambda: (r(*X),), *_default("empty_like zeros_like ones_like rand_like randn_like zero_ linalg_vector_norm"))
_add(lambda: (r(*X),), aten.var.correction, aten.var_mean.correction, aten.std.correction)
_add(lambda: (steps(*X),), *_default("ceil floor round trunc"))
_add(lambda: (away(*X),), *_default("log log10 log2 log1p sqrt rsqrt reciprocal acosh"))
_add(lambda: (p(*X),), *_default("acos asin atanh"))
_add(lambda: (torch.tensor([0.2, 0.6, 0.7], dtype=torch.float64),), aten.bernoulli.default)
_add(lambda: (r(),), *_default("_local_scalar_dense exp sum mean max min relu squeeze t linalg_vector_norm"))
_add(lambda: (r(*X), {"approximate": "tanh"}), aten.gelu.default)
for _name in ["eq", "ne", "lt", "le", "gt", "ge"]:
    _add(lambda: (r(*X), r(*V)), getattr(aten, _name).Tensor)
    _add(lambda: (r(*X), 0.1), getattr(aten, _name).Scalar)
_add(
    lambda: (r(*X), r(*X)), *_default("logical_and logical_or logical_xor equal is_same_size heaviside maximum minimum")
)
_add(lambda: (r(*X), away(*V)), *_default("fmax fmin floor_divide"), aten.fmod.Tensor, aten.remainder.Tensor)
_add(lambda: (i(2, 0, 1), r(2, 3)), aten.maximum.default, aten.add.Tensor, aten.mul.Tensor)
_add(lambda: (0.7 * steps(*X), 0.7), aten.floor_divide.Scalar, aten.fmod.Scalar, aten.remainder.Scalar)
_add(lambda: (2.3, away(*X)), aten.remainder.Scalar_Tensor)
_add(lambda: (r(*X), r(*V)), aten.copysign.Tensor)
_add(lambda: (r(*X), r(*V)), aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.mul.Tensor)
_add(lambda: (r(3), r(2, 1)), aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
_add(lambda: (r(), r(2, 3), {"alpha": -1.5}), aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
_add(lambda: (r(*X), 0.3, 2), aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
_add(lambda: (r(*X), r(*V)), aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.copy_.default)
_add(lambda: (r(*X), r(*V), {"alpha": 0.5}), aten.add_.Tensor, aten.sub_.Tensor)
_add(lambda: (r(*X), i(2, 3, 4)), aten.add_.Tensor, aten.mul_.Tensor, aten.div_.Tensor, aten.copy_.default)
_add(lambda: (r(*X), 1.7), aten.mul.Scalar, aten.div.Scalar)
_add(lambda: (r(*X), away(*V)), aten.div.Tensor, aten.div_.Tensor, aten.pow.Tensor_Tensor)
_add(lambda: (away(*X), r(2, 1)), aten.pow.Tensor_Tensor)
_add(lambda: (away(2, 1), i(2, 0, -1)), aten.pow.Tensor_Tensor)
_add(lambda: (r(2, 1), i(2, 0, 3)), aten.pow.Tensor_Tensor)
_add(lambda: (i(2, 1, 3), r(*X)), aten.pow.Tensor_Tensor)
_add(lambda: (r(3), away(2, 1)), aten.div.Tensor)
_add(lambda: (i(3), away(2, 1)), aten.div.Tensor)
_add(lambda: (r(*X), away(*V), {"rounding_mode": "floor"}), aten.div.Tensor_mode)
_add(lambda: (r(*X), away(*V), {"rounding_mode": None}), aten.div.Tensor_mode)
_add(lambda: (0.7 * steps(*X), 0.7, {"rounding_mode": "trunc"}), aten.div.Scalar_mode)
_add(lambda: (away(*X), 2), aten.pow.Tensor_Scalar)
_add(lambda: (r(*X), 3), aten.pow.Tensor_Scalar)
_add(lambda: (away(*X), -1.5), aten.pow.Tensor_Scalar)
_add(lambda: (1.8, r(*X)), aten.pow.Scalar)
_add(lambda: (r(*X), r(*V), away(2, 1)), aten.addcmul.default, aten.addcdiv.default)
_add(lambda: (r(*X), r(*V), away(2, 1), {"value": 0.5}), aten.addcmul.default, aten.addcdiv.default)
_add(lambda: (r(*X), r(*X), 0.3), aten.lerp.Scalar)
_add(lambda: (r(*X), r(*X), p(*V)), aten.lerp.Tensor)
_add(lambda: (r(*X), 0.4), aten.clamp_min.default, aten.clamp_max.default, aten.fill_.Scalar)
_add(lambda: (r(*X), -0.5, 0.6), aten.clamp.default)
_add(lambda: (r(*X), r()), aten.fill_.Tensor)
_add(lambda: (r(*X), r(*X), 0.3), aten.threshold_backward.default, aten.hardshrink_backward.default)
_add(lambda: (r(*X), r(*X), 0.3), aten.softshrink_backward.default)
_add(lambda: (r(*X), r(*X)), *_default("gelu_backward silu_backward tanh_backward sigmoid_backward"))
_add(lambda: (r(*X), r(*X), {"approximate": "tanh"}), aten.gelu_backward.default)
_add(lambda: (r(*X), r(*X), 2.0, 1.5), aten.softplus_backward.default)
_add(lambda: (r(*X), -1, False), aten._softmax.default, aten._log_softmax.default)
_add(lambda: (r(), 0, False), aten._softmax.default, aten._log_softmax.default)
_add(lambda: (r(*X), 0), aten._safe_softmax.default, aten.all.dim, aten.any.dim, aten.cumsum.default)
_add(lambda: (r(*X), 0), aten.squeeze.dim, aten.unsqueeze.default, aten.max.dim, aten.min.dim, aten.unbind.int)
_add(lambda: (r(*X), 0, -1), aten.select.int)
_add(lambda: (r(), 0), aten.cumsum.default, aten.squeeze.dim, aten.unsqueeze.default, aten.max.dim, aten.min.dim)
_add(lambda: (r(*X), r(*X), 1, torch.float64), *_default("_softmax_backward_data _log_softmax_backward_data"))
_add(lambda: (r(*X), r(5).sort()[0].detach()), aten.bucketize.Tensor)
_add(lambda: (r(5).sort()[0], r(*X)), aten.searchsorted.Tensor)
_add(lambda: (p(*X), 2), aten.multinomial.default)
_add(lambda: (r(*X), 0.4), aten.bernoulli.p, aten.bernoulli_.float, aten.geometric_.default)
_add(lambda: (r(*X), p(*X)), aten.bernoulli_.Tensor)
_add(lambda: (r(*X),), *_default("cauchy_ exponential_ log_normal_ normal_ uniform_ random_"))
_add(lambda: (r(*X), 5), aten.random_.to)
_add(lambda: (r(*X), 2, 5), getattr(aten.random_, "from"))
_add(lambda: (r(*X), 2.0), aten.full_like.default)
_add(lambda: (r(*X), [4]), *_default("new_empty new_zeros new_ones"))
_add(lambda: (r(*X), [4], [1]), aten.new_empty_strided.default)
_add(lambda: (r(*X), [4], 2.0), aten.new_full.default)
_add(lambda: (r(*X), {"dtype": torch.float32}), aten._to_copy.default)
_add(lambda: (r(*X), {"dtype": torch.int64}), aten._to_copy.default)
_add(lambda: (r(2, 6), [3, 4]), *_default("view _unsafe_view"))
_add(lambda: (r(2, 6), [3, 4], [4, 1]), aten._reshape_alias.default)
_add(lambda: (r(2, 1), [3, 2, 4]), aten.expand.default)
_add(lambda: (r(2, 3, 4), [2, 0, -2]), aten.permute.default)
_add(lambda: (r(3, 4), [2, 2], [4, 2], 1), aten.as_strided.default)
_add(lambda: (r(2, 3, 4), 0, -1), aten.transpose.int)
_add(lambda: (r(), 0, -1), aten.transpose.int)
_add(lambda: (r(3, 6), 1, 1, 6, 2), aten.slice.Tensor)
_add(lambda: (r(1, 3, 1), [0, 2]), aten.squeeze.dims)
_add(lambda: (r(1, 3, 1),), aten.squeeze.default)
_add(lambda: (r(2, 3, 4), 1, 0, 2), aten.diagonal.default)
_add(lambda: (r(2, 6), 1, 3, 2), aten.unfold.default)
_add(lambda: (r(), 0, 1, 1), aten.unfold.default)
_add(lambda: (r(5, 2), 2), aten.split.Tensor)
_add(lambda: (r(5, 2), [2, 3]), aten.split_with_sizes.default)
_add(lambda: (r(2, 3, 4), [0, -1]), aten.flip.default)
_add(lambda: (r(3, 4), 1, i(0, 2, 2)), aten.index_select.default)
_add(lambda: (r(3, 4), [1, -1, 0, 2], 0.7), aten.constant_pad_nd.default)
_add(lambda: ([r(2, 3), torch.ones(1, 3), r(1, 3)],), aten.cat.default)
_add(lambda: ([r(2, 3), torch.ones(2, 3)], -1), aten.stack.default)
_add(lambda: (r(2, 3), [2, 1, 2]), aten.repeat.default)
_add(lambda: (r(2, 3), [1, 2], [0, -1]), aten.roll.default)
_add(lambda: (r(2, 3), [2]), aten.roll.default)
_add(lambda: (yes(), r(2, 3), r(2, 1)), aten.where.self)
_add(lambda: (r(2, 3), yes(), -inf), aten.masked_fill.Scalar)
_add(lambda: (r(2, 3), yes(), r()), aten.masked_fill.Tensor)
_add(lambda: (r(2, 4), [3, 2, 4], 0, 1), aten.select_backward.default)
_add(lambda: (r(2, 2), [2, 6], 1, 1, 5, 2), aten.slice_backward.default)
_add(lambda: (r(2, 3), [3, 4, 2], 0, 0, 1), aten.diagonal_backward.default)
_add(lambda: (r(5, 3), torch.tensor([[0, 2], [4, 4]]), 4), aten.embedding.default)
_add(lambda: (r(2, 2, 3), torch.tensor([[0, 2], [4, 2]]), 5, 4, True), aten.embedding_dense_backward.default)
_add(lambda: (r(3, 4), 1, torch.tensor([[0, 0], [3, 1]])), aten.gather.default)
_add(lambda: (r(), 0, i(0, 0)), aten.gather.default)
_add(lambda: (r(3, 4), 0, torch.tensor([[0, 1, 2], [0, 2, 1]]), r(2, 3)), aten.scatter_add.default)
_add(lambda: (r(3, 4), 0, torch.tensor([[0, 1, 2], [1, 2, 0]]), r(2, 3)), aten.scatter.src)
_add(lambda: (r(3, 4), 0, torch.tensor([[0, 1, 2], [0, 2, 1]]), 0.5), aten.scatter.value)
_add(lambda: (r(3, 4, 2), [None, i(0, 3, 0)]), aten.index.Tensor)
_add(lambda: (r(3, 4, 2), [i(2, 0), None, i(1, 1)]), aten.index.Tensor)
_add(lambda: (r(2, 3), [torch.tensor([[True, False, True], [False, True, False]])]), aten.index.Tensor)
_add(lambda: (r(3, 4), [None, i(0, 3)], r(3, 2)), *_default("index_put _unsafe_index_put"))
_add(lambda: (r(3, 4), [i(1, 1), i(0, 0)], r(1), True), *_default("index_put _unsafe_index_put"))
_add(lambda: (r(3, 4), 1, i(0, 0, 2), r(3, 3), {"alpha": 2.0}), aten.index_add.default)
_add(lambda: (r(), 0, i(0), r()), aten.index_add.default)
_add(lambda: (r(3, 2), r(2, 4)), aten.mm.default)
_add(lambda: (r(2, 3, 2), r(2, 2, 4)), aten.bmm.default)
_add(lambda: (r(4), r(3, 2), r(2, 4), {"beta": 0.5, "alpha": 2.0}), aten.addmm.default)
_add(lambda: (r(4), r(3, 2), r(2, 4)), aten.addmm.default)
_add(lambda: (torch.full((4,), math.nan).double(), r(3, 2), r(2, 4), {"beta": 0}), aten.addmm.default)
_add(lambda: (r(1, 1, 4), r(2, 3, 2), r(2, 2, 4)), aten.baddbmm.default)
_add(lambda: (r(3, 2), r(2)), aten.mv.default)
_add(lambda: (r(3), r(3)), *_default("dot vdot"))
_add(lambda: (r(3), r(3, 2), r(2), {"beta": 0.5}), aten.addmv.default)
_add(lambda: (r(2, 3, 4), [0, -1]), aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
_add(lambda: (r(2, 3, 4), [1], True), aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
_add(lambda: (r(), [0]), aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
for _order in (2, 1, inf, -inf, 3, 4, 0):
    _add(lambda order=_order: (r(2, 3), order, [1]), aten.linalg_vector_norm.default)
_add(lambda: (r(2, 3, 4), [0, 2], {"correction": 0, "keepdim": True}), aten.var.correction, aten.var_mean.correction)
_add(lambda: (r(2, 3, 4), [0, 2], {"correction": 2}), aten.std.correction)

# x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
_CONVOLUTIONS: list[Callable[[], tuple[Any, ...]]] = [
    lambda: (r(2, 2, 5), r(3, 2, 3), r(3), [2], [1], [1], False, [0], 1),
    lambda: (r(2, 4, 4, 4), r(4, 2, 3, 2), None, [1, 1], [1, 0], [1, 2], False, [0, 0], 2),
    lambda: (r(2, 4, 3), r(4, 3, 3), r(3), [2], [1], [1], True, [1], 1),
    lambda: (r(1, 4, 3, 3), r(4, 1, 2, 2), r(2), [1, 1], [0, 0], [1, 1], True, [0, 0], 2),
]
_OUTPUTS = [(2, 3, 3), (2, 4, 4, 2), (2, 3, 6), (1, 2, 4, 4)]
for _arguments in _CONVOLUTIONS:
    _add(_arguments, aten.convolution.default)
for _arguments, _shape in zip(_CONVOLUTIONS, _OUTPUTS, strict=False):

    def _backward(arguments: Any = _arguments, shape: Any = _shape) -> tuple[Any, ...]:
        x, weight, bias, *geometry = arguments()
        return (r(*shape), x, weight, None if bias is None else [len(bias)], *geometry, [True, True, bias is not None])

    _add(_backward, aten.convolution_backward.default)

_add(lambda: (r(*IMAGE), [2, 2], [2, 1], [1, 0], True, False), aten.avg_pool2d.default)
_add(lambda: (r(1, 2, 2, 2), r(*IMAGE), [2, 2], [2, 3], [0, 0], False, True, None), aten.avg_pool2d_backward.default)
_add(lambda: (r(*VOLUME), [2, 2, 2]), aten.avg_pool3d.default)
_add(
    lambda: (r(1, 2, 2, 2, 2), r(*VOLUME), [2] * 3, [2] * 3, [0] * 3, False, True, None),
    aten.avg_pool3d_backward.default,
)
_add(lambda: (r(*IMAGE), [3, 2]), aten._adaptive_avg_pool2d.default)
_add(lambda: (r(1, 2, 3, 2), r(*IMAGE)), aten._adaptive_avg_pool2d_backward.default)
_add(lambda: (r(*VOLUME), [3, 2, 1]), aten._adaptive_avg_pool3d.default)
_add(lambda: (r(1, 2, 3, 2, 1), r(*VOLUME)), aten._adaptive_avg_pool3d_backward.default)
_add(lambda: (r(1, 2, 7), r(1, 2, 4), [1, 2]), aten.replication_pad1d_backward.default)
_add(lambda: (r(1, 2, 5, 7), r(*IMAGE), [1, 1, 0, 1]), aten.replication_pad2d_backward.default)
_add(lambda: (r(1, 2, 5, 4, 5), r(*VOLUME), [1, 0, 0, 0, 1, 0]), aten.replication_pad3d_backward.default)
_add(lambda: (r(*IMAGE), [2, 2], [1, 2], [1, 1]), aten.max_pool2d_with_indices.default)
_add(lambda: (r(*VOLUME), [2, 2, 2]), aten.max_pool3d_with_indices.default)
_add(lambda: (r(*IMAGE), [3, 2]), aten.adaptive_max_pool2d.default)
_add(lambda: (r(*VOLUME), [3, 2, 2]), aten.adaptive_max_pool3d.default)


def _pooled(op: Callable[..., Any], x: Callable[[], Tensor], *rest: Any) -> Callable[[], tuple[Any, ...]]:
    def arguments() -> tuple[Any, ...]:
        image = x()
        y, indices = op(image, *rest)
        extra = (*rest, [0] * len(rest[0]), [1] * len(rest[0]), False) if len(rest) == 2 else ()
        return (r(*y.shape), image, *extra, indices)

    return arguments


_2d, _3d = [2, 2], [2, 2, 2]
for _op, _backward_op, _shape, _rest in (
    (aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward, IMAGE, (_2d, _2d)),
    (aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward, VOLUME, (_3d, _3d)),
    (aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward, IMAGE, (_2d,)),
    (aten.adaptive_max_pool3d, aten.adaptive_max_pool3d_backward, VOLUME, (_3d,)),
):
    _add(_pooled(_op, lambda shape=_shape: r(*shape), *_rest), _backward_op.default)

_add(lambda: (r(2, 3, 4), [3, 4], r(3, 4), r(3, 4), 0.1), aten.native_layer_norm.default)
_add(lambda: (r(2, 4, 3), r(4), r(4), 2, 4, 3, 2, 0.1), aten.native_group_norm.default)
_add(lambda: (r(3, 2, 2), r(2), r(2), r(2), p(2), True, 0.3, 0.1), aten.native_batch_norm.default)
_add(lambda: (r(3, 2, 2), r(2), r(2), r(2), p(2), False, 0.3, 0.1), aten._native_batch_norm_legit.default)
_add(lambda: (r(3, 2, 2), r(2), r(2), True, 0.3, 0.1), aten._native_batch_norm_legit.no_stats)
_all = [True, True, True]
_add(lambda: (r(2, 3), r(2, 3), [3], r(2, 1), p(2, 1), r(3), r(3), _all), aten.native_layer_norm_backward.default)
_add(
    lambda: (r(2, 4, 3), r(2, 4, 3), r(2, 2), p(2, 2), r(4), 2, 4, 3, 2, _all), aten.native_group_norm_backward.default
)
_add(
    lambda: (r(3, 2), r(3, 2), r(2), r(2), p(2), r(2), p(2), False, 0.1, _all), aten.native_batch_norm_backward.default
)
_add(lambda: (r(4, 5), 0.4, True), aten.native_dropout.default)
_add(lambda: (r(*X), r(*X), 1, 0.5), *_default("huber_loss smooth_l1_loss"))
_add(lambda: (r(*X), r(*X), 0, 0.7), *_default("huber_loss smooth_l1_loss"))
_add(
    lambda: (r(1, 2, 3, 2), r(1, 2, 3, 2), r(1, 2, 3, 2), 0.0, True),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_add(
    lambda: (r(1, 1, 2, 2), r(1, 1, 3, 2), r(1, 1, 3, 2), 0.0, False, {"attn_mask": r(2, 3), "scale": 0.3}),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)

_add(lambda: (r(2, 3, 4), 1), *_default("sort mode cummax cummin cumprod logcumsumexp"))
_add(lambda: (r(2, 3, 4), -2), aten.median.dim, aten.nanmedian.dim, aten.prod.dim_int)
_add(lambda: (r(2, 5), 0, True), aten.median.dim, aten.prod.dim_int, aten.sort.default)
_add(lambda: (r(2, 5), 2, 0, True), aten.kthvalue.default)
_add(lambda: (r(2, 5), 3), *_default("kthvalue topk"))
_add(lambda: (r(4, 3), {"stable": True, "dim": 0, "descending": True}), aten.sort.stable)
_add(lambda: (r(), 0), *_default("sort cumprod logcumsumexp cummax"), aten.median.dim)
_add(lambda: (r(2, 3),), *_default("median nanmedian prod angle"))
_add(lambda: (torch.tensor([0.5, math.nan, -0.3, 1.1], dtype=torch.float64),), aten.nanmedian.default)
_add(lambda: (r(2, 3), yes()), aten.masked_select.default)
_add(lambda: (r(2, 3), yes(), r(5)), aten.masked_scatter.default)
_add(lambda: (r(2, 3), i(4, 0), r(2)), aten.put.default)
_add(lambda: (r(2, 3), i(4, 4), r(2), True), aten.put.default)
for _kind, _include in (("sum", True), ("sum", False), ("mean", True), ("mean", False)):

    def _reduced(kind: str = _kind, include: bool = _include) -> tuple[Any, ...]:
        return (r(3, 2), 0, torch.tensor([[0, 1], [0, 0]]), r(2, 2), kind, {"include_self": include})

    _add(_reduced, aten.scatter_reduce.two)
_add(lambda: (r(3, 4), r(3), 1), aten.diagonal_scatter.default)
_add(lambda: (away(2, 3),), *_default("digamma lgamma special_erfcx special_log_ndtr"))
_add(lambda: (r(2, 3),), *_default("special_erfcx special_log_ndtr"))
_add(lambda: (p(2, 3),), *_default("erfinv special_ndtri"))
_add(lambda: (2, away(2, 3)), aten.polygamma.default)
_add(lambda: (r(2, 3), r(3)), *_default("atan2 hypot"))
_add(lambda: (r(2, 4), r(3, 2, 1), r(3, 1, 4), {"beta": 0.5, "alpha": 2.0}), aten.addbmm.default)
_add(lambda: (r(2, 3), r(4, 3, 2), r(2, 2), [1, 3], [0], [1, 2], [2, 3]), aten._trilinear.default)
_add(lambda: (r(2, 4), torch.zeros(2, 4).double(), 0.1, 0.4, False), aten.rrelu_with_noise.default)
_add(lambda: (r(2, 4), torch.zeros(2, 4).double(), 0.1, 0.4, True), aten.rrelu_with_noise.default)
_add(lambda: (r(1, 2, 5, 5), _2d, _2d, torch.full((1, 2, 2), 0.4).double()), aten.fractional_max_pool2d.default)
_add(lambda: (r(1, 1, 4, 4, 4), _3d, _3d, torch.full((1, 1, 3), 0.4).double()), aten.fractional_max_pool3d.default)


def _fractional(op: Callable[..., Any], x: Tensor, n: int) -> tuple[Any, ...]:
    size = [2] * n
    y, indices = op(x, size, size, torch.full((1, x.shape[1], n), 0.4, dtype=torch.float64))
    return (r(*y.shape), x, size, size, indices)


_add(lambda: _fractional(aten.fractional_max_pool2d, r(1, 2, 5, 5), 2), aten.fractional_max_pool2d_backward.default)
_add(lambda: _fractional(aten.fractional_max_pool3d, r(1, 1, 4, 4, 4), 3), aten.fractional_max_pool3d_backward.default)
_add(lambda: (r(), r(3, 4), i(0, 3, 1), 2, 0.5, p(4), 1), aten.multi_margin_loss_backward.default)
_add(lambda: (r(3), r(3, 4), i(0, 3, 1), 1, 0.5, None, 0), aten.multi_margin_loss_backward.default)
_labels = torch.tensor([[2, 0, -1, 1], [3, -1, 0, 0]])
_add(lambda: (r(2, 4), _labels, 1), aten.multilabel_margin_loss_forward.default)
_add(lambda: (r(4), _labels[0], 0), aten.multilabel_margin_loss_forward.default)
