"""Networks that are not linear in their parameters: Jacobians, Gauss-Newton, and how far to trust it."""

import copy

import pytest
import torch
from oracles.penalized import Penalized
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch.influence import KernelInfluence

N, FEATURES, CLASSES, RIDGE = 18, 4, 3, 1.0
GROUP = [0, 5, 7]


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator).double()
    return x, (x[:, :CLASSES] + 0.5 * torch.randn(n, CLASSES, generator=generator)).argmax(dim=1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def flat(named):
    return torch.cat([t.detach().flatten() for t in named.values()])


def outputs(module, theta, x):
    """The module's outputs under flat parameters."""
    names, parts = [], theta.split([p.numel() for p in module.parameters()])
    for (name, p), part in zip(module.named_parameters(), parts, strict=True):
        names.append((name, part.reshape(p.shape)))
    return functional_call(module, dict(names), (x,))


def jacobian_of(module, theta, x):
    """Oracle: ``(n, C, P)`` by reverse mode, one output at a time."""
    return torch.autograd.functional.jacobian(lambda t: outputs(module, t, x), theta)


def train(module, x, y, centre, weight):
    """Minimise ``sum_i w_i l_i + (RIDGE / 2) ||theta - centre||^2`` by L-BFGS, then Newton's method to rounding."""
    problem = Penalized(
        lambda t: cross_entropy(outputs(module, t, x), y, reduction="none"), weight, torch.ones_like(centre), centre
    )
    nothing = torch.zeros(len(x)).double()
    theta = flat(dict(module.named_parameters())).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = problem.objective(theta, nothing, RIDGE)
        value.backward()
        return value

    optimizer.step(closure)
    nn.utils.vector_to_parameters(problem.minimise(theta.detach(), nothing, RIDGE), module.parameters())
    return module


@pytest.fixture(scope="module")
def trained():
    module = network()
    initial = copy.deepcopy(module.state_dict())
    train(module, *data(), flat(initial), torch.ones(N).double())
    return module, initial


def influence_of(trained, **options):
    module, initial = trained
    return KernelInfluence.from_module(
        module, data(), **{"loss": "softmax", "ridge": RIDGE, "centre": initial, **options}
    )


@pytest.mark.parametrize("solver", ["dual", "primal", "matrix_free"])
def test_the_dual_of_a_network_is_its_gauss_newton_step(trained, solver):
    """Oracle: the Newton step of the network made linear at the trained parameters, by autograd."""
    module, initial = trained
    theta = flat(dict(module.named_parameters()))
    x, y = data()
    x_test, y_test = data(6, seed=3)
    jacobian, jacobian_test = (jacobian_of(module, theta, inputs) for inputs in (x, x_test))
    made_linear = module(x).detach(), module(x_test).detach()
    problem = Penalized(
        lambda t: cross_entropy(made_linear[0] + jacobian @ (t - theta), y, reduction="none"),
        torch.ones(N).double(),
        torch.ones_like(theta),
        flat(initial),
    )
    deleted = torch.zeros(N).double()
    deleted[GROUP] = 1
    for convention, after in (("fixed", RIDGE), ("per_example", RIDGE * (N - len(GROUP)) / N)):
        given = RIDGE / N if convention == "per_example" else RIDGE
        influence = influence_of(trained, ridge=given, convention=convention, solver=solver)
        change = problem.newton(theta, deleted, after)
        found = flat(influence.parameter_change(influence.delete(GROUP)))
        torch.testing.assert_close(found, change, rtol=0, atol=1e-8 * float(change.norm()))
        p = influence.prepare((x_test, y_test)).delete(GROUP)
        torch.testing.assert_close(p.change, jacobian_test @ change, rtol=0, atol=1e-8)
        pull = RIDGE / N * (theta - flat(initial)) @ change
        torch.testing.assert_close(p.loss.ridge, pull, rtol=1e-6, atol=0)
        slope = (p.baseline.softmax(dim=1) - torch.nn.functional.one_hot(y_test)) * (jacobian_test @ change)
        torch.testing.assert_close(p.loss.linear, slope.sum(dim=1), rtol=0, atol=1e-8)


def test_predictions_are_nearer_to_retraining_than_no_change(trained):
    """Oracle: the network trained again without the examples, from where it was."""
    module, initial = trained
    x_test, _ = data(40, seed=3)
    weight = torch.ones(N).double()
    weight[GROUP] = 0
    retrained = train(copy.deepcopy(module), *data(), flat(initial), weight)
    truth = (retrained(x_test) - module(x_test)).detach()
    for mode in ("newton", "first_order"):
        change = influence_of(trained).prepare(x_test).delete(GROUP, mode=mode).change
        assert (change - truth).norm() / truth.norm() < 0.5  # a change of the same size in another direction has 1.4


def test_a_minimum_is_told_from_a_model_that_is_not(trained):
    """Oracle: ``theta = centre + J' a`` holds at a minimum, and the gradient by autograd."""
    found = influence_of(trained).diagnostics().stationarity
    assert found.stationary
    assert found.relative < 1e-8
    assert found.representer_gap < 1e-8

    module, initial = network(), trained[1]
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    influence = influence_of((module, initial))
    found = influence.diagnostics().stationarity
    assert not found.stationary
    x, y = data()
    theta = flat(dict(module.named_parameters())).requires_grad_()
    value = cross_entropy(outputs(module, theta, x), y, reduction="sum")
    value = value + RIDGE / 2 * (theta - flat(initial)).square().sum()
    torch.testing.assert_close(found.residual, float(torch.autograd.grad(value, theta)[0].norm()), rtol=1e-8, atol=0)
    with pytest.warns(UserWarning, match=r"not at a minimum.*'per_example'"):
        influence_of((module, initial), ridge=RIDGE / N, convention="per_example")


def test_linearity_gap_of_the_training_and_of_a_deletion(trained):
    """Oracle: the definition, by two runs of the network; it is zero for a linear one and falls with the change."""
    module, initial = trained
    influence = influence_of(trained)
    x, _ = data()
    theta, start = flat(dict(module.named_parameters())), flat(initial)
    difference = outputs(module, theta, x) - outputs(module, start, x)
    gap = (difference - jacobian_of(module, theta, x) @ (theta - start)).norm() / difference.norm()
    torch.testing.assert_close(influence.diagnostics().linearity_gap, float(gap), rtol=1e-8, atol=0)

    weights = torch.zeros(N)
    weights[GROUP] = 1
    gaps = [influence.linearity_gap(influence.delete(weights=t * weights)) for t in (1, 0.1, 0.01)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    line = nn.Linear(FEATURES, CLASSES)
    zero = {name: torch.zeros_like(p) for name, p in line.named_parameters()}
    for unpenalized in ([], ["bias"]):
        linear = influence_of((line, zero), unpenalized=unpenalized)
        assert linear.diagnostics().linearity_gap < 1e-12
        assert linear.linearity_gap(linear.delete(GROUP)) < 1e-10


def test_the_jacobian_may_be_taken_at_the_initial_parameters(trained):
    """Oracle: the kernel of the Jacobian there, given; the outputs are those of the trained network."""
    module, initial = trained
    (x, y), (x_test, _) = data(), data(5, seed=3)
    j, j_test = (jacobian_of(module, flat(initial), inputs).flatten(0, 1) for inputs in (x, x_test))
    given = KernelInfluence.from_kernel(j @ j.T, module(x), y, loss="softmax", ridge=RIDGE)
    expected = given.prepare_kernel(j_test @ j.T, module(x_test)).delete(GROUP)
    p = influence_of(trained, jacobian_at=initial).prepare(x_test).delete(GROUP)
    torch.testing.assert_close(p.value, expected.value)
    at_trained = influence_of(trained).prepare(x_test).delete(GROUP)
    assert (p.change - at_trained.change).norm() > 1e-3 * p.change.norm()


class Several(nn.Module):
    """Convolution, both normalisations, dropout, a tied and a frozen parameter, one output per example."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(1, 3, 2)
        self.batch = nn.BatchNorm1d(3)
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
        self.second.weight = self.first.weight
        self.layer = nn.LayerNorm(9)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(9, 1)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        hidden = self.batch(self.convolution(x[:, None])).flatten(1)
        hidden = self.dropout(self.layer(self.second(torch.tanh(self.first(hidden)))))
        return self.last(hidden)[:, 0]


@pytest.mark.parametrize("tile_size", [None, 5])
def test_tiles_and_layers(tile_size):
    """Oracle: the Jacobian by autograd, one example at a time, in evaluation mode; and the kernel made of it, given."""
    torch.manual_seed(0)
    module = Several()
    module.batch.running_var.uniform_(0.5, 2)
    module.train()
    x, x_test = data()[0], data(5, seed=3)[0]
    y, kept = x[:, 0], copy.deepcopy(module.state_dict())
    reference = copy.deepcopy(module).double().eval()
    parameters = [p for p in reference.parameters() if p.requires_grad]

    def jacobian(inputs):
        rows = [torch.autograd.grad(reference(one[None])[0], parameters) for one in inputs]
        return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])

    j, j_test = jacobian(x), jacobian(x_test)
    given = KernelInfluence.from_kernel(j @ j.T, reference(x), y, loss="squared", ridge=RIDGE)
    expected = given.prepare_kernel(j_test @ j.T, reference(x_test))
    for solver in ("dual", "primal", "matrix_free"):
        influence = KernelInfluence.from_module(
            module, (x.float(), y), loss="squared", ridge=RIDGE, tile_size=tile_size, solver=solver
        )
        effect = influence.prepare(x_test.float().double())
        assert effect.baseline.shape == (5,)
        for found, truth in (
            (effect.delete(GROUP), expected.delete(GROUP)),
            (effect.delete_many([GROUP, [1]]), expected.delete_many([GROUP, [1]])),
            *(() if solver == "matrix_free" else [(effect.leave_one_out(), expected.leave_one_out())]),
        ):
            torch.testing.assert_close(found.value, truth.value, rtol=1e-5, atol=1e-6)  # inputs rounded to float32
        change = influence.parameter_change(influence.delete_many([GROUP, [1]]))
        assert "last.bias" not in change
        truth = torch.stack([j.T @ given.delete(s).coefficients for s in (GROUP, [1])])
        torch.testing.assert_close(
            torch.cat([t.flatten(1) for t in change.values()], dim=1), truth, rtol=1e-4, atol=1e-6
        )
    assert module.training
    assert all(torch.equal(t, kept[name]) for name, t in module.state_dict().items())
    assert module.last.weight.dtype == torch.float32


def test_integer_inputs():
    """Oracle: the same network on the embedded inputs' one-hot codes."""
    torch.manual_seed(0)
    tokens, y = torch.randint(5, (N, 3)), torch.randint(CLASSES, (N,))
    embedding, last = nn.Embedding(5, 4), nn.Linear(12, CLASSES)
    module = nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), last)

    class OnCodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Parameter(embedding.weight.detach().clone()), last

        def forward(self, x):
            return self.last(torch.tanh((x @ self.table).flatten(1)))

    found = KernelInfluence.from_module(module, (tokens, y), loss="softmax", ridge=RIDGE).prepare(tokens)
    codes = torch.nn.functional.one_hot(tokens, 5).double()
    truth = KernelInfluence.from_module(OnCodes(), (codes, y), loss="softmax", ridge=RIDGE).prepare(codes)
    torch.testing.assert_close(found.delete(GROUP).value, truth.delete(GROUP).value)


def test_loaders_give_their_examples_in_order(trained):
    """Oracle: the same tensors at once."""
    module, initial = trained
    dataset = TensorDataset(*data())
    influence = KernelInfluence.from_module(
        module, DataLoader(dataset, batch_size=5), loss="softmax", ridge=RIDGE, centre=initial
    )
    test = TensorDataset(*data(7, seed=2))
    found = influence.prepare(DataLoader(test, batch_size=3)).delete(GROUP)
    expected = influence_of(trained).prepare(test[:]).delete(GROUP)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.loss.change, expected.loss.change)
