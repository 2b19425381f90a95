"""The audit's verdict beside models that were really retrained, and its numbers beside scikit-learn and scipy."""

import copy
import io
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, Classifier, data, fit, loader
from scipy import stats
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_sketch import ConfigurationError, DeletionPredictor, Reweight, Sketch, SketchCallback
from lightning_sketch.unlearning import GradientAscent, Measure, SketchStep, audit
from lightning_sketch.unlearning.audit import _judge

Batch = tuple[Tensor, Tensor]


def train(x: Tensor, y: Tensor, steps: int = 150) -> nn.Sequential:
    """Full-batch gradient descent from one seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def ascended(model: nn.Module, batch: Batch, target: float) -> nn.Module:
    """Gradient ascent until the loss of the batch is at ``target``."""
    model = copy.deepcopy(model)
    for _ in range(2000):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if loss >= target:
            break
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.add_(g, alpha=0.01)
    return model


class Case:
    """A training, a forget set, and the retraining without it."""

    def __init__(self, chosen: str) -> None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x, y = torch.as_tensor(digits.data[order] / 16), torch.as_tensor(digits.target[order])
        self.test = (x[300:700], y[300:700])
        x, y = x[:300], y[:300]
        of_class = (y == 3).nonzero()[:20, 0]
        rows = torch.isin(torch.arange(300), of_class) if chosen == "class subset" else torch.arange(300) < 30
        self.forget, self.retain = (x[rows], y[rows]), (x[~rows], y[~rows])
        self.original, self.retrained = train(x, y), train(*self.retain)
        before, after = (F.cross_entropy(m(x[rows]), y[rows]).item() for m in (self.original, self.retrained))
        self.before, self.effect = before, after - before

    def audit(self, unlearned: nn.Module, **options: Any):
        sets = {"forget": self.forget, "retain": self.retain, "test": self.test, "reference": self.retrained}
        return audit(self.original, unlearned, **(sets | options))


@pytest.fixture(scope="module", params=["class subset", "random examples"])
def case(request):
    return Case(request.param)


def moved(model: nn.Module, distance: float, seed: int) -> nn.Module:
    """The model, moved by so much in a random direction."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    noise = [torch.randn_like(p) for p in model.parameters()]
    size = sum(float(n.square().sum()) for n in noise) ** 0.5
    with torch.no_grad():
        for p, n in zip(model.parameters(), noise, strict=True):
            p.add_(n, alpha=distance / size)
    return model


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum((p - q).detach().square().sum().item() for p, q in pairs) ** 0.5


def test_the_retrained_model_passes_and_the_unchanged_one_does_not(case):
    """Oracle: the definition of unlearning."""
    passed = case.audit(copy.deepcopy(case.retrained))
    assert passed.verdict == "passed"
    assert passed.passed
    assert passed.reference == "retrained"
    unchanged = case.audit(case.original)
    assert unchanged.verdict == "too little"
    assert not unchanged.passed
    assert f"forget loss {-case.effect:+.3g} nats" in unchanged.reason


def test_forgetting_too_much_fails(case):
    """Oracle: a model whose forget loss is raised by three times as much as retraining raises it, by ascent."""
    report = case.audit(ascended(case.original, case.forget, case.before + 3 * case.effect))
    assert report.verdict == "too much"


def test_a_random_perturbation_of_the_same_norm_fails(case):
    """Oracle: directions of another generator, as far away as the retrained model is; none may pass."""
    for seed in range(5):
        report = case.audit(moved(case.original, distance(case.original, case.retrained), seed))
        assert not report.passed
    assert case.audit(case.retrained).control_verdict != "passed"


@pytest.mark.parametrize(
    ("forget", "test", "verdict"),
    [
        (1.45, 0, "passed"),
        (0.55, 0, "passed"),
        (1.55, 0, "too much"),
        (0.45, 0, "too little"),
        (1, 0.45, "passed"),
        (1, 0.55, "too much"),
        (1, -0.55, "too little"),
        (0.45, 0.55, "too little"),
    ],
)
def test_the_rule_at_its_threshold(forget, test, verdict):
    """Oracle: the rule by hand, on models that look their logits up, with chosen losses; ``E`` is 1."""
    inputs = torch.tensor([[0.0], [1.0], [2.0]])  # forget, retain, test
    targets = torch.zeros(1, dtype=torch.long)

    class Table(nn.Module):
        def __init__(self, losses):
            super().__init__()
            p = torch.tensor(losses).double().neg().exp()
            self.logits = nn.Parameter(torch.stack([p.log(), (1 - p).log()], 1))

        def forward(self, x):
            return self.logits[x[:, 0].long()]

    original, reference = Table([0.1, 0.1, 1.0]), Table([1.1, 0.1, 1.0])
    unlearned = Table([0.1 + forget, 0.1, 1.0 + test])
    sets = {name: (inputs[i : i + 1], targets) for i, name in enumerate(("forget", "retain", "test"))}
    assert audit(original, unlearned, **sets, reference=reference).verdict == verdict


