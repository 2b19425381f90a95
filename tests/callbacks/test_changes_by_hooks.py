"""Parameters that enter and leave the optimizer, and what hooks leave behind: right, or refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, assert_first_order, fit, loader, network, sketch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from lightning_sketch.errors import ConfigurationError, FidelityError


class Finetune(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05, initial_denom_lr=1.0)


class Head(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Leaves(Classifier):
    """A group leaves the optimizer for an epoch and comes back to its state."""

    def on_train_epoch_start(self) -> None:
        groups = self.trainer.optimizers[0].param_groups
        if self.current_epoch == 1:
            self.kept = groups.pop(0)
        elif self.current_epoch == 2:
            groups.append(self.kept)

    def configure_optimizers(self) -> Any:
        groups = [{"params": layer.parameters()} for layer in (self.net[0], self.net[2])]
        return torch.optim.AdamW(groups, lr=0.02, eps=1e-2)


class Joins(Classifier):
    """A network that followed the trained one is trained itself."""

    def __init__(self) -> None:
        super().__init__()
        self.target = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.current_epoch == 0:
            with torch.no_grad():
                for t, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    t.mul_(0.5).add_(p, alpha=0.5)
        return F.cross_entropy(self.net(x) + self.target(x), y)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": list(self.target.parameters())})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [Head, Leaves, Joins])
def test_parameters_that_enter_and_leave_the_optimizer(kind, tmp_path, monkeypatch):
    """Oracle: central differences of retraining."""

    def run(make: Any, callbacks: Any, *args: Any, **options: Any) -> Any:
        return fit(make, [*([Finetune()] if kind is Head else []), *callbacks], *args, **options)

    monkeypatch.setattr("helpers.fit", run)
    assert_first_order(kind, tmp_path, epochs=3)


class ScalesMomentum(Classifier):
    def on_train_epoch_start(self) -> None:
        for state in self.trainer.optimizers[0].state.values():
            state["momentum_buffer"].mul_(0.5)


class KeepsLoss(Classifier):
    last: Any = 1.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = outputs["loss"].detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.last


class Proximal(Classifier):
    def on_train_epoch_start(self) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        distance = sum((p - q).square().sum() for p, q in zip(self.parameters(), self.before, strict=True))
        return super().training_step(batch, batch_idx) + distance


class LateTeacher(Classifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.current_epoch == 0 else loss + F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (ScalesMomentum, FidelityError, r"`state\[net.*momentum_buffer.* was changed before optimizer step 3"),
        (KeepsLoss, ConfigurationError, "`last`: `training_step` reads a tensor.*a hook left there"),
        (Proximal, ConfigurationError, "`before`: `training_step` reads a tensor.*a hook left there"),
        (LateTeacher, FidelityError, r"`teacher\.0\.weight` was registered before optimizer step 3"),
    ],
)
def test_what_hooks_leave_behind_is_refused(kind, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fit(kind, [sketch(tmp_path)])


class Reorders(Classifier):
    """Leaves example 0 where it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        order = [0, *range(len(y) - 1, 0, -1)]
        return F.cross_entropy(self.net(x[order]), y[order])


@pytest.mark.parametrize("batch_size", [4, 12])
def test_a_step_that_permutes_its_batch_is_refused(batch_size, tmp_path):
    """``Reweight`` permutes weights alike, so that differences of retraining would not tell."""
    with pytest.raises(ConfigurationError, match="weights do not act on single examples"):
        fit(Reorders, [sketch(tmp_path)], loader(batch_size=batch_size))
