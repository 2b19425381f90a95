"""Questions about many deletions at once, on outputs that are known polynomials of the deletion weights."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_sketch.directions import make_directions
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction import Effect

N = 6


class Cubic:
    """``f(x)_o = f0_o + <F_1, x> + <F_2, x x> + <F_3, x x x>`` with random symmetric tensors, ``out`` outputs."""

    def __init__(self, out=(2, 3), seed=0, interactions=1.0, n=N):
        rng = np.random.default_rng(seed)
        size = math.prod(out)
        self.out, self.n, self.f0 = out, n, rng.standard_normal(size)
        self.f1 = rng.standard_normal((size, n))
        f2, f3 = rng.standard_normal((size, n, n)), rng.standard_normal((size, n, n, n))
        self.f2 = interactions * (f2 + f2.swapaxes(1, 2)) / 2
        self.f3 = interactions * sum(f3.transpose(0, *p) for p in itertools.permutations((1, 2, 3))) / 6

    def terms(self, x):
        """``(3, m, O)``."""
        return np.stack(
            [
                np.einsum("ou,mu->mo", self.f1, x),
                np.einsum("ouv,mu,mv->mo", self.f2, x, x),
                np.einsum("ouvw,mu,mv,mw->mo", self.f3, x, x, x),
            ]
        )

    def change(self, sets):
        x = np.zeros((len(sets), self.n))
        for row, units in zip(x, sets, strict=True):
            row[list(units)] = 1
        return self.terms(x).sum(axis=0)

    def effect(self, count=40, design="sphere", degree=3, dtype=torch.float64, units=None):
        """40 complex directions are 80 measurements of the 6, 21 and 56 entries of the tensors: all is determined."""
        psi = make_directions(count, design, self.n, seed=1).array
        coefficients = torch.from_numpy(self.terms(psi)[:degree]).reshape(degree, len(psi), *self.out)
        baseline = torch.from_numpy(self.f0).reshape(self.out).to(dtype)
        return Effect(baseline, coefficients, psi, np.arange(self.n) if units is None else units)


CLOSE = {"rtol": 1e-6, "atol": 1e-8}


@pytest.mark.parametrize("degree", [None, 1, 2])
def test_leave_one_out_deletes_each_unit_alone(degree):
    """Oracle: the polynomial's diagonal entries."""
    cubic = Cubic()
    p = cubic.effect().leave_one_out(degree=degree)
    diagonal = np.stack(
        [np.einsum("ou->uo", cubic.f1), np.einsum("ouu->uo", cubic.f2), np.einsum("ouuu->uo", cubic.f3)]
    )
    expected = diagonal[: degree or 3].sum(axis=0).reshape(N, 2, 3)
    np.testing.assert_allclose(p.change, expected, **CLOSE)
    assert p.by_degree.shape == (degree or 3, N, 2, 3)


def test_lists_of_examples_are_deleted_by_whole_units():
    """Oracle: the polynomial, of the units that the examples make up."""
    cubic = Cubic(n=4)
    effect = cubic.effect(units=np.array([0, 0, 1, 2, 2, 2, -1, 3]))
    p = effect.delete_many(examples=[[1, 0], [], [7, 5, 4, 3]])
    np.testing.assert_allclose(p.change.reshape(3, -1), cubic.change([[0], [], [2, 3]]), **CLOSE)
    with pytest.raises(ConfigurationError, match="`examples` holds 1 of the 2 examples of unit 0"):
        effect.delete_many(examples=[[1]])
    for given in ({}, {"sets": [[0]], "examples": [[0, 1]]}):
        with pytest.raises(ConfigurationError, match="exactly one of `sets` and `examples`"):
            effect.delete_many(**given)


def test_a_reduced_effect_is_that_of_the_weighted_sum():
    """Oracle: the polynomial's weighted sum, and a sum of opposite outputs, which is known without error."""
    cubic = Cubic()
    weights = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = cubic.effect().reduce(weights).delete([1, 4])
    np.testing.assert_allclose(p.change, cubic.change([[1, 4]])[0] @ weights.flatten().numpy(), **CLOSE)
    np.testing.assert_allclose(p.baseline, cubic.f0 @ weights.flatten().numpy(), **CLOSE)
    one = Cubic(out=()).effect(4)
    opposite = Effect(
        torch.stack([one.baseline, -one.baseline]),
        torch.stack([one.coefficients, -one.coefficients], dim=-1),
        make_directions(4, "sphere", N, seed=1).array,
        np.arange(N),
    )
    assert one.delete([0]).stderr > 0
    assert float(opposite.reduce(torch.ones(2)).delete([0]).stderr) == 0
    torch.testing.assert_close(opposite.reduce(torch.tensor([1.0, -1])).delete([0]).stderr, 2 * one.delete([0]).stderr)


