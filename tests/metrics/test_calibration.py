"""Calibration: predictions beside models that were really retrained."""

import numpy as np
import pytest
import torch
from helpers import FEATURES, Classifier, data, fit
from scipy.stats import spearmanr
from torch import nn

from lightning_sketch import ConfigurationError, DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.metrics import calibrate

UNITS = np.arange(12) % 6
SETS = [(0,), (3,), (1, 4), (5, 2)]


class Normalised(Classifier):
    """BatchNorm, so that retrained buffers matter, one of them an integer; a buffer that no state_dict holds."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def logits(module, batch):
    return module.net(batch[0]) * module.scale


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("sketch")
    fit(Normalised, [SketchCallback(dirpath, degree=2, design="basis+common", units=UNITS)])
    retrained = {units: fit(Normalised, [Reweight(units=UNITS, delete=units)])[0] for units in SETS}
    return Sketch.load(dirpath), retrained, data(7, seed=5)[:]


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_predictions_are_compared_with_retrained_modules(study, as_state_dict):
    """Oracle: the retrained modules' own outputs, and every number by numpy and scipy."""
    sketch, retrained, batch = study
    given = {u: m.state_dict() for u, m in retrained.items()} if as_state_dict else retrained
    predictor = DeletionPredictor(sketch, Normalised().double(), logits)
    found = predictor.calibrate(batch, given, level=0.8)
    with torch.no_grad():
        true = torch.stack([logits(module.eval(), batch) for module in retrained.values()]).numpy()
    prediction = predictor.prepare(batch).delete_many([list(units) for units in SETS])
    low, high = (bound.numpy() for bound in prediction.interval(0.8))
    predicted, change = prediction.change.numpy(), true - prediction.baseline.numpy()
    assert found.num_sets == 4
    assert found.level == 0.8
    assert found.coverage == pytest.approx(np.mean((low <= true) & (true <= high)))
    assert found.bias == pytest.approx(np.mean(predicted - change) / np.mean(np.abs(change)))
    assert found.relative_error == pytest.approx(np.linalg.norm(predicted - change) / np.linalg.norm(change))
    pairs = zip(predicted.reshape(4, -1).T, change.reshape(4, -1).T, strict=True)
    assert found.lds == pytest.approx(np.mean([spearmanr(p, t).statistic for p, t in pairs]))
    assert found.relative_error < 0.1  # so that the retrained numbers were the right ones
    assert found.lds > 0.8


def test_losses_are_compared_too(study):
    """Oracle: the error of an output known to be right; two sets are not ranked."""
    sketch, retrained, batch = study
    predictor = DeletionPredictor(sketch, Normalised().double())
    found = predictor.calibrate(batch, {units: retrained[units] for units in SETS[:2]})
    assert found.relative_error < 0.1
    assert found.level == 0.9
    assert found.lds is None
    assert "LDS" not in repr(found)
    assert "of 2 deletions" in repr(found)


def test_the_models_are_left_alone(study):
    """Oracle: modes and tensors before."""
    sketch, retrained, batch = study
    module = Normalised().double().train()
    models = [module, *retrained.values()]
    for model in models:
        model.train()
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    DeletionPredictor(sketch, module, logits).calibrate(batch, retrained)
    for model, tensors in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


def test_what_is_no_retrained_model_is_refused(study):
    """Oracle: the argument's name in the message."""
    sketch, retrained, batch = study
    predictor = DeletionPredictor(sketch, Normalised().double(), logits)
    with pytest.raises(ConfigurationError, match="`retrained` is empty"):
        predictor.calibrate(batch, {})
    with pytest.raises(ConfigurationError, match=r"`retrained` has the key 3: give a tuple"):
        predictor.calibrate(batch, {3: retrained[(3,)]})
    with pytest.raises(ConfigurationError, match=r"`retrained\[\(3,\)\]` has no `net\.\d\.\w+` of shape"):
        predictor.calibrate(batch, {(3,): Classifier()})
    with pytest.raises(ConfigurationError, match=r"`retrained\[\(3,\)\]` has no"):
        predictor.calibrate(batch, {(3,): {"state_dict": retrained[(3,)].state_dict()}})
    with pytest.raises(ConfigurationError, match="`units`"):
        predictor.calibrate(batch, {(6,): retrained[(3,)]})
    with pytest.raises(ConfigurationError, match="`level`"):
        predictor.calibrate(batch, retrained, level=90)


def test_shapes_that_differ_are_refused(study):
    """Oracle: the argument's name in the message."""
    sketch, _, batch = study
    effect = DeletionPredictor(sketch, Normalised().double(), logits).prepare(batch)
    with pytest.raises(ConfigurationError, match=r"`true` has shape \(7, 3\)"):
        calibrate(effect.delete_many([[0]]), effect.baseline)
