"""``StabilityMonitor``: its numbers against finite differences of retraining, its schedule, its logs, its advice."""

import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, data, fit, loader, network, overflowing, scaled
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from torch import Tensor, nn

from lightning_sketch import ConfigurationError, Reweight, SketchCallback, StabilityMonitor, StableAdamW
from lightning_sketch.callbacks.stability import Measurement
from lightning_sketch.directions import random_signs

UNITS = 12
TEST = data(8, seed=5)[:]


class Smooth(Classifier):
    """The same initial weights in every run, and a validation loss."""

    def __init__(self) -> None:
        super().__init__(network())
        self.double()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))


def test_losses(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(TEST[0]), TEST[1], reduction="none")


test_losses.__test__ = False  # type: ignore[attr-defined]


def differences(f: Callable[[float], Tensor], h: float) -> list[Tensor]:
    """Taylor coefficients of orders 1 and 2 at zero, to ``O(h^4)``."""
    zero, plus, minus, plus2, minus2 = (f(s * h) for s in (0, 1, -1, 2, -2))
    first = (8 * (plus - minus) - (plus2 - minus2)) / (12 * h)
    second = (16 * (plus + minus) - (plus2 + minus2) - 30 * zero) / (24 * h * h)
    return [first, second]


def log2_sizes(coefficients: list[Tensor]) -> list[float]:
    """``log2`` of root mean squares over everything."""
    return [0.5 * math.log2(float(c.square().mean())) for c in coefficients]


def norms(sizes: list[float], num_units: int) -> list[float]:
    return [size + 0.5 * math.log2(math.comb(num_units + r - 1, r)) for r, size in enumerate(sizes, 1)]


def whole(**options: Any) -> StabilityMonitor:
    return StabilityMonitor(**{"every_n_steps": 3, "window": None, "degree": 2, "output": test_losses, **options})


def train(monitor: StabilityMonitor, *others: pl.Callback, **options: Any) -> pl.Trainer:
    return fit(Smooth, [monitor, *others], **options)[1]


def test_a_whole_run_against_retraining() -> None:
    """Oracle: finite differences of ``Reweight`` runs along the sign patterns, in loss and parameters."""
    monitor = whole(seed=4)
    module, _ = fit(Smooth, [monitor])
    found = monitor.history[-1]
    *signs, common = random_signs(2, UNITS, 4).array.real

    def losses(psi: np.ndarray) -> Callable[[float], Tensor]:
        return lambda s: test_losses(fit(Smooth, [Reweight(weights=list(s * psi))])[0], None).detach()

    along = [differences(losses(psi), 0.02) for psi in signs]
    terms = log2_sizes([torch.stack(orders) for orders in zip(*along, strict=True)])
    assert found.step == 6
    assert found.profile.log2_terms == pytest.approx(terms, abs=1e-3)
    assert found.profile.log2_norms == pytest.approx(norms(terms, UNITS), abs=1e-3)
    assert found.profile.log2_common == pytest.approx(log2_sizes(differences(losses(common), 0.02)), abs=1e-3)
    assert found.profile.growth == pytest.approx(np.diff(norms(terms, UNITS))[0], abs=2e-3)

    def parameters(psi: np.ndarray, s: float) -> Tensor:
        changed = fit(Smooth, [Reweight(weights=list(s * psi))])[0]
        return torch.cat([p.detach().flatten() for p in changed.parameters()])

    moved = torch.stack([(parameters(psi, 1e-4) - parameters(psi, -1e-4)) / 2e-4 for psi in signs])
    length = float(torch.cat([p.detach().flatten() for p in module.parameters()]).norm())
    expected = float(moved.square().sum(1).mean().sqrt()) / length
    assert found.parameter_sensitivity == pytest.approx(expected, rel=1e-6)


