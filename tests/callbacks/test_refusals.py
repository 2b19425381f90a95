"""What cannot be sketched is refused early, in a sentence that names the argument or the operator."""

import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET, Classifier, data, fit, loader, sketch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sketch import Reweight, Sketch, SketchCallback
from lightning_sketch.errors import ConfigurationError, FidelityError, SketchError, UnsupportedOperatorError

STEPS: list[int] = []


class Counted(Classifier):
    """Remembers how often it trained, to see how early an error comes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        STEPS.append(batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def _no_steps() -> None:
    STEPS.clear()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"degree": 0}, "`degree` is 0: give a positive integer"),
        ({"degree": 1.5}, "`degree` is 1.5: give a positive integer"),
        ({"degree": True}, "`degree` is True: give a positive integer"),
        ({"directions": 0}, "`directions` is 0: give a positive integer"),
        ({"directions": -3}, "`directions` is -3: give a positive integer"),
        ({"directions_per_pass": 0}, "`directions_per_pass` is 0: give a positive integer"),
        ({"directions_per_pass": "all"}, "`directions_per_pass` is 'all': give a positive integer"),
        ({"every_n_train_steps": 0}, "`every_n_train_steps` is 0: give a positive integer"),
        ({"normalization": "sum"}, "`normalization` must be 'batch' or 'remaining' but is 'sum'"),
        ({"loss": "mse"}, "`loss` must be 'auto' or a callable"),
        ({"ids": 7}, "`ids` must be 'auto', a key of the batch or a callable"),
        ({"design": "spheres"}, "`design`.*'spheres'"),
        ({"design": "basis+basis"}, "`design`.*twice"),
    ],
)
def test_arguments_are_checked_at_once(argument, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        SketchCallback(tmp_path, **argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"design": "indicator"}, "`deletion_sets`"),
        ({"design": "indicator", "deletion_sets": [[99]]}, "`deletion_sets`"),
        ({"directions": np.zeros((2, 5))}, "`directions`.*5"),
        ({"directions": np.full((1, 12), np.nan)}, "`directions`"),
        ({"units": [0, 1, 2]}, "`units`.*3.*12"),
        ({"units": [0.5] * 12}, "`units`"),
        ({"units": [-2] * 12}, "`units`"),
        ({"units": [-1] * 12}, "`units`"),
    ],
)
def test_arguments_that_depend_on_the_data_are_checked_before_training(argument, message, tmp_path):
    directions = argument.pop("directions", 2)
    with pytest.raises(ConfigurationError, match=message):
        fit(Counted, [sketch(tmp_path, directions, **argument)])
    assert not STEPS


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SketchError, match=r"file/sketch.*`dirpath`"):
        fit(Counted, [sketch(tmp_path / "file" / "sketch", 2)])
    assert not STEPS


class Manual(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class Lbfgs(Counted):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class NoOptimizer(Counted):
    def configure_optimizers(self) -> Any:
        return None


class Stranger(Counted):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(2, 7))], lr=0.1)


class Iterates(Counted):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Manual, {}, "manual optimization.*`automatic_optimization = True`"),
        (TwoOptimizers, {}, "manual optimization"),
        (Lbfgs, {}, "LBFGS.*StableAdamW or SGD"),
        (NoOptimizer, {}, "`configure_optimizers`"),
        (Stranger, {}, r"`configure_optimizers`.*shape \(2, 7\)"),
        (Iterates, {}, r"`training_step\(dataloader_iter\)`.*`batch`"),
        (Counted, {"precision": "16-true"}, "precision '16-true'.*bf16-mixed"),
        (Counted, {"precision": "bf16-true"}, "precision 'bf16-true'.*32-true"),
        (Manual, {"precision": "bf16-true"}, "manual optimization.*; precision"),
    ],
)
@pytest.mark.parametrize("callback", ["sketch", "reweight"])
def test_setups_that_are_not_supported(callback, kind, options, message, tmp_path):
    if callback == "reweight" and kind in (Lbfgs, NoOptimizer, Stranger):
        pytest.skip("reweighting a loss needs nothing of the optimizer")
    with pytest.raises(ConfigurationError, match=message):
        fit(kind, [sketch(tmp_path) if callback == "sketch" else Reweight(delete=[0])], **options)
    assert not STEPS


def test_two_optimizers_are_refused_by_number():
    """Lightning itself lets several optimizers only into manual optimization; the check stands on its own."""
    from lightning_sketch.shadow.wrapping import check_optimizers

    module = TwoOptimizers()
    with pytest.raises(ConfigurationError, match=r"supports one optimizer, but `configure_optimizers` returned 2"):
        check_optimizers(module.configure_optimizers(), module, "SketchCallback")


class SharpnessAware(torch.optim.SGD):
    """Evaluates the loss twice a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Sharp(Counted):
    def configure_optimizers(self) -> Any:
        return SharpnessAware(self.parameters(), lr=0.1)


