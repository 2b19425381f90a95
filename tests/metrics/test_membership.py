"""Membership attacks, against scikit-learn, scipy and formulas by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC
from torchmetrics import MetricCollection

from lightning_sketch import ConfigurationError
from lightning_sketch.metrics import ForgetEfficacy, MembershipAUROC, MembershipTPR, membership_scores

ATTACKS = ["loss", "confidence", "entropy", "modified_entropy"]


def classifier(members=60, others=90, classes=4, seed=0, sureness=1.5, decimals=None):
    """Logits of members that are surer of their classes than others; rounded, scores tie."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(members + others) < members)
    targets = rng.integers(0, classes, members + others)
    logits = rng.standard_normal((members + others, classes))
    logits[np.arange(len(logits)), targets] += np.where(member, sureness, 0.5)
    if decimals is not None:
        logits = logits.round(decimals)
    return torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(member)


def scores_by_hand(logits, targets, attack):
    p = softmax(logits.double().numpy(), axis=1)
    own = p[np.arange(len(p)), targets]
    if attack == "loss":
        return np.log(own)
    if attack == "confidence":
        return p.max(axis=1)
    if attack == "entropy":
        return -stats.entropy(p, axis=1)
    found = []
    for row, y in zip(p, targets.tolist(), strict=True):
        others = [q * math.log(1 - q) for c, q in enumerate(row) if c != y]
        found.append((1 - row[y]) * math.log(row[y]) + sum(others))
    return np.array(found)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_their_formulas(attack, dtype):
    """Oracle: scipy's softmax and entropy, loops; confidence is kept on a scale that keeps the order."""
    logits, targets, _ = classifier()
    found = membership_scores(logits.to(dtype), targets, attack).numpy()
    expected = scores_by_hand(logits.to(dtype), targets, attack)
    if attack == "confidence":
        found = 1 - np.exp(-found)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attack", ATTACKS)
def test_very_sure_predictions_differ(attack):
    """Oracle: the order of the margins. Softmax of float64 is 1 for all but the first."""
    logits = torch.tensor([[30.0, 0.0, -1.0], [45.0, 0.0, -1.0], [60.0, 0.0, -1.0], [700.0, 0.0, -1.0]]).double()
    found = membership_scores(logits, torch.zeros(4, dtype=torch.long), attack)
    assert bool(found.isfinite().all())
    assert bool((found.diff() > 0).all())


def test_modified_entropy_knows_a_sure_error_from_a_sure_hit():
    """Oracle: by hand, ``-2 log(e^-m)`` at margin ``m``; the plain entropy does not tell them apart."""
    logits = torch.tensor([[40.0, 0.0], [40.0, 0.0]]).double()
    targets = torch.tensor([0, 1])
    hit, error = membership_scores(logits, targets, "modified_entropy")
    assert error.item() == pytest.approx(-80, rel=1e-12)
    assert abs(hit.item()) < 1e-30
    plain = membership_scores(logits, targets, "entropy")
    assert plain[0] == plain[1]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("decimals", [None, 0])
def test_auroc_and_tpr_are_those_of_scikit_learn(attack, decimals):
    """Oracle: ``roc_auc_score`` and ``roc_curve`` of scores by hand, with ties where logits are whole numbers."""
    logits, targets, member = classifier(members=200, others=300, decimals=decimals)
    scores = scores_by_hand(logits, targets, attack).round(9)
    auroc, tpr = MembershipAUROC(attack), MembershipTPR(attack)
    for part in range(0, 500, 120):
        rows = slice(part, part + 120)
        auroc.update(logits[rows], targets[rows], member[rows])
        tpr.update(logits[rows], targets[rows], member[rows])
    for value in (*auroc.members, *auroc.others, *tpr.members, *tpr.others):
        value.copy_(value if decimals is None else (value * 1e9).round() / 1e9)  # equal up to rounding is equal
    assert auroc.compute().item() == pytest.approx(roc_auc_score(member, scores), abs=1e-12)
    wrong, found, _ = roc_curve(member, scores, drop_intermediate=False)
    assert tpr.compute().item() == pytest.approx(found[wrong <= 0.01].max(), abs=1e-12)
    assert auroc.compute() > 0.6


def test_the_sign_and_the_ends():
    """Oracle: 1 for an overfitted model, 0 for one too forgetful, 0.5 in expectation for halves of the test data."""
    sure, unsure = torch.tensor([[9.0, 0.0]]).repeat(5, 1), torch.tensor([[0.5, 0.0]]).repeat(5, 1)
    logits, targets = torch.cat([sure, unsure]), torch.zeros(10, dtype=torch.long)
    member = torch.arange(10) < 5
    for attack in ATTACKS:
        assert MembershipAUROC(attack)(logits, targets, member) == 1
        assert MembershipTPR(attack)(logits, targets, member) == 1
        assert MembershipAUROC(attack)(logits, targets, ~member) == 0
        assert MembershipTPR(attack)(logits, targets, ~member) == 0
    halves, covered = [], 0
    for seed in range(20):
        logits, targets, _ = classifier(0, 400, seed=seed)
        half = MembershipAUROC("loss")
        halves.append(half(logits, targets, torch.arange(400) % 2 == 0).item())
        low, high = half.interval(0.95, samples=200)
        covered += bool(low < 0.5 < high)
    assert abs(np.mean(halves) - 0.5) < 0.026  # four standard errors, each half having one of 0.029
    assert covered >= 16  # 19 expected; fewer than 16 of 20 has probability 0.003