def by_hand(weights: np.ndarray, first: int, last: int) -> Tensor:
    """Loss of the batch of step ``last`` after that step, the weights being those of steps ``first`` to ``last``."""
    pl.seed_everything(1, verbose=False)
    module = Smooth()
    velocity = [torch.zeros_like(p) for p in module.parameters()]
    x, y = data()[:]
    for step in range(last + 1):
        rows = torch.arange(4) + 4 * (step % 3)
        w = torch.as_tensor(weights)[rows] if step >= first else torch.ones(4, dtype=torch.float64)
        loss = (F.cross_entropy(module.net(x[rows]), y[rows], reduction="none") * w).mean()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for p, v, g in zip(module.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.1 * v)
    with torch.no_grad():
        return F.cross_entropy(module.net(x[rows]), y[rows])


def test_a_window_sees_what_was_deleted_within_it() -> None:
    """Oracle: finite differences of a training loop by hand, weighted in the last two of seven steps only."""
    monitor = StabilityMonitor(every_n_steps=5, window=2, degree=2, seed=3)
    train(monitor, epochs=3)
    found = next(m for m in monitor.history if m.step == 7)
    rows = np.r_[0:4, 8:12]  # of the batches of steps 5 and 6
    *signs, _ = random_signs(2, UNITS, 3).array.real
    along = [differences(lambda s, psi=psi: by_hand(1 - s * psi, 5, 6), 0.02) for psi in signs]  # type: ignore[misc]
    length = np.linalg.norm(signs[0][rows])
    terms = log2_sizes([torch.stack(orders) / length**r for r, orders in enumerate(zip(*along, strict=True), 1)])
    assert found.profile.num_units == 8
    assert found.profile.log2_terms == pytest.approx(terms, abs=1e-3)
    assert found.profile.log2_norms == pytest.approx(norms(terms, 8), abs=1e-3)


def test_beside_a_sketch_it_reads_the_sketch(tmp_path: Path) -> None:
    """Oracle: the monitor that carries the same directions itself."""
    alone, beside = whole(seed=2), whole()
    train(alone)
    train(beside, SketchCallback(tmp_path / "sketch", random_signs(2, UNITS, 2).array, 2))
    assert [m.step for m in beside.history] == [m.step for m in alone.history] == [3, 6]
    for ours, theirs in zip(beside.history, alone.history, strict=True):
        assert ours.profile.log2_norms == pytest.approx(theirs.profile.log2_norms, abs=1e-9)
        assert ours.profile.log2_common == pytest.approx(theirs.profile.log2_common, abs=1e-9)
        assert ours.parameter_sensitivity == pytest.approx(theirs.parameter_sensitivity, rel=1e-9)
        assert ours.profile.spread == pytest.approx(theirs.profile.spread, rel=1e-9)
        assert [name for name, _ in ours.growing] == [name for name, _ in theirs.growing]


