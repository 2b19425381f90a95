"""A run whose coefficients or loss are not finite any more goes on; the sketch does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Classifier, fit, sketch
from torch import Tensor, nn

from lightning_sketch import ConfigurationError, FidelityError, InstabilityError, Sketch


class NotANumber(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 4 else loss


class Steep(Classifier):
    """Adds from step 4 on a wave too small to change a bit, whose third derivative is more than float64 holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        wave = 1e-300 * torch.sin(1e150 * self.net[0].bias.sum())
        return loss if self.global_step < 4 else loss + wave


class Watched(Classifier):
    """Counts how often the step really runs."""

    runs = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).runs += 1
        return super().training_step(batch, batch_idx)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("kind", "words"), [(NotANumber, "loss is nan"), (Steep, "coefficients.*not finite")])
def test_the_run_goes_on_without_a_sketch(kind: type[Classifier], words: str, tmp_path: Path) -> None:
    """Oracle: the run without the callback, to the last bit."""
    plain, _ = fit(kind, epochs=4)
    callback = sketch(tmp_path, degree=3)
    with pytest.warns(UserWarning, match=rf"{words}.*optimizer step 4.*Training goes on; the sketch is not written"):
        tracked, trainer = fit(kind, [callback], epochs=4)
    assert trainer.global_step == 12
    for name, value in parameters(plain).items():
        assert torch.equal(parameters(tracked)[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
    assert not (tmp_path / "sketch/sketch.json").exists()
    assert tracked.training_step.__func__ is kind.training_step


def test_the_sketch_of_an_earlier_run_is_named(tmp_path: Path) -> None:
    fit(Classifier, [sketch(tmp_path)])
    with pytest.warns(UserWarning, match="the sketch is not written, and that of an earlier run stays in"):
        fit(NotANumber, [sketch(tmp_path)], epochs=4)


def test_an_earlier_sketch_stays(tmp_path: Path) -> None:
    """Oracle: the sketch of a run that ends there."""
    callback = sketch(tmp_path / "whole", degree=3, every_n_train_steps=3)
    with pytest.warns(UserWarning, match="sketch of step 3 stays in"):
        fit(Steep, [callback], epochs=4)
    fit(Classifier, [sketch(tmp_path / "short", degree=3)], epochs=1)
    whole, short = (Sketch.load(tmp_path / kind / "sketch") for kind in ("whole", "short"))
    assert whole.steps == short.steps == 3
    for a, b in zip(whole.shards(), short.shards(), strict=True):
        for name, value in b.coefficients.items():
            assert torch.equal(a.coefficients[name], value)


def test_nothing_is_run_again_after_giving_up(tmp_path: Path) -> None:
    """Oracle: a count of training steps, of which the callback makes more while it follows the run."""

    class Both(Watched, Steep):
        pass

    Both.runs = 0
    with pytest.warns(UserWarning, match="Training goes on"):
        fit(Both, [sketch(tmp_path, degree=3)], epochs=2)
    before = Both.runs
    Both.runs = 0
    with pytest.warns(UserWarning, match="Training goes on"):
        fit(Both, [sketch(tmp_path, degree=3)], epochs=4)
    assert Both.runs == before + 6


def test_stopping_is_a_choice(tmp_path: Path) -> None:
    with pytest.raises(InstabilityError, match="not finite after optimizer step 4") as caught:
        fit(Steep, [sketch(tmp_path, degree=3, on_instability="stop")], epochs=4)
    assert isinstance(caught.value, FidelityError)


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`on_instability` must be 'warn' or 'stop' but is 'ignore'"):
        sketch(tmp_path, directions=np.ones((1, 12)), on_instability="ignore")
