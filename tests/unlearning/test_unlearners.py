"""What holds for every method: the examples are forgotten, and nothing else is touched."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers import CLASSES, FEATURES, Classifier, data, fit, loader
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_sketch import ConfigurationError, DeletionPredictor, InstabilityError, Reweight, Sketch, SketchCallback
from lightning_sketch.influence import KernelInfluence
from lightning_sketch.unlearning import (
    IAU,
    IMU,
    CounterfactualDistillation,
    GradientAscent,
    KernelStep,
    SketchStep,
    Unlearner,
    UnlearningReport,
)

UNITS = [i // 2 for i in range(24)]  # units of two examples
DELETED = [1, 4]
FORGET = [2, 3, 8, 9]
RETAIN = [i for i in range(24) if i not in FORGET]
NAMES = ["GradientAscent", "IMU", "IAU", "SketchStep", "CounterfactualDistillation", "KernelStep"]
PLAIN_STATISTICS = [name for name in NAMES if name != "SketchStep"]


class Normalised(Classifier):
    """With BatchNorm, dropout, a frozen parameter, a metric and a list that grows, so that traces show."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))
        )
        self.net[0].bias.requires_grad_(False)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.seen: list[int] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        outputs = self(x)
        loss = F.cross_entropy(outputs, y)
        self.accuracy(outputs, y)
        self.seen.append(batch_idx)
        self.calls.add_(1)
        self.log("loss", loss)
        return loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Normalised, Sketch]:
    dirpath = tmp_path_factory.mktemp("sketch")
    callback = SketchCallback(dirpath, degree=4, design="indicator", deletion_sets=[DELETED], units=UNITS)
    module, _ = fit(Normalised, [callback], loader(24, 8), epochs=4)
    return module, Sketch.load(dirpath)


def rows(indices: list[int]) -> DataLoader:
    return DataLoader(Subset(data(24), indices), batch_size=3)


def make(name: str, trained: tuple[Any, Sketch]) -> Unlearner:
    module, sketch = trained
    if name == "KernelStep":
        influence = KernelInfluence.from_module(module, data(24).tensors, loss="softmax", ridge=1.0)
        return KernelStep(influence, FORGET)
    return {
        "GradientAscent": lambda: GradientAscent(epochs=3),
        "IMU": lambda: IMU(epochs=3),
        "IAU": lambda: IAU(),
        "SketchStep": lambda: SketchStep(sketch, DELETED),
        "CounterfactualDistillation": lambda: CounterfactualDistillation(sketch, DELETED, epochs=20),
    }[name]()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def unlearn(name: str, trained: tuple[Any, Sketch], module: nn.Module, **options: Any) -> UnlearningReport:
    given = {"forget": rows(FORGET), "retain": rows(RETAIN)} | options
    return make(name, trained).unlearn(module, progress=False, **given)


@pytest.mark.parametrize("name", NAMES)
def test_forget_loss_rises_and_the_report_is_whole(name, trained):
    """Oracle: losses of the returned module, by hand."""
    module, _ = trained
    report = unlearn(name, trained, module, held_out=data(8, seed=5).tensors)
    assert report.forget_loss.after > report.forget_loss.before
    assert (report.num_forget, report.num_retain, report.num_held_out) == (4, 20, 8)
    numbers = [*report.forget_loss, *report.retain_loss, *report.held_out_loss, *report.history]
    numbers += [report.change_norm, report.relative_change, report.seconds]
    assert all(math.isfinite(v) for v in numbers)
    assert all(bool(t.isfinite().all()) for t in report.details.values())
    x, y = data(24)[FORGET]
    for trial, expected in zip((module, report.module), report.forget_loss, strict=True):
        found = copy.deepcopy(trial).eval()(x)
        assert F.cross_entropy(found, y).item() == pytest.approx(expected, rel=1e-12)
    distance = sum((p - q).square().sum() for p, q in zip(module.parameters(), report.module.parameters(), strict=True))
    assert report.change_norm == pytest.approx(distance.sqrt().item(), rel=1e-12)
    assert report.change_norm > 0
    assert repr(report).startswith(f"UnlearningReport({name}: forget loss")


