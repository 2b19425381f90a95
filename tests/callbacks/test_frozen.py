"""What is not trained costs no coefficients, and is followed where a step changes it all the same."""

import json
from collections import UserDict

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, FEATURES, Classifier, assert_first_order, data, fit, loader, sketch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import Sketch
from lightning_sketch.shadow.planning import state_bytes, trained_bytes

K, R, WIDE = 3, 2, 400


class Adapted(Classifier):
    """A frozen layer behind a trained one, so that coefficients pass through it forth and back, and a trained head."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, WIDE), nn.Tanh()))
        self.head = nn.Linear(WIDE, CLASSES)
        self.net[2].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.net(x)), y)


class OptimizesTrained(Adapted):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Looks(pl.Callback):
    """Sums the bytes of all coefficients that another callback holds at the end."""

    def __init__(self, callback):
        self.callback, self.found = callback, 0

    def on_train_end(self, trainer, pl_module):
        for block in self.callback.state_dict()["blocks"]:
            kinds = (block["params"], block["buffers"], *block["optimizer"].values())
            self.found += sum(t.numel() * t.element_size() for kind in kinds for t in kind.values() if t is not None)


@pytest.mark.parametrize("make", [Adapted, OptimizesTrained])
def test_what_is_frozen_has_no_coefficients(make, tmp_path):
    """Oracle: bytes of the trained parameters and their momentum, counted by hand; the parameters before training."""
    callback = sketch(tmp_path, K, R, design="basis", units=[i % K for i in range(12)])
    looks = Looks(callback)
    module, _ = fit(make, [looks, callback])
    trained = (FEATURES * 4 + 4 + WIDE * CLASSES + CLASSES) * 8
    assert trained_bytes(module.parameters()) == trained
    assert looks.found == state_bytes(trained, 1, K, R) == 2 * trained * K * R
    metadata = json.loads((tmp_path / "sketch" / "sketch.json").read_text())
    assert metadata["coefficients"]["names"] == ["head.bias", "head.weight", "net.0.bias", "net.0.weight"]
    pl.seed_everything(1, verbose=False)
    for before, after in zip(make().net[2].parameters(), module.net[2].parameters(), strict=True):
        assert torch.equal(before.double(), after)


def test_the_plan_counts_what_is_frozen(tmp_path):
    """Oracle: the bytes of the frozen layer, of which one copy is kept to compare with."""
    planned = {}
    for frozen in (False, True):
        callback = sketch(tmp_path / str(frozen), 1, design="common")

        def make(frozen=frozen):
            module = OptimizesTrained()
            module.unused = nn.Linear(100, 100).requires_grad_(False) if frozen else nn.Identity()
            return module

        fit(make, [callback])
        planned[frozen] = callback.planned_bytes
    assert planned[True] - planned[False] >= (100 * 100 + 100) * 8


class Teacher(Classifier):
    """Draws its net to a slow average of itself, which is a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.student = nn.Linear(FEATURES, CLASSES)

    def follow(self):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.7).add_(fast, alpha=0.3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.follow()
        return F.cross_entropy(self.student(x) + self.teacher(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net.parameters(), *self.student.parameters()], lr=0.1)


class TeacherThroughData(Teacher):
    def follow(self):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data.mul_(0.7).add_(fast.data, alpha=0.3)


class SometimesFollows(Teacher):
    """Leaves the teacher alone in every other step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx % 2:
            self.follow()
        return F.cross_entropy(self.student(x) + self.teacher(x), y)


@pytest.mark.parametrize("make", [Teacher, TeacherThroughData, SometimesFollows])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_may_change_what_is_not_trained(make, accumulate, tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(make, tmp_path, accumulate_grad_batches=accumulate)


class Unfreezes(Adapted):
    """Trains the frozen layer, too, from the second epoch on; the optimizer has held it from the beginning."""

    def on_train_epoch_start(self):
        self.net[2].requires_grad_(self.current_epoch > 0)


class Freezes(Adapted):
    """Trains the layer in the first epoch alone."""

    def on_train_epoch_start(self):
        self.net[2].requires_grad_(self.current_epoch == 0)


class FreezesBeforeTheStep(Adapted):
    """Trains the layer for the last time in the step before which it is frozen."""

    def __init__(self):
        super().__init__()
        self.net[2].requires_grad_(True)

    def on_after_backward(self):
        if self.global_step == 3:
            self.net[2].requires_grad_(False)


@pytest.mark.parametrize("make", [Unfreezes, Freezes, FreezesBeforeTheStep])
def test_what_is_trained_may_change(make, tmp_path):
    """Oracle: central differences of retraining."""
    assert_first_order(make, tmp_path)


class Encoding(UserDict):
    """A batch as the tokenizers of `transformers` make it: a mapping, but no dictionary."""


class OfEncodings(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["x"]), batch["labels"])


def test_batches_may_be_mappings_of_other_classes(tmp_path):
    """Oracle: the sketch of the same run on tuples."""

    def collate(rows):
        x, y = zip(*rows, strict=True)
        return Encoding(x=torch.stack(x), labels=torch.stack(y))

    fit(OfEncodings, [sketch(tmp_path / "mapping")], DataLoader(data(), batch_size=4, collate_fn=collate))
    fit(Classifier, [sketch(tmp_path / "tuple")], loader())
    (ours,), (theirs,) = (list(Sketch.load(tmp_path / kind / "sketch").shards()) for kind in ("mapping", "tuple"))
    for name, block in theirs.coefficients.items():
        assert torch.equal(ours.coefficients[name], block)
