"""``GradientRestriction`` against finite differences of the restricted loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, data, fit, loader, network, scaled, sketch
from torch import Tensor, nn

from lightning_sketch import ConfigurationError, GradientRestriction, Reweight, StabilityMonitor

ALPHA = 0.3


class Plain(Classifier):
    """A step of SGD whose change of parameters is minus the gradient."""

    logged: list[float]

    def __init__(self) -> None:
        super().__init__(network().double())

    def on_train_start(self) -> None:
        self.logged = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logged.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Faint(Plain):
    """The same step, but of a loss so small that what is added under the root is one in its units."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1e-6 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e6)


KINDS = [(Plain, 1e-12), (Faint, 1.0)]


def losses(module: Any, rows: list[int]) -> Tensor:
    x, y = data()[rows]
    return F.cross_entropy(module.net(x), y, reduction="none")


def mean_of(rows: list[int]) -> Callable[[Any], Tensor]:
    return lambda module: losses(module, rows).mean()


def restricted(loss: Callable[[Any], Tensor], module: Any, norm: str, smallest: float = 1e-12) -> float:
    """``l + alpha ||g||``, by one backward pass."""
    value = loss(module)
    found = torch.autograd.grad(value, list(module.parameters()))
    squares = [g.square().sum() for g in found]
    if norm == "global":
        squares = [torch.stack(squares).sum()]
    return float((value + ALPHA * sum((s + smallest).sqrt() for s in squares)).detach())


def assert_descends(objective: Callable[[Any], float], before: Any, after: Any) -> None:
    """Require the change of every parameter to be minus the central difference of the objective."""
    step = 1e-5
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        for index in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[index] += sign * step
                ends.append(objective(before))
                with torch.no_grad():
                    p.view(-1)[index] -= sign * step
            expected = -(ends[0] - ends[1]) / (2 * step)
            found = float((q.view(-1)[index] - p.view(-1)[index]).detach())
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


def run(*callbacks: Any, kind: Any = Plain, batch_size: int = 4, **options: Any) -> tuple[Any, Any]:
    """The module before and after."""
    before, _ = fit(kind, train=loader(batch_size=batch_size), epochs=1, max_steps=0)
    after, _ = fit(kind, callbacks, loader(batch_size=batch_size), epochs=1, **options)
    return before, after


@pytest.mark.parametrize(("kind", "smallest"), KINDS)
@pytest.mark.parametrize("norm", ["per_tensor", "global"])
@pytest.mark.parametrize("precision", [{}, scaled(2.0**20)], ids=["double", "scaled"])
def test_a_step_descends_the_restricted_loss(norm, precision, kind, smallest):
    """Oracle: central differences of the loss with the norm of its gradient."""
    before, after = run(GradientRestriction(ALPHA, norm), kind=kind, max_steps=1, **precision)
    first = mean_of([0, 1, 2, 3])
    assert_descends(lambda m: restricted(first, m, norm, smallest), before, after)
    assert after.logged[0] == pytest.approx(first(before).item(), rel=1e-12)


@pytest.mark.parametrize(("kind", "smallest"), KINDS)
def test_accumulated_batches_bring_their_own_terms(kind, smallest):
    """Oracle: central differences of the mean over two batches."""
    before, after = run(GradientRestriction(ALPHA), kind=kind, accumulate_grad_batches=2, max_steps=1)
    parts = [list(range(4)), list(range(4, 8))]

    def objective(module: Any) -> float:
        return sum(restricted(mean_of(rows), module, "per_tensor", smallest) for rows in parts) / 2

    assert_descends(objective, before, after)


def test_retraining_without_units_has_the_same_term():
    """Oracle: central differences of the loss of what is left, with the norm of its gradient."""
    before, after = run(GradientRestriction(ALPHA), Reweight(delete=[1, 2]), max_steps=1)

    def left(module: Any) -> Tensor:
        return (losses(module, [0, 1, 2, 3]) * torch.tensor([1.0, 0, 0, 1])).mean()

    assert_descends(lambda m: restricted(left, m, "per_tensor"), before, after)


def test_nothing_is_plain_training():
    """Oracle: a run without the callback, to the last bit, over epochs of Adam with clipping."""

    class Trained(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    options: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    plain, _ = fit(Trained, **options)
    with_none, _ = fit(Trained, [GradientRestriction(0.0)], **options)
    for p, q in zip(plain.parameters(), with_none.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_are_clipped_with_the_term():
    """Oracle: the norm of the step."""
    before, after = run(GradientRestriction(50.0), max_steps=1, gradient_clip_val=0.25)
    change = sum((p - q).square().sum() for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert change.sqrt().item() == pytest.approx(0.25, rel=1e-5)


def test_gradients_become_smaller():
    """Oracle: the norm of the gradient after training without the term."""

    def size(module: Any) -> float:
        found = torch.autograd.grad(losses(module, list(range(12))).mean(), list(module.parameters()))
        return float(sum(g.square().sum() for g in found))

    without, _ = fit(Classifier, epochs=8)
    with_it, _ = fit(Classifier, [GradientRestriction(0.05)], epochs=8)
    assert size(with_it) < size(without)


class Attending(Classifier):
    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(FEATURES, 1, 8, dropout=0.0, batch_first=True)
        super().__init__(nn.Sequential(nn.Unflatten(1, (1, -1)), layer, nn.Flatten(), nn.Linear(FEATURES, CLASSES)))


def test_attention_has_second_derivatives():
    """Oracle: the choice of kernels from before; fused attention alone would raise."""
    before = torch.backends.mha.get_fastpath_enabled()
    module, trainer = fit(Attending, [GradientRestriction()])
    assert trainer.global_step == 6
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is before
    assert torch.backends.cuda.flash_sdp_enabled()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class WithoutSecond(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(Once.apply(self.net(x)), y)


class Manual(Classifier):
    automatic_optimization = False


class Searching(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("kind", "others", "message"),
    [
        (Manual, [], "GradientRestriction does not support: manual optimization"),
        (Searching, [], "LBFGS"),
        (WithoutSecond, [], "GradientRestriction needs second derivatives"),
        (Classifier, [StabilityMonitor()], "`callbacks` holds GradientRestriction and StabilityMonitor"),
    ],
)
def test_what_cannot_be_right_is_refused(kind, others, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        fit(kind, [GradientRestriction(), *others])


def test_a_sketch_of_a_restricted_run_is_refused(tmp_path):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match="GradientRestriction and SketchCallback"):
        fit(Classifier, [sketch(tmp_path), GradientRestriction()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0,), "`alpha` must be"), ((float("nan"),), "`alpha`"), (("1",), "`alpha`"), ((0.1, "l1"), "`norm` must be")],
)
def test_arguments_are_checked_at_once(arguments, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        GradientRestriction(*arguments)