SCHEDULES = {
    "windows": ({"every_n_steps": 8, "window": 3}, [3, 11, 19]),
    "the last does not end": ({"every_n_steps": 6, "window": 4}, [4, 10, 16]),
    "without gaps": ({"every_n_steps": 5, "window": 5}, [5, 10, 15, 20]),
    "a window longer than the run": ({"every_n_steps": 50, "window": 30}, [20]),
    "whole": ({"every_n_steps": 8, "window": None}, [8, 16, 20]),
    "whole, seldom": ({"every_n_steps": 100, "window": None}, [10, 20]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_when_it_measures(name: str) -> None:
    options, expected = SCHEDULES[name]
    monitor = StabilityMonitor(**options, degree=1, probes=1)
    train(monitor, epochs=-1, max_steps=20)
    assert [m.step for m in monitor.history] == expected


class Logging(Smooth):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


NAMES = {f"stability/{n}" for n in ("log2_norm_order_1", "log2_norm_order_2", "growth", "trusted_units", "spread")}
NAMES.add("stability/parameter_sensitivity")


def test_three_loggers_under_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those of the user's own metric; every logger has the numbers of the history."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = [
        CSVLogger(tmp_path, name="", version="csv"),
        TensorBoardLogger(tmp_path, name="", version="tensorboard"),
        MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlflow'}"),
    ]
    monitor = StabilityMonitor(every_n_steps=3, window=2, degree=2)
    fit(
        Logging,
        [monitor],
        loader(batch_size=2),
        logger=loggers,
        accumulate_grad_batches=2,
        epochs=2,
        log_every_n_steps=1,
    )
    assert [m.step for m in monitor.history] == [2, 5]
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, last = monitor.history
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]  # Lightning counts the steps before this one
    assert all(row["train_loss"] for row in rows)
    assert not any(rows[0][name] for name in NAMES)
    for row, m in zip(rows[1:], [first] * 3 + [last] * 2, strict=True):
        assert {name for name in row if name.startswith("stability") and row[name]} == NAMES
        assert float(row["stability/growth"]) == pytest.approx(m.profile.growth, rel=1e-5)
        assert float(row["stability/log2_norm_order_2"]) == pytest.approx(m.profile.log2_norms[1], rel=1e-5)
        assert float(row["stability/parameter_sensitivity"]) == pytest.approx(m.parameter_sensitivity, rel=1e-5)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert [e.step for e in events.Scalars("stability/trusted_units")] == [1, 2, 3, 4, 5]
    assert [e.step for e in events.Scalars("train_loss")] == [0, 1, 2, 3, 4, 5]
    client, run = loggers[2].experiment, loggers[2].run_id
    history = client.get_metric_history(run, "stability/spread")
    assert set(events.Tags()["images"]) == {"stability/profile", "stability/sensitivity"}
    assert {f.path for f in client.list_artifacts(run, "stability")} == {"stability/profile", "stability/sensitivity"}
    assert [m.step for m in history] == [1, 2, 3, 4, 5]
    assert history[-1].value == pytest.approx(last.profile.spread, rel=1e-5)


def test_other_callbacks_watch_it(tmp_path: Path) -> None:
    """``EarlyStopping`` stops where the threshold says; ``ModelCheckpoint`` names files by it, in every epoch."""
    stopping = EarlyStopping("stability/log2_norm_order_1", stopping_threshold=1e9, patience=100)
    trainer = train(StabilityMonitor(100, 2, degree=1), stopping, epochs=4)
    assert trainer.current_epoch == 1
    saving = ModelCheckpoint(tmp_path, monitor="stability/log2_norm_order_1", save_top_k=-1)
    monitor = StabilityMonitor(100, 2, degree=1)
    trainer = train(monitor, saving, epochs=4, enable_checkpointing=True)
    assert len(saving.best_k_models) == 4
    assert [m.step for m in monitor.history] == [2]
    assert float(trainer.callback_metrics["stability/log2_norm_order_1"]) == pytest.approx(
        monitor.history[-1].profile.log2_norms[0], rel=1e-5
    )


def test_the_validation_loss(tmp_path: Path) -> None:
    """Oracle: the loss on the same batch by a callable."""

    def first_batch(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module.net(TEST[0][:4]), TEST[1][:4])

    val = torch.utils.data.DataLoader(data(8, seed=5), 4)
    histories: list[list[Measurement]] = []
    for output in ("val_loss", first_batch):
        monitor = whole(output=output)
        train(monitor, val=val)
        histories.append(monitor.history)
    assert len(histories[0]) == 2
    for a, b in zip(*histories, strict=True):
        assert np.array_equal(a.profile.log2_norms, b.profile.log2_norms)


class Returns(Smooth):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}


