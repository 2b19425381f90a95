"""Coefficients are carried times powers of two: nothing changes but what a dtype can hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import Classifier, fit, loader, sketch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracles.scalar_jet import ScalarJet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sketch import DeletionPredictor, Sketch, SketchCallback
from lightning_sketch.errors import FidelityError
from lightning_sketch.optim import StableAdamW
from lightning_sketch.shadow import jets_of_run
from lightning_sketch.shadow.checks import Readings
from lightning_sketch.shadow.scaling import MAX_EXPONENT, choose_shift, exponents_of, scale_orders

DTYPES = [torch.float32, torch.float64]
BITS = {torch.float32: 128, torch.float64: 1024}

# The powers of two themselves.


def test_exponents_bring_the_largest_entry_to_between_a_half_and_one():
    """Oracle: the definition, also at the ends of float64."""
    directions = np.array([[3.0, -4j], [0.5, 0], [1, 0], [1e-320, 0], [0, 1.7e308], [0, 0]])
    exponents = exponents_of(directions)
    assert exponents[:3].tolist() == [-3, 0, -1]
    assert exponents[5] == 0
    largest = np.ldexp(np.abs(directions).max(1), exponents)[:5]
    assert ((largest >= 0.5) & (largest < 1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_are_scaled_exactly(dtype):
    """Oracle: ``ldexp`` of the C library, where the power alone is beyond the dtype, and where the result is."""
    largest = BITS[dtype] - 10
    block = torch.tensor([1.5, -1.25 * 2.0**-largest, 0.0], dtype=dtype).expand(60, 2, 3)[..., None].clone()
    shift = np.array([-(largest // 60), 2 * largest // 60, MAX_EXPONENT])
    scaled = scale_orders(block, shift)
    powers = np.outer(np.arange(1, 61), shift)[:, None, :, None]
    with np.errstate(over="ignore"):
        expected = np.ldexp(block.numpy(), powers).astype(block.numpy().dtype)
    np.testing.assert_array_equal(scaled.numpy(), expected)
    assert scaled.isfinite().all()
    assert torch.equal(scale_orders(scaled, -shift), block)
    assert scale_orders(block, np.array([99, 0, 0]))[-1, 0, 0].isinf()


def sizes(degree: int, low: float, high: float) -> Any:
    logs = arrays.arrays(np.float64, (degree, 1), elements=st.floats(low, high))
    zero = arrays.arrays(np.bool_, (degree, 1))
    return st.tuples(logs, zero)


@given(st.sampled_from(DTYPES), st.data())
def test_shifts_of_any_coefficients(dtype, data):
    """Oracle: what the function promises, in logarithms."""
    bits = BITS[dtype]
    limit, lossless = bits // 3, -(bits - 2) + {128: 23, 1024: 52}[bits]
    degree = data.draw(st.integers(1, 100))
    logs, zero = data.draw(sizes(degree, -bits + 3, bits - 3))
    largest = np.where(zero, 0, np.exp2(logs))
    (shift,) = choose_shift(largest, dtype)
    orders = np.arange(1, degree + 1)[:, None]
    before, after, orders = logs[~zero], (logs + shift * orders)[~zero], orders[~zero]
    slack = 1e-6
    if not len(before) or (abs(before) <= limit - slack).all():
        assert shift == 0
        return
    if (before > limit + slack).any():
        assert shift < 0
        assert after.max() <= limit + slack, "or the next step may overflow"
        lost = (after < lossless - slack) & (before >= lossless)
        one_less = (before + (shift + 1) * orders).max()
        assert not lost.any() or one_less > limit - slack, "bits are lost only where there is no other way"
    elif (before < limit - slack).all():
        assert shift >= 0, "small coefficients are never made smaller"
        if (before < -limit - slack)[orders > 1].any():
            assert shift == 0 or after.max() <= slack
            assert after.min() >= -limit - slack or (after + orders).max() > -slack, "one more would exceed one"
            assert shift == 0 or (after - orders).min() <= -limit + slack, "one less would do"
        elif (before > -limit + slack)[orders > 1].all():
            assert shift == 0, "the first order alone says nothing of the others"


@pytest.mark.parametrize(
    ("logs", "shift"),
    [
        ([-43, -86], 22),  # as far as order 2 needs, not to [0, 0]
        ([-3, -50], 3),  # not beyond one
        ([-20, 43], -22),  # to one, rounded down
        ([-90, 43], -13),  # no bit of order 1 is lost
        ([-101, 61], -10),  # but for what order 2 needs
        ([-42, 42], 0),
    ],
)
def test_shifts_in_single_precision(logs, shift):
    """Oracle: by hand; the range is 2^-42 to 2^42, 2^-103 the smallest whose rounding errors are normal."""
    largest = np.exp2(np.array(logs, dtype=np.float64))[:, None]
    assert choose_shift(largest, torch.float32).tolist() == [shift]


def test_exponents_stop_at_their_limit(monkeypatch):
    """Oracle: what the format allows, and the power that is left."""
    jets = jets_of_run.RunJets(np.arange(3), directions(), 2, torch.float64, torch.device("cpu"))
    jets.exponents = np.array([MAX_EXPONENT - 1, -MAX_EXPONENT, 0])
    jets.params = {"a": torch.ones(2, 2, 3, dtype=torch.float64)}
    monkeypatch.setattr(jets_of_run, "choose_shift", lambda largest, dtype: np.array([9, -9, 1]))
    jets._rescale(np.ones((2, 3)), 0)
    assert jets.exponents.tolist() == [MAX_EXPONENT, -MAX_EXPONENT, 1]
    assert jets.params["a"][:, 0].tolist() == [[2, 1, 2], [4, 1, 4]]


def test_orders_that_are_zero_say_nothing():
    """Oracle: the first steps and linear runs, whose first order is ordinary and whose others vanish."""
    largest = np.zeros((100, 3))
    largest[0] = [2.0**-50, 0, 1e3]
    assert choose_shift(largest, torch.float32).tolist() == [0, 0, 0]
    largest[1, 2] = 2.0**60
    assert choose_shift(largest, torch.float32).tolist() == [0, 0, -30]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_coefficient_is_found_wherever_it_is(dtype, monkeypatch):
    """Oracle: numpy's largest absolute value over parameters; one that is not finite is an error."""
    generator = torch.Generator().manual_seed(0)
    jets = jets_of_run.RunJets(np.arange(3), directions(), 4, dtype, torch.device("cpu"))
    blocks = {
        str(shape): torch.randn(4, 2, 3, *shape, generator=generator, dtype=dtype) for shape in [(2, 5), (7,), (), (0,)]
    }
    jets.params = {**blocks, "constant": None}
    seen: list[np.ndarray] = []

    def keep(largest: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        seen.append(largest)
        return np.zeros(3, dtype=np.int64)

    monkeypatch.setattr(jets_of_run, "choose_shift", keep)
    readings = Readings()
    jets._watch(0, readings)
    readings.read()
    flat = np.concatenate([b.flatten(3).numpy() if b.ndim > 3 else b.numpy()[..., None] for b in blocks.values()], 3)
    np.testing.assert_array_equal(seen[0], np.abs(flat).max((1, 3)))
    assert (np.abs(flat.max((1, 3))) != seen[0]).any(), "some of the largest are negative"
    for value in (np.nan, np.inf, -np.inf):
        blocks["(7,)"][2, 1, 1, 3] = value
        jets._watch(5, readings)
        with pytest.raises(FidelityError, match="not finite after optimizer step 5"):
            readings.read()


# Whole runs: nothing changes.


class Everything(Classifier):
    """Running statistics, momentum and squares, dropout and clipping: all that carries coefficients."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].to(self.dtype), batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        return StableAdamW(self.parameters(), lr=0.02)


def coefficients(path: Path, directions: np.ndarray, degree: int = 3, **options: Any) -> tuple[Sketch, list[Any]]:
    callback = sketch(path, directions, degree, directions_per_pass=2)
    fit(Everything, [callback], loader(), gradient_clip_val=0.1, **options)
    found = Sketch.load(path / "sketch")
    return found, list(found.shards())


def directions() -> np.ndarray:
    generator = np.random.default_rng(0)
    complex_ = generator.normal(size=(3, 12)) + 1j * generator.normal(size=(3, 12))
    complex_[1] = complex_[1].real
    return 0.1 * complex_


def same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.coefficients.keys() == b.coefficients.keys()
        for name, value in a.coefficients.items():
            assert value.any(), name
            assert torch.equal(value, b.coefficients[name]), name


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_without_scaling_gives_the_same_bits(precision, tmp_path, monkeypatch):
    """Oracle: the directions as they are given, with exponents of zero."""
    found, scaled = coefficients(tmp_path / "scaled", directions(), precision=precision)
    assert (found.exponents == exponents_of(directions())).all()
    assert found.exponents.any()
    monkeypatch.setattr(jets_of_run, "exponents_of", lambda d: np.zeros(len(d), dtype=np.int64))
    plain, unscaled = coefficients(tmp_path / "plain", directions(), precision=precision)
    assert not plain.exponents.any()
    same(scaled, unscaled)


def test_directions_times_powers_of_two_give_the_same_sketch(tmp_path):
    """Oracle: homogeneity; what is stored is the same to the last bit, and only the exponents differ."""
    powers = np.array([7, -9, 300])
    first, ours = coefficients(tmp_path / "a", directions())
    second, theirs = coefficients(tmp_path / "b", np.ldexp(1.0, powers)[:, None] * directions())
    assert (first.exponents - second.exponents).tolist() == powers.tolist()
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.scaled[name], b.scaled[name]) for name in a.scaled)


def test_exponents_that_move_at_every_step_give_the_same_bits(tmp_path, monkeypatch):
    """Oracle: the run whose exponents stay; parameters, statistics and the optimizer's state all follow."""
    still, expected = coefficients(tmp_path / "still", directions())
    generator = np.random.default_rng(1)
    moves = []

    def move(largest: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        moves.append(generator.integers(-9, 10, largest.shape[1]))
        return moves[-1]

    monkeypatch.setattr(jets_of_run, "choose_shift", move)
    moved, found = coefficients(tmp_path / "moved", directions())
    assert (moved.exponents != still.exponents).all()
    assert len(moves) == 2 * 6
    same(found, expected)


# Whole runs: degree 100 in single precision.

DEGREE = 100
INPUTS, TARGETS = [1.0, -0.5, 0.75, 1.25, 0.5, -1.0], [0.5, 1.0, -0.25, 0.75, -1.0, 0.25]


class Product(pl.LightningModule):
    """``a b x`` fitted to ``y``: its series in the weights is found by hand."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.a, self.b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.5]))

    def per_example_loss(self, batch: Any) -> Tensor:
        return (self.a * self.b * batch[0] - batch[1]).square() / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_example_loss(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def by_hand(psi: np.ndarray, lr: float, epochs: int) -> tuple[ScalarJet, ScalarJet]:
    """Gradient descent on ``sum_i w_i (a b x_i - y_i)^2 / 2 / sum_i w_i``, ``w_i = 1 - psi_i z``, three at a time."""
    a, b = (ScalarJet([start] + [0] * DEGREE) for start in (1.0, 0.5))
    for batch in [range(3), range(3, 6)] * epochs:
        weights = {i: ScalarJet([1, -psi[i]] + [0] * (DEGREE - 1)) for i in batch}
        slope = sum(weights[i] * (a * b * INPUTS[i] - TARGETS[i]) * INPUTS[i] for i in batch) / sum(weights.values())
        a, b = a - lr * slope * b, b - lr * slope * a
    return a, b


def products(path: Path, psi: np.ndarray, lr: float, epochs: int) -> Sketch:
    dataset = TensorDataset(torch.tensor(INPUTS), torch.tensor(TARGETS))
    callback = SketchCallback(path, psi[None], DEGREE, normalization="remaining")
    fit(lambda: Product(lr), [callback], DataLoader(dataset, 3), epochs=epochs, precision="32-true")
    return Sketch.load(path)


RUNS: dict[str, tuple[np.ndarray, float, int, Callable[[np.ndarray], bool]]] = {
    "small entries": (
        np.array([1.0, 0.8, 0.9, -0.7, 1.0, 0.6]) / 32,
        0.5,
        2,
        lambda logs: logs[24] < -126 and logs[-1] < -500,
    ),
    "complex": (
        np.array([1.0, 0.8j, 0.9, -0.7, 1.0 + 0.1j, -0.6]) / 32,
        0.5,
        2,
        lambda logs: logs[-1] < -500,
    ),
    "growth": (np.array([1.0, -1, 0.5, 1, 0.5, -1]), 3.0, 4, lambda logs: logs[-1] > 150),
}


@pytest.mark.parametrize("name", RUNS)
def test_degree_100_in_single_precision(name, tmp_path):
    """Oracle: plain Python series in double precision, whose top orders float32 does not hold."""
    psi, lr, epochs, beyond = RUNS[name]
    a, b = by_hand(psi, lr, epochs)
    expected = np.array([a.c[1:], b.c[1:]])
    assert beyond(np.log2(np.abs(expected).max(axis=0)))
    found = products(tmp_path, psi, lr, epochs)
    (shard,) = found.shards()
    parts = torch.stack([shard.coefficients[n][..., 0, 0] for n in ("a", "b")]).numpy()
    got = parts[..., 0] + (1j * parts[..., 1] if np.iscomplexobj(psi) else 0)
    error = np.abs(got - expected).max(axis=0) / np.abs(expected).max(axis=0)
    print(f"{name}: relative error {error.max():.1e}, exponent {found.exponents[0]}")
    assert error.max() < 1e-3

    predictor = DeletionPredictor(found, Product(lr), lambda module, batch: module.a * module.b * batch)
    effect = predictor.prepare(torch.tensor([1.0, 2.0]))
    assert effect.baseline.dtype == torch.float32
    assert effect.coefficients.dtype == torch.complex128
    outputs = np.array((a * b).c[1:])
    error = np.abs(effect.coefficients[:, 0, 1].numpy() - 2 * outputs) / np.abs(outputs)
    assert np.median(error) < 1e-3


def test_norms_are_those_of_the_coefficients_themselves(tmp_path, monkeypatch):
    """Oracle: the norms of what the sketch gives out."""
    said = []
    original = jets_of_run.RunJets.norms
    monkeypatch.setattr(jets_of_run.RunJets, "norms", lambda self: said.append(original(self)) or said[-1])
    _, (real, complex_) = coefficients(tmp_path, directions())
    for shard, norms in zip((real, complex_), said, strict=True):
        given = {n: c for n, c in shard.coefficients.items() if "running" not in n}
        assert norms.keys() == given.keys()
        for name, c in given.items():
            expected = c.square().sum([1, *range(3, c.ndim)]).sqrt().log2().numpy()
            assert norms[name] == pytest.approx(expected)


class Sharp(Product):
    """Two groups of examples pull the other way, so the run stands still; the series of either is steep."""

    def per_example_loss(self, batch: Any) -> Tensor:
        u = 1e3 * (self.a - self.b)
        return batch[1] * (u + 1 / (1 + u * u))


def test_coefficients_that_overflow_within_a_step_are_refused(tmp_path):
    """Oracle: the error's words; in the second step order 20 grows by 1e120, more than float32 has room for."""
    signs = torch.tensor([1.0, -1.0] * 3)
    callback = SketchCallback(tmp_path, signs.double().numpy()[None], 20, on_instability="stop")
    loader = DataLoader(TensorDataset(signs, signs), 6)
    words = "Taylor coefficients of the parameters are not finite after optimizer step 1: the run is not stable"
    with pytest.raises(FidelityError, match=words):
        fit(lambda: Sharp(1.0), [callback], loader, epochs=3, precision="32-true")
