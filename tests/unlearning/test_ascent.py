"""Gradient ascent and IMU against autograd."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import ConfigurationError
from lightning_sketch.unlearning import IMU, GradientAscent, influence_weights

PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    ).double()
    net(data(20, seed=1).tensors[0])  # running statistics
    return net


def scores_by_autograd(net: nn.Module, x: Tensor, y: Tensor, damping: float = 0.01) -> Tensor:
    """``-g_i' F^-1 mean(g)`` with the diagonal Fisher matrix, one backward pass for each example."""
    net = copy.deepcopy(net).eval()
    head = list(net[-1].parameters())
    rows = []
    for i in range(len(y)):
        gradient = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), head)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    g = torch.stack(rows)
    return -g @ (g.mean(dim=0) / (g.square().mean(dim=0) + damping))


def contradicting() -> TensorDataset:
    """Nine like inputs, of which one is of another class: the two most probable ones, which exclude each other."""
    x = data(1).tensors[0] + 0.1 * data(9, seed=2).tensors[0]
    first, second = network().eval()(x)[0].topk(2).indices.tolist()
    return TensorDataset(x, torch.tensor([first] * 7 + [second, first]))


def batches(size: int = 9, batch_size: int = 4) -> DataLoader:
    return DataLoader(data(size), batch_size=batch_size)


@pytest.mark.parametrize("dataset", [data(9), contradicting()], ids=["alike", "contradicting"])
@pytest.mark.parametrize("lightning", [True, False])
def test_scores_are_those_of_autograd(lightning, dataset):
    """Oracle: one backward pass for each example. The batches of the loader make no difference."""
    net, (x, y) = network(), dataset.tensors
    module = Classifier(net) if lightning else net
    details = IMU(epochs=1).unlearn(module, DataLoader(dataset, batch_size=4)).details
    expected = scores_by_autograd(net, x, y)
    torch.testing.assert_close(details["scores"], expected, rtol=1e-9, atol=1e-12)
    assert details["scores"].mean() <= 0
    assert torch.equal(details["weights"], influence_weights(details["scores"]))
    assert (details["weights"] > 0).equal(expected < 0)


@pytest.mark.parametrize("trainable", ["head", "all"])
@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_a_step_descends_the_weighted_loss(trainable, l1):
    """Oracle: the loss of the paper, by autograd, with weights that are constants."""
    net, (x, y) = network().eval(), data(9).tensors
    report = IMU(lr=0.1, epochs=1, trainable=trainable, l1=l1, **PLAIN).unlearn(net, (x, y))
    w = scores_by_autograd(net, x, y).clamp(max=0).abs().sqrt()
    w = w.clamp(max=torch.quantile(w[w > 0], 0.93))
    loss = -(w * F.cross_entropy(net(x), y, reduction="none")).sum() / w.sum()
    loss = loss + l1 * sum(p.abs().sum() for p in net[-1].parameters())
    trained = list((net[-1] if trainable == "head" else net).parameters())
    gradients = dict(zip(map(id, trained), torch.autograd.grad(loss, trained), strict=True))
    for p, q in zip(net.parameters(), report.module.parameters(), strict=True):
        expected = p - 0.1 * gradients[id(p)] if id(p) in gradients else p
        torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(p, q) is (id(p) not in gradients)
    assert report.steps == 1


def test_uniform_weights_are_gradient_ascent():
    """Oracle: the other method to the last bit, and torch's own optimizer on the negative loss."""
    net = network().eval()
    options: dict[str, Any] = {"lr": 0.05, "epochs": 3}
    uniform = IMU(weights="uniform", **options).unlearn(net, batches(8), seed=4)
    ascent = GradientAscent(trainable="head", **options).unlearn(net, batches(8), seed=4)
    for p, q in zip(uniform.module.parameters(), ascent.module.parameters(), strict=True):
        assert torch.equal(p, q)
    whole = GradientAscent(**options).unlearn(net, data(8).tensors).module
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (-F.cross_entropy(net(data(8).tensors[0]), data(8).tensors[1])).backward()
        optimizer.step()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_the_head_alone_moves():
    """Oracle: all other tensors from before."""
    net = network()
    found = IMU().unlearn(net, batches()).module.state_dict()
    for name, t in net.state_dict().items():
        assert torch.equal(t, found[name]) is not name.startswith("4."), name


