"""The checks of the first batch: which losses can be weighted by example, and which cannot."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, data, fit, loader, sketch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import ModuleState
from lightning_sketch.shadow.random_state import RandomState
from lightning_sketch.shadow.record import StepRecord
from lightning_sketch.shadow.verification import verify_weighting
from lightning_sketch.shadow.weighting import LossWeighting, training_loss


def verify(module: Classifier, batch: Any = None, loss: Any = "auto", examples: int = 4) -> float:
    """Verify one step of a module on its own, in float64."""
    torch.manual_seed(0)
    module = module.double()
    batch = data(examples).tensors if batch is None else batch
    random_state, state = RandomState.capture(torch.device("cpu")), ModuleState(Places(module))
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    value = training_loss(module.training_step(batch, 0)).detach()
    record = StepRecord((batch, 0), torch.arange(examples), random_state, state, buffers, 1, value.double())
    params = dict(module.named_parameters())
    return verify_weighting(module, module.training_step, LossWeighting(loss, "batch"), record, params)


def stepping(step: Any, net: nn.Module | None = None) -> Classifier:
    """A classifier with this training step."""

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return step(self, *batch)

    torch.manual_seed(0)
    return Module(net)


def test_the_plain_loss_belongs_to_its_examples():
    assert verify(Classifier()) < 1e-12


def test_the_fraction_of_a_regulariser_is_reported():
    """Oracle: the two parts of the loss."""
    module = stepping(lambda m, x, y: F.cross_entropy(m.net(x), y) + 0.1 * m.net[0].weight.square().sum())
    x, y = data(4).tensors
    decay = 0.1 * module.double().net[0].weight.square().sum()
    expected = decay / (F.cross_entropy(module.net(x), y) + decay)
    assert verify(module) == pytest.approx(float(expected), rel=1e-9)


def noisy(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.net(F.dropout(x) * (1 + torch.rand(()))), y)


def tokens(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.net(torch.stack([x, 2 * x], 1))  # (B, T, C)
    return F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(2))


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def hooked(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.net(x)
    logits.register_hook(lambda g: g * 1)  # only of what requires grad
    return F.cross_entropy(logits, y)


FINE = {
    "gradient hook": stepping(hooked),
    "dropout and random scale": stepping(noisy),
    "flattened tokens": stepping(tokens),
    "batch norm": stepping(lambda m, x, y: F.cross_entropy(m.net(x), y), with_norm()),
    "unreduced": stepping(lambda m, x, y: F.cross_entropy(m.net(x), y, reduction="none").mean()),
    "logged only": stepping(lambda m, x, y: F.cross_entropy(m.net(x), y) + 0 * F.mse_loss(x, x * 0).detach()),
}


@pytest.mark.parametrize("name", FINE)
def test_losses_that_can_be_weighted(name):
    assert verify(FINE[name]) < 1e-9


def focal(m: Any, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m.net(x), y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def hardest(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.net(x), y, reduction="none").topk(2).values.mean()


def contrastive(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(m.net(x), dim=-1)
    return F.cross_entropy(z @ z.mT / 0.1, torch.arange(len(x)))


def time_first(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.net(torch.stack([x, 2 * x]))  # (T, B, C)
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(2))


def partly(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.net(x)
    return F.cross_entropy(logits, y) + 0.5 * (logits - 1).square().mean()


def misread(m: Any, x: Tensor, y: Tensor) -> Tensor:
    weight = m.net[2].weight.repeat(4, 1)  # its 12 rows look like three for each of four examples
    return F.cross_entropy(m.net(x), y) + F.mse_loss(weight, torch.zeros_like(weight))


REFUSED = {
    "focal loss": (focal, "not a weighted sum"),
    "hardest examples": (hardest, "not a weighted sum"),
    "in-batch InfoNCE": (contrastive, "changing example 0"),
    "time-first": (time_first, "changing example 0"),
    "a part is not intercepted": (partly, "only a part of the training loss"),
    "a regulariser taken for examples": (misread, r"\(12, 6\) entries.*do not depend on the batch"),
    "no example": (lambda m, x, y: F.mse_loss(x, x).detach() + m.net[0].weight.sum(), "no part of the training loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_cannot_be_weighted_are_refused(name):
    step, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=rf"`loss.*{message}.*`loss=callable"):
        verify(stepping(step))


@pytest.mark.parametrize(("times", "examples"), [(4, 4), (8, 4), (2, 4)])
def test_losses_flattened_time_first_are_refused(times, examples):
    """(B, T) inputs whose loss is flattened from (T, B), with T = B, a multiple or a fraction."""
    x = torch.randn(examples, times, FEATURES, dtype=torch.float64)
    y = torch.randint(0, 3, (examples, times))
    module = stepping(lambda m, x, y: F.cross_entropy(m.net(x.transpose(0, 1)).flatten(0, 1), y.T.flatten()))
    with pytest.raises(ConfigurationError, match=r"`loss`: changing example 0"):
        verify(module, (x, y), examples=examples)


@pytest.mark.parametrize(("times", "examples"), [(8, 4), (2, 4)])
def test_time_first_batches_are_refused(times, examples):
    """(T, B) inputs, with T a multiple or a fraction of B: the examples are not along the first dimension."""
    x = torch.randn(times, examples, FEATURES, dtype=torch.float64)
    y = torch.randint(0, 3, (times, examples))
    module = stepping(lambda m, x, y, *_: F.cross_entropy(m.net(x).flatten(0, 1), y.flatten()))
    with pytest.raises(ConfigurationError, match=r"`loss"):
        verify(module, (x, y, torch.arange(examples)))


def test_callables_are_checked_too():
    """A callable that is not the training loss, and one that compares examples; and one that is right."""

    def each(m: Any, batch: Any) -> Tensor:
        return F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")

    assert verify(Classifier(), loss=each) < 1e-12
    assert verify(stepping(focal), loss=lambda m, b: (1 - (-each(m, b)).exp()) ** 2 * each(m, b)) < 1e-12
    with pytest.raises(ConfigurationError, match=r"changing example 0"):
        verify(Classifier(), loss=lambda m, b: each(m, b) + m.net(b[0])[:, 0] - m.net(b[0])[:, 0].mean())


def test_a_batch_without_examples_needs_a_callable():
    """A batch that is an object of its own: nothing in it can be changed for the check."""

    class Graph:
        x, y = data(4).tensors

    module = stepping(lambda m, x, y: F.cross_entropy(m.net(x), y))
    module.training_step = lambda batch, i: F.cross_entropy(module.net(batch.x), batch.y)
    with pytest.raises(ConfigurationError, match=r"`loss='auto'` cannot find the examples.*Graph"):
        verify(module, Graph())
    loss = lambda m, b: F.cross_entropy(m.net(b.x), b.y, reduction="none")  # noqa: E731
    assert verify(module, Graph(), loss) < 1e-12


def test_a_step_that_fails_on_changed_values_is_warned_of():
    def picky(m: Any, x: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(x, data(4).tensors[0]), "unknown example"
        return F.cross_entropy(m.net(x), y)

    with pytest.warns(UserWarning, match=r"`loss`.*could not be checked.*unknown example"):
        verify(stepping(picky))


@pytest.mark.parametrize("batch_size", [1, 12])
def test_batches_of_one_and_of_all(batch_size, tmp_path):
    fit(Classifier, [sketch(tmp_path)], loader(batch_size=batch_size), epochs=1)


def test_the_fraction_is_announced(tmp_path, caplog):
    """Oracle: the sentence."""

    class Regularised(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()

    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Regularised, [sketch(tmp_path)], epochs=1)
    assert "of the first batch's loss belongs to no example" in caplog.text


def padded(weight: Tensor | None = None) -> Classifier:
    """A language-model loss: the mean over all tokens but padding."""

    def step(m: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = m.net(F.one_hot(x, FEATURES).to(m.net[0].weight.dtype))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), weight=weight, ignore_index=-100)

    return stepping(step)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)])
def test_a_mean_over_unpadded_tokens_belongs_to_examples(weight):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, FEATURES, (4, 6), generator=generator)
    labels = torch.randint(0, 3, (4, 6), generator=generator)
    for row, length in enumerate((3, 6, 4, 5)):
        labels[row, length:] = -100
    assert verify(padded(weight), (tokens, labels)) < 1e-12


def test_class_weights_belong_to_examples():
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert verify(stepping(lambda m, x, y: F.cross_entropy(m.net(x), y, weight=weight))) < 1e-12


@pytest.mark.parametrize("tokens", [(1, 2, 1), (2, 2, 2)])
def test_one_example_that_reads_the_same_backwards(tokens):
    x = torch.tensor([tokens])
    assert verify(padded(), (x, x % 3), examples=1) < 1e-12
