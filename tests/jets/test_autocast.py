"""Mixed precision: order 0 is the plain run to the last bit, coefficients are as exact as the precision allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

from lightning_sketch.jets import JetTensor
from lightning_sketch.jets.tensor import coefficient_dtype

from .test_databases import COMMON, name_of

EPS = torch.finfo(torch.bfloat16).eps
LOW = [torch.bfloat16, torch.float16]
DEGREE = 3


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, "gelu", batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]):
        super().__init__()
        self.cell = cell(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (6, 8)),
    "CNN": (cnn, (6, 3, 8, 8)),
    "encoder": (Encoder, (6, 5, 8)),
    "GRU": (lambda: Recurrent(nn.GRU), (6, 5, 8)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (6, 5, 8)),
}
TARGET = torch.tensor([0, 1, 2, 3, 1, 0])


@pytest.fixture(autouse=True)
def _as_in_the_shadow() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        torch.backends.mkldnn.flags(enabled=False),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        warnings.simplefilter("ignore")
        yield


def make(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A network, its input, and coefficients of its parameters and running statistics."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    net, x = build(), torch.randn(shape)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    floating = {n: p for n, p in state.items() if p.is_floating_point()}
    return net, x, {n: 0.1 * torch.randn(DEGREE, 2, 2, *p.shape) for n, p in floating.items()}


def state_of(net: nn.Module, blocks: dict[str, Tensor] | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, p in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        value = p.detach().to(dtype, copy=True) if p.is_floating_point() else p.clone()
        if blocks is not None and p.is_floating_point():
            value = JetTensor(value, blocks[name].to(dtype, copy=True))
        state[name] = value.requires_grad_(p.requires_grad)
    return state


def run(net: nn.Module, state: dict[str, Any], x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Any]:
    """Output, loss, gradients and what is left in the buffers."""
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = torch.func.functional_call(net, state, (x,))
        loss = F.cross_entropy(out, TARGET)
    names = [n for n, p in state.items() if p.requires_grad]
    grads = torch.autograd.grad(loss, [state[n] for n in names])
    buffers = {n: b for n, b in state.items() if n not in names}
    found = {"output": out, "loss": loss, **{f"gradient of {n}": g for n, g in zip(names, grads, strict=True)}}
    return {n: y.detach() for n, y in {**found, **buffers}.items()}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NETS)
def test_order_0_is_the_plain_run(name, dtype):
    """Oracle: plain torch under autocast, bit by bit, forward and backward."""
    net, x, blocks = make(name)
    plain = run(net, state_of(net, None), x, dtype)
    ours = run(net, state_of(net, blocks), x, dtype)
    assert plain["output"].dtype == dtype
    for key, expected in plain.items():
        value = ours[key].primal if isinstance(ours[key], JetTensor) else ours[key]
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=f"{key} differs")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NETS)
def test_coefficients_are_as_exact_as_the_precision(name, dtype):
    """Oracle: the same jets in float64, without autocast; those of the plain run's gradients are 0.8 to 1.2 eps."""
    net, x, blocks = make(name)
    eps = torch.finfo(dtype).eps
    ours = run(net, state_of(net, blocks), x, dtype)
    exact = run(net.double(), state_of(net, blocks, torch.float64), x.double())
    for key, expected in exact.items():
        if not isinstance(expected, JetTensor):
            continue
        for r in range(DEGREE):
            off = relative(ours[key].coefficients[r], expected.coefficients[r])
            assert off < (4 if key == "loss" else 3) * eps, f"order {r + 1} of the {key} is off by {off / eps:.1f} eps"


