"""Projected gradients of units, and directions along their leading eigenvectors."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, assert_first_order, data, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sketch import (
    ConfigurationError,
    DeletionPredictor,
    GradientFeatures,
    Sketch,
    SketchCallback,
    SketchError,
)
from lightning_sketch.callbacks import gradient_features
from lightning_sketch.features import FILE_NAME, UnitFeatures
from lightning_sketch.prediction.estimators import KernelEstimator
from lightning_sketch.shadow.unit_gradients import CountSketch

UNITS = [i % 5 - 1 for i in range(12)]  # units 0..3, and rows that belong to none
UNIT_OF_ROW = np.array(UNITS)


class Noisy(Classifier):
    """With running statistics and dropout, which gradients of units do without."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        )
        self.double()


class Normalised(Classifier):
    """With running statistics; without random numbers, which Lightning does not resume."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.double()


def gradients(module: pl.LightningModule) -> dict[str, np.ndarray]:
    """Of the sum of every unit's losses, in evaluation mode, one example at a time: ``(4, *S)`` by name."""
    module.eval()
    x, y = data().tensors
    found = {name: np.zeros((4, *p.shape)) for name, p in module.named_parameters()}
    for i, unit in enumerate(UNITS):
        if unit >= 0:
            loss = F.cross_entropy(module.net(x[i : i + 1]), y[i : i + 1])
            for (name, _), g in zip(
                module.named_parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
            ):
                found[name][unit] += g.numpy()
    return found


def mean_losses(module: pl.LightningModule) -> list[float]:
    """Of every unit, in evaluation mode, one example at a time."""
    module.eval()
    x, y = data().tensors
    losses = [F.cross_entropy(module.net(x[i : i + 1]), y[i : i + 1]).item() for i in range(len(x))]
    return [float(np.mean(np.array(losses)[unit == UNIT_OF_ROW])) for unit in range(4)]


def projected(vectors: dict[str, np.ndarray], projection: CountSketch) -> np.ndarray:
    total = torch.zeros(4, projection.size, dtype=torch.float64)
    for name, v in vectors.items():
        projection.add(total, name, torch.from_numpy(v))
    return total.numpy()


@pytest.mark.parametrize("at", [[0], [0.5, 1.0]])
def test_features_are_projected_gradients(at: list[float], tmp_path: Path) -> None:
    """Oracle: autograd on one example at a time, before and after the training."""
    pl.seed_everything(1, verbose=False)
    start = Noisy()
    after, _ = fit(Noisy, [GradientFeatures(tmp_path, at, 64, units=UNITS)], loader(batch_size=5))
    found = UnitFeatures.load(tmp_path, UNIT_OF_ROW)
    half, _ = fit(Noisy, [], loader(batch_size=5), epochs=1)
    modules = [start] if at == [0] else [half, after]
    expected = [projected(gradients(m), CountSketch(64, 0)) for m in modules]
    np.testing.assert_allclose(found.array, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.losses, [mean_losses(m) for m in modules], rtol=1e-6)
    assert found.seed == 0


def test_a_projection_keeps_inner_products() -> None:
    """Oracle: the products of the vectors themselves, within four standard errors of the stated variance."""
    stream = np.random.default_rng(0)
    vectors = {"a": stream.normal(size=(4, 7, 3)), "b": stream.normal(size=(4, 11))}
    flat = np.concatenate([v.reshape(4, -1) for v in vectors.values()], 1)
    exact, size, draws = flat @ flat.T, 16, 400
    grams = [(p := projected(vectors, CountSketch(size, seed))) @ p.T for seed in range(draws)]
    squares = np.outer(np.diag(exact), np.diag(exact))
    bound = np.sqrt((squares + exact**2) / size)
    assert (np.abs(np.mean(grams, axis=0) - exact) < 4 * bound / np.sqrt(draws)).all()
    assert (np.std(grams, axis=0) < 1.2 * bound).all()
    assert (np.std(grams, axis=0) > 0.3 * bound).any()


@pytest.mark.parametrize("design", ["", "gradient"])
def test_the_run_is_left_alone(design: str, tmp_path: Path) -> None:
    """Oracle: the run without callbacks, to the last bit, and its random numbers."""
    runs = []
    for callbacks in ([], [GradientFeatures(tmp_path / "f", units=UNITS)]):
        if callbacks and design:
            callbacks.append(SketchCallback(tmp_path / "s", 3, 1, design=design, units=UNITS))
        module, trainer = fit(Noisy, callbacks, loader(batch_size=5, shuffle=True))
        runs.append((module.state_dict(), trainer.optimizers[0].state_dict()["state"], torch.rand(3)))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_points_are_fractions_of_the_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(trainer: Any, *args: Any) -> tuple[Tensor, Tensor]:
        taken.append(trainer.global_step)
        return torch.zeros(4), torch.zeros(4, 8)

    monkeypatch.setattr(gradient_features, "project_gradients", count)
    fit(Classifier, [GradientFeatures(tmp_path, (0, 0.25, 0.5, 1), 8, units=UNITS)], epochs=4)
    assert taken == [0, 3, 6, 12]