class Silent(Smooth):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("other", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_a_validation_loss_that_is_returned_or_missing() -> None:
    val = torch.utils.data.DataLoader(data(8, seed=5), 4)
    logged, returned = whole(output="val_loss"), whole(output="val_loss")
    fit(Smooth, [logged], val=val)
    fit(Returns, [returned], val=val)
    assert np.array_equal(logged.history[-1].profile.log2_norms, returned.history[-1].profile.log2_norms)
    with pytest.raises(ConfigurationError, match="logs no tensor as 'val_loss'"):
        fit(Silent, [whole(output="val_loss")], val=val)
    with pytest.raises(ConfigurationError, match="`output='val_loss'` needs validation data"):
        fit(Smooth, [whole(output="val_loss")])


def test_a_window_before_the_first_validation_is_not_measured() -> None:
    monitor = StabilityMonitor(4, 2, degree=1, output="val_loss")
    followed: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            followed.append(monitor._following)

    val = torch.utils.data.DataLoader(data(8, seed=5), 4)
    train(monitor, Watch(), val=val, epochs=3, num_sanity_val_steps=0)
    assert [m.step for m in monitor.history] == [6]
    assert followed == [True, False, False, False, True, False, False, False, True]


def test_checkpoints_hold_nothing_of_windows(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(StabilityMonitor(4, 3, degree=1), saving, epochs=2, enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        assert "StabilityMonitor" not in torch.load(path, weights_only=True)["callbacks"]


class Dropout(Smooth):
    """Random numbers in the step, and running statistics."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        Classifier.__init__(self, net)
        self.double()


@pytest.mark.parametrize("options", [{"window": 2}, {"window": None}, {"window": 2, "output": "val_loss"}])
def test_the_run_is_the_same_to_the_last_bit(options: dict[str, Any]) -> None:
    """Oracle: the run without the callback; everything else is put back, too."""
    val = torch.utils.data.DataLoader(data(8, seed=5), 4)
    states = []
    for callbacks in ([], [StabilityMonitor(every_n_steps=4, degree=2, **options)]):
        shuffled = loader(shuffle=True)
        sampler = shuffled.batch_sampler
        module, trainer = fit(Dropout, callbacks, shuffled, val=val, epochs=4, accumulate_grad_batches=2)
        assert shuffled.batch_sampler is sampler
        assert "training_step" not in module.__dict__
        state = [*module.state_dict().values(), torch.rand(3)]
        state += [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        states.append([t.clone() for t in state])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Oracle: the run that was never interrupted."""
    unbroken, saving = whole(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(unbroken, saving, epochs=4, enable_checkpointing=True)
    resumed = whole()
    train(resumed, epochs=4, checkpoint=tmp_path / "epoch=1.ckpt", seed=9)
    assert [m.step for m in resumed.history] == [9, 12]
    for ours, theirs in zip(resumed.history, unbroken.history[2:], strict=True):
        assert np.array_equal(ours.profile.log2_norms, theirs.profile.log2_norms)
    with pytest.raises(ConfigurationError, match="must see training from its first step"):
        train(whole(), epochs=5, checkpoint=_without_callbacks(tmp_path))


def _without_callbacks(folder: Path) -> Path:
    saved = torch.load(folder / "epoch=1.ckpt", weights_only=True)
    saved["callbacks"] = {}
    torch.save(saved, folder / "bare.ckpt")
    return folder / "bare.ckpt"


def test_windows_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Windows after it are those of the unbroken run, also without any state in the checkpoint."""
    unbroken, saving = StabilityMonitor(5, 2, degree=2), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(unbroken, saving, epochs=5, enable_checkpointing=True)
    resumed = StabilityMonitor(5, 2, degree=2)
    train(resumed, epochs=5, checkpoint=_without_callbacks(tmp_path), seed=9)
    assert [m.step for m in unbroken.history] == [2, 7, 12]
    assert [m.step for m in resumed.history] == [12]  # that of step 5 had begun before the checkpoint of step 6
    for ours, theirs in zip(resumed.history, unbroken.history[2:], strict=True):
        assert np.array_equal(ours.profile.log2_norms, theirs.profile.log2_norms)


def test_a_step_that_the_scaler_skips_within_a_window() -> None:
    class Overflows(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            return F.cross_entropy(overflowing(logits) if batch_idx == 1 else logits, batch[1])

    monitor = StabilityMonitor(3, 3, degree=2)
    fit(Overflows, [monitor], **scaled())
    assert [m.step for m in monitor.history] == [3, 6]
    assert all(np.isfinite(m.profile.log2_norms).all() for m in monitor.history)


class Digits(Classifier):
    """What AdamW's ``eps`` is about: inputs that are always zero, and gradients close to zero."""

    adam: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)))

    def configure_optimizers(self) -> Any:
        return type(self).adam(self.parameters(), lr=1e-2)


class Stable(Digits):
    adam = StableAdamW


class Kinked(Stable):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.ReLU()


def digits_warnings(kind: type[Digits], monitor: StabilityMonitor) -> list[str]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    dataset = torch.utils.data.TensorDataset(torch.tensor(x / 16), torch.tensor(y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kind, [monitor], torch.utils.data.DataLoader(dataset, 64), epochs=-1, max_steps=30)
    return [str(w.message) for w in caught if "StabilityMonitor" in str(w.message)]


@pytest.mark.parametrize("window", [10, None])
def test_adam_with_eps_outside_the_root_is_named(window: int | None) -> None:
    units = [i % 50 for i in range(1797)]
    options: dict[str, Any] = {"every_n_steps": 10, "window": window, "units": units}
    unstable = StabilityMonitor(**options)
    (message,) = digits_warnings(Digits, unstable)
    assert "(1) AdamW with eps=1e-08 outside the root" in message
    assert "use StableAdamW" in message
    assert "at optimizer step 10 the Taylor terms grow by" in message
    assert "`net.0.weight`" in message
    assert unstable.history[0].profile.growth > 0
    assert unstable.history[0].profile.trusted_units() == 0
    stable = StabilityMonitor(**options)
    assert digits_warnings(Stable, stable) == []
    assert all(m.profile.growth < 0 and m.profile.trusted_units() > 0 for m in stable.history)


def test_kinks_are_named() -> None:
    (message,) = digits_warnings(Kinked, StabilityMonitor(10, 10, units=[i % 50 for i in range(1797)]))
    assert "(1) `net.1` (ReLU) is piecewise linear" in message


def test_a_run_that_blows_up_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Explosion(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                for block in monitor._blocks[0].params.values():
                    assert block is not None
                    block.fill_(float("inf"))

    monitor = whole(every_n_steps=100)
    with pytest.warns(UserWarning, match="not finite after optimizer step 4.*its stability is not monitored any more"):
        trainer = train(monitor, Explosion(), epochs=4)
    assert trainer.global_step == 12
    assert monitor.history == []
    assert float(trainer.callback_metrics["stability/growth"]) == math.inf
    assert float(trainer.callback_metrics["stability/trusted_units"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` is 0: give a positive integer"),
        ({"every_n_steps": 5}, "windows would overlap"),
        ({"probes": True}, "`probes` is True: give a positive integer"),
        ({"window": 2.5}, "`window` is 2.5: give a positive integer"),
        ({"degree": 0}, "`degree` is 0: give a positive integer"),
        ({"output": "test_loss"}, "`output` must be 'train_loss', 'val_loss' or a callable"),
        ({"tolerance": 1}, "`tolerance` is 1: give a relative error between 0 and 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StabilityMonitor(**options)


def test_two_of_them_do_not_share_a_run() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's
        train(whole(), whole())
    with pytest.raises(ConfigurationError, match="more than one"):
        train(whole(), Reweight())


def test_it_says_the_cost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        train(StabilityMonitor(30, 10))
        train(whole(probes=4))
    assert "3 real directions of degree 3 through 10 of every 30 steps, each of which costs up to 27" in caplog.text
    assert "the run as a whole up to 900% more" in caplog.text
    assert "5 real directions of degree 2 through the whole run; a step costs up to 25 plain steps" in caplog.text


def test_fast_dev_run() -> None:
    monitor = StabilityMonitor()
    train(monitor, fast_dev_run=True)
    assert [m.step for m in monitor.history] == [1]


def test_its_figure() -> None:
    monitor = StabilityMonitor(3, 2, degree=2)
    with pytest.raises(ConfigurationError, match="`plot` has nothing to draw"):
        monitor.plot()
    train(monitor, epochs=3)
    _, ax = monitor.plot()
    drawn = {str(line.get_label()): line for line in ax.get_lines()}
    assert drawn["order 2"].get_xdata().tolist() == [m.step for m in monitor.history] == [2, 5, 8]
    assert drawn["order 2"].get_ydata().tolist() == [m.profile.log2_norms[1] for m in monitor.history]
