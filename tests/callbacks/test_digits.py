"""The digits study: a sketch of one run against really retraining, by an independent vectorised implementation."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from oracles import digits
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Sketch, SketchCallback
from lightning_sketch.optim import StableAdamW

SOURCES, EPOCHS, BATCH, DEGREE = 50, 6, 48, 3


class Digits(pl.LightningModule):
    """64-64-10 with GELU, StableAdamW falling linearly to zero."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
        self.steps = steps
        self.rows: list[list[int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets, _ = batch
        return F.cross_entropy(self.net(inputs), targets)

    def on_train_batch_end(self, outputs: object, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.rows.append(batch[2].tolist())

    def configure_optimizers(self) -> object:
        optimizer = StableAdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Study:
    """One sketched run, and retraining of any deletion sets.

    Args:
        dirpath: where the sketch goes.
        seed: of the split, the units and the run.
        within_classes: five units in each class, ``5 c .. 5 c + 4``, instead of 50 random ones.
    """

    def __init__(self, dirpath: object, seed: int = 0, within_classes: bool = False) -> None:
        data = load_digits()
        order = np.random.default_rng(seed).permutation(len(data.target))
        inputs, targets = torch.as_tensor(data.data[order] / 16), torch.as_tensor(data.target[order])
        train, self.test = slice(0, 1437), (inputs[1437:], targets[1437:])
        self.train_data = inputs[train], targets[train]
        generator = np.random.default_rng(seed + 1)
        if within_classes:
            self.units = targets[train].numpy() * 5 + generator.integers(0, 5, 1437)
        else:
            self.units = generator.integers(0, SOURCES, 1437)
        pl.seed_everything(seed, verbose=False)
        model = Digits(EPOCHS * (1437 // BATCH)).double()
        self.initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        dataset = TensorDataset(*self.train_data, torch.arange(1437))
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            precision="64-true",
            callbacks=[SketchCallback(dirpath, degree=DEGREE, design="basis+common", units=self.units)],
            **QUIET,
        )
        trainer.fit(model, DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True))
        self.batches = [torch.as_tensor(rows) for rows in model.rows]
        self.effect = DeletionPredictor(Sketch.load(dirpath), model).prepare((*self.test, torch.arange(360)))

    def true_change(self, sets: list[list[int]]) -> np.ndarray:
        """Change of the 360 test losses on retraining without each set, ``(len(sets), 360)``."""
        x = np.zeros((len(sets) + 1, SOURCES))
        for row, units in enumerate(sets):
            x[row, units] = 1
        _, losses = digits.retrain(
            self.initial, *self.train_data, self.batches, torch.as_tensor(self.units), torch.as_tensor(x), *self.test
        )
        return (losses[:-1] - losses[-1]).numpy()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("digits"))


def random_sets(size: int, count: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [sorted(generator.choice(SOURCES, size, replace=False).tolist()) for _ in range(count)]


@pytest.mark.parametrize(
    ("size", "allowed_error", "least_lds"), [(1, 0.003, 0.999), (2, 0.03, 0.99), (5, 0.04, 0.99), (12, 0.08, 0.97)]
)
def test_predicted_changes_equal_retraining(study, size, allowed_error, least_lds):
    """Oracle: vectorised retraining; relative L2 error and rank correlation over deletions (LDS)."""
    sets = [[u] for u in range(SOURCES)] if size == 1 else random_sets(size, 50, size)
    p = study.effect.delete_many(sets)
    predicted, resummed = p.change.numpy(), (p.resummed - p.baseline).numpy()
    true = study.true_change(sets)
    error = np.linalg.norm(predicted - true) / np.linalg.norm(true)
    lds = np.mean([spearmanr(p, t).statistic for p, t in zip(predicted.T, true.T, strict=True)])
    print(f"{size} of {SOURCES} sources deleted: relative error {100 * error:.2f} %, LDS {lds:.4f}")
    assert error <= allowed_error
    assert lds >= least_lds
    assert p.reliable.all()
    assert np.linalg.norm(resummed - true) <= (0.9 if size == 12 else 1.05) * np.linalg.norm(predicted - true)


def test_intervals_cover_as_often_as_they_say(study):
    """Oracle: vectorised retraining of 200 random deletions of 1 to 12 units."""
    generator = np.random.default_rng(11)
    sets = [generator.choice(SOURCES, generator.integers(1, 13), replace=False).tolist() for _ in range(200)]
    p = study.effect.delete_many(sets)
    error = np.abs(p.change.numpy() - study.true_change(sets))
    low, high = p.interval(0.9)
    covered = error <= (high - low).numpy() / 2
    print(f"90 % intervals cover {100 * covered.mean():.2f} %")
    assert 0.85 <= covered.mean() <= 0.97


def test_a_whole_class_is_flagged_and_single_units_of_it_are_not(tmp_path):
    """Oracle: vectorised retraining; of a whole class the series misses most, of any unit next to nothing."""
    study = Study(tmp_path, seed=2, within_classes=True)
    classes = [list(range(5 * c, 5 * c + 5)) for c in range(10)]
    for sets, least, most in ((classes, 0.5, 2), ([[u] for u in range(SOURCES)], 0, 0.03)):
        p = study.effect.delete_many(sets)
        true = study.true_change(sets)
        error = np.linalg.norm(p.change.numpy() - true) / np.linalg.norm(true)
        print(f"{len(sets[0])} units of a class: relative error {100 * error:.1f} %, reliable {p.reliable.sum()}")
        assert least <= error <= most
        assert p.reliable.all() == (sets is not classes)
        assert p.reliable.any() == (sets is not classes)
    assert "10 of 10 unreliable, better retrain" in repr(study.effect.delete_many(classes))
