"""Metrics of counterfactual models: their error bars on known posteriors, their values against retraining."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassROC,
)

from lightning_sketch import ConfigurationError, DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.directions import make_directions
from lightning_sketch.prediction import Effect
from lightning_sketch.prediction.evaluation import evaluate

UNITS = np.arange(240) % 12
SETS = [[3], [0, 7], [5]]


class WeightedSum(torchmetrics.Metric):
    """A linear metric: ``sum_i preds_i target_i``."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64))

    def update(self, preds, target):
        self.total = self.total + (preds * target).sum()

    def compute(self):
        return self.total


class CrossEntropy(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("loss", torch.tensor(0.0, dtype=torch.float64))

    def update(self, preds, target):
        self.loss = F.cross_entropy(preds, target)

    def compute(self):
        return self.loss


def quadratic(vectors, count=3, n=8):
    """Outputs ``o`` with ``f(x) = v_o . x + (v_o . x)^2``, of which a few directions do not tell all."""
    psi = make_directions(count, "sphere", n, seed=0).array
    inner = psi @ vectors.T
    coefficients = torch.from_numpy(np.stack([inner, inner**2]))
    return Effect(torch.zeros(len(vectors), dtype=torch.float64), coefficients, psi, np.arange(n))


SAMPLES = 1000
# Of a standard deviation from 1,000 draws: four times its relative standard error 1 / sqrt(2 * 1000)
SAMPLING = 4 / math.sqrt(2 * SAMPLES)


def stderr_of_sum(effect, weights, delete, **options):
    weights = torch.tensor(weights, dtype=torch.float64)
    found = evaluate(effect, weights, WeightedSum(), delete, "auto", options.get("degree"), SAMPLES, 0)
    return found.stderr["WeightedSum"]


@pytest.mark.parametrize("degree", [1, 2])
def test_outputs_that_vary_together_err_together(degree):
    """Oracle: ``|sum_o w_o a_o|`` times the error of one, of outputs ``a_o f`` that differ by a factor."""
    v, factors = np.random.default_rng(0).standard_normal(8), np.array([1.0, -2.0, 0.5])
    one = quadratic(v[None])
    coefficients = one.coefficients * torch.from_numpy(factors)
    effect = Effect(torch.zeros(3, dtype=torch.float64), coefficients, one._directions, np.arange(8))
    stderr = float(one.delete([2, 3], degree=degree).stderr)
    assert stderr > 0
    for weights in ([1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, -1.0, 3.0]):
        expected = abs(np.dot(weights, factors)) * stderr
        found = stderr_of_sum(effect, weights, [2, 3], degree=degree)
        np.testing.assert_allclose(found, expected, rtol=SAMPLING, atol=1e-12)


def test_outputs_that_vary_on_their_own_err_on_their_own():
    """Oracle: the root of the sum of squares, of outputs with coefficients along different directions."""
    psi = make_directions(6, "sphere", 20, seed=0).array
    coefficients = np.zeros((1, 6, 3), dtype=complex)
    coefficients[0, 0, 0], coefficients[0, 0, 1], coefficients[0, 2:, 2] = 1, 1j, [1, 1j, 0, 2]
    effect = Effect(torch.zeros(3, dtype=torch.float64), torch.from_numpy(coefficients), psi, np.arange(20))
    stderr = effect.delete([0, 4]).stderr.numpy()
    assert stderr.min() > 0
    for weights in ([1.0, 1.0, 1.0], [2.0, -1.0, 0.0]):
        expected = np.linalg.norm(weights * stderr)
        np.testing.assert_allclose(stderr_of_sum(effect, weights, [0, 4]), expected, rtol=SAMPLING)


@pytest.mark.parametrize("estimator", ["kernel", "mean", "median_of_means"])
def test_an_output_alone_errs_as_its_prediction(estimator):
    """Oracle: the standard error of the prediction, of an output that is itself the metric.

    The orders of the mean's errors are correlated; for one of these outputs the second lowers the error of the first.
    """
    effect = quadratic(np.random.default_rng(1).standard_normal((3, 8)), count=5)
    x = np.array([0, 0, -0.3, -0.3, 0, 0, 0, 0])
    for o, expected in enumerate(effect.delete(weights=x, estimator=estimator).stderr):
        found = evaluate(effect, F.one_hot(torch.tensor(o), 3), WeightedSum(), x, estimator, None, SAMPLES, 0)
        np.testing.assert_allclose(found.stderr["WeightedSum"], expected, rtol=SAMPLING)


def test_the_error_of_a_linear_metric_is_near_that_of_the_reduced_effect():
    """Oracle: the kernel estimator on the weighted sum itself; correlations are estimated, so to a fifth."""
    effect = quadratic(np.random.default_rng(1).standard_normal((20, 8)))
    generator = np.random.default_rng(2)
    ratios = []
    for _ in range(10):
        weights = generator.standard_normal(20)
        exact = effect.reduce(torch.from_numpy(weights)).delete([1, 5]).stderr
        ratios.append(float(stderr_of_sum(effect, weights, [1, 5]) / exact))
    print("sampled over exact standard errors", np.round(ratios, 2))
    assert 0.8 < np.exp(np.mean(np.log(ratios))) < 1.25


def test_a_linear_metric_of_the_prediction_is_exact_and_sees_the_last_order():
    """Oracle: the prediction's own fields."""
    effect = quadratic(np.random.default_rng(1).standard_normal((5, 8)))
    weights = torch.arange(5.0, dtype=torch.float64)
    x = np.zeros((2, 8))
    x[0, [1, 2]], x[1, 4] = 1, -0.5
    p = effect.delete_many(x)
    found = evaluate(effect, weights, WeightedSum(), x, "auto", None, 2, 0)
    torch.testing.assert_close(found.counterfactual["WeightedSum"], p.value @ weights)
    torch.testing.assert_close(found.truncation["WeightedSum"], ((p.by_degree[1] - p.by_degree[0]) @ weights).abs())
    assert float(found.baseline["WeightedSum"]) == 0
    again = evaluate(effect, weights, WeightedSum(), x, "auto", None, 2, 0)
    assert torch.equal(found.stderr["WeightedSum"], again.stderr["WeightedSum"])
    alone = evaluate(effect, weights, WeightedSum(), x[1], "auto", 1, 2, 0)
    torch.testing.assert_close(
        alone.counterfactual["WeightedSum"], effect.delete(weights=x[1], degree=1).value @ weights
    )


class Classes(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.8)


def examples(size, seed):
    """Noisy classes, so that metrics are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.7 * torch.randn(size, 3, generator=generator, dtype=torch.float64)).argmax(1)


TEST = examples(150, 8)


def train(*callbacks):
    pl.seed_everything(0, verbose=False)
    model = Classes()
    trainer = pl.Trainer(max_epochs=3, precision="64-true", callbacks=list(callbacks), **QUIET)
    trainer.fit(model, DataLoader(TensorDataset(*examples(240, 0)), batch_size=24, shuffle=True))
    return model.eval()


@pytest.fixture(scope="module")
def sketch(tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("run")
    train(SketchCallback(dirpath, degree=3, design="basis+common", units=UNITS))
    return Sketch.load(dirpath)


@pytest.fixture(scope="module")
def retrained():
    """Logits of really retrained models on the test examples, ``(sets, 150, 3)``."""
    return torch.stack([train(Reweight(units=UNITS, delete=units))(TEST[0]).detach() for units in SETS])


def metrics():
    return torchmetrics.MetricCollection(
        {
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "calibration": MulticlassCalibrationError(3, n_bins=10),
            "auroc": MulticlassAUROC(3),
            "loss": CrossEntropy(),
        }
    )


@pytest.fixture(scope="module")
def evaluation(sketch):
    predictor = DeletionPredictor(sketch, Classes().double(), "logits")
    return predictor.evaluate(DataLoader(TensorDataset(*TEST), batch_size=40), metrics(), SETS)


def by_hand(logits):
    """Accuracy, expected calibration error of ten bins, one-against-rest AUROC and loss, in numpy."""
    z, y = logits.numpy(), TEST[1].numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.ceil(confidence * 10).astype(int)
    gaps = [(bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean()) for b in set(bins)]
    pairs = [(p[y == c, c][:, None], p[y != c, c][None]) for c in range(3)]
    auroc = np.mean([(a > b).mean() + (a == b).mean() / 2 for a, b in pairs])
    return {
        "accuracy": right.mean(),
        "calibration": sum(gaps),
        "auroc": auroc,
        "loss": -np.log(p[range(150), y]).mean(),
    }


def test_metrics_equal_those_of_retrained_models(sketch, retrained, evaluation):
    """Oracles: retraining, and the metrics by hand.

    Measured are the errors ``e`` of the predicted logits; they bound what metrics may differ by. Accuracy: the part of
    examples whose two best true logits are closer than ``2 e``. AUROC: so many pairs, over classes, whose true
    probabilities are closer than ``e``, as these move by at most ``e / 2``. Loss: ``2 e``, since its gradient by the
    logits has an L1 norm below 2.
    """
    predicted = DeletionPredictor(sketch, Classes().double(), "logits").prepare(TEST).delete_many(SETS).value
    before = by_hand(train()(TEST[0]).detach())
    for i, logits in enumerate(retrained):
        true = by_hand(logits)
        e = float((predicted[i] - logits).abs().max())
        best = logits.topk(2, dim=1).values
        near = float((best[:, 0] - best[:, 1] < 2 * e).double().mean())
        p = logits.softmax(1)
        close = max(
            float(((p[TEST[1] == c, c][:, None] - p[TEST[1] != c, c][None]).abs() < e).double().mean())
            for c in range(3)
        )
        bounds = {"accuracy": near, "auroc": close, "loss": 2 * e, "calibration": 0.01}
        for name, value in true.items():
            found = float(evaluation.counterfactual[name][i])
            assert abs(float(evaluation.baseline[name]) - before[name]) < 1e-6
            print(
                f"{SETS[i]} {name}: {before[name]:.4f} -> {found:.4f}, retrained {value:.4f}, bound {bounds[name]:.4f}"
            )
            assert abs(found - value) <= bounds[name] + 1e-6
        bar = float(evaluation.stderr["loss"][i] + evaluation.truncation["loss"][i])
        assert abs(float(evaluation.counterfactual["loss"][i]) - true["loss"]) < 2 * bar + 1e-6
        assert bar < 0.5 * abs(true["loss"] - before["loss"])
        assert abs(float(evaluation.counterfactual["auroc"][i]) - true["auroc"]) < 0.001


def test_error_bars_vanish_where_all_is_measured(evaluation):
    """Oracle: single units lie on directions of the basis, pairs do not."""
    for stderr in evaluation.stderr.values():
        assert stderr.shape == (3,)
        assert float(stderr[0]) == float(stderr[2]) == 0
    assert float(evaluation.stderr["loss"][1]) > 0


def test_the_users_metrics_are_left_as_they_were(sketch, evaluation):
    """Oracles: what they compute of their own updates; metrics without any, which give the same evaluation."""
    collection = metrics()
    collection.update(torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 1]))
    expected = {name: value.clone() for name, value in collection.compute().items()}
    predictor = DeletionPredictor(sketch, Classes().double(), "logits")
    found = predictor.evaluate(TEST, collection, [3], samples=1)
    for name, value in collection.compute().items():
        assert torch.equal(value, expected[name])
        torch.testing.assert_close(found.baseline[name], evaluation.baseline[name])
        assert found.baseline[name] != value


def test_batches_keys_sets_and_one_set_agree(sketch, evaluation):
    """Oracle: many sets at once through a dataloader."""
    x, y = TEST
    predictor = DeletionPredictor(sketch, Classes().double(), "logits")
    one_hot = torch.zeros(12)
    one_hot[3] = 1
    cases = [
        predictor.evaluate((x, y), metrics(), [3], samples=1),
        predictor.evaluate({"x": x, "labels": y}, metrics(), one_hot, samples=1),
        predictor.evaluate((x, y + 5), metrics(), [3], samples=1, targets=lambda batch: batch[1] - 5),
    ]
    network = DeletionPredictor(sketch, Classes().double(), lambda module, batch: module.net(batch[0]))
    cases.append(network.evaluate((x, y, y), metrics(), [3], samples=1, targets=lambda batch: batch[2]))
    for found in cases:
        for name, value in found.counterfactual.items():
            torch.testing.assert_close(value, evaluation.counterfactual[name][0])
            assert value.shape == ()
    accuracy = predictor.evaluate(TEST, MulticlassAccuracy(3, average="none"), SETS, samples=1)
    assert accuracy.baseline["MulticlassAccuracy"].shape == (3,)
    assert accuracy.stderr["MulticlassAccuracy"].shape == (3, 3)


def test_an_evaluation_reads_as_a_table(sketch):
    """Oracle: the text, of a metric that counts; its numbers come from the prediction."""
    predictor = DeletionPredictor(sketch, Classes().double(), "logits")
    found = predictor.evaluate(TEST, MulticlassConfusionMatrix(3), [3], samples=1)
    heading, row = repr(found).splitlines()
    assert heading.split() == ["metric", "baseline", "counterfactual", "stderr", "truncation"]
    assert row.split()[:6] == ["mean", "of", "MulticlassConfusionMatrix", "16.6667", "16.6667", "0"]
    many = repr(predictor.evaluate(TEST, MulticlassAccuracy(3), SETS, samples=1)).splitlines()
    assert [line.split()[1] for line in many] == ["deletion", "0", "1", "2"]


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("loss", {}, "`evaluate` gives the output to metrics .*'loss' is not.*output='logits'"),
        ("probabilities", {}, "`evaluate` gives the output to metrics"),
        ("parameter:net.0.bias", {}, "`evaluate` gives the output to metrics"),
        ("logits", {"metrics": F.cross_entropy}, "`metrics` must be a torchmetrics.Metric or MetricCollection"),
        ("logits", {"metrics": MulticlassROC(3)}, "`metrics`: 'MulticlassROC' computes a tuple"),
        ("logits", {"samples": 0}, "`samples` is 0"),
        ("logits", {"delete": [12]}, "`units` holds"),
        ("logits", {"delete": 3}, "`delete` is 3: give a list of units"),
        ("logits", {"delete": np.zeros(3)}, "`weights` has shape"),
        ("logits", {"degree": 4}, "`degree` is 4"),
        ("logits", {"batches": TEST[0]}, "a Tensor.*does not tell its targets"),
        ("logits", {"targets": lambda batch: batch[1][1:]}, "`targets` gives 149 targets to 150 predictions"),
        ("logits", {"targets": lambda batch: batch[1].tolist()}, "`targets` must return a tensor but returned list"),
    ],
)
def test_impossible_evaluations_are_refused(sketch, output, arguments, message):
    """Oracle: the error's words."""
    given = {"batches": TEST, "metrics": MulticlassAccuracy(3), "delete": [3], "samples": 1, **arguments}
    with pytest.raises(ConfigurationError, match=message):
        DeletionPredictor(sketch, Classes().double(), output).evaluate(**given)