def test_optimizers_that_evaluate_the_loss_twice_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"SharpnessAware, whose steps evaluate the loss more than once"):
        fit(Sharp, [sketch(tmp_path)])


def test_resuming_is_refused(tmp_path):
    _, trainer = fit(Counted, epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    STEPS.clear()
    for callback in (sketch(tmp_path), Reweight(delete=[0])):
        module = Counted()
        fresh = fit(Counted, [callback], epochs=1, max_steps=0)[1]
        fresh.fit_loop.max_epochs, fresh.fit_loop.epoch_loop.max_steps = 2, -1
        with pytest.raises(ConfigurationError, match=r"first step.*starts at step 3.*`ckpt_path`"):
            fresh.fit(module, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert not STEPS


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return ((x, y) for x, y in data())


def collate(examples: list[Any]) -> dict[str, Any]:
    x, y = torch.utils.data.default_collate(examples)
    return {"x": x, "y": y}


class Keyed(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


@pytest.mark.parametrize(
    ("kind", "train", "ids", "message"),
    [
        (Counted, lambda: DataLoader(Stream(), 4), "auto", '`ids="auto"`.*IterableDataset.*`ids='),
        (Counted, lambda: DataLoader(data(), 4, in_order=False), "auto", '`ids="auto"`.*in_order=False'),
        (Keyed, lambda: DataLoader(data(), 4, collate_fn=collate), "row", r"`ids='row'` is not a key.*\['x', 'y'\]"),
        (
            Counted,
            loader,
            lambda batch: torch.arange(4) + 9,
            "`ids` gave example 12, but the train dataset has.*0 to 11",
        ),
        (Counted, loader, lambda batch: torch.arange(4) - 1, "`ids` gave example -1"),
        (Counted, loader, lambda batch: torch.arange(3), "`ids` gave 3 examples but the batch holds 4"),
        (Counted, loader, lambda batch: torch.rand(4), r"`ids` must give \(B,\) integers"),
    ],
)
def test_examples_that_are_not_known(kind, train, ids, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        fit(kind, [sketch(tmp_path, ids=ids)], train())
    assert not STEPS


def test_a_dataset_without_length_needs_units(tmp_path):
    ids = lambda batch: [0, 1, 2, 3]  # noqa: E731
    with pytest.raises(ConfigurationError, match=r"`units` must be given.*Stream"):
        fit(Counted, [sketch(tmp_path, ids=ids)], DataLoader(Stream(), 4))
    assert not STEPS
    fit(Counted, [sketch(tmp_path, ids=ids, units=range(4))], DataLoader(Stream(), 4))


class Special(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(x)


class NoRule(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.Sequential(nn.Tanh(), Special()))


def test_an_operator_without_a_rule_is_named(tmp_path):
    with pytest.raises(
        UnsupportedOperatorError, match=r"`aten\.special_bessel_j1\.default` \(in `net\.1\.1`\).*jet_rule"
    ):
        fit(NoRule, [sketch(tmp_path)])
    assert set(STEPS) == {0}


class NotANumber(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("nan")


def test_a_loss_that_is_not_a_number(tmp_path):
    with pytest.raises(FidelityError, match=r"training loss is nan at optimizer step 0"):
        fit(NotANumber, [sketch(tmp_path)])


class OwnLoss(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - F.one_hot(batch[1], 3)).square().mean()


@pytest.mark.parametrize("callback", ["sketch", "reweight"])
def test_a_loss_that_cannot_be_weighted(callback, tmp_path):
    with pytest.raises(ConfigurationError, match=r"`loss='auto'` found no.*`loss=callable.*`per_example_loss"):
        fit(OwnLoss, [sketch(tmp_path) if callback == "sketch" else Reweight(delete=[0])])


def test_a_callable_that_is_not_the_training_loss(tmp_path):
    def twice(module: Any, batch: Any) -> Tensor:
        return 2 * F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")

    with pytest.raises(FidelityError, match=r"`training_step` again.*or `loss` is not the training loss"):
        fit(Counted, [sketch(tmp_path, loss=twice)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"delete": [12]}, "`delete` must name units 0 to 11"),
        ({"delete": [-1]}, "`delete` must name units 0 to 11"),
        ({"weights": [1.0, 2.0]}, "`weights` must be 12 finite numbers"),
        ({"weights": [float("inf")] * 12}, "`weights` must be 12 finite numbers"),
        ({"units": [0, 1]}, "`units`"),
    ],
)
def test_what_cannot_be_reweighted(argument, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(Counted, [Reweight(**argument)])
    assert not STEPS


def test_delete_and_weights_exclude_each_other():
    with pytest.raises(ConfigurationError, match=r"`delete` and `weights` exclude each other"):
        Reweight(delete=[0], weights=[1.0])


@pytest.mark.parametrize("averaging", [StochasticWeightAveraging(1e-2), EMAWeightAveraging()])
def test_averaged_parameters_are_refused(averaging, tmp_path):
    with pytest.raises(ConfigurationError, match=type(averaging).__name__):
        fit(Counted, [averaging, sketch(tmp_path, 2)])
    assert not STEPS


def test_a_list_of_units_is_asked_for():
    with pytest.raises(ConfigurationError, match="`delete` must be a list of units but is 3"):
        Reweight(delete=3)


def test_what_kinks_cost_is_said_before_training(tmp_path):
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"`net\.1` \(ReLU\) is piecewise linear"):
        fit(lambda: Classifier(net), [sketch(tmp_path, 2)])


class Wild(Classifier):
    """Trains at a rate at which every order is larger than the one before."""

    lr = 30.0


def test_terms_that_grow_with_the_order_are_reported(tmp_path):
    with pytest.warns(UserWarning, match="Taylor terms of the parameters grow with the order"):
        fit(Wild, [sketch(tmp_path, 2, degree=3, design="basis")])


def test_terms_that_grow_are_reported_early(tmp_path):
    """Hours may lie between the tenth step and the end; oracle: the steps that were taken before the warning."""

    class Restless(Counted):
        lr = 30.0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taken = []

        class Look(pl.Callback):
            def on_train_batch_end(self, *_):
                taken.append(any("after 10 optimizer steps the Taylor terms" in str(w.message) for w in caught))

        fit(Restless, [sketch(tmp_path, 2, degree=3, design="basis"), Look()], epochs=7)
    assert taken == [step >= 10 for step in range(1, 22)]
    ours = [str(w.message) for w in caught if "Taylor terms of the parameters grow" in str(w.message)]
    assert len(ours) == 2  # and once of the whole run


def test_the_other_package_of_lightning_is_named(tmp_path):
    """Oracle: the error's words."""
    other = pytest.importorskip("pytorch_lightning")

    class Theirs(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for callback in (sketch(tmp_path, 2), Reweight(delete=[0])):
        trainer = other.Trainer(callbacks=[callback], max_epochs=1, precision="64-true", **QUIET)
        with pytest.raises(ConfigurationError, match=r"of the package `pytorch_lightning`.*`import lightning\.pytorch"):
            trainer.fit(Theirs(), loader())


@pytest.mark.parametrize("several", [lambda: [loader(), loader()], lambda: {"a": loader()}])
def test_several_dataloaders_are_refused_before_units_are_asked_for(several, tmp_path):
    with pytest.raises(ConfigurationError, match=r"the train dataloader is a (list|dict): let every batch carry"):
        fit(Counted, [sketch(tmp_path, 2)], several())
    assert not STEPS


def test_a_run_without_a_sketch_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no sketch was written"):
        fit(Classifier, [sketch(tmp_path, 2)], fast_dev_run=True)
    with pytest.raises(SketchError, match="there is no sketch"):
        Sketch.load(tmp_path)
