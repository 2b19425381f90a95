"""Units and directions: shapes, distributions, seeds and refusals."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sketch.directions import (
    count_units,
    first_order_error,
    make_directions,
    make_from_recipe,
    resolve_units,
    units_checksum,
)
from lightning_sketch.errors import ConfigurationError

SIZES = {"count": st.integers(1, 20), "num_units": st.integers(1, 9), "seed": st.integers(0, 2**40)}


@given(**SIZES)
def test_sphere_rows_have_unit_norm_and_are_complex(count, num_units, seed):
    """Oracle: the norm, by definition of the sphere."""
    directions = make_directions(count, "sphere", num_units, seed=seed)
    assert directions.array.shape == (count, num_units)
    assert directions.array.dtype == np.complex128
    np.testing.assert_allclose(np.sum(np.abs(directions.array) ** 2, axis=1), 1, atol=1e-14)
    assert not directions.real.any()


@given(**SIZES)
def test_orthonormal_rows_are_orthonormal_within_blocks(count, num_units, seed):
    """Oracle: ``V V^H = I`` for every block of at most n rows."""
    array = make_directions(count, "orthonormal", num_units, seed=seed).array
    assert array.shape == (count, num_units)
    for start in range(0, count, num_units):
        block = array[start : start + num_units]
        np.testing.assert_allclose(block @ block.conj().T, np.eye(len(block)), atol=1e-13)


@pytest.mark.parametrize("design", ["sphere", "orthonormal"])
def test_random_rows_are_uniform_on_the_sphere(design):
    """Oracle: uniform moments, ``E |psi_u|^2 = 1/n``, ``E |psi_u|^4 = 2/(n(n+1))``, ``E psi_u^2 = 0``."""
    n, count = 4, 40_000
    array = make_directions(count, design, n, seed=5).array
    square = np.abs(array) ** 2
    np.testing.assert_allclose(square.mean(axis=0), 1 / n, rtol=0.02)
    np.testing.assert_allclose((square**2).mean(axis=0), 2 / (n * (n + 1)), rtol=0.04)
    assert np.abs((array**2).mean(axis=0)).max() < 0.01
    assert np.abs(array.mean(axis=0)).max() < 0.02


@given(first=st.integers(0, 2**40), second=st.integers(0, 2**40), design=st.sampled_from(["sphere", "orthonormal"]))
def test_a_seed_is_reproducible_and_another_seed_differs(first, second, design):
    """Oracle: the array itself and its checksum."""
    one, again = (make_directions(3, design, 4, seed=first) for _ in range(2))
    other = make_directions(3, design, 4, seed=second)
    np.testing.assert_array_equal(one.array, again.array)
    assert one.checksum() == again.checksum()
    assert (one.checksum() == other.checksum()) == (first == second)


def test_a_design_draws_the_same_alone_and_joined():
    """Oracle: each design alone."""
    joined = make_directions(3, "orthonormal+basis+sphere", 5, seed=7).array
    np.testing.assert_array_equal(joined[:3], make_directions(3, "orthonormal", 5, seed=7).array)
    np.testing.assert_array_equal(joined[3:8], np.eye(5))
    np.testing.assert_array_equal(joined[8:], make_directions(3, "sphere", 5, seed=7).array)
    np.testing.assert_array_equal(joined[8:10], make_directions(2, "sphere", 5, seed=7).array)


def test_indicator_marks_the_units_of_every_set():
    """Oracle: the vectors written out."""
    directions = make_directions(1, "indicator", 4, deletion_sets=[[2], [0, 3]])
    np.testing.assert_array_equal(directions.array, [[0, 0, 1, 0], [1, 0, 0, 1]])
    assert directions.real.all()


def test_common_alone_is_the_common_mode():
    """Oracle: ``1/sqrt(n)``."""
    np.testing.assert_array_equal(make_directions(9, "common", 4).array, [[0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize("order", ["basis+common", "common+basis"])
def test_basis_and_common_join_as_in_the_design(order):
    """Oracle: the three families ``e_u``, ``c 1``, ``e_u + c 1`` written out, all real."""
    n, c = 50, 1 / np.sqrt(50)
    directions = make_directions(64, order, n)
    assert directions.array.shape == (101, n)
    assert directions.num_directions == 101
    assert directions.num_units == n
    expected = np.concatenate([np.eye(n), np.full((1, n), c), np.eye(n) + c])
    np.testing.assert_allclose(directions.array, expected, atol=1e-15)
    assert directions.real.all()


def test_common_shifts_complex_directions_too():
    """Oracle: every sphere row plus ``c``; only the common mode is real."""
    sphere = make_directions(3, "sphere", 4, seed=1).array
    directions = make_directions(3, "sphere+common", 4, seed=1)
    np.testing.assert_array_equal(directions.array[4:], sphere + 0.5)
    assert directions.real.tolist() == [False] * 3 + [True] + [False] * 3


@settings(max_examples=30)
@given(
    names=st.lists(st.sampled_from(["sphere", "orthonormal", "basis", "indicator", "common"]), min_size=1, unique=True),
    **SIZES,
)
def test_a_recipe_survives_json_and_makes_the_same_directions(names, count, num_units, seed):
    """Oracle: the array that the recipe came from."""
    sets = [[0], [num_units - 1]] if "indicator" in names else None
    made = make_directions(count, "+".join(names), num_units, seed=seed, deletion_sets=sets)
    remade = make_from_recipe(json.loads(json.dumps(made.recipe)), num_units)
    np.testing.assert_array_equal(made.array, remade.array)
    assert made.recipe == remade.recipe


def test_random_designs_of_one_seed_are_independent():
    """Oracle: from the same stream the first orthonormal row would be the first sphere row."""
    rows = [make_directions(1, design, 5, seed=7).array[0] for design in ("sphere", "orthonormal")]
    assert np.abs(rows[0] - rows[1]).max() > 0.1


def test_an_explicit_array_is_copied_and_kept():
    """Oracle: the array given."""
    given_array = np.array([[1, 2.5], [0, -1]], dtype=np.complex128)
    directions = make_directions(given_array, "orthonormal", 2)
    given_array[0, 0] = 9
    np.testing.assert_array_equal(directions.array, [[1, 2.5], [0, -1]])
    assert directions.real.all()
    assert directions.recipe["design"] == "explicit"
    assert make_directions([[1, 1j]], "orthonormal", 2).real.tolist() == [False]
    with pytest.raises(ValueError, match="read-only"):
        directions.array[0, 0] = 3
    with pytest.raises(ConfigurationError, match="`recipe`"):
        make_from_recipe(directions.recipe, 2)


def test_checksum_covers_shape_and_bytes():
    """Oracle: the hash computed by hand; a reshaped or changed array differs."""
    directions = make_directions(np.array([[1.0, 2.0]]), "sphere", 2)
    raw = b"(1, 2)" + np.array([1.0, 0.0, 2.0, 0.0], dtype="<f8").tobytes()
    assert directions.checksum() == hashlib.sha256(raw).hexdigest()
    assert directions.checksum() != make_directions(np.array([[1.0], [2.0]]), "sphere", 1).checksum()
    assert directions.checksum() != make_directions(np.array([[1.0, 2.0 + 1e-15j]]), "sphere", 2).checksum()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"directions": 0}, "`directions`"),
        ({"directions": True}, "`directions`"),
        ({"directions": 2.5}, "`directions`"),
        ({"directions": "many"}, "`directions`"),
        ({"directions": np.ones((2, 4))}, r"`directions` has shape \(2, 4\)"),
        ({"directions": np.ones(3)}, r"`directions` has shape \(3,\)"),
        ({"directions": np.ones((0, 3))}, "`directions`"),
        ({"directions": [[1, 2, np.nan]]}, "`directions` holds NaN"),
        ({"directions": [[1, 2, 3], [0, 0, 0]]}, "`directions` has the zero direction in row 1"),
        ({"directions": np.eye(3), "deletion_sets": [[0]]}, "`deletion_sets`"),
        ({"design": "spheres"}, "`design` names 'spheres'"),
        ({"design": "basis+"}, "`design`"),
        ({"design": "basis+basis"}, "`design`"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 1.5}, "`seed`"),
        ({"design": "indicator"}, "`deletion_sets`"),
        ({"design": "indicator", "deletion_sets": [[3]]}, "`deletion_sets`"),
        ({"design": "indicator", "deletion_sets": [[-1]]}, "`deletion_sets`"),
        ({"design": "indicator", "deletion_sets": [[]]}, "`deletion_sets`"),
        ({"design": "indicator", "deletion_sets": [[1, 1]]}, "`deletion_sets`"),
        ({"design": "sphere", "deletion_sets": [[1]]}, "`deletion_sets`"),
        ({"num_units": 0}, "`num_units`"),
    ],
)
def test_impossible_directions_are_refused(arguments, named):
    """Oracle: the argument's name in the message."""
    good = {"directions": 2, "design": "sphere", "num_units": 3}
    with pytest.raises(ConfigurationError, match=named):
        make_directions(**{**good, **arguments})