def test_directions_are_leading_eigenvectors(tmp_path: Path) -> None:
    """Oracle: numpy's eigenvectors of the kernel with its ridge, from Gram matrices alone."""
    fit(Noisy, [GradientFeatures(tmp_path / "pilot", units=UNITS)])
    features = UnitFeatures.load(tmp_path / "pilot", UNIT_OF_ROW).array
    callback = SketchCallback(tmp_path / "s", 2, 1, design="gradient", units=UNITS, features=tmp_path / "pilot")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "SketchCallback")  # such as that of too few random directions
        fit(Noisy, [callback])
    sketch = Sketch.load(tmp_path / "s")
    sketch.verify()
    directions = sketch.directions
    assert directions.shape == (2, 4)
    assert not directions.imag.any()
    grams = [g @ g.T for g in features.astype(np.float64)]
    kernel = sum(g @ np.linalg.inv(g + 3 * np.trace(g) / 4 * np.eye(4)) for g in grams)
    eigenvectors = np.linalg.eigh(kernel)[1][:, ::-1]
    overlap = np.abs(directions[:2].real @ eigenvectors[:, :2])
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-6)


def test_gradient_directions_are_joined_with_the_common_mode(tmp_path: Path) -> None:
    """Oracle: the definition of the design ``common``."""
    fit(Noisy, [SketchCallback(tmp_path, 2, 1, design="gradient+common", units=UNITS)])
    directions = Sketch.load(tmp_path).directions
    np.testing.assert_allclose(directions[2], np.full(4, 0.5))
    np.testing.assert_allclose(directions[3:], directions[:2] + 0.5)
    np.testing.assert_allclose(directions[:2] @ directions[:2].T, np.eye(2), atol=1e-12)


def test_a_resumed_run_keeps_the_directions_of_its_start(tmp_path: Path) -> None:
    """Oracle: the run that was never interrupted."""

    def callback(name: str, count: int = 3) -> SketchCallback:
        return SketchCallback(tmp_path / name, count, 2, design="gradient", units=UNITS)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(Normalised, [callback("whole"), saving], enable_checkpointing=True)
    fit(Normalised, [callback("resumed")], checkpoint=tmp_path / "epoch=0.ckpt", seed=5)
    whole, resumed = Sketch.load(tmp_path / "whole"), Sketch.load(tmp_path / "resumed")
    np.testing.assert_array_equal(whole.directions, resumed.directions)
    for a, b in zip(whole.shards(), resumed.shards(), strict=True):
        torch.testing.assert_close(a.scaled, b.scaled, rtol=0, atol=0)
    with pytest.raises(ConfigurationError, match="arguments that training began with"):
        fit(Normalised, [callback("other", 2)], checkpoint=tmp_path / "epoch=0.ckpt")


def test_features_survive_an_interruption(tmp_path: Path) -> None:
    """Oracle: the features of the run that was never interrupted."""

    def callback(name: str) -> GradientFeatures:
        return GradientFeatures(tmp_path / name, (0, 0.5, 1), 16, units=UNITS)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(Normalised, [callback("whole"), saving], enable_checkpointing=True)
    fit(Normalised, [callback("resumed")], checkpoint=tmp_path / "epoch=0.ckpt", seed=5)
    arrays = [UnitFeatures.load(tmp_path / name, UNIT_OF_ROW).array for name in ("whole", "resumed")]
    np.testing.assert_array_equal(*arrays)
    fit(Normalised, [saved_without := ModelCheckpoint(tmp_path, filename="without")], enable_checkpointing=True)
    with pytest.raises(ConfigurationError, match="GradientFeatures must see training from its first step"):
        fit(Normalised, [callback("late")], checkpoint=Path(saved_without.best_model_path), epochs=3)


