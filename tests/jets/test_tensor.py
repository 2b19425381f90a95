"""``JetTensor`` behaves as a tensor: construction, factories, views, in-place operators, dtypes, autograd, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError, UnsupportedOperatorError
from lightning_sketch.jets import JetTensor
from lightning_sketch.jets.rules.constants import _warn_of_numbers
from lightning_sketch.jets.tensor import constant

from .oracle import Curve, assert_right, make_curve

F64 = torch.float64


def curve(*shape: int, parts: int = 2, directions: int = 2, degree: int = 3, seed: int = 0) -> Curve:
    generator = torch.Generator().manual_seed(seed)
    return make_curve(torch.randn(shape, generator=generator, dtype=F64), degree, parts, directions, generator)


def make(*shape: int, dtype: torch.dtype = F64, **kwargs: int) -> JetTensor:
    c = curve(*shape, **kwargs)
    return JetTensor(c.point.to(dtype), c.coefficients.to(dtype))


def equal(x: Tensor, primal: Tensor, coefficients: Tensor) -> None:
    assert isinstance(x, JetTensor)
    torch.testing.assert_close(x.primal, primal)
    torch.testing.assert_close(x.coefficients, coefficients)


@pytest.mark.parametrize(
    ("primal", "coefficients", "name"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1, 1, 1, 3, dtype=torch.int64), "primal"),
        (torch.zeros(3, dtype=torch.complex64), torch.zeros(1, 1, 1, 3, dtype=torch.complex64), "primal"),
        (torch.zeros(3), torch.zeros(1, 1, 1, 4), "coefficients"),
        (torch.zeros(3), torch.zeros(1, 1, 3), "coefficients"),
        (torch.zeros(3), torch.zeros(0, 1, 1, 3), "coefficients"),
        (torch.zeros(3), torch.zeros(1, 3, 1, 3), "coefficients"),
        (torch.zeros(3), torch.zeros(1, 1, 1, 3, dtype=F64), "coefficients"),
        (torch.zeros(3).half(), torch.zeros(1, 1, 1, 3).half(), "coefficients"),
        (torch.zeros(3, requires_grad=True), torch.zeros(1, 1, 1, 3), "primal"),
        (torch.zeros(3).to_sparse(), torch.zeros(1, 1, 1, 3), "primal"),
        ([1.0], torch.zeros(1, 1, 1, 1), "primal"),
    ],
)
def test_constructor_refuses(primal, coefficients, name):
    """Oracle: the sentence itself."""
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        JetTensor(primal, coefficients)


def test_constructor_refuses_a_jet_of_a_jet():
    """Oracle: the sentence itself."""
    with pytest.raises(ConfigurationError, match="`primal`"):
        JetTensor(make(3), torch.zeros(1, 1, 1, 3, dtype=F64))


def test_attributes():
    """Oracle: the parts that it was made of."""
    x = make(2, 3)
    assert (x.shape, x.dtype, x.lead, x.ndim, len(x)) == ((2, 3), F64, (3, 2, 2), 2, 2)
    assert x.coefficients.shape == (3, 2, 2, 2, 3)
    assert repr(x) == "JetTensor(shape=(2, 3), dtype=torch.float64, degree=3, directions=2 complex)"
    assert f"{make():.3f}" == f"{make().primal.item():.3f}"


@pytest.mark.parametrize("build", [
    lambda x: x.t(),
    lambda x: x[:, ::2],
    lambda x: x[:, 1:3],
    lambda x: x[:1].expand(3, 4),
    lambda x: x.t()[1:],
    lambda x: x[:0],
])  # fmt: skip
def test_any_memory_layout_may_be_wrapped(build):
    """Oracle: the same writes on contiguous copies."""
    point = build(curve(3, 4).point)
    block = curve(*point.shape).coefficients
    x = JetTensor(point, block)
    y = JetTensor(point.clone(memory_format=torch.contiguous_format), block.clone())
    for z in (x, y):
        z[:1].mul_(2)
        z.t()[1:].add_(z.t()[1:].clone())
        z[..., 0] = z[..., -1] * z[..., 0]
    equal(x.contiguous(), y.primal, y.coefficients)


VIEWS = {
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[:, -1],
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "diagonal": lambda x: x.diagonal(0, 0, 2),
    "view": lambda x: x.view(4, 6),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(),
    "as_strided": lambda x: x.as_strided((2, 3), (12, 2), 1),
    "as_strided of a view": lambda x: x[1].as_strided((2, 2), (1, 4), 13),
    "as_strided beyond a view": lambda x: x[1, :1].as_strided((2, 3), (12, 1), 2),
    "chunk": lambda x: x.chunk(2, 2)[1],
    "split": lambda x: x.split([1, 2], 1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "unfold": lambda x: x.unfold(2, 2, 2),
    "detach": lambda x: x.detach(),
    "movedim": lambda x: x.movedim(0, 2),
    "narrow of a transpose": lambda x: x.mT.narrow(1, 1, 2),
    "data": lambda x: x.data,
    "of a view": lambda x: x[1].t()[1:3].select(1, 2),
}
WRITES = {
    "add_": lambda v, o: v.add_(o, alpha=2),
    "sub_": lambda v, o: v.sub_(o),
    "mul_": lambda v, o: v.mul_(o),
    "mul_ by a number": lambda v, o: v.mul_(-1.5),
    "div_": lambda v, o: v.div_(o * o + 1),
    "copy_": lambda v, o: v.copy_(o),
    "zero_": lambda v, o: v.zero_(),
    "fill_": lambda v, o: v.fill_(o.sum()),
    "exp_": lambda v, o: v.exp_(),
    "addcmul_": lambda v, o: v.addcmul_(o, o, value=0.5),
    "lerp_": lambda v, o: v.lerp_(o, 0.3),
    "clamp_": lambda v, o: v.clamp_(-0.8, 0.9),
    "setitem": lambda v, o: v.__setitem__(..., o * 2),
    "relu_": lambda v, o: torch.relu_(v),
    "masked_fill_": lambda v, o: v.masked_fill_(v > 0.1, 2.0),
    "out": lambda v, o: torch.sin(o, out=v),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_writing_into_a_view_writes_into_the_base(view, write):
    """Oracle: polynomials fitted to the same writes on ordinary tensors."""

    def function(xs: list[Tensor]) -> list[Tensor]:
        base = xs[0] * 1
        v = VIEWS[view](base)
        other = xs[1].reshape(-1)[: v.numel()].reshape(v.shape)
        WRITES[write](v, other)
        return [base, VIEWS[view](base)]

    assert_right(function, [curve(2, 3, 4, directions=1, degree=2), curve(2, 3, 4, directions=1, degree=2, seed=1)])


@pytest.mark.parametrize("view", VIEWS)
def test_writing_into_a_view_of_a_factory_tensor(view):
    """Oracle: the coefficients of what is written; those of the factory tensor were not allocated before."""
    base = torch.zeros_like(make(2, 3, 4))
    v = VIEWS[view](base)
    x = make(*v.shape)
    v += x
    equal(VIEWS[view](base), x.primal, x.coefficients)
    assert base.coefficients.abs().sum() == pytest.approx(x.coefficients.abs().sum())


@pytest.mark.parametrize("view", VIEWS)
def test_reading_a_view_of_a_constant_gives_it_no_coefficients(view):
    """Oracle: the product of the primals, and the coefficients of a product with an ordinary tensor."""
    base = constant(curve(2, 3, 4).point, make(1).lead)
    v = VIEWS[view](base)
    x = make(*v.shape)
    equal(v * x, v.primal * x.primal, (x * v.primal).coefficients)
    assert base.block is None
    assert v.block is None


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_constant_see_what_is_written_into_it_later(view):
    """Oracle: the same view taken afterwards."""
    base, x = constant(curve(2, 3, 4).point, make(1).lead), make(2, 3, 4)
    v = VIEWS[view](base)
    base.copy_(x)
    equal(v, VIEWS[view](x).primal, VIEWS[view](x).coefficients)
    v += v.clone()
    assert base.coefficients.abs().sum() > x.coefficients.abs().sum()


def test_aliases_of_a_factory_tensor_share_what_is_written_later():
    """Oracle: the value that was written."""
    base = make(3).new_zeros(3)
    alias, deeper = base.detach(), base.detach().detach()
    x = make(3)
    alias.copy_(x)
    equal(base, x.primal, x.coefficients)
    equal(deeper, x.primal, x.coefficients)
    base.zero_()
    assert not deeper.coefficients.any()


def test_overlapping_writes_are_refused_as_torch_does():
    """Oracle: torch's own error."""
    for write in (WRITES["add_"], WRITES["mul_"], WRITES["exp_"], WRITES["copy_"]):
        with pytest.raises(RuntimeError, match="single memory location"):
            write(make(1, 3).expand(2, 3), make(2, 3))


