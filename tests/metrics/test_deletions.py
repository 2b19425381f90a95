"""Metrics of predicted deletions, against scipy and formulas by hand."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torchmetrics import MetricCollection
from torchmetrics.functional import spearman_corrcoef

from lightning_sketch import ConfigurationError
from lightning_sketch.metrics import IntervalCoverage, LinearDatamodelingScore, RelativeChangeError


def spearman(predicted, true):
    """``(O,)`` from ``(m, O)``, by scipy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.array([stats.spearmanr(p, t).statistic for p, t in zip(predicted.T, true.T, strict=True)])


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


def noisy_pair(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    true = rng.standard_normal(shape)
    return [a.astype(dtype) for a in (true + 0.5 * rng.standard_normal(shape), true)]


# integers, so that ties and constant outputs are frequent
tied = st.integers(0, 3).map(float)


@given(st.data(), st.integers(2, 12), st.integers(1, 4))
def test_lds_is_spearman_of_each_output(data, m, outputs):
    """Oracle: ``scipy.stats.spearmanr``, NaN for constant outputs."""
    predicted, true = (data.draw(hnp.arrays(np.float64, (m, outputs), elements=tied)) for _ in range(2))
    expected = spearman(predicted, true)
    raw = LinearDatamodelingScore("raw_values")
    raw.update(*tensors(predicted, true))
    np.testing.assert_allclose(raw.compute(), expected, atol=1e-12)
    mean = LinearDatamodelingScore()
    mean.update(*tensors(predicted, true))
    ranked = np.ptp(true, axis=0) > 0  # a constant prediction of something that varies counts as 0
    by_hand = np.mean(np.nan_to_num(expected[ranked])) if ranked.any() else np.nan
    np.testing.assert_allclose(mean.compute(), by_hand, atol=1e-12)


@pytest.mark.parametrize("out", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_lds_of_any_shape_and_dtype(out, dtype):
    """Oracle: scipy, output by output, and torchmetrics' functional up to its epsilon."""
    predicted, true = noisy_pair((30, *out), dtype=dtype)
    flat = [a.reshape(30, -1) for a in (predicted, true)]
    metric = LinearDatamodelingScore()
    assert metric(*tensors(predicted, true)).item() == pytest.approx(spearman(*flat).mean(), abs=1e-12)
    peer = spearman_corrcoef(*(t.float() for t in tensors(*flat)))
    assert metric.compute().item() == pytest.approx(peer.mean().item(), abs=1e-5)
    raw = LinearDatamodelingScore("raw_values")
    raw.update(*tensors(predicted, true))
    assert raw.compute().shape == (() if out == (1,) else out)
    assert raw.compute().dtype == torch.float64


@given(st.integers(0, 2**32 - 1), st.integers(3, 20))
def test_lds_sees_only_ranks(seed, m):
    """Oracle: invariance under monotone maps, offsets and the order of deletions; the sign is that of the pair."""
    predicted, true = noisy_pair((m, 3), seed)
    score = LinearDatamodelingScore()(*tensors(predicted, true))
    order = np.random.default_rng(seed).permutation(m)
    for p, t in (
        (np.exp(predicted), 7 + 3 * true),
        (predicted[order], true[order]),
        (1e-30 * predicted, 1e30 * true),
        (-predicted, -true),
    ):
        torch.testing.assert_close(LinearDatamodelingScore()(*tensors(p, t)), score)
    torch.testing.assert_close(LinearDatamodelingScore()(*tensors(-predicted, true)), -score)
    assert LinearDatamodelingScore()(*tensors(np.exp(true), true)) == 1


def test_lds_of_fewer_than_two_deletions_is_undefined():
    """Oracle: NaN, as one deletion has no ranking."""
    assert LinearDatamodelingScore()(torch.ones(1, 3), torch.zeros(1, 3)).isnan()


@given(hnp.arrays(np.float32, (2, 4, 3), elements=st.floats(-1e3, 1e3, width=32)), st.floats(0.01, 100))
def test_relative_change_error_by_hand(pair, scale):
    """Oracle: numpy's norms; a common scale changes nothing."""
    predicted, true = pair.astype(np.float64)
    metric = RelativeChangeError()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.linalg.norm(predicted - true) / np.linalg.norm(true)
    np.testing.assert_allclose(metric(*tensors(pair[0], pair[1])), expected, rtol=1e-9)
    if np.linalg.norm(true) > 1e-6:
        np.testing.assert_allclose(
            RelativeChangeError()(*tensors(scale * predicted, scale * true)), expected, rtol=1e-9
        )
        np.testing.assert_allclose(RelativeChangeError()(*tensors(0 * true, true)), 1, rtol=1e-9)


def test_relative_change_error_of_tiny_float32_changes():
    """Oracle: by hand; float32 squares would underflow."""
    assert RelativeChangeError()(torch.tensor([1.1e-30]), torch.tensor([1e-30])).item() == pytest.approx(0.1, rel=1e-5)


def test_relative_change_error_is_differentiable():
    """Oracle: ``d||p - t|| / ||t|| / dp = (p - t) / (||p - t|| ||t||)``."""
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    predicted = torch.tensor([3.0, 6.0], dtype=torch.float64, requires_grad=True)
    RelativeChangeError()(predicted, true).backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([0.0, 0.2], dtype=torch.float64))


@given(hnp.arrays(np.float64, (3, 5, 2), elements=tied))
def test_coverage_by_hand(values):
    """Oracle: numpy, bounds included; no interval gets worse by widening it."""
    lower, upper, true = values[0], values[0] + values[1], values[2]
    expected = np.mean((lower <= true) & (true <= upper))
    metric = IntervalCoverage()
    assert metric(tuple(tensors(lower, upper)), torch.from_numpy(true)).item() == expected
    assert IntervalCoverage()(tuple(tensors(lower - 1, upper + 1)), torch.from_numpy(true)).item() >= expected


def test_coverage_of_a_scalar_and_of_open_ends():
    """Oracle: by hand."""
    assert IntervalCoverage()((torch.tensor(0.0), torch.tensor(1.0)), torch.tensor(0.5)) == 1
    ends = torch.full((2,), -torch.inf), torch.tensor([0.0, torch.inf])
    assert IntervalCoverage()(ends, torch.ones(2)) == 0.5


# --- what all three share --------------------------------------------------------------------------------------------


def arguments(name, seed, m=8):
    predicted, true = tensors(*noisy_pair((m, 3), seed))
    return ((predicted - 0.3, predicted + 0.3), true) if name == "coverage" else (predicted, true)


def joined(first, second):
    if isinstance(first, tuple):
        return tuple(joined(a, b) for a, b in zip(first, second, strict=True))
    return torch.cat([first, second])


METRICS = {"lds": LinearDatamodelingScore, "error": RelativeChangeError, "coverage": IntervalCoverage}


@pytest.mark.parametrize("name", METRICS)
def test_updates_and_processes_add_up(name):
    """Oracle: the metric of all data in one update: after two updates, two merged metrics, and two processes."""
    one, two = arguments(name, 0), arguments(name, 1, m=5)
    whole = METRICS[name]()(*joined(one, two))
    streamed = METRICS[name]()
    for each in (one, two):
        batch = METRICS[name]()
        torch.testing.assert_close(streamed(*each), batch(*each))  # forward gives the batch's own value
    torch.testing.assert_close(streamed.compute(), whole)
    merged = METRICS[name]()
    merged.update(*one)
    other = METRICS[name]()
    other.update(*two)
    merged.merge_state(other)
    torch.testing.assert_close(merged.compute(), whole)
    synced = METRICS[name](
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda state, group=None: [state, state],  # another process with the same data
    )
    synced.update(*one)
    torch.testing.assert_close(synced.compute(), METRICS[name]()(*joined(one, one)))
    streamed.reset()
    torch.testing.assert_close(streamed(*one), METRICS[name]()(*one))


@pytest.mark.parametrize("name", METRICS)
def test_values_are_drawn(name):
    """Oracle: figure and axes, of one value and of several."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = METRICS[name]()
    values = [metric(*arguments(name, seed)) for seed in range(3)]
    figure, ax = metric.plot()
    assert isinstance(figure, pyplot.Figure)
    assert isinstance(ax, pyplot.Axes)
    _, given_ax = pyplot.subplots()
    _, ax = metric.plot(values, ax=given_ax)
    assert ax is given_ax
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values)
    pyplot.close("all")


def test_they_work_in_a_collection():
    """Oracle: each metric alone."""
    pair = arguments("lds", 0)
    found = MetricCollection([LinearDatamodelingScore(), RelativeChangeError()])(*pair)
    torch.testing.assert_close(found["LinearDatamodelingScore"], LinearDatamodelingScore()(*pair))
    torch.testing.assert_close(found["RelativeChangeError"], RelativeChangeError()(*pair))


def test_what_is_better_is_declared():
    """Oracle: by hand; of coverage neither."""
    assert [m.higher_is_better for m in METRICS.values()] == [True, False, None]
    assert [m.is_differentiable for m in METRICS.values()] == [False, True, False]
    assert not any(m.full_state_update for m in METRICS.values())


nan = torch.tensor([0.0, float("nan")])
two, three = torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("metric", "given", "named"),
    [
        (LinearDatamodelingScore, (two, three), r"`true` has shape \(3,\) and `predicted` \(2,\)"),
        (LinearDatamodelingScore, (torch.tensor(1.0), torch.tensor(1.0)), "`predicted` is a scalar"),
        (LinearDatamodelingScore, (two, nan), "`true` holds NaN"),
        (LinearDatamodelingScore, ([1.0, 2.0], two), "`predicted` is list"),
        (RelativeChangeError, (three, two), r"`true_change` has shape \(2,\) and `predicted_change` \(3,\)"),
        (RelativeChangeError, (nan, two), "`predicted_change` holds NaN"),
        (IntervalCoverage, ((two, two), three), r"`true` has shape \(3,\) and `lower` \(2,\)"),
        (IntervalCoverage, ((two, three), two), r"`upper` has shape \(3,\)"),
        (IntervalCoverage, ((two + 1, two), two), "`interval` has a lower bound above"),
        (IntervalCoverage, (two, two), r"`interval` must be \(lower, upper\)"),
    ],
)
def test_what_can_not_be_compared_is_refused(metric, given, named):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=named):
        metric().update(*given)


def test_outputs_of_other_shapes_are_not_mixed():
    """Oracle: the argument's name in the message."""
    metric = LinearDatamodelingScore()
    metric.update(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ConfigurationError, match=r"`predicted` has outputs of shape \(3,\), and had \(2,\)"):
        metric.update(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ConfigurationError, match="`multioutput` is 'mean'"):
        LinearDatamodelingScore("mean")