@pytest.mark.parametrize("weights", [torch.ones(3), [1, 1], torch.full((2, 3), math.nan)])
def test_weights_of_another_shape_are_refused(weights):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match="`weights`"):
        Cubic().effect().reduce(weights)


def test_the_ranking_is_by_predicted_change():
    """Oracle: the polynomial's changes, sorted by numpy."""
    cubic = Cubic()
    effect = cubic.effect()
    alone = cubic.change([[u] for u in range(N)])
    weights = np.array([0, 1, 0, -2, 0, 0.5])
    for of, value in (("mean", alone.mean(axis=1)), (torch.tensor(weights).reshape(2, 3), alone @ weights)):
        ranking = effect.rank(2, of)
        order = np.argsort(value)
        assert ranking.raising.units.tolist() == order[::-1][:2].tolist()
        assert ranking.lowering.units.tolist() == order[:2].tolist()
        np.testing.assert_allclose(ranking.raising.change, np.sort(value)[::-1][:2], **CLOSE)
        np.testing.assert_allclose(ranking.lowering.change, np.sort(value)[:2], **CLOSE)
    each = effect.rank(6, "each", degree=1)
    np.testing.assert_array_equal(each.lowering.units.reshape(6, -1), np.argsort(cubic.f1.T, axis=0))
    np.testing.assert_allclose(each.raising.change.reshape(6, -1), np.sort(cubic.f1.T, axis=0)[::-1], **CLOSE)


def test_a_ranking_carries_the_errors_of_its_units():
    """Oracle: the predictions of the single deletions."""
    effect = Cubic(out=()).effect(5)
    ranking = effect.rank(6)
    for ranked in (ranking.raising, ranking.lowering):
        for i, unit in enumerate(ranked.units.tolist()):
            one = effect.delete([unit])
            assert one.stderr > 0
            torch.testing.assert_close(ranked.stderr[i], one.stderr)
            torch.testing.assert_close(ranked.truncation[i], one.truncation)


@pytest.mark.parametrize("degree", [None, 2, 3])
def test_an_interaction_is_the_mixed_difference(degree):
    """Oracle: ``2 F_2[u, v] + 3 F_3[u, u, v] + 3 F_3[u, v, v]``."""
    cubic = Cubic()
    u, v = np.array([0, 4, 2]), np.array([3, 1, 5])
    second = 2 * cubic.f2[:, u, v].T
    third = 3 * (cubic.f3[:, u, u, v] + cubic.f3[:, u, v, v]).T
    many = cubic.effect().interaction(u, v.tolist(), degree=degree)
    expected = second if degree == 2 else second + third
    np.testing.assert_allclose(many.value.reshape(3, -1), expected, **CLOSE)
    np.testing.assert_allclose(many.truncation.reshape(3, -1), np.abs(second if degree == 2 else third), **CLOSE)
    one = cubic.effect().interaction(4, 1, degree=degree)
    assert one.value.shape == (2, 3)
    torch.testing.assert_close(one.value, many.value[1])
    torch.testing.assert_close(one.stderr, many.stderr[1])


def test_the_error_of_an_interaction_is_bounded_by_those_of_its_deletions():
    """Oracles: their sum; a basis, along which single units are known exactly; 1,000 errors of random cubics."""
    effect = Cubic(out=()).effect(5)
    total = sum(effect.delete(units).stderr for units in ([0, 3], [0], [3]))
    torch.testing.assert_close(effect.interaction(0, 3).stderr, total)
    basis = Cubic(out=()).effect(1, "basis+common")
    torch.testing.assert_close(basis.interaction(0, 3).stderr, basis.delete([0, 3]).stderr)
    assert basis.interaction(0, 3).stderr > 0
    cubic = Cubic(out=(1000,), seed=5)
    found = cubic.effect(10).interaction(0, 3)
    true = 2 * cubic.f2[:, 0, 3] + 3 * (cubic.f3[:, 0, 0, 3] + cubic.f3[:, 0, 3, 3])
    within = np.abs(found.value.numpy() - true) <= 2 * found.stderr.numpy()
    assert within.mean() >= 0.95


def brute_force(cubic, m, sign, weights):
    sets = list(itertools.combinations(range(cubic.n), m))
    changes = sign * (cubic.change(sets) @ weights)
    return sets[int(changes.argmax())], float(changes.max())


@pytest.mark.parametrize("toward", ["up", "down"])
def test_the_most_influential_set_without_interactions_is_the_best(toward):
    """Oracle: exhaustive search."""
    cubic = Cubic(n=8, interactions=0.0, seed=2)
    weights = np.linspace(-1, 2, 6)
    sign = 1 if toward == "up" else -1
    effect = cubic.effect(60)
    for of, w in (("mean", np.full(6, 1 / 6)), (torch.tensor(weights).reshape(2, 3), weights)):
        found = effect.most_influential(3, of, toward=toward)
        best, change = brute_force(cubic, 3, sign, w)
        assert sorted(found.units.tolist()) == sorted(best)
        np.testing.assert_allclose(found.change[-1], sign * change, rtol=1e-6)