@pytest.mark.parametrize("dtype", LOW)
def test_order_1_is_the_slope_of_the_plain_run(dtype):
    """Oracle: differences of plain runs under autocast, over a step that is large against the rounding."""
    net, x, blocks = make("MLP")
    ours = run(net, state_of(net, blocks), x, dtype)
    ends = []
    for sign in (1, -1):
        state = state_of(net, None)
        for n, block in blocks.items():
            state[n] = (state[n].detach() + sign * 0.5 * block[0, 0, 0]).requires_grad_()
        ends.append(run(net, state, x, dtype)["output"].double())
    assert relative(ours["output"].coefficients[0, 0, 0], ends[0] - ends[1]) < 0.1


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("name", COMMON)
def test_operators_round_as_their_kernels(name, dtype):
    """Oracle: the operator on plain tensors, bit by bit, forward and backward."""
    info = next(i for i in op_db if name_of(i) == name)
    for sample in list(info.sample_inputs("cpu", dtype, requires_grad=True))[:3]:
        results = []
        for jets in (False, True):
            torch.manual_seed(0)
            inputs, call = _inputs(info, sample, jets)
            outputs = [y for y in torch.utils._pytree.tree_leaves(call()) if isinstance(y, Tensor)]
            losses = [(y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in outputs]
            wanted = [x for x in inputs if x.requires_grad]
            if any(y.requires_grad for y in outputs):
                total = sum(z for z in losses if z.requires_grad)
                outputs += [g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None]
            results.append([y.detach() for y in outputs])
        for expected, found in zip(*results, strict=True):
            value = found.primal if isinstance(found, JetTensor) else found
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def _inputs(info: Any, sample: Any, jets: bool) -> tuple[list[Tensor], Callable[[], Any]]:
    leaves, spec = torch.utils._pytree.tree_flatten((sample.input, tuple(sample.args), sample.kwargs))
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            leaves[i] = x.detach().clone()
            if jets and x.is_floating_point():
                leaves[i] = JetTensor(leaves[i], torch.ones(2, 1, 1, *x.shape, dtype=coefficient_dtype(x.dtype)))
            leaves[i].requires_grad_(x.requires_grad)
    first, args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    return [x for x in leaves if isinstance(x, Tensor)], lambda: info.op(first, *args, **kwargs)


ROUNDED_ONCE = {
    "product": lambda x: x * x.flip(0),
    "mean": lambda x: x.mean(0),
    "exponential": torch.exp,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (16,)),
}


@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_coefficients_are_rounded_once_per_operator(name):
    """Oracle: the same jets in float32, rounded at the end."""
    torch.manual_seed(0)
    point, block = torch.randn(4, 16).bfloat16(), torch.randn(DEGREE, 2, 2, 4, 16).bfloat16()
    found = ROUNDED_ONCE[name](JetTensor(point, block))
    expected = ROUNDED_ONCE[name](JetTensor(point.float(), block.float()))
    assert torch.equal(found.coefficients, expected.coefficients.bfloat16())


def into_part(x: JetTensor) -> Any:
    y = torch.zeros_like(x)
    y[1:].copy_(x[:-1])
    y[0].add_(x[1]).mul_(x[2])
    y[:, 2] = 1.0
    y[2, 1:3] = x[0, :2]
    return y.div_(2.0)


def of_product(x: JetTensor) -> Any:
    y = torch.zeros_like(x)
    torch.mm(x, x.t(), out=y)
    return torch.addmm(y, x, y) + torch.bmm(x.view(2, 2, 4), x.view(2, 4, 2))[1, 0, 1]


def of_convolution(x: JetTensor) -> Any:
    image = x.detach().view(2, 1, 2, 4).requires_grad_()
    weight = x.detach()[:2, :2].reshape(2, 1, 1, 2).requires_grad_()
    return torch.autograd.grad(F.conv2d(image, weight, weight[:, 0, 0, 0]).square().sum(), (image, weight))


MOVES: dict[str, Callable[[JetTensor], Any]] = {
    "in place": into_part,
    "matrix products": of_product,
    "convolution": of_convolution,
    "copies": lambda x: x.clone().t().contiguous() + x.float().half() - 3 * x.to(torch.float16, copy=True),
    "joined": lambda x: torch.cat([x, torch.ones(1, 4).half(), torch.stack([x[0], -x[1]])]),
    "chosen": lambda x: torch.where(x > 0, x, x.t()).masked_fill(x > 1, 0.5),
    "indexed": lambda x: x[torch.tensor([0, 2, 0])].index_put((torch.tensor([1]),), x[3], accumulate=True),
    "gathered": lambda x: torch.zeros_like(x).scatter_add(0, TARGET[None, :4], x).gather(1, TARGET[:4, None]),
    "embedded": lambda x: F.embedding(TARGET, x).index_select(1, TARGET).index_add(0, TARGET[:2], x[:2, [0, 1] * 3]),
    "views": lambda x: F.pad(x.flip(0).unfold(0, 2, 2).diagonal().expand(3, 2, 2).mT.reshape(-1)[1:], (1, 2)),
    "lists": lambda x: torch._foreach_add([x, x.t()], [x[0], x[1]], alpha=2),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 2, 2).clone())),
}