@pytest.mark.parametrize(
    ("error", "forget", "verdict"),
    [
        (0.0, 0.55, "too little"),
        (0.2, 0.45, "passed"),
        (0.2, 0.35, "too little"),
        (0.2, 1.75, "passed"),
        (0.2, 1.85, "too much"),
        (0.45, 1.1, "passed"),
        (0.55, 1.1, "undecided"),
    ],
)
def test_the_error_of_the_reference_widens_what_passes(error, forget, verdict):
    """Oracle: the rule by hand; the reference's forget loss is ``1.1 +- error`` and the original's 0.1."""
    exact = Measure(1.0, 1.0, 1.0)
    values = {
        "original": {"forget_loss": Measure(0.1, 0.1, 0.1), "test_loss": exact},
        "unlearned": {"forget_loss": Measure(forget, forget, forget), "test_loss": exact},
        "reference": {"forget_loss": Measure(1.1, 1.1 - error, 1.1 + error), "test_loss": exact},
    }
    assert _judge(values, "unlearned", 0.5, True)[0] == verdict
    assert _judge(values, "unlearned", 0.5, False)[0] == "undecided"


def test_too_small_an_effect_is_undecided():
    """Oracle: a reference that forgets nothing is the original."""
    case = Case("random examples")
    report = case.audit(case.original, reference=copy.deepcopy(case.original))
    assert report.verdict == "undecided"
    assert not report.passed
    assert json.loads(report.to_json())["values"]["unlearned"]["parameter_distance"]["value"] is None  # 0 / 0


def test_numbers_are_those_of_scikit_learn_and_scipy(case):
    """Oracle: ``log_loss``, ``accuracy_score``, ``roc_auc_score`` and ``scipy.stats.entropy``."""
    unlearned = ascended(case.original, case.forget, case.before + case.effect)
    report = case.audit(unlearned)
    sets = {"forget": case.forget, "retain": case.retain, "test": case.test}
    models = {"original": case.original, "unlearned": unlearned, "reference": case.retrained}
    p = {
        model: {name: softmax(module(x).detach().numpy(), axis=1) for name, (x, _) in sets.items()}
        for model, module in models.items()
    }
    alike = np.isin(case.test[1], case.forget[1])
    for model, values in p.items():
        found = report.values[model]
        for name, (_, y) in sets.items():
            assert found[f"{name}_loss"].value == pytest.approx(log_loss(y, values[name], labels=range(10)), rel=1e-9)
            assert found[f"{name}_accuracy"].value == accuracy_score(y, values[name].argmax(1))
        for name in ("forget", "test"):
            reference = p["reference"][name]
            kl = stats.entropy(reference, values[name], axis=1).mean()
            assert found[f"{name}_kl"].value == pytest.approx(kl, abs=1e-10)
            other = (reference.argmax(1) != values[name].argmax(1)).mean()
            assert found[f"{name}_disagreement"].value == pytest.approx(other)
        own = np.concatenate(
            [
                values[n][np.arange(len(sets[n][1])), sets[n][1]][rows]
                for n, rows in (("forget", slice(None)), ("test", alike))
            ]
        )
        member = np.arange(len(own)) < len(case.forget[1])
        auroc = found["auroc_loss"]
        assert auroc.value == pytest.approx(roc_auc_score(member, own), abs=1e-9)
        assert auroc.low <= auroc.value <= auroc.high
        assert auroc.low < auroc.high
        assert found["forget_loss"].low == found["forget_loss"].high  # nothing was predicted
    assert report.sizes == {name: len(y) for name, (_, y) in sets.items()}
    ratio = distance(unlearned, case.retrained) / distance(case.original, case.retrained)
    assert report.values["unlearned"]["parameter_distance"].value == pytest.approx(ratio, rel=1e-9)
    change = [report.values[model]["relative_change"].value for model in ("unlearned", "random")]
    assert change[0] == pytest.approx(change[1], rel=1e-9)
    assert report.values["original"]["relative_change"].value == 0


