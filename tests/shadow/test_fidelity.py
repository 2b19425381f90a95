"""The tracked run is the user's run, or an error says what differs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, assert_first_order, fit, loader, sketch
from torch import Tensor, nn

from lightning_sketch import Sketch, SketchCallback
from lightning_sketch.errors import ConfigurationError, FidelityError, UnsupportedOperatorError


class GradientHook(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda g: g * 1.01)


class ScalesGradient(Classifier):
    """Adam hardly notices a scaled gradient, but its state does."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad *= 0.5

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-5)


class ScalesRate(Classifier):
    """One step moves a parameter by 1e-4 of its norm, and this changes one by 1e-6 of it."""

    lr = 1e-3

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 1.01


OUTSIDE = torch.Generator().manual_seed(0)


class OwnGenerator(Classifier):
    """Draws from a generator that lives outside the module."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.rand(x.shape, generator=OUTSIDE, dtype=x.dtype)
        return F.cross_entropy(self.net(x * noise), y)


class Hidden(torch.optim.SGD):
    """Momentum outside ``optimizer.state``."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.velocity: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                self.velocity[i] = p.grad if i not in self.velocity else 0.9 * self.velocity[i] + p.grad
                p.sub_(self.velocity[i], alpha=group["lr"])
        return loss


class Counts(torch.optim.SGD):
    """Anneals by a counter of its own."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step()
        return loss


class ReadsNumbers(torch.optim.SGD):
    """Normalises by a Python number."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / p.grad.norm().item())
        return loss


def with_optimizer(kind: Any) -> type[Classifier]:
    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.1)

    return Module


class ClipsByNumber(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for p in self.parameters():
            p.grad /= p.grad.norm().item()


class NotANumber(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 1 else loss


class Diverges(Classifier):
    lr = 1e200

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).to(batch[0]))


CALLS: list[int] = []


class Counting(Classifier):
    """A step whose loss depends on how often it ran in the process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        CALLS.append(1)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * len(CALLS))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (GradientHook, FidelityError, r"gradient of `net\.0\.weight` in the re-run.*gradient hook"),
        (ScalesGradient, FidelityError, "gradient of `net.*was changed between the backward pass and optimizer step 0"),
        (ScalesRate, FidelityError, "`net.* after optimizer step 0 is not what the optimizer class gives"),
        (OwnGenerator, FidelityError, "`training_step` again at optimizer step 0 gives loss"),
        (Counting, FidelityError, "`training_step` again at optimizer step 0 gives loss"),
        (with_optimizer(Hidden), ConfigurationError, "`configure_optimizers`: Hidden keeps a tensor.*`velocity`"),
        (with_optimizer(Counts), FidelityError, "optimizer keeps state outside"),
        (with_optimizer(ReadsNumbers), UnsupportedOperatorError, "optimizer.*Python number"),
        (ClipsByNumber, UnsupportedOperatorError, "`configure_gradient_clipping` reads a Python number"),
        (NotANumber, FidelityError, "training loss is nan at optimizer step 1"),
        (Diverges, FidelityError, "training loss is inf at optimizer step 1"),
    ],
)
def test_runs_that_cannot_be_followed_are_refused(kind, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fit(kind, [sketch(tmp_path, on_instability="stop")])


class HookThenNumber(GradientHook, ClipsByNumber):
    """Its second fault only stops the re-run, whose gradient is wrong already."""


class NanThenNumber(NotANumber):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_step == 1:
            ClipsByNumber.configure_gradient_clipping(self, optimizer)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(HookThenNumber, "gradient hook"), (NanThenNumber, "training loss is nan at optimizer step 1")],
)
def test_the_cause_is_reported_and_not_what_follows_from_it(kind, message, tmp_path):
    """Oracle: the first of two errors, though its number is read after the second was raised."""
    with pytest.raises(FidelityError, match=message) as caught:
        fit(kind, [sketch(tmp_path, on_instability="stop")])
    assert isinstance(caught.value.__context__, UnsupportedOperatorError)


class ChangedAtTheEnd(Classifier):
    """Changes a parameter before a last batch whose gradient is thrown away."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            self.net[0].bias.data += 1

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.global_step < 5:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_what_no_later_step_reads_is_read_at_the_end(tmp_path):
    with pytest.raises(FidelityError, match=r"`net\.0\.bias` was changed before optimizer step 5"):
        fit(ChangedAtTheEnd, [sketch(tmp_path)])
    assert not (tmp_path / "sketch" / "sketch.json").exists()


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("kind", [GradientHook, ScalesGradient, ScalesRate])
def test_single_precision_is_as_strict(kind, precision, tmp_path):
    """A tolerance relative to the parameters would let all that pass which one step changes."""

    class Module(kind):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].to(self.dtype), batch[1]], batch_idx)

    with pytest.raises(FidelityError):
        fit(Module, [sketch(tmp_path)], precision=precision)


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-2),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-2, fused=True),
    "foreach RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2, momentum=0.5, foreach=True),
    "learning rate as a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_kernels_of_the_optimizer_do_not_raise_false_alarms(name, precision, tmp_path):
    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].to(self.dtype), batch[1]], batch_idx)

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[name](self.parameters())

    fit(Module, [sketch(tmp_path)], precision=precision, gradient_clip_val=0.1, epochs=4)