@pytest.mark.parametrize("name", NAMES)
def test_the_module_is_left_as_it_was(name, trained):
    """Oracle: a copy from before."""
    module = trained[0]
    module.train()
    module.net[1].eval()
    module.net[2].train()
    before, modes = state(module), {path: m.training for path, m in module.named_modules()}
    seen, attributes, random = list(module.seen), set(vars(module)), torch.get_rng_state()
    module.net[4].weight.grad = gradient = torch.ones_like(module.net[4].weight)
    report = unlearn(name, trained, module)
    assert report.module is not module
    assert same(state(module), before)
    assert not same(state(report.module), before)
    assert torch.equal(torch.get_rng_state(), random)
    for m in (module, report.module):
        assert {path: part.training for path, part in m.named_modules()} == modes
        assert m.seen == seen
        assert set(vars(m)) == attributes
        assert [path for path, p in m.named_parameters() if not p.requires_grad] == ["net.0.bias"]
        assert torch.equal(m.net[0].bias, before["net.0.bias"])
    assert module.net[4].weight.grad is gradient
    module.net[4].weight.grad = None


@pytest.mark.parametrize("name", PLAIN_STATISTICS)
def test_buffers_are_left_as_they_were(name, trained):
    """Oracle: the buffers from before. (SketchStep predicts them.)"""
    module = trained[0].train()
    report = unlearn(name, trained, module)
    expected = dict(module.named_buffers())
    for path, buffer in report.module.named_buffers():
        assert torch.equal(buffer, expected[path])


@pytest.mark.parametrize("name", NAMES)
def test_inplace_is_the_same_on_the_module_itself(name, trained):
    """Oracle: the copy that is changed otherwise."""
    module = copy.deepcopy(trained[0])
    other = unlearn(name, trained, module, seed=3)
    gradient = module.net[4].weight.grad = torch.ones_like(module.net[4].weight)
    report = unlearn(name, trained, module, seed=3, inplace=True)
    assert report.module is module
    assert same(state(module), state(other.module))
    assert module.net[4].weight.grad is gradient
    assert report.forget_loss == other.forget_loss


def test_nothing_is_logged_by_a_module_that_has_its_trainer(trained, tmp_path):
    """Oracle: the file of its logger and what callbacks see, from before."""
    logger = CSVLogger(tmp_path, name="", version="run")
    module, trainer = fit(Normalised, train=loader(24, 8), logger=logger, log_every_n_steps=1)
    logged, seen = (tmp_path / "run" / "metrics.csv").read_text(), dict(trainer.callback_metrics)
    accuracy = copy.deepcopy(module.accuracy)
    report = GradientAscent(epochs=2).unlearn(module, rows(FORGET), inplace=True)
    assert report.forget_loss.after > report.forget_loss.before
    assert trainer.loggers == [logger]
    assert dict(trainer.callback_metrics) == seen
    logger.save()
    assert (tmp_path / "run" / "metrics.csv").read_text() == logged
    assert torch.equal(module.accuracy.compute(), accuracy.compute())


