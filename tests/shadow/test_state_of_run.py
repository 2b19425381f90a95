"""What a training carries from one step to the next besides parameters: coefficients follow it, or it is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, assert_first_order, data, fit, loader, network, sketch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch import Reweight
from lightning_sketch.errors import ConfigurationError, FidelityError
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.record import call_with_tensors


class Centered(Classifier):
    """Subtracts a running mean of the hidden layer, which depends on the parameters of earlier steps."""

    how = "copy_"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(6))

    def next_center(self, hidden: Tensor) -> None:
        new = 0.8 * self.center + 0.2 * hidden.mean(0).detach()
        if self.how == "copy_":
            self.center.copy_(new)
        elif self.how == "in place":
            self.center.mul_(0.8).add_(hidden.mean(0).detach(), alpha=0.2)
        else:
            self.center = new

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.net[1](self.net[0](x))
        loss = F.cross_entropy(self.net[2](hidden - self.center), y)
        self.next_center(hidden)
        return loss


@pytest.mark.parametrize("how", ["copy_", "in place", "reassigned"])
def test_buffers_carry_coefficients(how, tmp_path, monkeypatch):
    """Oracle: central differences of retraining."""
    monkeypatch.setattr(Centered, "how", how)
    assert_first_order(Centered, tmp_path)


class LateBuffer(Centered):
    """A buffer that does not exist before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.center is None:
            self.center = torch.zeros(6, dtype=torch.float64)
        return super().training_step(batch, batch_idx)

    how = "reassigned"


def test_a_buffer_that_was_none_carries_coefficients(tmp_path):
    """Oracle: central differences of retraining; and the run's own buffer stays a plain tensor."""
    assert_first_order(LateBuffer, tmp_path)
    module, _ = fit(LateBuffer, [sketch(tmp_path)])
    assert type(module.center) is Tensor


class Plain(Centered):
    """The same without a buffer."""

    how = "reassigned"

    def __init__(self) -> None:
        Classifier.__init__(self)
        self.net.center = torch.zeros(6, dtype=torch.float64)

    @property
    def center(self) -> Tensor:
        return self.net.center

    @center.setter
    def center(self, value: Tensor) -> None:
        self.net.center = value


class InDict(Plain):
    def __init__(self) -> None:
        Classifier.__init__(self)
        self.held = {"deep": [torch.zeros(6, dtype=torch.float64)]}

    @property
    def center(self) -> Tensor:
        return self.held["deep"][-1]

    @center.setter
    def center(self, value: Tensor) -> None:
        self.held["deep"].append(value)

    def next_center(self, hidden: Tensor) -> None:
        self.center = 0.8 * self.center + 0.2 * hidden.mean(0).detach()


@pytest.mark.parametrize(("kind", "name"), [(Plain, r"net\.center"), (InDict, "held")])
def test_tensor_attributes_that_feed_the_next_step_are_refused(kind, name, tmp_path):
    """Their coefficients would be lost, and every number after the first step silently wrong."""
    with pytest.raises(ConfigurationError, match=f"`{name}`.*earlier step.*register_buffer"):
        fit(kind, [sketch(tmp_path)])


def test_a_tensor_attribute_changed_in_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Plain, "how", "in place")
    with pytest.raises(ConfigurationError, match=r"`net\.center`.*in place.*register_buffer"):
        fit(Plain, [sketch(tmp_path)])


class Keeps(Classifier):
    """Keeps tensors that no later step reads, and reads one that does not depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.named: dict[str, Any] = {}
        self.last = None
        self.constant = torch.full((2,), 0.5, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.constant.sum()
        self.constant = self.constant * 0.9
        self.last = loss
        self.net[0].cache = loss * 2
        self.outputs.append(loss.detach())
        self.named["loss"] = (loss.detach(), [loss.detach()])
        return loss + 0 * self.net[0].cache.detach()

    def on_train_epoch_end(self) -> None:
        self.mean = torch.stack(self.outputs).mean()
        self.outputs.clear()


def test_tensors_that_nobody_reads_again_are_fine(tmp_path):
    """Oracle: central differences of retraining, and plain tensors in the run's own containers."""
    assert_first_order(Keeps, tmp_path)
    module, _ = fit(Keeps, [sketch(tmp_path)])
    assert type(module.last) is type(module.named["loss"][0]) is type(module.net[0].cache) is Tensor


class Target(Classifier):
    """A target network outside the optimizer that follows the trained one inside ``training_step``."""

    frozen = True

    def __init__(self) -> None:
        super().__init__()
        self.target = network().requires_grad_(not self.frozen)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            for t, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
                t.mul_(0.9).add_(p, alpha=0.1)
            wanted = self.target(x)
        return F.mse_loss(self.net(x.sin()), wanted)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_outside_the_optimizer_carry_coefficients(frozen, tmp_path, monkeypatch):
    """Oracle: central differences of retraining."""
    monkeypatch.setattr(Target, "frozen", frozen)
    assert_first_order(Target, tmp_path)


class FollowsInHook(Target):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0].sin()), self.target(batch[0]).detach())

    def on_train_batch_end(self, *args: Any) -> None:
        for t, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(0.9).add_(p.data, alpha=0.1)


class Clamped(Classifier):
    def on_train_batch_end(self, *args: Any) -> None:
        for p in self.parameters():
            p.data.clamp_(-0.2, 0.2)


class Scheduled(Centered):
    def on_train_batch_start(self, *args: Any) -> None:
        self.center += 0.1


class ReturnsNone(Centered):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 0 else loss