def test_a_broadcast_result_does_not_fit_in_place():
    """Oracle: torch refuses too; both say the shapes."""
    with pytest.raises(RuntimeError, match="shape"):
        make(1, 3).add_(make(2, 3))
    with pytest.raises((RuntimeError, UnsupportedOperatorError), match="shape"):
        make(1, 3).mul_(make(2, 3))
    with pytest.raises(UnsupportedOperatorError, match=r"shape \(3,\) into a tensor of shape \(2,\)"):
        torch.exp(make(3), out=make(2))


def test_writing_a_jet_into_an_ordinary_tensor_is_refused():
    """Oracle: the sentence itself."""
    for write in (lambda t, x: t.copy_(x), lambda t, x: t.add_(x), lambda t, x: torch.exp(x, out=t)):
        with pytest.raises(UnsupportedOperatorError, match="new_zeros"):
            write(torch.zeros(3, dtype=F64), make(3))


def test_out_replaces_old_coefficients():
    """Oracle: the result without ``out``; the maximum's index is an ordinary tensor."""
    x, out = make(3), make(3)
    torch.exp(x, out=out)
    equal(out, x.exp().primal, x.exp().coefficients)
    torch.exp(torch.zeros(3, dtype=F64), out=out)
    assert not out.coefficients.any()
    values, indices = x.new_zeros(()), torch.zeros((), dtype=torch.int64)
    torch.max(x, 0, out=(values, indices))
    equal(values, x.max(0)[0].primal, x.max(0)[0].coefficients)
    assert indices == x.primal.argmax()