@pytest.mark.parametrize("name", MOVES)
def test_coefficients_of_float16_have_the_range_of_float32(name):
    """Oracle: the same jets in float32, along directions of common size; rounding is that of the primal."""
    torch.manual_seed(0)
    point, block = torch.randn(4, 4).half(), torch.randn(2, 2, 3, 4, 4)
    tiny = torch.tensor([2.0**-30, 2.0**-60]).reshape(2, 1, 1, 1, 1)
    found, plain = MOVES[name](JetTensor(point.clone(), block * tiny)), MOVES[name](point.clone())
    expected = MOVES[name](JetTensor(point.float(), block.clone()))
    for y, z, y0 in zip(*(torch.utils._pytree.tree_leaves(each) for each in (found, expected, plain)), strict=True):
        assert torch.equal(y.primal, y0)
        assert y.coefficients.dtype == torch.float32
        scaled = y.coefficients.flatten(3) / tiny.flatten(3)
        assert relative(scaled, z.coefficients.flatten(3).double()) < 3 * torch.finfo(torch.float16).eps


def weight_and_input() -> tuple[JetTensor, JetTensor]:
    torch.manual_seed(0)
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    return JetTensor(w, torch.randn(2, 2, 1, 4, 4), requires_grad=True), JetTensor(x, torch.randn(2, 2, 1, 3, 4))


def test_casts_of_weights_are_kept_within_a_context_only():
    """Oracle: the products of both values of the weight, each cast afresh."""
    w, x = weight_and_input()
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            first, second = x @ w, x @ w
        assert torch.equal(first.detach().coefficients, second.detach().coefficients)
        fresh = x.to(torch.bfloat16) @ w.detach().to(torch.bfloat16)
        assert torch.equal(first.detach().primal, fresh.primal)
        assert torch.equal(first.detach().coefficients, fresh.coefficients)
        results.append(first.detach().coefficients)
        with torch.no_grad():
            w.mul_(2.0)
    assert not torch.equal(*results)


def test_the_cache_of_casts_tells_a_jet_from_its_plain_twin():
    """Oracle: the type of the result, whichever comes first."""
    w, x = weight_and_input()
    twin = w.primal.requires_grad_()
    for plain_first in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            for plain in (plain_first, not plain_first):
                y = x.primal @ (twin if plain else w)
                assert isinstance(y, JetTensor) is not plain


def test_a_rule_is_not_cast_again():
    """Oracle: the dtype of the plain operator, which autocast leaves alone while the rule is a matrix product."""
    w, x = weight_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.mv(w, x[0])
        assert torch.mv(w.primal, x.primal[0]).dtype == torch.float32
    expected = torch.mv(w.detach(), x[0])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.detach().coefficients, expected.coefficients, rtol=0, atol=0)


def test_running_statistics_in_low_precision():
    """Oracle: plain torch; these buffers are themselves in low precision, so that the rule sees copies of them."""
    net = nn.BatchNorm1d(4).to(torch.bfloat16)
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.bfloat16)
    blocks = {n: torch.ones(2, 1, 1, *b.shape) for n, b in net.state_dict().items() if b.is_floating_point()}
    state = state_of(net, blocks, torch.bfloat16)
    jet = JetTensor(x, torch.randn(2, 1, 1, 6, 4).to(torch.bfloat16))
    torch.func.functional_call(net, state, (jet,))
    net(x)
    assert torch.equal(state["running_mean"].primal, net.running_mean)
    assert torch.equal(state["running_var"].primal, net.running_var)
    expected = 0.9 + 0.1 * jet.coefficients.mean(3)[0].float()
    torch.testing.assert_close(state["running_mean"].coefficients[0].float(), expected, rtol=4 * EPS, atol=EPS)


def test_the_precision_of_matrix_products_is_left_to_the_user():
    """Oracle: torch's own setting, which it changes nothing about on a CPU."""
    w, x = weight_and_input()
    before = torch.get_float32_matmul_precision()
    expected = (x @ w).detach().coefficients
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal((x @ w).detach().coefficients, expected)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