@pytest.mark.parametrize(
    ("kind", "name", "step"),
    [
        (FollowsInHook, "target.0.weight", 1),
        (Clamped, "net.0", 1),
        (Scheduled, "center", 1),
        (ReturnsNone, "center", 0),
    ],
)
def test_tensors_changed_outside_a_tracked_step_are_refused(kind, name, step, tmp_path):
    """Their coefficients would be stale."""
    with pytest.raises(FidelityError, match=f"`{name}.*changed before optimizer step {step} .*training_step"):
        fit(kind, [sketch(tmp_path)])


class Changing(Classifier):
    """Unused, frozen, tied and shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.sometimes = nn.Parameter(torch.ones(3))
        self.net[0].bias.requires_grad_(False)
        self.first, self.second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.decoder = nn.Linear(FEATURES, FEATURES)
        self.decoder.weight = self.encoder.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(self.decoder(self.encoder(x).tanh())) + (self.first + self.second)  # one gradient for both
        if batch_idx == 1:
            logits = logits * self.sometimes
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        rest = [p for n, p in self.named_parameters() if not n.startswith("encoder")]
        groups = [{"params": self.encoder.parameters(), "lr": 0.03, "weight_decay": 0.2}, {"params": rest}]
        return torch.optim.AdamW(groups, lr=0.05, eps=1e-2, weight_decay=0.1)


class KeepsZeros(Changing):
    """Gradients of zero instead of none: momentum and weight decay go on."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("kind", [Changing, KeepsZeros])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_unused_frozen_tied_parameters_in_two_groups(kind, accumulate, tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(kind, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)


class PopsKeys(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["pair"][0] = batch["pair"][0] * 2
        x, y = batch.pop("pair")
        return F.cross_entropy(self.net(x), y)


def dictionaries() -> Any:
    def collate(examples: list[Any]) -> Any:
        return {"pair": torch.utils.data.default_collate(examples)}

    return torch.utils.data.DataLoader(data(), batch_size=4, collate_fn=collate)


def test_containers_of_the_batch_may_be_changed(tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(PopsKeys, tmp_path, dictionaries)


class ChangesBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


def test_a_batch_changed_in_place_is_refused(tmp_path):
    with pytest.raises(FidelityError, match="`training_step` changes its batch in place"):
        fit(ChangesBatch, [sketch(tmp_path)])


class Skips(Classifier):
    """No loss for some batches, which are then left out of the accumulated gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in (1, 2, 5) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_steps_without_a_loss(accumulate, tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(Skips, tmp_path, lambda: loader(batch_size=2), accumulate_grad_batches=accumulate)


class StepsRarely(Classifier):
    """Throws away every other gradient."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_gradients_that_are_thrown_away(tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(StepsRarely, tmp_path)


class AdaptiveClip(Classifier):
    """Clips the module's parameters, by a bound that it anneals, and logs."""

    bound = 0.3

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
        self.bound *= 0.9
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.bound)
        self.log("bound", self.bound)


@pytest.mark.parametrize("algorithm", ["norm", "value", "own"])
def test_gradient_clipping(algorithm, tmp_path):
    """Oracle: central differences of retraining, and a bound that was annealed once a step."""
    kind = AdaptiveClip if algorithm == "own" else Classifier
    options = {} if algorithm == "own" else {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    assert_first_order(kind, tmp_path, **options)
    if algorithm == "own":
        module, trainer = fit(kind, [sketch(tmp_path)])
        assert module.bound == pytest.approx(0.3 * 0.9**trainer.global_step, rel=1e-12)


class WithGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.tied = self.inner
        self.register_buffer("mean", torch.zeros(2))


def test_calls_with_other_tensors_put_the_module_back():
    """Oracle: the module's own tensors, also when the function fails; buffers it reassigned are handed out."""
    module = WithGroups()
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    new = {"inner.weight": torch.ones(2, 2), "mean": torch.ones(2)}

    def use() -> Tensor:
        module.mean = module.mean + 1
        return module.tied(module.mean)

    torch.testing.assert_close(call_with_tensors(Places(module), new, use), 4 + own["inner.bias"])
    assert new["mean"].tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="shapes"):
        call_with_tensors(Places(module), {"inner.weight": torch.ones(3, 3)}, lambda: module.inner(torch.ones(2)))
    now = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(now[name] is t for name, t in own.items())


class Checkpointed(Classifier):
    """Runs its first layers again in the backward pass, with the same dropout, and hooks a gradient there."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.norms: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = checkpoint(lambda x: F.dropout(self.net[:3](x), 0.3), x, use_reentrant=False)
        hidden.register_hook(lambda g: self.norms.append(g.norm()))
        return F.cross_entropy(self.net[3](hidden), y)


def test_code_that_runs_in_the_backward_pass(tmp_path):
    """Oracle: central differences of retraining, and a list with one plain tensor for every step."""
    assert_first_order(Checkpointed, tmp_path)
    module, trainer = fit(Checkpointed, [sketch(tmp_path)])
    assert [type(norm) for norm in module.norms] == [Tensor] * trainer.global_step


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def test_compiled_submodules_are_run_as_they_are_written(tmp_path):
    """Oracle: the same module without compilation."""
    module, _ = fit(Compiled, [sketch(tmp_path)], epochs=1)
    plain, _ = fit(Classifier, epochs=1)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_run_on_batches_of_one(tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(Classifier, tmp_path, lambda: loader(batch_size=1), epochs=1)


def test_two_callbacks_that_take_the_place_of_the_step_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="`callbacks` holds more than one"):
        fit(Classifier, [sketch(tmp_path), Reweight(delete=[0])])
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SketchCallback`"):  # Lightning's
        fit(Classifier, [sketch(tmp_path), sketch(tmp_path / "other")])
