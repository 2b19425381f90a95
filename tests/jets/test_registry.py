"""Which rule an operator gets: registered, derived, decomposed, or refused with an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sketch.errors import ConfigurationError, UnsupportedOperatorError
from lightning_sketch.jets import JetTensor, jet_rule, registered_operators
from lightning_sketch.jets.registry import find_rule

aten = torch.ops.aten


@pytest.fixture(scope="module")
def operators():
    """Operators of our own: one to give a rule, one to leave without."""
    library = torch.library.Library("jet_tests", "DEF")
    for name in ("cube", "unknown", "unknown_backward"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x**3, "CPU")
    library.define("cube_(Tensor(a!) x) -> Tensor(a!)")
    library.impl("cube_", lambda x: x.copy_(x**3), "CPU")
    yield torch.ops.jet_tests
    library._destroy()


def jet(*shape: int) -> JetTensor:
    torch.manual_seed(0)
    return JetTensor(torch.randn(shape, dtype=torch.float64), torch.randn(2, 1, 1, *shape, dtype=torch.float64))


def test_a_rule_of_the_users_own(operators):
    """Oracle: the same polynomial in torch's operators; the in-place operator is derived from the rule."""
    x = jet(3)
    with pytest.raises(UnsupportedOperatorError, match=r"jet_tests\.cube\.default"):
        operators.cube(x)

    @jet_rule(operators.cube.default)
    def cube(x):
        return x * x * x

    assert operators.cube.default in registered_operators()
    torch.testing.assert_close(operators.cube(x).coefficients, (x**3).coefficients)
    y = x.clone()
    operators.cube_(y)
    torch.testing.assert_close(y.coefficients, (x**3).coefficients)
    with pytest.raises(ConfigurationError, match=r"jet_tests\.cube\.default.*cube"):
        jet_rule(operators.cube.default)(cube)


def test_registration_wants_an_exact_overload():
    """Oracle: the sentence itself."""
    with pytest.raises(ConfigurationError, match=r"aten.exp.*\.default"):
        jet_rule(aten.exp)(lambda x: x)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.ops.jet_tests.unknown(x)


def test_a_missing_rule_names_operator_module_and_remedy(operators):
    """Oracle: the sentence itself."""
    net = nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": Unknown()})["inner"])
    net = nn.ModuleDict({"encoder": net})
    with pytest.raises(
        UnsupportedOperatorError,
        match=r"`jet_tests.unknown.default` \(in `1`\) .*@lightning_sketch.jets.jet_rule\(torch.ops.jet_tests.unkn",
    ):
        net["encoder"](jet(3))
    with pytest.raises(UnsupportedOperatorError, match="in `Unknown`"):
        Unknown()(jet(3))


def test_a_missing_rule_in_the_backward_pass(operators):
    """Oracle: the sentence itself."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return torch.ops.jet_tests.unknown_backward(grad)

    x = jet(3).requires_grad_()
    with pytest.raises(UnsupportedOperatorError, match=r"unknown_backward.default.*backward pass.*jet_rule"):
        (Function.apply(x) * x).sum().backward()


def test_what_a_decomposition_lacks_is_reported_as_the_operator_itself():
    """Oracle: the name of the operator that the user wrote."""
    with pytest.raises(UnsupportedOperatorError, match=r"`aten\.special_bessel_j0\.default`"):
        torch.special.bessel_j0(jet(3))


def test_in_place_twins_are_derived():
    """Oracle: the rule of the operator that is not in place."""
    assert aten.exp_.default not in registered_operators()
    x = jet(3)
    torch.testing.assert_close(x.clone().exp_().coefficients, x.exp().coefficients)
    torch.testing.assert_close(x.clone().sigmoid_().coefficients, x.sigmoid().coefficients)


@pytest.mark.parametrize("op", [aten.rrelu_with_noise.default, aten.normal.Tensor_float, aten.binomial.default])
def test_random_operators_are_never_decomposed(op):
    """Oracle: the registry; a decomposition would draw other numbers than the user's run."""
    if op not in registered_operators():
        with pytest.raises(UnsupportedOperatorError):
            find_rule(op)


DRAWS = {
    "bernoulli": torch.bernoulli,
    "rand_like": torch.rand_like,
    "normal": lambda x: torch.normal(x, 0.5),
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "multinomial": lambda x: torch.multinomial(x, 2),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_those_of_the_plain_run(name):
    """Oracle: plain torch from the same seed, and what it draws next."""
    x = torch.rand(4, 5, dtype=torch.float64)
    results = []
    for value in (x, JetTensor(x, torch.ones(2, 1, 1, 4, 5, dtype=torch.float64))):
        torch.manual_seed(0)
        y = DRAWS[name](value)
        results.append((y.primal if isinstance(y, JetTensor) else y, torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_dropout_draws_the_masks_of_the_plain_run():
    """Oracle: torch's own mask, also on a permuted layout."""
    x = jet(4, 5, 3)
    for view in (lambda t: t, lambda t: t.permute(2, 0, 1), lambda t: t.transpose(0, 1)):
        torch.manual_seed(1)
        y = nn.functional.dropout(view(x), 0.5)
        torch.manual_seed(1)
        torch.testing.assert_close(y.primal, nn.functional.dropout(view(x.primal), 0.5))


def test_constants_cost_nothing():
    """Oracle: no coefficients are allocated for what does not vary."""
    x = torch.zeros_like(jet(3))
    assert (x + 1).exp().sum().block is None
    assert nn.functional.dropout(x, 0.5).block is None


def test_operators_on_lists():
    """Oracle: the operators on single tensors."""
    xs = [jet(3), jet(2, 2)]
    for y, x in zip(torch._foreach_add(xs, xs, alpha=2), xs, strict=True):
        torch.testing.assert_close(y.coefficients, 3 * x.coefficients)
    ys = [x.clone() for x in xs]
    torch._foreach_addcdiv_(ys, xs, [x * x + 1 for x in xs], 0.5)
    for y, x in zip(ys, xs, strict=True):
        torch.testing.assert_close(y.coefficients, (x + 0.5 * x / (x * x + 1)).coefficients)
    for y, x in zip(torch._foreach_norm(xs), xs, strict=True):
        torch.testing.assert_close(y.coefficients, x.norm().coefficients)


def test_counts(capsys):
    """Prints how many operators have a rule of their own; the families keep the number of written rules small."""
    rules = {find_rule(op) for op in registered_operators() if op.namespace == "aten"}
    with capsys.disabled():
        print(f"\n{len(registered_operators())} operators with a rule")
    assert len(rules) > 200