def test_a_sketch_along_gradients_is_right(tmp_path: Path) -> None:
    """Oracle: central differences of reweighted trainings."""
    pilot = tmp_path / "pilot"
    fit(Classifier, [GradientFeatures(pilot, units=UNITS)])
    direction = UnitFeatures.load(pilot, UNIT_OF_ROW).leading_directions(1)
    assert_first_order(Classifier, tmp_path, num_units=4, callback={"units": UNITS})
    fit(Classifier, [SketchCallback(tmp_path / "a", 1, 1, design="gradient", units=UNITS, features=pilot)])
    fit(Classifier, [SketchCallback(tmp_path / "b", direction, 1, units=UNITS)])
    for a, b in zip(Sketch.load(tmp_path / "a").shards(), Sketch.load(tmp_path / "b").shards(), strict=True):
        torch.testing.assert_close(a.scaled, b.scaled, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": ()}, "`at`"),
        ({"at": (0.5, 1.5)}, "`at`"),
        ({"projection": 0}, "`projection`"),
        ({"loss": 3}, "`loss`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GradientFeatures(tmp_path, **arguments)


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`features` is given"):
        SketchCallback(tmp_path, design="basis", features=tmp_path)
    with pytest.raises(SketchError, match=FILE_NAME):
        fit(Classifier, [SketchCallback(tmp_path / "s", 2, design="gradient", features=tmp_path / "none")])
    fit(Classifier, [GradientFeatures(tmp_path / "f", (1,), projection=2, units=UNITS)])
    with pytest.raises(ConfigurationError, match="other units"):
        fit(Classifier, [SketchCallback(tmp_path / "s", 2, design="gradient", features=tmp_path / "f")])
    with pytest.raises(ConfigurationError, match="2 independent directions"):
        fit(
            Classifier,
            [SketchCallback(tmp_path / "s", 3, design="gradient", units=UNITS, features=tmp_path / "f")],
        )
    (tmp_path / "f" / FILE_NAME).write_bytes(b"\x80\x04not features")
    with pytest.raises(SketchError, match="can not be read"):
        UnitFeatures.load(tmp_path / "f", UNIT_OF_ROW)


class Coupled(Classifier):
    """The hardest examples of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none").topk(2).values.mean()


def test_a_loss_that_couples_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`loss`"):
        fit(Coupled, [GradientFeatures(tmp_path, (0,), units=UNITS)])


def test_a_predictor_takes_features_of_its_own_units(tmp_path: Path) -> None:
    """Oracle: the estimator, given the features themselves."""
    fit(Noisy, [GradientFeatures(tmp_path / "f", units=UNITS), SketchCallback(tmp_path / "s", 1, 1, units=UNITS)])
    fit(Noisy, [GradientFeatures(tmp_path / "other")])
    sketch, batch = Sketch.load(tmp_path / "s"), data(6).tensors
    effect = DeletionPredictor(sketch, Noisy(), features=tmp_path / "f").prepare(batch)
    features = UnitFeatures.load(tmp_path / "f", UNIT_OF_ROW).flattened()
    kernel = KernelEstimator(sketch.directions, effect.coefficients.numpy(), features, effect._influence)
    expected = kernel(np.eye(4), 1)[0][0]
    np.testing.assert_allclose(effect.delete_many(np.eye(4)).change, expected, rtol=1e-12)
    reduced = effect.reduce(torch.arange(6.0))
    np.testing.assert_array_equal(reduced._features, features)
    np.testing.assert_allclose(reduced._influence.gradients, np.arange(6.0)[None] @ effect._influence.gradients)
    with pytest.raises(ConfigurationError, match="other units"):
        DeletionPredictor(sketch, Noisy(), features=tmp_path / "other")
    with pytest.raises(SketchError, match=FILE_NAME):
        DeletionPredictor(sketch, Noisy(), features=tmp_path / "none")


@pytest.mark.parametrize("output", ["loss", "logits"])
@pytest.mark.parametrize("design", ["sphere", "basis"])
def test_a_predictor_projects_gradients_and_displacements(output: str, design: str, tmp_path: Path) -> None:
    """Oracle: autograd on one example at a time, and the coefficients of each parameter as an output."""
    features = GradientFeatures(tmp_path / "f", projection=32, units=UNITS, seed=5)
    module, _ = fit(Noisy, [features, SketchCallback(tmp_path / "s", 3, 2, design=design, units=UNITS)])
    sketch, batch = Sketch.load(tmp_path / "s"), data(6).tensors
    wanted = output if output == "loss" else (lambda module, batch: module.net(batch[0]))
    influence = DeletionPredictor(sketch, Noisy(), wanted, features=tmp_path / "f").prepare(batch)._influence
    assert influence is not None
    module.eval()
    rows = []
    for x, y in zip(*batch, strict=True):
        logits = module.net(x[None])
        for value in [F.cross_entropy(logits, y[None])] if output == "loss" else logits[0]:
            found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
            rows.append({n: g.numpy() for (n, _), g in zip(module.named_parameters(), found, strict=True)})
    projection = CountSketch(32, 5)

    def project(vectors: dict[str, Tensor], count: int) -> np.ndarray:
        total = torch.zeros(count, 32, dtype=torch.float64)
        for name, v in vectors.items():
            projection.add(total, name, v)
        return total.numpy()

    gradients = {n: torch.from_numpy(np.stack([row[n] for row in rows])) for n in rows[0]}
    np.testing.assert_allclose(influence.gradients, project(gradients, len(rows)), rtol=1e-9, atol=1e-12)
    moved = {
        n: DeletionPredictor(sketch, Noisy(), f"parameter:{n}").prepare().coefficients[0]
        for n, _ in module.named_parameters()
    }
    count = sketch.num_directions
    expected = project({n: m.real for n, m in moved.items()}, count) + 1j * project(
        {n: m.imag for n, m in moved.items()}, count
    )
    np.testing.assert_allclose(influence.displacements, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(expected.imag).max() > 1e-6 or design == "basis"