@pytest.mark.parametrize("factory", [
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like, torch.randn_like,
    lambda x: torch.full_like(x, 2.0), lambda x: x.new_zeros(2, 3), lambda x: x.new_ones(2, 3),
    lambda x: x.new_full((2, 3), 1.5), lambda x: x.new_empty(2, 3), lambda x: torch.bernoulli(x.sigmoid()),
    lambda x: torch.empty_like(x).bernoulli_(0.3), lambda x: x.sign(), lambda x: x.clone().normal_(),
])  # fmt: skip
def test_factories_give_jets_with_zero_coefficients(factory):
    """Oracle: zero, and the primal that torch draws from the same seed."""
    x = make(2, 3)
    torch.manual_seed(0)
    y = factory(x)
    torch.manual_seed(0)
    expected = factory(x.primal)
    assert isinstance(y, JetTensor)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    if "empty" not in str(factory) and factory(x.primal).equal(factory(x.primal)):
        torch.testing.assert_close(y.primal, expected)
    assert not y.coefficients.any()
    y += x
    torch.testing.assert_close(y.coefficients, x.coefficients)


def test_casts():
    """Oracle: the cast coefficients, float32 for float16; integers and truth values are ordinary tensors."""
    x = make(3)
    for dtype in (torch.float32, torch.bfloat16):
        equal(x.to(dtype), x.primal.to(dtype), x.coefficients.to(dtype))
    equal(x.half(), x.primal.half(), x.coefficients.float())
    equal(x.half().float(), x.primal.half().float(), x.coefficients.float())
    equal(x.half().bfloat16(), x.primal.half().bfloat16(), x.coefficients.float().bfloat16())
    assert type(x.int()) is Tensor
    assert type(x > 0) is Tensor
    equal(x.float().sum(dtype=F64), x.primal.float().double().sum(), x.coefficients.float().double().sum(-1))