class Noisy(torch.optim.SGD):
    """Langevin dynamics: draws in its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.01)
        return loss


def test_an_optimizer_that_draws_random_numbers(tmp_path):
    """Oracle: central differences of retraining, and the run without the callback."""
    kind = with_optimizer(Noisy)
    assert_first_order(kind, tmp_path)
    with_callback, without = (fit(kind, callbacks)[0] for callbacks in ([sketch(tmp_path)], []))
    for p, q in zip(with_callback.parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q)


def each(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


class HasMethod(Classifier):
    """Its training step makes no loss that could be intercepted."""

    def per_example_loss(self, batch: Any) -> Tensor:
        return each(self, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.net(batch[0]).log_softmax(-1)[range(len(batch[1])), batch[1]].mean()


@pytest.mark.parametrize(
    ("kind", "callback"),
    [
        (Classifier, {"normalization": "remaining"}),
        (HasMethod, {}),
        (HasMethod, {"normalization": "remaining"}),
        (Classifier, {"loss": each}),
        (Classifier, {"units": [0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 10, 3]}),
        (Classifier, {"units": [0, 1, 2, 3] * 3}),
    ],
)
def test_losses_units_and_normalizations(kind, callback, tmp_path):
    """Oracle: central differences of retraining."""
    num_units = max(callback.get("units", [11])) + 1
    assert_first_order(kind, tmp_path, lambda: loader(shuffle=True), num_units, callback)


def test_complex_directions_and_several_passes(tmp_path):
    """Oracle: one pass along all directions."""
    parts = []
    for name, size in (("all", "auto"), ("one", 1)):
        fit(Classifier, [sketch(tmp_path / name, 3, 2, design="sphere", directions_per_pass=size)], loader())
        shards = sorted(Sketch.load(tmp_path / name / "sketch").shards(), key=lambda s: s.indices[0])
        parts.append(torch.cat([s.coefficients["net.0.weight"] for s in shards], dim=2))
    torch.testing.assert_close(*parts)


class NormalisedNet(Classifier):
    """The bias before the batch norm has a gradient that is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.to(self.dtype)), y)


def test_clipping_by_norm_is_not_blown_up_by_gradients_that_are_rounding(tmp_path):
    """Oracle: the same run without that bias' rounding, in float64 without the bias, and finite differences there."""

    class WithoutBias(NormalisedNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].bias.requires_grad_(False)

    coefficients = {}
    for name, make, precision in (
        ("single", NormalisedNet, "32-true"),
        ("without bias", WithoutBias, "64-true"),
    ):
        callback = SketchCallback(tmp_path / name, degree=3, design="basis", units=[i % 3 for i in range(12)])
        fit(make, [callback], precision=precision, gradient_clip_val=0.1)
        (shard,) = Sketch.load(tmp_path / name).shards()
        coefficients[name] = shard.coefficients["net.3.weight"].double()
    expected = coefficients["without bias"].flatten(1).norm(dim=1)
    error = (coefficients["single"] - coefficients["without bias"]).flatten(1).norm(dim=1)
    assert (error < 1e-3 * expected).all()


def test_the_default_dtype_of_the_run(tmp_path):
    """The Trainer's double precision is the default dtype inside the step. Oracle: retraining."""

    class Draws(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.zeros(()).dtype == torch.float64
            return (0.5 + torch.rand(())) * super().training_step(batch, batch_idx)

    assert_first_order(Draws, tmp_path)


class Strided(Classifier):
    """Reads a parameter at an offset from the beginning of its memory."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weight = self.net[2].weight
        logits = F.linear(self.net[:2](x), weight.as_strided(weight.shape, weight.stride(), 0), self.net[2].bias)
        return F.cross_entropy(logits, y)


def test_a_parameter_may_be_read_at_an_offset(tmp_path):
    """Oracle: the same training without it."""
    for module in (Classifier, Strided):
        fit(module, [sketch(tmp_path / module.__name__, degree=2)])
    (a,), (b,) = (Sketch.load(tmp_path / m.__name__ / "sketch").shards() for m in (Classifier, Strided))
    assert a.scaled.keys() == b.scaled.keys()
    for name in a.scaled:
        torch.testing.assert_close(a.scaled[name], b.scaled[name], rtol=1e-9, atol=1e-12)