def test_scores_are_taken_anew_when_asked():
    """Oracle: autograd at the module after one epoch, and within a batch."""
    net, (x, y) = network(), data(9).tensors
    later = scores_by_autograd(IMU(lr=0.5, epochs=1, recompute="epoch").unlearn(net, (x, y)).module, x, y)
    once, epoch = (IMU(lr=0.5, epochs=2, recompute=r).unlearn(net, (x, y)).details for r in ("once", "epoch"))
    torch.testing.assert_close(once["scores"], scores_by_autograd(net, x, y), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(epoch["scores"], later, rtol=1e-9, atol=1e-12)
    assert (once["scores"] - later).abs().max() > 0.01
    tiny = IMU(lr=1e-12, epochs=1, recompute="batch").unlearn(net, batches()).details
    for part in torch.arange(9).split(4):
        expected = scores_by_autograd(net, x[part], y[part])
        torch.testing.assert_close(tiny["scores"][part], expected, rtol=1e-7, atol=1e-9)
        assert torch.equal(tiny["weights"][part], influence_weights(tiny["scores"][part]))


def test_shuffled_weights_are_the_same_for_other_examples():
    """Oracle: the weights in their places."""
    net = network()
    right = IMU(epochs=1).unlearn(net, batches()).details
    runs = [IMU(epochs=1, weights="shuffle").unlearn(net, batches(), seed=seed) for seed in (0, 0, 1)]
    shuffled = [report.details["weights"] for report in runs]
    assert torch.equal(shuffled[0].sort().values, right["weights"].sort().values)
    assert not torch.equal(shuffled[0], right["weights"])
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert runs[0].forget_loss == runs[1].forget_loss


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([-4.0, 1.0, -1.0, -0.25], {"clip": 1.0}, [2, 0, 1, 0.5]),
        ([-4.0, 1.0, -1.0, -0.25], {"clip": 1.0, "power": 1.0}, [4, 0, 1, 0.25]),
        ([-4.0, 1.0, -1.0, -0.25], {"clip": 0.5}, [1, 0, 1, 0.5]),
        ([-4.0, 1.0, -1.0, -0.25], {"clip": 1.0, "top": 0.5}, [2, 0, 1, 0]),
        ([-4.0, 1.0, -1.0, -0.25], {"top": 0.01}, [2, 0, 0, 0]),
        ([4.0, 0.0, 1.0], {"clip": 1.0}, [2, 0, 1]),
        ([0.0, 0.0], {}, [1, 1]),
    ],
)
def test_weights_from_scores(scores, options, expected):
    """Oracle: by hand."""
    found = influence_weights(torch.tensor(scores), **options)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    st.floats(0.1, 2),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_weights_are_never_negative_nor_all_zero(scores, power, clip, top):
    """Oracle: what a weighted mean needs; order of the weights is that of the scores."""
    scores = torch.tensor(scores, dtype=torch.float64)
    scores[scores.abs() < 1e-12] = 0
    found = influence_weights(scores, power=power, clip=clip, top=top)
    assert (found >= 0).all()
    assert found.isfinite().all()
    assert found.sum() > 0
    negative = scores[scores < 0]
    if len(negative):
        assert (found[scores >= 0] == 0).all()
        stronger = negative[:, None] < negative
        assert (found[scores < 0][:, None] >= found[scores < 0])[stronger].all()


@pytest.mark.parametrize("method", [GradientAscent, IMU])
def test_ascent_stops_at_the_loss_of_held_out_examples(method):
    """Oracle: that loss, by hand, and the history."""
    net, (x, y) = network().eval(), data(9).tensors
    held_out = (x, (y + 1) % CLASSES)
    enough = F.cross_entropy(net(x), (y + 1) % CLASSES).item()
    y = net(x).argmax(dim=1)
    report = method(lr=0.1, epochs=200).unlearn(net, (x, y), held_out=held_out)
    assert report.stopped == "held_out"
    assert report.held_out_loss.before == pytest.approx(enough)
    assert report.history[-1] >= enough
    assert all(loss < enough for loss in (report.forget_loss.before, *report.history[:-1]))
    assert report.forget_loss.after == report.history[-1]
    none = method().unlearn(net, held_out, held_out=(x, y))
    assert (none.steps, none.stopped, none.change_norm) == (0, "held_out", 0)


