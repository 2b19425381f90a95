"""Distances to a retrained model, against scipy, scikit-learn and formulas by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from lightning_sketch import ConfigurationError
from lightning_sketch.metrics import (
    PredictionDisagreement,
    PredictionKL,
    RelativeParameterDistance,
    RelearningTime,
    UnlearningGap,
)


def pair(size=40, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return first, first + torch.randn(size, classes, generator=generator, dtype=torch.float64)


def test_kl_is_the_relative_entropy_from_the_reference():
    """Oracle: ``scipy.stats.entropy(reference, p)``; and by hand, which tells the direction."""
    unlearned, reference = pair()
    expected = stats.entropy(softmax(reference.numpy(), axis=1), softmax(unlearned.numpy(), axis=1), axis=1).mean()
    metric = PredictionKL()
    metric.update(unlearned[:15], reference[:15])
    metric.update(unlearned[15:], reference[15:])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)
    # reference (3/4, 1/4), unlearned (1/2, 1/2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = PredictionKL()(torch.zeros(1, 2).double(), torch.tensor([[3.0, 1.0]]).double().log())
    assert found.item() == pytest.approx(by_hand, rel=1e-12)
    assert PredictionKL()(unlearned, unlearned) == 0


def test_disagreement_is_the_share_of_other_classes():
    """Oracle: one minus scikit-learn's accuracy."""
    unlearned, reference = pair()
    found = PredictionDisagreement()(unlearned, reference).item()
    expected = 1 - accuracy_score(reference.argmax(1), unlearned.argmax(1))
    assert 0 < found < 1
    assert found == pytest.approx(expected, abs=1e-12)


def test_parameter_distance_is_relative_to_that_of_the_original():
    """Oracle: numpy on all parameters in one vector."""
    torch.manual_seed(0)
    unlearned, original, retrained = models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(3)]
    u, o, r = (np.concatenate([p.detach().double().numpy().ravel() for p in m.parameters()]) for m in models)
    found = RelativeParameterDistance()(unlearned, original, retrained).item()
    assert found == pytest.approx(np.linalg.norm(u - r) / np.linalg.norm(o - r), rel=1e-12)
    assert RelativeParameterDistance()(original, original, retrained) == 1
    assert RelativeParameterDistance()(copy.deepcopy(retrained), original, retrained) == 0


def test_gaps_are_differences_of_scikit_learns_numbers():
    """Oracle: ``accuracy_score`` and ``log_loss``."""
    sizes = {"forget": 10, "retain": 40, "test": 25}
    accuracy, loss = UnlearningGap("accuracy"), UnlearningGap("loss")
    expected: dict[str, list[float]] = {"accuracy": [], "loss": []}
    for seed, (role, size) in enumerate(sizes.items()):
        unlearned, reference = pair(size, seed=seed)
        targets = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))
        for rows in (slice(0, 4), slice(4, None)):
            accuracy.update(unlearned[rows], reference[rows], targets[rows], role)
            loss.update(unlearned[rows], reference[rows], targets[rows], role)
        u, r = (softmax(t.numpy(), axis=1) for t in (unlearned, reference))
        expected["accuracy"].append(accuracy_score(targets, u.argmax(1)) - accuracy_score(targets, r.argmax(1)))
        expected["loss"].append(log_loss(targets, u, labels=[0, 1, 2]) - log_loss(targets, r, labels=[0, 1, 2]))
    for metric in (accuracy, loss):
        found, truth = metric.compute(), expected[metric.quantity]
        assert list(found) == [*sizes, "average"]
        assert [found[role].item() for role in sizes] == pytest.approx(truth, abs=1e-12)
        assert found["average"].item() == pytest.approx(np.abs(truth).mean(), abs=1e-12)


def test_relearning_counts_the_steps_of_gradient_descent():
    """Oracle: the closed form of gradient descent on a parabola, ``theta_t = (1 - lr)^t``."""
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    metric = RelearningTime(target=0.01)
    assert metric(theta.detach() ** 2 / 2) == math.inf
    for _ in range(40):
        optimizer.zero_grad()
        (theta**2 / 2).backward()
        optimizer.step()
        metric.update(theta.detach() ** 2 / 2)
    assert metric.compute().item() == math.ceil(math.log(0.02) / (2 * math.log(0.9)))
    metric.update(torch.tensor(5.0))
    assert metric.compute().item() == 19
    metric.reset()
    metric.update(torch.tensor(0.001))
    assert metric.compute().item() == 0


def test_updates_of_several_processes_are_added():
    """Oracle: all examples at once, each twice."""
    options = {
        "distributed_available_fn": lambda: True,
        "dist_sync_fn": lambda state, group=None: [state, state],  # another process with the same data
    }
    one = pair()
    for make in (PredictionKL, PredictionDisagreement):
        synced = make(**options)
        synced.update(*one)
        torch.testing.assert_close(synced.compute(), make()(*one))
        assert synced.count == 40
    time = RelearningTime(1.0, **options)
    for loss in (2.0, 1.5, 0.5):
        time.update(torch.tensor(loss))
    assert time.compute() == 2


def gap_of(seed):
    metric = UnlearningGap()
    metric.update(*pair(seed=seed), torch.zeros(40, dtype=torch.long), "forget")
    return metric.compute()


def test_values_are_drawn():
    """Oracle: the values on the axes."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    values = [PredictionKL()(*pair(seed=seed)) for seed in range(3)]
    _, ax = PredictionKL().plot(values)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values)
    gaps = [gap_of(seed) for seed in range(3)]
    _, ax = UnlearningGap().plot(gaps)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [gap["forget"] for gap in gaps])
    pyplot.close("all")


a, b = pair()
diverged = nn.Linear(2, 2)
nn.init.constant_(diverged.bias, math.nan)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of torchmetrics, before the error
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PredictionKL()(a, b[:3]), r"`reference_logits` has shape \(3, 3\) and `logits` \(40, 3\)"),
        (lambda: PredictionKL()(a, b * torch.nan), "`reference_logits` holds NaN"),
        (lambda: PredictionDisagreement()(a[0], b[0]), r"`logits` is \(3,\)"),
        (lambda: UnlearningGap("margin"), "`quantity` is 'margin'"),
        (lambda: UnlearningGap()(a, b, torch.zeros(40).long(), "train"), "`role` is 'train'"),
        (lambda: UnlearningGap()(a, b, torch.zeros(40), "test"), "`targets` must be int64"),
        (lambda: UnlearningGap().compute(), "no examples yet"),
        (lambda: RelearningTime(math.nan), "`target` is nan"),
        (lambda: RelearningTime(1.0)(torch.tensor(math.nan)), "`loss` is tensor"),
        (lambda: RelearningTime(1.0)(torch.ones(2)), "`loss` is tensor"),
        (
            lambda: RelativeParameterDistance()(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2)),
            "`original` has other parameters",
        ),
        (lambda: RelativeParameterDistance()(diverged, nn.Linear(2, 2), nn.Linear(2, 2)), "`unlearned` holds NaN"),
    ],
)
def test_what_can_not_be_right_is_refused(call, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        call()