def test_units_default_to_one_per_example():
    """Oracle: the sequence itself."""
    units = resolve_units(None, 3)
    assert units.tolist() == [0, 1, 2]
    assert units.dtype == np.int64
    assert count_units(units) == 3


def test_units_are_copied():
    """Oracle: the numbers before the edit."""
    mine = np.array([1, 0, -1])
    units = resolve_units(mine, 3)
    mine[:] = 7
    assert units.tolist() == [1, 0, -1]
    assert count_units(units) == 2


@pytest.mark.parametrize(
    "units",
    [
        [0, 1],
        [0, 1, 2, 3],
        [[0, 1, 2]],
        [0.0, 1.0, 2.0],
        ["a", "b", "c"],
        [0, 1, -2],
        [-1, -1, -1],
        [True, False, True],
    ],
)
def test_impossible_units_are_refused(units):
    """Oracle: the argument's name in the message."""
    with pytest.raises(ConfigurationError, match="`units`"):
        resolve_units(units, 3)
    with pytest.raises(ConfigurationError, match="`units`"):
        resolve_units(None, 0)


def test_units_checksum_depends_on_every_unit():
    """Oracle: the hash computed by hand."""
    units = np.array([0, 1, 1])
    raw = b"(3,)" + units.astype("<i8").tobytes()
    assert units_checksum(units) == hashlib.sha256(raw).hexdigest() == units_checksum(units.astype(np.int32))
    assert units_checksum(units) != units_checksum(np.array([0, 1, 2]))


@pytest.mark.parametrize("num_measurements", [4, 10, 16, 20, 30])
def test_first_order_error_is_that_of_random_projections(num_measurements):
    """Oracle: projecting random deletions on random subspaces, and scaling as the unbiased estimator does."""
    n, rng = 20, np.random.default_rng(0)
    squares = []
    for _ in range(400):
        basis, _ = np.linalg.qr(rng.standard_normal((n, min(num_measurements, n))))
        slope, x = rng.standard_normal(n), rng.standard_normal(n)
        squares.append((slope @ basis @ basis.T @ x * n / min(num_measurements, n) - slope @ x) ** 2)
    assert np.sqrt(np.mean(squares) / n) == pytest.approx(first_order_error(num_measurements, n), rel=0.15, abs=1e-9)


def test_more_directions_than_memory_are_refused_before_they_are_made():
    """Oracle: the error's words; the array would take 1.6 TB."""
    with pytest.raises(ConfigurationError, match=r"`design='basis'`.*100000 directions.*`units=`"):
        make_directions(1, "basis", 100_000)