@pytest.mark.parametrize("argument", ["forget", "retain", "held_out"])
@pytest.mark.parametrize("empty", ["loader", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_empty_sets_are_refused(name, argument, empty, trained):
    """Oracle: the sentence."""
    x, y = data(24).tensors
    nothing = DataLoader(TensorDataset(x[:0], y[:0])) if empty == "loader" else (x[:0], y[:0])
    with pytest.raises(ConfigurationError, match=f"`{argument}` is empty"):
        unlearn(name, trained, trained[0], **{argument: nothing})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": None}, "`forget` is None"),
        ({"forget": data(4)}, "`forget` is a TensorDataset: give a batch or a DataLoader"),
        ({"loss": "mse"}, "`loss` must be 'auto' or a callable"),
        ({"loss": lambda module, batch: torch.zeros(())}, r"`loss` must return one loss per example, \(3,\).*\(\)"),
        ({"module": nn.Linear(2, 2).requires_grad_(False)}, "requires a gradient"),
        ({"module": 3}, "`module` is a int"),
    ],
)
def test_what_cannot_be_right_is_refused(change, message, trained):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        GradientAscent().unlearn(**({"module": trained[0], "forget": rows(FORGET)} | change))


def test_a_loss_that_diverges_leaves_the_module_as_it_was(trained):
    """Oracle: the parameters from before."""
    module = copy.deepcopy(trained[0])
    before = state(module)
    with pytest.raises(InstabilityError, match="`forget` is not finite: lower the learning rate"):
        GradientAscent(lr=1e200).unlearn(module, rows(FORGET), inplace=True)
    assert same(state(module), before)
    assert module.training is trained[0].training


class Explicit(Classifier):
    def per_example_loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().sum(dim=1)