def test_the_interval_is_as_wide_as_theory_says():
    """Oracle: the normal approximation of Hanley and McNeil (1982) for the AUROC; binomial for the TPR."""
    logits, targets, member = classifier(members=300, others=400)
    metric = MembershipAUROC("loss")
    a = metric(logits, targets, member).item()
    low, high = (v.item() for v in metric.interval(0.9, samples=2000))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    deviation = math.sqrt((a * (1 - a) + 299 * (q1 - a * a) + 399 * (q2 - a * a)) / (300 * 400))
    assert low < a < high
    assert (high - low) / 2 == pytest.approx(1.645 * deviation, rel=0.15)
    assert metric.interval(0.9, samples=50, seed=3) == metric.interval(0.9, samples=50, seed=3)
    tpr = MembershipTPR("loss", max_fpr=1.0)  # every member is found, in every draw
    tpr.update(logits, targets, member)
    assert [v.item() for v in tpr.interval()] == [1, 1]


def test_most_intervals_hold_the_true_value():
    """Oracle: the AUROC of a very large sample of the same distribution."""
    truth = MembershipAUROC("loss")(*classifier(100_000, 100_000, seed=99)).item()
    covered = 0
    for seed in range(60):
        metric = MembershipAUROC("loss")
        metric.update(*classifier(50, 60, seed=seed))
        low, high = metric.interval(0.9, samples=200)
        covered += bool(low <= truth <= high)
    assert 46 <= covered <= 60  # 54 expected; fewer than 46 of 60 has probability 0.0007


@pytest.mark.parametrize("attack", ATTACKS)
def test_forget_efficacy_is_that_of_a_support_vector_machine(attack):
    """Oracle: scikit-learn on scores by hand, with weights ``n / (2 n_class)`` of each example."""
    logits, targets, member = classifier(members=80, others=50)
    metric = ForgetEfficacy(attack)
    forgotten = classifier(20, 20, seed=1)[:2]
    metric.update(logits[member], targets[member], "retain")
    metric.update(logits[~member], targets[~member], "test")
    metric.update(*forgotten, "forget")
    scores, asked = scores_by_hand(logits, targets, attack), scores_by_hand(*forgotten, attack)
    if attack == "confidence":
        scores, asked = -np.log(1 - scores), -np.log(1 - asked)
    weights = np.where(member, 130 / 160, 130 / 100)
    attacker = SVC(C=3, gamma="auto").fit(scores[:, None], member.numpy(), sample_weight=weights)
    assert metric.compute().item() == pytest.approx(1 - attacker.predict(asked[:, None]).mean(), abs=1e-12)


def test_forget_efficacy_asks_for_scikit_learn(monkeypatch):
    """Oracle: the sentence."""
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    metric = ForgetEfficacy()
    metric.update(*classifier()[:2], "forget")
    with pytest.raises(ConfigurationError, match="needs scikit-learn: run `pip install"):
        metric.compute()


def test_processes_and_batches_are_one_sample():
    """Oracle: all examples at once."""
    one = classifier(seed=1)
    for make in (MembershipAUROC, MembershipTPR):
        synced = make(
            distributed_available_fn=lambda: True,
            dist_sync_fn=lambda state, group=None: [state, state],  # another process with the same data
        )
        synced.update(*one)
        torch.testing.assert_close(synced.compute(), make()(*(torch.cat([t, t]) for t in one)))
        again = make()
        again.update(*classifier(seed=2))
        again.reset()
        assert again(*one) == make()(*one)
    found = MetricCollection([MembershipAUROC("loss"), MembershipTPR("loss")])(*one)
    assert found["MembershipTPR"] == MembershipTPR("loss")(*one)


@pytest.mark.parametrize("make", [MembershipAUROC, MembershipTPR])
def test_values_are_drawn(make):
    """Oracle: the values on the axes."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = make()
    values = [metric(*classifier(seed=seed)) for seed in range(3)]
    _, ax = metric.plot()
    assert isinstance(ax, pyplot.Axes)
    _, ax = metric.plot(values)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values)
    pyplot.close("all")


logits, targets, member = classifier(3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MembershipAUROC("secret"), "`attack` is 'secret'"),
        (lambda: ForgetEfficacy("secret"), "`attack` is 'secret'"),
        (lambda: MembershipTPR(max_fpr=1.5), "`max_fpr` is 1.5"),
        (lambda: MembershipAUROC()(logits[0], targets, member), r"`logits` is \(4,\)"),
        (lambda: MembershipAUROC()(logits[:, :1], targets, member), r"`logits` is \(6, 1\)"),
        (lambda: MembershipAUROC()(logits * torch.nan, targets, member), "`logits` holds NaN"),
        (lambda: MembershipAUROC()(logits, targets[:5], member), "`targets` must be int64"),
        (lambda: MembershipAUROC()(logits, targets + 4, member), "`targets` must be classes from 0 to 3"),
        (lambda: MembershipAUROC()(logits, targets, member.long()), "`member` must be a bool tensor"),
        (lambda: MembershipAUROC()(logits, targets, member | True), "`member` is the same for all"),
        (lambda: MembershipAUROC().interval(), "no examples yet"),
        (lambda: MembershipAUROC().interval(1.0), "`level` is 1.0"),
        (lambda: MembershipAUROC().interval(samples=0), "`samples` is 0"),
        (lambda: ForgetEfficacy().update(logits, targets, "train"), "`role` is 'train'"),
        (lambda: ForgetEfficacy()(logits, targets, "forget"), "`role` has never been 'retain'"),
    ],
)
def test_what_can_not_be_right_is_refused(call, message):
    """Oracle: the sentence."""
    with pytest.raises(ConfigurationError, match=message):
        call()