def test_ascent_stops_at_the_largest_change():
    """Oracle: the distance of the parameters."""
    net = network()
    report = GradientAscent(lr=0.1, epochs=100, max_change=0.05).unlearn(net, batches())
    size = sum(p.square().sum() for p in net.parameters()).sqrt()
    assert report.stopped == "max_change"
    assert report.change_norm == pytest.approx(0.05 * size.item(), rel=1e-9)
    assert report.relative_change == pytest.approx(0.05)
    assert GradientAscent(lr=1e-6, epochs=1, max_change=0.05).unlearn(net, batches()).stopped == "epochs"


def test_a_shuffling_loader_is_read_once():
    """Oracle: scores of autograd in the one order that the loader gave."""
    net = network()
    seeded = DataLoader(data(9), batch_size=9, shuffle=True, generator=torch.Generator().manual_seed(3))
    rows = next(iter(DataLoader(range(9), 9, shuffle=True, generator=torch.Generator().manual_seed(3))))
    x, y = data(9)[rows]
    details = IMU(epochs=3).unlearn(net, seeded).details
    torch.testing.assert_close(details["scores"], scores_by_autograd(net, x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`lr` is 0.0: give a positive number"),
        ({"lr": float("nan")}, "`lr`"),
        ({"epochs": 0}, "`epochs` is 0: give a positive integer"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"trainable": "body"}, "`trainable` is 'body': give one of 'all', 'head'"),
        ({"max_change": 0}, "`max_change`"),
        ({"power": 0}, "`power`"),
        ({"clip": 1.1}, "`clip`"),
        ({"top": 0}, "`top`"),
        ({"damping": 0.0}, "`damping`"),
        ({"l1": -0.1}, "`l1`"),
        ({"curvature": "kfac"}, "`curvature`.*'diag_fisher'"),
        ({"recompute": "never"}, "`recompute`"),
        ({"weights": "random"}, "`weights`"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        IMU(**options)


def run_net(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module["net"](batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("net", "head", "loss", "message"),
    [
        (network(), "2", "auto", r"`head` is '2': the module has the linear layers \['0', '4'\]"),
        (network(), "0", "auto", "the loss is not the cross-entropy of the outputs of `0`"),
        (network(), "auto", lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1, reduction="none"), "`4`"),
        (nn.ModuleDict({"net": network(), "other": nn.Linear(8, CLASSES)}), "other", run_net, "called once"),
        (nn.Sequential(nn.Conv1d(1, CLASSES, FEATURES), nn.Flatten()).double(), "auto", "auto", "no nn.Linear"),
        (nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, 3).requires_grad_(False)).double(), "auto", "auto", "free"),
    ],
)
def test_heads_that_are_none_are_refused(net, head, loss, message):
    """Oracle: the sentence."""
    x, y = data(6).tensors
    x = x[:, None] if any(isinstance(m, nn.Conv1d) for m in net.modules()) else x
    with pytest.raises(ConfigurationError, match=message):
        IMU(head=head).unlearn(net, (x, y), loss=loss)


def test_examples_that_contradict_the_others_are_left_out():
    """Oracle: ascent without them, with the other weights in the loss."""
    net, (x, y) = network(), contradicting().tensors
    scores = scores_by_autograd(net, x, y)
    kept = (scores < 0).nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 6, 8]
    w = scores[kept].abs().sqrt()

    def weighted(module: Any, batch: Any) -> Tensor:
        return len(w) * w / w.sum() * F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    options: dict[str, Any] = {"lr": 0.1, "epochs": 1, **PLAIN}
    whole = IMU(clip=1.0, **options).unlearn(net, (x, y)).module
    alone = GradientAscent(trainable="head", **options).unlearn(net, (x[kept], y[kept]), loss=weighted).module
    for p, q in zip(whole.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)
