"""What kernel influence refuses, and what it chooses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import ConfigurationError
from lightning_sketch.influence import KernelInfluence, fit

N, D = 10, 3


def data():
    torch.manual_seed(0)
    return torch.randn(N, D).double(), torch.randn(N).double()


def influence(module=None, given=None, **options):
    torch.manual_seed(0)
    module = module or nn.Linear(D, 1)
    return KernelInfluence.from_module(
        module, data() if given is None else given, **{"loss": "squared", "ridge": 1.0, **options}
    )


def of_kernel(kernel, outputs=None, **options):
    outputs = data()[1] if outputs is None else outputs
    return KernelInfluence.from_kernel(kernel, outputs, data()[1], **{"loss": "squared", "ridge": 1.0, **options})


def kernel():
    return data()[0] @ data()[0].T


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.weight, x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "`ridge` is 0.0"),
        ({"ridge": float("nan")}, "`ridge` is nan"),
        ({"convention": "mean"}, "`convention` is 'mean'.*'per_example'"),
        ({"loss": "hinge"}, "`loss` is 'hinge'.*'softmax'"),
        ({"solver": "lissa"}, "`solver` is 'lissa'"),
        ({"sample_weight": torch.ones(N + 1)}, "`sample_weight`.*10 numbers"),
        ({"sample_weight": -torch.ones(N)}, "`sample_weight`.*at least 0"),
        ({"unpenalized": ["offset"]}, r"`unpenalized` holds \['offset'\].*'bias'"),
        ({"unpenalized": ["weight", "bias"]}, "`module` has no penalised parameter"),
        ({"centre": {"weight": torch.zeros(1, D)}}, "`centre` has no tensor `bias`"),
        ({"jacobian_at": {"weight": torch.zeros(D)}}, r"`jacobian_at` has no tensor `weight` of shape \(1, 3\)"),
        ({"module": TwoOutputs()}, "`module` returned tuple"),
        ({"module": nn.ModuleList([nn.Linear(D, 1)])}, "`module` can not be called.*define `forward`"),
        ({"module": nn.Unflatten(1, (D, 1))}, "`module` has no penalised parameter"),
        ({"module": nn.Sequential(nn.Linear(D, 4), nn.Unflatten(1, (2, 2)))}, r"returned \(1, 2, 2\)"),
        ({"given": (data()[0], data()[1][:3])}, "10 inputs and 3 targets"),
        ({"given": (data()[0][:0], data()[1][:0])}, "0 inputs.*at least one"),
        ({"given": data()[0]}, "`data` has no targets"),
        ({"given": iter(())}, "`data` has no batch"),
        ({"given": [[1, 2, 3]]}, "other batches"),
        ({"given": DataLoader(TensorDataset(*data()), shuffle=True)}, "shuffle=False"),
        ({"given": (data()[0] * torch.inf, data()[1])}, "NaN or infinity"),
    ],
)
def test_arguments_that_cannot_be_right(options, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        influence(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_kernel(torch.eye(N - 1)), r"`kernel` has shape \(9, 9\)"),
        (lambda: of_kernel(kernel() + torch.arange(N)), "not symmetric"),
        (lambda: of_kernel(-kernel()).prepare_kernel(kernel(), data()[1]).delete([1]), "positive semidefinite"),
        (lambda: of_kernel(kernel() * torch.nan), "NaN"),
        (lambda: of_kernel(kernel(), torch.zeros(N, 2, 2)), "`outputs` has shape"),
        (lambda: of_kernel(kernel(), basis=torch.ones(N)), "`basis` has shape"),
        (lambda: of_kernel(kernel(), centre_outputs=torch.ones(N, 1)), "`centre_outputs` has shape"),
        (lambda: of_kernel(kernel(), solver="primal"), "'primal' needs|`solver='primal'` needs"),
        (lambda: of_kernel(kernel()).prepare(data()), "use prepare_kernel"),
        (lambda: influence().prepare_kernel(kernel(), data()[1]), "use `prepare`"),
        (lambda: of_kernel(kernel()).prepare_kernel(kernel(), data()[1][:, None]), "`outputs` has shape"),
        (lambda: of_kernel(kernel(), basis=torch.ones(N, 1)).prepare_kernel(kernel(), data()[1]), "`basis` must be"),
        (lambda: of_kernel(kernel()).parameter_change(of_kernel(kernel()).delete([1])), "a kernel and no module"),
        (lambda: influence().linearity_gap(influence().leave_one_out()), "several deletions"),
    ],
)
def test_kernels_and_points_that_cannot_be_right(make, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda e: e.delete(), "exactly one"),
        (lambda e: e.delete([1], weights=np.zeros(N)), "exactly one"),
        (lambda e: e.delete([N]), "examples 0 to 9"),
        (lambda e: e.delete([-1]), "examples 0 to 9"),
        (lambda e: e.delete([1, 1]), "twice"),
        (lambda e: e.delete([1.5]), "flat list of integers"),
        (lambda e: e.delete([[1]]), "flat list of integers"),
        (lambda e: e.delete(weights=np.zeros(N + 1)), r"`weights` has shape \(11,\)"),
        (lambda e: e.delete(weights=np.full(N, 1.5)), "at most 1"),
        (lambda e: e.delete(weights=np.full(N, np.nan)), "finite"),
        (lambda e: e.delete_many([]), "`sets` is empty"),
        (lambda e: e.delete([1], mode="second_order"), "`mode` is 'second_order'"),
    ],
)
def test_queries_that_cannot_be_right(query, message):
    """Oracle: the sentence, the same for the model and for its outputs."""
    fitted = influence()
    for target in (fitted, fitted.prepare(data())):
        with pytest.raises(ConfigurationError, match=message):
            query(target)


def test_exact_is_for_the_squared_loss_alone():
    """Oracle: the sentence."""
    x, y = data()
    fitted = influence(given=(x, (y > 0).double()), loss="logistic")
    for query in (fitted.delete, fitted.prepare(x).delete):
        with pytest.raises(ConfigurationError, match=r"`mode='exact'` needs the loss 'squared'"):
            query([1], mode="exact")
    with pytest.raises(ConfigurationError, match="squared"):
        fitted.prepare(x).leave_one_out(mode="exact")


def test_everything_may_be_deleted_where_the_ridge_stays():
    """Oracle: what the ridge alone leaves, zero; and the sentence where the ridge goes with the examples."""
    x, y = data()
    k = x @ x.T
    fitted = k @ torch.linalg.solve(k + torch.eye(N), y)
    effect = of_kernel(k, fitted).prepare_kernel(k, fitted)
    assert effect.delete(list(range(N))).value.abs().max() < 1e-10
    shared = of_kernel(k, fitted, convention="per_example").prepare_kernel(k, fitted)
    with pytest.raises(ConfigurationError, match="leaves no example"):
        shared.delete(list(range(N)))


def test_an_example_that_alone_determines_a_direction_is_refused():
    """Oracle: a leverage of one to rounding, on which a division by zero would follow."""
    k = torch.diag(torch.tensor([1e14] + [1.0] * (N - 1)).double())
    with pytest.raises(ConfigurationError, match=r"`ridge` is too small.*leverage 1"):
        of_kernel(k, torch.zeros(N)).prepare_kernel(k, torch.zeros(N)).delete([0])


def test_conjugate_gradients_that_do_not_converge_say_so(monkeypatch):
    """Oracle: the sentence."""
    monkeypatch.setattr("lightning_sketch.influence.matrix_free.MOST_ITERATIONS", 1)
    with pytest.raises(ConfigurationError, match=r"conjugate gradients have a relative residual.*raise the ridge"):
        influence(solver="matrix_free").delete([1])


@pytest.mark.parametrize(
    ("width", "largest", "solver"),
    [(2, 1000, "primal"), (20, 1000, "dual"), (2, 2, "matrix_free"), (20, 9, "matrix_free")],
)
def test_the_solver_is_chosen_from_sizes(monkeypatch, width, largest, solver):
    """Oracle: the smaller of ``nC`` = 10 and ``P`` = width + 1, if that is small enough."""
    monkeypatch.setattr(fit, "LARGEST_DENSE", largest)
    given = (torch.randn(N, width), data()[1])
    assert influence(nn.Linear(width, 1), given).solver == solver
    assert influence(nn.Linear(width, 1), given, solver="matrix_free").solver == "matrix_free"
    if largest < 1000:
        with pytest.raises(ConfigurationError, match=r"`solver='dual'` would factorise a matrix of 10 rows"):
            influence(nn.Linear(width, 1), given, solver="dual")