@pytest.mark.parametrize("op", [torch.add, torch.mul, torch.div, torch.sub, torch.maximum, torch.pow])
@pytest.mark.parametrize("other", [
    lambda: make(2, 3), lambda: make(), lambda: make(2, 1), lambda: torch.arange(1, 4),
    lambda: torch.tensor(2.5, dtype=F64),
])  # fmt: skip
def test_type_promotion(op, other):
    """Oracle: torch's promotion of the primals, and the same computation in double precision."""
    x, y = make(2, 3, dtype=torch.float32, seed=1).abs() + 0.5, other()
    if isinstance(y, JetTensor):
        y = y.abs() + 0.5
    for a, b in ((x, y), (y, x)):
        primals = [t.primal if isinstance(t, JetTensor) else t for t in (a, b)]
        result, precise = op(a, b), op(a.double(), b.double())
        assert result.dtype == op(*primals).dtype
        assert result.coefficients.dtype == result.dtype
        torch.testing.assert_close(result.coefficients.double(), precise.coefficients, rtol=1e-4, atol=1e-4)


def test_in_place_operators_keep_the_dtype():
    """Oracle: the same in double precision."""
    for write in (torch.Tensor.add_, torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.copy_, torch.Tensor.sub_):
        x, y = make(2, 3, dtype=torch.float32), make(2, 3, seed=1)
        precise = write(x.double(), y)
        write(x, y)
        assert (x.dtype, x.coefficients.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(x.coefficients.double(), precise.coefficients, rtol=1e-3, atol=1e-3)


def test_numbers_taken_out_are_constant_and_said_once():
    """Oracle: the primal's number, and the list of warnings."""
    _warn_of_numbers.cache_clear()
    x = make()
    with pytest.warns(UserWarning, match="treated as constant"):
        assert x.item() == x.primal.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(x) == x.primal.item()
        assert bool(x > -100)
    _warn_of_numbers.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert constant(torch.tensor(2.0), (1, 1, 1)).item() == 2


def test_lists_and_arrays_are_refused():
    """Oracle: the sentence itself."""
    import numpy as np

    with pytest.raises(UnsupportedOperatorError, match="tolist"):
        make(2).tolist()
    with pytest.raises(UnsupportedOperatorError, match="numpy"):
        make(2).detach().cpu().numpy()
    with pytest.raises(UnsupportedOperatorError, match="numpy"):
        np.asarray(make(2))


def test_complex_points_are_refused():
    """Oracle: the sentence itself; complex tensors arise between real ones only, see test_fourier.py."""
    point = torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(ConfigurationError, match="`primal` must be floating point"):
        JetTensor(point, torch.zeros(1, 1, 1, 3, dtype=torch.complex64))


def test_integers_that_vary_are_refused():
    """Oracle: the error class; a sum in integers would be silently constant."""
    with pytest.raises(UnsupportedOperatorError, match=r"became torch\.int64"):
        make(4).sum(dtype=torch.int64)


def test_copies():
    """Oracle: the original."""
    x = make(2, 3)
    stream = io.BytesIO()
    torch.save(x, stream)
    stream.seek(0)
    for y in (
        copy.deepcopy(x),
        pickle.loads(pickle.dumps(x)),
        torch.load(stream, weights_only=False),
        x.clone(),
        x.contiguous(),
    ):
        equal(y, x.primal, x.coefficients)
    y = copy.deepcopy(x.requires_grad_())
    assert y.requires_grad
    with torch.no_grad():
        y.zero_()
    assert x.coefficients.any()


def test_data_may_be_replaced():
    """Oracle: the value assigned; writes go to both."""
    x, y = make(3), make(3, seed=1)
    x.data = y
    equal(x, y.primal, y.coefficients)
    y.mul_(2)
    equal(x, y.primal, y.coefficients)
    with pytest.raises(ConfigurationError, match="`data`"):
        x.data = make(4)


@pytest.mark.parametrize("change", [
    lambda x: x.unsqueeze(0).squeeze_(0), lambda x: x.clone().unsqueeze_(1), lambda x: x.clone().t_(),
    lambda x: x.clone().transpose_(0, 1),
])  # fmt: skip
def test_views_in_place(change):
    """Oracle: the same on the primal and on the coefficients' trailing dimensions."""
    x = make(2, 3)
    y = change(x)
    assert y.shape == y.primal.shape == change(x.primal).shape
    assert y.stride() == y.primal.stride()
    for c, block in zip(y.coefficients.flatten(0, 2), x.coefficients.flatten(0, 2), strict=True):
        torch.testing.assert_close(c, change(block))


def test_view_in_place_keeps_the_storage():
    """Oracle: the base."""
    base = make(2, 3)
    v = base[:1]
    v.squeeze_(0)
    v.mul_(3)
    torch.testing.assert_close(base.coefficients[..., 0, :], v.coefficients)


def test_jets_of_another_kind_are_refused():
    """Oracle: the sentence itself."""
    x = make(2, directions=3)
    for other in (make(2, directions=1), make(2, parts=1, directions=3), make(2, directions=3, degree=2)):
        for operate in (torch.add, torch.mul, torch.dot, lambda a, b: a.add_(b), lambda a, b: a.copy_(b)):
            with pytest.raises(ConfigurationError, match=r"\(R, P, K\)"):
                operate(x.clone(), other)


def test_backward_fills_grad_with_jets():
    """Oracle: closed form, ``d/dx sum(x^3) = 3 x^2``; the second pass doubles it."""
    c = curve(3)
    x = c.jet(requires_grad=True)
    assert x.is_leaf
    (x**3).sum().backward()
    expected = 3 * c.jet() * c.jet()
    equal(x.grad, expected.primal, expected.coefficients)
    (x**3).sum().backward()
    equal(x.grad, 2 * expected.primal, 2 * expected.coefficients)
    assert not x.detach().requires_grad


def test_gradient_goes_through_in_place_writes_on_views():
    """Oracle: polynomials fitted to torch's autograd."""

    def function(xs: list[Tensor]) -> list[Tensor]:
        x, y = (t.detach().clone().requires_grad_() for t in xs)
        z = x * 2
        z[0] *= y[0]
        z.t()[1].add_(y[:, 0].sin()[: z.shape[0]])
        z.view(-1)[::2].exp_()
        w = torch.zeros_like(z)
        w[:, 1:] = z[:, :-1] * y[:, 1:]
        ((w * w).sum() + z.sum()).backward()
        return [w, x.grad, y.grad]

    assert_right(function, [curve(2, 4, directions=1), curve(2, 4, directions=1, seed=1)])


def test_gradient_of_a_gradient():
    """Oracle: polynomials fitted to torch's double backward."""

    def function(xs: list[Tensor]) -> list[Tensor]:
        x = xs[0].detach().clone().requires_grad_()
        (g,) = torch.autograd.grad((x.tanh() * x.sin()).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * g).sum(), x)
        return [g, h]

    assert_right(function, [curve(4, directions=1)])


def test_empty_and_zero_dimensional():
    """Oracle: shapes of torch."""
    x = make(0, 3)
    assert (x @ make(3, 2)).coefficients.shape == (3, 2, 2, 0, 2)
    assert x.sum().coefficients.shape == (3, 2, 2)
    assert torch.cat([x, make(2, 3)]).shape == (2, 3)
    assert make().expand(2, 3).sum(0).coefficients.shape == (3, 2, 2, 3)
    y = make()
    equal(y.view(1).view(()), y.primal, y.coefficients)
    equal(y.transpose(0, -1), y.primal, y.coefficients)
