"""Dual influence against the Newton step of the whole objective, differentiated by autograd."""

import itertools

import pytest
import torch
from oracles.penalized import Penalized
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, poisson_nll_loss

from lightning_sketch.influence import KernelInfluence

C = 3
SIZES = {"P > nC": (12, 20), "P < nC": (20, 4)}
RIDGE_PER_EXAMPLE = 0.05
MODES = ("newton", "first_order")
SOLVERS = ("dual", "primal", "matrix_free")


def squared(f, y):
    return (f - y).square().sum(dim=1) / 2


def softmax(f, y):
    return cross_entropy(f, y, reduction="none")


def logistic(f, y):
    return binary_cross_entropy_with_logits(f, y, reduction="none").sum(dim=1)


def poisson(f, y):
    return poisson_nll_loss(f, y, reduction="none").sum(dim=1)


def smooth_absolute(f, y):
    """Pseudo-Huber; its Hessian is not constant and no loss of the table."""
    return ((1 + (f - y).square()).sqrt() - 1).sum(dim=-1) + 0.1 * (f.sum(dim=-1) - 1).square()


LOSSES = {
    "squared": (squared, lambda f: f + torch.randn_like(f)),
    "softmax": (softmax, lambda f: (f + torch.randn_like(f)).argmax(dim=1)),
    "logistic": (logistic, lambda f: (f + torch.randn_like(f) > 0).double()),
    "poisson": (poisson, lambda f: torch.poisson(f.exp())),
    "callable": (smooth_absolute, lambda f: f + torch.randn_like(f)),
}


class Study:
    """A linear model, trained to a minimum by the oracle."""

    def __init__(self, loss, size, convention, centred, unpenalized=()):
        torch.manual_seed(0)
        n, d = size
        self.n, self.convention = n, convention
        self.inputs, self.test_inputs = torch.randn(n, d).double(), torch.randn(5, d).double()
        self.batch_loss, draw = LOSSES[loss]
        self.loss = self.batch_loss if loss == "callable" else loss
        truth = 0.5 * torch.randn(d, C).double()
        self.targets, self.test_targets = draw(self.inputs @ truth), draw(self.test_inputs @ truth)
        self.weight = torch.rand(n).double() + 0.5
        self.module = nn.Linear(d, C, dtype=torch.float64)
        self.shapes = {name: p.shape for name, p in self.module.named_parameters()}
        penalty = torch.cat([torch.full((s.numel(),), float(k not in unpenalized)) for k, s in self.shapes.items()])
        count = sum(s.numel() for s in self.shapes.values())
        self.centre = torch.randn(count).double() * 0.3 * penalty if centred else torch.zeros(count).double()
        self.problem = Penalized(
            lambda t: self.batch_loss(self.outputs(t, self.inputs), self.targets),
            self.weight,
            penalty.double(),
            self.centre,
        )
        self.ridge = RIDGE_PER_EXAMPLE * n
        self.theta = self.problem.minimise(self.centre, torch.zeros(n).double(), self.ridge)
        self.module.load_state_dict(self.named(self.theta))
        self.centred, self.unpenalized = centred, unpenalized

    def named(self, theta):
        parts = theta.split([s.numel() for s in self.shapes.values()])
        return {name: part.reshape(s) for (name, s), part in zip(self.shapes.items(), parts, strict=True)}

    def outputs(self, theta, inputs):
        named = self.named(theta)
        return inputs @ named["weight"].T + named["bias"]

    def test_losses(self, outputs):
        return self.batch_loss(outputs, self.test_targets)

    def influence(self, solver):
        return KernelInfluence.from_module(
            self.module,
            (self.inputs, self.targets),
            loss=self.loss,
            ridge=RIDGE_PER_EXAMPLE if self.convention == "per_example" else self.ridge,
            convention=self.convention,
            sample_weight=self.weight,
            centre=self.named(self.centre) if self.centred else None,
            unpenalized=self.unpenalized,
            solver=solver,
        )

    def ridge_after(self, x):
        return self.ridge * (1 - x.sum() / self.n) if self.convention == "per_example" else self.ridge

    def change(self, x, mode):
        """The oracle's change of parameters."""
        if mode == "first_order":
            return self.problem.first_order(self.theta, x, self.ridge_after(x), self.ridge)
        return self.problem.newton(self.theta, x, self.ridge_after(x))


def close(found, expected, tolerance=1e-8):
    assert found.shape == expected.shape
    error = float((found - expected).norm() / expected.norm())
    assert error < tolerance, error


def check(study):
    """Parameters, outputs and loss of groups, fractions and all single examples, by every solver and mode."""
    one, ten, fractions = (torch.zeros(study.n).double() for _ in range(3))
    one[4], ten[1:11], fractions[:4] = 1, 1, torch.tensor([0.3, 1.0, -0.5, 0.7]).double()
    for solver, mode in itertools.product(SOLVERS, MODES):
        influence = study.influence(solver)
        assert influence.solver == solver
        effect = influence.prepare((study.test_inputs, study.test_targets))
        for x in (one, ten, fractions):
            change = study.change(x, mode)
            found = influence.parameter_change(influence.delete(weights=x, mode=mode))
            close(torch.cat([v.flatten() for v in found.values()]), change)
            p = effect.delete(weights=x, mode=mode)
            before, after = (study.outputs(t, study.test_inputs) for t in (study.theta, study.theta + change))
            close(p.baseline, before)
            close(p.change, after - before)
            close(p.value, after)
            close(p.loss.baseline, study.test_losses(before))
            close(p.loss.change, study.test_losses(after) - study.test_losses(before))
            slope = torch.func.grad(lambda f: study.test_losses(f).sum())(before)
            close(p.loss.linear, (slope * (after - before)).sum(dim=1))
            pull = study.ridge / study.n * (study.problem.penalty * (study.theta - study.centre)) @ change
            close(p.loss.ridge, pull)
        alone = effect.leave_one_out(mode=mode)
        close(alone.change[4], study.outputs(study.theta + study.change(one, mode), study.test_inputs) - before)
        last = effect.delete([study.n - 1], mode=mode)
        for of_all, of_last in (
            (alone.change, last.change),
            (alone.loss.change, last.loss.change),
            (alone.loss.linear, last.loss.linear),
            (alone.loss.ridge, last.loss.ridge),
        ):
            close(of_all[-1], of_last)


@pytest.mark.parametrize("centred", [False, True], ids=["centre 0", "centre given"])
@pytest.mark.parametrize("convention", ["fixed", "per_example"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_every_solver_gives_the_newton_step_of_the_objective(loss, size, convention, centred):
    """Oracle: autograd's gradient and Hessian of the whole penalised objective."""
    check(Study(loss, SIZES[size], convention, centred))


@pytest.mark.parametrize("loss", ["logistic", "poisson", "callable"])
def test_losses_of_the_table_and_of_the_user(loss):
    """Oracle: the same."""
    check(Study(loss, SIZES["P < nC"], "fixed", False))


@pytest.mark.parametrize("convention", ["fixed", "per_example"])
@pytest.mark.parametrize("loss", ["softmax", "poisson"])
def test_parameters_without_a_ridge(loss, convention):
    """Oracle: the same, with a penalty on the weights alone; the softmax's biases may shift together."""
    check(Study(loss, SIZES["P < nC"], convention, False, unpenalized=["bias"]))
