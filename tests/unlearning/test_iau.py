"""IAU against autograd on whole sets and torch's own Adam."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, data, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_sketch import ConfigurationError
from lightning_sketch.unlearning import IAU, TotalGradient, total_gradient

FORGET, RETAIN = list(range(5)), list(range(5, 20))
LR = 0.01


def module(lightning: bool = False) -> Any:
    torch.manual_seed(0)
    net = network().double()
    return Classifier(net) if lightning else net


def rows(indices: list[int], batch_size: int = 4) -> DataLoader:
    return DataLoader(Subset(data(20), indices), batch_size=batch_size)


def gradient(net: nn.Module, indices: list[int], reduction: str) -> list[Tensor]:
    x, y = data(20)[indices]
    return list(torch.autograd.grad(F.cross_entropy(net(x), y, reduction=reduction), list(net.parameters())))


def change(net: nn.Module, other: nn.Module) -> list[Tensor]:
    return [(q - p).detach() for p, q in zip(net.parameters(), other.parameters(), strict=True)]


@pytest.mark.parametrize("lightning", [True, False])
def test_the_default_is_the_first_step_of_adam(lightning):
    """Oracle: torch.optim.Adam on the difference of the means over whole sets."""
    net = module()
    report = IAU(lr=LR).unlearn(module(lightning), rows(FORGET), rows(RETAIN))
    gradients = [r - f for r, f in zip(gradient(net, RETAIN, "mean"), gradient(net, FORGET, "mean"), strict=True)]
    trained = copy.deepcopy(net)
    for p, g in zip(trained.parameters(), gradients, strict=True):
        p.grad = g
    torch.optim.Adam(trained.parameters(), lr=LR).step()
    found = change(net, report.module.net if lightning else report.module)
    for a, b, g in zip(found, change(net, trained), gradients, strict=True):
        assert (g.abs() > 1e-6).all()
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * LR)
        torch.testing.assert_close(a, -LR * g.sign(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("correction", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("batch_size", [3, 20])
def test_a_step_of_sgd_is_that_of_whole_sets(normalise, correction, batch_size):
    """Oracle: gradients of whole sets; the sign ascends the examples to forget."""
    net = module()
    method = IAU(lr=LR, update="sgd", normalise=normalise, correction=correction)
    retain = rows(RETAIN, batch_size) if correction else None
    report = method.unlearn(net, rows(FORGET, batch_size), retain)
    forget, kept = gradient(net, FORGET, normalise), gradient(net, RETAIN, normalise)
    for found, f, r in zip(change(net, report.module), forget, kept, strict=True):
        torch.testing.assert_close(found, LR * (f - correction * r), rtol=1e-9, atol=1e-14)
    size = sum(float(f.square().sum()) for f in forget) ** 0.5
    assert report.details["forget_gradient_norm"].item() == pytest.approx(size, rel=1e-9)
    if correction:
        a, b = (torch.cat([g.flatten() for g in part]) for part in (forget, kept))
        assert report.details["cosine"].item() == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-9)


def test_steps_take_gradients_anew():
    """Oracle: two runs of one step."""
    net = module()
    method = IAU(lr=LR, update="sgd")
    first = method.unlearn(net, rows(FORGET), rows(RETAIN)).module
    second = method.unlearn(first, rows(FORGET), rows(RETAIN)).module
    both = IAU(lr=LR, update="sgd", steps=2).unlearn(net, rows(FORGET), rows(RETAIN))
    assert both.steps == 2
    for p, q in zip(second.parameters(), both.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_the_total_gradient_takes_the_place_of_the_retained_examples(normalise):
    """Oracle: the step with them, and the sum of gradients of the whole set."""
    net = module()
    total = total_gradient(net, rows(FORGET + RETAIN))
    assert total.num_examples == 20
    for (name, found), expected in zip(total.gradients.items(), gradient(net, FORGET + RETAIN, "sum"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=name)
    with_it = IAU(update="sgd", normalise=normalise, total_gradient=total).unlearn(net, rows(FORGET))
    without = IAU(update="sgd", normalise=normalise).unlearn(net, rows(FORGET), rows(RETAIN))
    for p, q in zip(with_it.module.parameters(), without.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_a_total_gradient_of_another_model_is_refused():
    """Oracle: the sentence. After a first request the parameters are others."""
    net = module()
    total = total_gradient(net, rows(FORGET + RETAIN))
    first = IAU(total_gradient=total).unlearn(net, rows(FORGET)).module
    with pytest.raises(ConfigurationError, match="`total_gradient` was taken at other parameters"):
        IAU(total_gradient=total).unlearn(first, rows(FORGET))
    with pytest.raises(ConfigurationError, match="`forget` has 5 examples, and `total_gradient` is of 5"):
        IAU(total_gradient=TotalGradient(total.gradients, 5, total.parameters)).unlearn(net, rows(FORGET))
    with pytest.raises(ConfigurationError, match="use `steps=1`"):
        IAU(total_gradient=total, steps=2)


def test_the_largest_norm():
    """Oracle: the step without a bound."""
    net = module()
    free = IAU(update="sgd", lr=1.0).unlearn(net, rows(FORGET), rows(RETAIN))
    half = free.change_norm / 2
    capped = IAU(update="sgd", lr=1.0, max_norm=half).unlearn(net, rows(FORGET), rows(RETAIN))
    assert capped.change_norm == pytest.approx(half, rel=1e-12)
    for a, b in zip(change(net, capped.module), change(net, free.module), strict=True):
        torch.testing.assert_close(a, b / 2, rtol=1e-9, atol=1e-14)


def test_a_step_goes_where_retraining_goes():
    """Oracle: a logistic regression fitted by scikit-learn with and without the examples."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, CLASSES, generator=generator, dtype=torch.float64)
    y = (x[:, :CLASSES] + noise).argmax(dim=1)

    def fitted(x: Tensor, y: Tensor) -> nn.Linear:
        found = LogisticRegression(C=10.0, tol=1e-10, max_iter=2000).fit(x.numpy(), y.numpy())
        layer = nn.Linear(FEATURES, CLASSES).double()
        layer.weight.data, layer.bias.data = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
        return layer

    before, after = fitted(x, y), fitted(x[10:], y[10:])
    report = IAU(update="sgd", normalise="sum", lr=1e-3).unlearn(before, (x[:10], y[:10]), (x[10:], y[10:]))
    a, b = (torch.cat([d.flatten() for d in change(before, other)]) for other in (report.module, after))
    assert F.cosine_similarity(a, b, dim=0) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"update": "adam"}, "`update` is 'adam': give one of 'adam_sign', 'sgd'"),
        ({"normalise": "max"}, "`normalise`"),
        ({"correction": -1.0}, "`correction`"),
        ({"steps": 1.5}, "`steps` is 1.5: give a positive integer"),
        ({"max_norm": 0.0}, "`max_norm`"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        IAU(**options)


def test_retained_examples_are_asked_for():
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match="`retain` is None"):
        IAU().unlearn(module(), rows(FORGET))