class Summed(Classifier):
    """A weighted loss with a regulariser, which is no example's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = torch.arange(1.0, CLASSES + 1, dtype=torch.float64)
        return F.cross_entropy(self.net(x), y, weights) + 7 * self.net[0].weight.square().sum()


def weighted(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = torch.arange(1.0, CLASSES + 1, dtype=torch.float64)
    losses = F.cross_entropy(net(x), y, weights, reduction="none")
    return len(y) * losses / weights[y].sum()


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        (Classifier, "auto", lambda net, x, y: F.cross_entropy(net(x), y, reduction="none")),
        (Explicit, "auto", lambda net, x, y: net(x).square().sum(dim=1)),
        (Summed, "auto", weighted),
        (Classifier, lambda module, batch: module.net(batch[0]).sum(dim=1), lambda net, x, y: net(x).sum(dim=1)),
        (None, "auto", lambda net, x, y: F.cross_entropy(net(x), y, reduction="none")),
    ],
)
def test_a_step_ascends_the_loss_of_the_module(kind, loss, expected):
    """Oracle: the gradient of the loss, written out."""
    torch.manual_seed(0)
    module = Classifier().double() if kind is None else kind().double()
    net = module.net
    x, y = data(6).tensors
    ascent = GradientAscent(lr=0.1, epochs=1, momentum=0, weight_decay=0)
    report = ascent.unlearn(net if kind is None else module, (x, y), loss=loss)
    found = report.module if kind is None else report.module.net
    value = expected(net, x, y).mean()
    assert report.forget_loss.before == pytest.approx(value.item(), rel=1e-12)
    gradients = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    for p, q, g in zip(net.parameters(), found.parameters(), gradients, strict=True):
        torch.testing.assert_close(q, p + 0.1 * g, rtol=1e-12, atol=1e-14)


def test_float32_data_of_a_float64_model(trained):
    """Oracle: the same data in float64."""
    x, y = data(6).tensors
    x = x.float()
    single = GradientAscent().unlearn(trained[0], (x, y))
    assert single.forget_loss == GradientAscent().unlearn(trained[0], (x.double(), y)).forget_loss


@pytest.mark.parametrize("degree", [1, 3])
def test_predicted_tensors_are_the_taylor_sum(degree, trained):
    """Oracle: the coefficients of the sketch, whose one direction is the deletion."""
    module, sketch = trained
    (shard,) = sketch.shards()
    assert sketch.directions.real.nonzero()[1].tolist() == DELETED
    stepped = SketchStep(sketch, DELETED, degree=degree).unlearn(module, rows(FORGET)).module.state_dict()
    for name, block in shard.coefficients.items():
        expected = sketch.primal[name] + block[:degree, 0, 0].sum(dim=0)
        torch.testing.assert_close(stepped[name], expected, rtol=1e-6, atol=1e-9)


def test_predicted_parameters_are_nearer_to_those_of_retraining(trained):
    """Oracle: retraining without the units."""
    module, sketch = trained
    retrained, _ = fit(Normalised, [Reweight(UNITS, DELETED)], loader(24, 8), epochs=4)
    stepped = SketchStep(sketch, DELETED).unlearn(module, rows(FORGET)).module
    truth, first, found = retrained.state_dict(), module.state_dict(), stepped.state_dict()
    for name in ("net.0.weight", "net.4.weight", "net.4.bias", "net.1.running_mean", "net.1.running_var"):
        remaining = (found[name] - truth[name]).norm() / (first[name] - truth[name]).norm()
        assert remaining < 0.2, (name, remaining)
    assert torch.equal(found["net.1.num_batches_tracked"], truth["net.1.num_batches_tracked"])


def test_distillation_reaches_the_outputs_of_retraining(trained):
    """Oracle: retraining without the units, on examples and on inputs without labels."""
    module, sketch = trained
    retrained, _ = fit(Normalised, [Reweight(UNITS, DELETED)], loader(24, 8), epochs=4)
    x = data(24).tensors[0]
    inputs = torch.randn(16, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    method = CounterfactualDistillation(sketch, DELETED, inputs=inputs, lr=3e-3, epochs=200)
    report = method.unlearn(module, rows(FORGET), rows(RETAIN))
    assert report.stopped == "reached"
    predictor = DeletionPredictor(sketch, module, "logits")
    predicted = predictor.prepare(torch.cat([x, inputs])).delete(DELETED).change
    assert report.details["distance"][0].item() == pytest.approx(predicted.square().mean().sqrt().item(), rel=1e-6)
    assert report.details["distance"][-1] <= 0.1 * report.details["distance"][0]
    assert (report.details["distance"][:-1] > 0.1 * report.details["distance"][0]).all()
    for at in (x, inputs):
        outputs = [copy.deepcopy(m).eval()(at).detach() for m in (module, report.module, retrained)]
        assert (outputs[1] - outputs[2]).norm() < 0.2 * (outputs[0] - outputs[2]).norm()


def test_a_module_that_the_sketch_is_not_of_is_refused(trained):
    """Oracle: the sentence."""
    module = copy.deepcopy(trained[0])
    with torch.no_grad():
        module.net[4].bias.add_(1)
    for method in (SketchStep(trained[1], DELETED), CounterfactualDistillation(trained[1], DELETED)):
        with pytest.raises(ConfigurationError, match=r"`module` is not the one.*`net.4.bias` differs"):
            method.unlearn(module, rows(FORGET))
    for kind in (SketchStep, CounterfactualDistillation):
        with pytest.raises(ConfigurationError, match="`delete`"):
            kind(trained[1], [])


def test_the_kernel_step_of_a_linear_model_is_retraining():
    """Oracle: a ridge regression without the examples, in closed form."""
    x = data(24).tensors[0]
    y = x @ torch.arange(1.0, FEATURES + 1, dtype=torch.float64)[:, None] + x[:, :1] ** 2

    def solve(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + 0.5 * torch.eye(FEATURES), x.T @ y).T

    model = nn.Linear(FEATURES, 1, bias=False).double()
    model.weight.data = solve(x, y)
    influence = KernelInfluence.from_module(model, (x, y), loss="squared", ridge=0.5)
    squared = lambda module, batch: (module(batch[0]) - batch[1]).square().sum(dim=1)  # noqa: E731
    report = KernelStep(influence, FORGET, mode="exact").unlearn(model, (x[FORGET], y[FORGET]), loss=squared)
    torch.testing.assert_close(report.module.weight.data, solve(x[RETAIN], y[RETAIN]), rtol=1e-9, atol=0)
    assert report.forget_loss.after > report.forget_loss.before