@pytest.mark.parametrize("toward", ["up", "down"])
def test_the_most_influential_set_is_greedy_and_near_the_best(toward):
    """Oracles: greedy search on the polynomial itself; exhaustive search, of which it reaches 95 % on the median."""
    sign, reached = 1 if toward == "up" else -1, []
    for seed in range(10):
        cubic = Cubic(out=(), n=8, interactions=0.15, seed=seed)
        found = cubic.effect(60).most_influential(3, toward=toward)
        chosen: list[int] = []
        for i in range(3):
            left = [u for u in range(8) if u not in chosen]
            changes = sign * cubic.change([[*chosen, u] for u in left])[:, 0]
            chosen.append(left[int(changes.argmax())])
            np.testing.assert_allclose(found.change[i], sign * changes.max(), **CLOSE)
        assert found.units.tolist() == chosen
        reached.append(sign * float(found.change[-1]) / brute_force(cubic, 3, sign, np.ones(1))[1])
    print(f"{toward}: reached of the best {np.round(sorted(reached), 3)}")
    assert np.median(reached) >= 0.95
    assert min(reached) >= 0.7


def test_the_series_decides_where_units_interact():
    """Oracle: a quadratic by hand. Alone unit 0 raises f most, with unit 1 it does nothing; 1 and 2 help each other."""
    first, second = np.array([3.0, 2.0, 1.0]), np.zeros((3, 3))
    second[0, 1] = second[1, 0] = -1.0
    second[1, 2] = second[2, 1] = 2.0
    psi = make_directions(10, "sphere", 3, seed=0).array
    coefficients = np.stack([psi @ first, np.einsum("ku,uv,kv->k", psi, second, psi)])
    effect = Effect(torch.tensor(0.0, dtype=torch.float64), torch.from_numpy(coefficients), psi, np.arange(3))
    found = effect.most_influential(2)
    assert found.units.tolist() == [0, 2]
    np.testing.assert_allclose(found.change, [3, 4], rtol=1e-9)
    found = effect.most_influential(3)
    assert found.units.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.change, [3, 4, 8], rtol=1e-9)
    assert effect.most_influential(1, degree=1, toward="down").units.tolist() == [2]
    np.testing.assert_allclose(effect.interaction([0, 1, 0], [1, 2, 2]).value, [-2, 4, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.rank(0), "`k` is 0: give an integer from 1 to 6"),
        (lambda e: e.rank(7), "`k`"),
        (lambda e: e.rank(2.0), "`k`"),
        (lambda e: e.rank(2, "median"), "`of` is 'median'"),
        (lambda e: e.rank(2, torch.ones(2)), "`weights`"),
        (lambda e: e.rank(2, degree=4), "`degree`"),
        (lambda e: e.most_influential(7), "`m` is 7"),
        (lambda e: e.most_influential(2, "each"), "`of` is 'each'"),
        (lambda e: e.most_influential(2, toward="both"), "`toward` is 'both': give 'up' or 'down'"),
        (lambda e: e.interaction(1, 1), "pair unit 1 with itself"),
        (lambda e: e.interaction([0, 1], [2]), "`u` and `v`"),
        (lambda e: e.interaction(0, [2]), "`u` and `v`"),
        (lambda e: e.interaction(0.5, 1), "`u` and `v`"),
        (lambda e: e.interaction(0, 6), "`units`"),
        (lambda e: e.interaction(0, 1, degree=1), "`degree` is 1, to which units do not interact"),
        (lambda e: e.leave_one_out(estimator="best"), "`estimator`"),
    ],
)
def test_impossible_questions_are_refused(ask, message):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match=message):
        ask(Cubic().effect())


def test_answers_read_as_tables():
    """Oracle: the text itself."""
    coefficients = torch.tensor([[2.0, -3.0, 1.0]], dtype=torch.complex128)
    effect = Effect(torch.tensor(5.0), coefficients, np.eye(3), np.arange(3))
    assert repr(effect.rank(2)) == (
        "deletions that raise the output most\n"
        "unit  change  stderr  truncation\n"
        "0         +2       0           2\n"
        "2         +1       0           1\n"
        "deletions that lower it most\n"
        "unit  change  stderr  truncation\n"
        "1         -3       0           3\n"
        "2         +1       0           1"
    )
    assert repr(effect.most_influential(2)) == (
        "and unit  change  stderr  truncation\n"
        "0             +2       0           2\n"
        "2             +3       0           3"
    )
    wide = Effect(torch.zeros(2), torch.ones(2, 3, 2, dtype=torch.complex128), np.eye(3), np.arange(3))
    assert repr(wide.rank(2, "each").raising) == "RankedUnits(k=2, rankings=(2,))"
    assert repr(wide.interaction(0, 1)).startswith("Interaction(shape=(2,), mean value=")