def test_the_report_is_a_table_a_dictionary_and_a_figure(case):
    """Oracle: one beside the other."""
    report = case.audit(case.original)
    as_dict = json.loads(report.to_json())
    assert as_dict == report.to_dict()
    assert as_dict["verdict"] == "too little"
    assert as_dict["values"]["reference"]["test_loss"]["value"] == report.values["reference"]["test_loss"].value
    assert all(m["value"] is not None for values in as_dict["values"].values() for m in values.values())
    assert repr(report).startswith("AuditReport(too little, against the retrained model: forget loss -")
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=250, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for words in ("against the retrained model: too little", "auroc modified entropy", "forget efficacy"):
        assert words in text
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, ax = report.plot()
    assert ax.figure is figure
    drawn = [container.lines[0].get_ydata(orig=False) for container in ax.containers]
    for values, heights in zip(report.values.values(), drawn, strict=True):
        expected = [values[f"{name}_loss"].value for name in ("forget", "retain", "test")]
        np.testing.assert_allclose(heights, expected)
    pyplot.close("all")


def test_what_can_not_be_measured_is_left_out(case, monkeypatch):
    """Oracle: the names; there are no test examples of the forgotten classes, no scikit-learn and no rich."""
    x, y = case.test
    others = ~torch.isin(y, case.forget[1][:1])
    alone = tuple(t[:1] for t in case.forget)
    whole = case.audit(case.original).values["original"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    report = case.audit(case.original, forget=alone, test=(x[others], y[others]))
    left_out = whole.keys() - report.values["original"].keys()
    attacks = ("loss", "confidence", "entropy", "modified_entropy")
    assert left_out == {f"{kind}_{attack}" for kind in ("auroc", "tpr") for attack in attacks} | {"forget_efficacy"}
    with pytest.raises(ConfigurationError, match="`table` needs rich"):
        report.table()


def test_modules_are_left_as_they_were(case):
    """Oracle: copies from before; dropout would change the numbers in training mode."""
    with_dropout = nn.Sequential(*case.original, nn.Dropout(0.9)).train()
    before, random = copy.deepcopy(with_dropout.state_dict()), torch.get_rng_state()
    report = audit(
        with_dropout,
        with_dropout,
        forget=case.forget,
        retain=case.retain,
        test=case.test,
        reference=nn.Sequential(*case.retrained, nn.Dropout(0.9)),
    )
    assert report.values["original"]["forget_loss"].value == pytest.approx(case.before, rel=1e-12)
    assert all(m.training for m in with_dropout.modules())
    assert all(torch.equal(t, before[name]) for name, t in with_dropout.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_single_logits_are_two_classes():
    """Oracle: the binary cross-entropy."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 3), torch.randint(0, 2, (30, 1)).float()
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    sets = {"forget": (x[:10], y[:10]), "retain": (x[10:20], y[10:20]), "test": (x[20:], y[20:])}
    report = audit(model, model, **sets, reference=other)
    expected = F.binary_cross_entropy_with_logits(model(x[:10]).double(), y[:10].double()).item()
    assert report.values["original"]["forget_loss"].value == pytest.approx(expected, rel=1e-9)


class Logits(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


UNITS = [i // 4 for i in range(48)]
DELETED = [2, 7]
ROWS = [i for i, unit in enumerate(UNITS) if unit in DELETED]


@pytest.fixture(scope="module")
def sketched(tmp_path_factory):
    """A sketched run, its sketch, and the retrained model."""
    dirpath = tmp_path_factory.mktemp("sketch")
    sketching = SketchCallback(dirpath, degree=4, design="indicator", deletion_sets=[DELETED], units=UNITS)
    original, _ = fit(Logits, [sketching], loader(48, 8), epochs=6)
    retrained, _ = fit(Logits, [Reweight(units=UNITS, delete=DELETED)], loader(48, 8), epochs=6)
    return original, Sketch.load(dirpath), retrained


def sets_of_run(**options: Any) -> dict[str, Any]:
    kept = [i for i in range(48) if i not in ROWS]
    return {
        "forget": DataLoader(Subset(data(48), ROWS), batch_size=3),
        "retain": DataLoader(Subset(data(48), kept), batch_size=7, shuffle=True),
        "test": data(20, seed=9).tensors,
        **options,
    }


def test_the_predicted_verdicts_are_those_of_retraining(sketched):
    """Oracle: the model really retrained; the same models, judged by either."""
    original, sketch, retrained = sketched
    predictor = DeletionPredictor(sketch, original, "logits")
    trials = {
        "unchanged": original,
        "retrained": retrained,
        "step": SketchStep(sketch, DELETED).unlearn(original, sets_of_run()["forget"]).module,
        "ascended": GradientAscent(lr=0.5, epochs=40).unlearn(original, sets_of_run()["forget"]).module,
    }
    verdicts = {}
    for name, module in trials.items():
        predicted = audit(original, module, **sets_of_run(), predictor=predictor, delete=DELETED)
        true = audit(original, module, **sets_of_run(), reference=retrained)
        assert (predicted.reference, true.reference) == ("predicted", "retrained")
        verdicts[name] = predicted.verdict
        assert predicted.verdict == true.verdict
    assert verdicts == {"unchanged": "too little", "retrained": "passed", "step": "passed", "ascended": "too much"}
    for name in ("forget_loss", "test_loss"):
        found, truth = predicted.values["reference"][name], true.values["reference"][name]
        assert found.low < truth.value < found.high
        assert found.low < found.value < found.high
        assert found.high - found.low < 0.2 * (truth.value - true.values["original"][name].value)
    assert predicted.values["reference"]["forget_kl"] == (0, 0, 0)
    assert predicted.values["unlearned"]["forget_kl"].low < predicted.values["unlearned"]["forget_kl"].high


def test_a_prediction_that_is_not_reliable_decides_nothing(sketched, tmp_path):
    """Oracle: a sketch of degree 1, which is never reliable."""
    original, _, retrained = sketched
    callback = SketchCallback(tmp_path, degree=1, design="indicator", deletion_sets=[DELETED], units=UNITS)
    module, _ = fit(Logits, [callback], loader(48, 8), epochs=6)
    predictor = DeletionPredictor(Sketch.load(tmp_path), module, "logits")
    report = audit(original, retrained, **sets_of_run(), predictor=predictor, delete=DELETED)
    assert report.verdict == "undecided"
    assert "not reliable" in report.reason


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 3)).double()


x, y = data(6).tensors
sets = {"forget": (x, y), "retain": (x, y), "test": (x, y)}
plain = network()
diverged = network()
nn.init.constant_(diverged[0].bias, math.inf)


@pytest.mark.parametrize("name", ["forget", "retain", "test"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((x[:0], y[:0]), "is empty"),
        (DataLoader(TensorDataset(x[:0], y[:0])), "is empty"),
        ((x * torch.nan, y), "holds NaN"),
        (None, "is None"),
        (data(6), "is a TensorDataset"),
    ],
)
def test_empty_sets_and_nan_are_refused(name, given, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=f"`{name}` {message}"):
        audit(plain, plain, **(sets | {name: given}), reference=plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "`reference` and `predictor` are both None"),
        ({"reference": "model"}, "`reference` is a str"),
        ({"unlearned": diverged}, "`unlearned` gives outputs on `forget` that are not finite"),
        ({"unlearned": nn.Linear(FEATURES, 3).double()}, "`unlearned` has other parameters than `original`"),
        ({"tolerance": 1.5}, "`tolerance` is 1.5"),
        ({"forget": (x, y + 3)}, "`targets` must be classes from 0 to 2"),
        ({"forget": (x, y + 0.5)}, "`forget` has targets that are not classes"),
    ],
)
def test_what_can_not_be_right_is_refused(change, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        audit(**({"original": plain, "unlearned": plain, "reference": plain} | sets | change))


def test_predictors_of_another_kind_are_refused(sketched):
    """Oracle: the sentence."""
    original, sketch, retrained = sketched
    predictor = DeletionPredictor(sketch, original, "logits")
    for options, first, message in (
        ({"predictor": predictor}, original, "`delete` is None"),
        ({"predictor": predictor, "delete": []}, original, "`delete` is"),
        ({"predictor": DeletionPredictor(sketch, original), "delete": DELETED}, original, "output 'loss'"),
        ({"predictor": predictor, "delete": DELETED}, retrained, "`original` is not the model"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            audit(first, retrained, **sets_of_run(), **options)
