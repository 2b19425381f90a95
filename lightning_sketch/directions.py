"""Deletion units, and the directions in unit space along which a training run is expanded, drawn from a seed."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lightning_sketch.errors import ConfigurationError

MAX_ENTRIES = 2**30  # of the array of directions, 16 bytes each
DESIGNS = ("sphere", "orthonormal", "basis", "indicator", "common", "gradient")


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions ``psi_1 .. psi_K`` in unit space, and the recipe that made them.

    Args:
        array: ``(K, n)`` complex128, read-only; row ``j`` is ``psi_j``, column ``u`` belongs to unit ``u``.
        recipe: JSON-able arguments of :func:`make_directions`; ``design`` is ``"explicit"`` for a given array.
    """

    array: np.ndarray
    recipe: dict[str, Any]

    @property
    def real(self) -> np.ndarray:
        """``(K,)`` bool: which directions have an imaginary part that is identically zero."""
        real: np.ndarray = (self.array.imag == 0).all(axis=1)
        return real

    @property
    def num_directions(self) -> int:
        """``K``."""
        return int(self.array.shape[0])

    @property
    def num_units(self) -> int:
        """``n``."""
        return int(self.array.shape[1])

    def checksum(self) -> str:
        """SHA-256, in hex, of the array's shape and its bytes (C order, little-endian complex128)."""
        return _sha256(self.array, "<c16")


def resolve_units(units: Sequence[int] | np.ndarray | None, num_examples: int) -> np.ndarray:
    """Return the unit of every training example.

    Args:
        units: unit of each example, ``-1`` for an example that can not be deleted; ``None`` makes each example a unit.
        num_examples: length of the training dataset.

    Returns:
        ``(num_examples,)`` int64.

    Raises:
        ConfigurationError: wrong length, not integers, a value below -1, or no unit at all.

    Example:
        >>> resolve_units([0, 0, 1, -1], 4).tolist()
        [0, 0, 1, -1]
    """
    if units is None:
        if num_examples < 1:
            raise ConfigurationError("`units` is None and the training dataset is empty: give a dataset with examples.")
        return np.arange(num_examples, dtype=np.int64)
    resolved = np.asarray(units)
    if resolved.ndim != 1 or len(resolved) != num_examples:
        raise ConfigurationError(
            f"`units` has shape {resolved.shape} and the training dataset has {num_examples} examples: "
            "give one unit per example, in dataset order."
        )
    if resolved.dtype.kind not in "iu":
        raise ConfigurationError(
            f"`units` holds {resolved.dtype} values: give integers 0..n-1, for instance "
            "`numpy.unique(names, return_inverse=True)[1]`."
        )
    resolved = resolved.astype(np.int64)  # a copy: later edits of the caller's array must not reach the sketch
    if resolved.min(initial=0) < -1:
        raise ConfigurationError(
            f"`units` holds {resolved.min()}: number units from 0 and mark an example that can not be deleted by -1."
        )
    if resolved.max(initial=-1) < 0:
        raise ConfigurationError("`units` marks every example as not deletable (-1): give at least one example a unit.")
    return resolved


def count_units(unit_of_example: np.ndarray) -> int:
    """Return the number of units ``n``, the largest unit plus one."""
    return int(unit_of_example.max()) + 1


def units_checksum(unit_of_example: np.ndarray) -> str:
    """Return the SHA-256, in hex, of the unit map's shape and bytes (little-endian int64)."""
    return _sha256(unit_of_example, "<i8")


def make_directions(
    directions: int | ArrayLike,
    design: str,
    num_units: int,
    *,
    seed: int = 0,
    deletion_sets: Sequence[Sequence[int]] | None = None,
    leading: Callable[[int], np.ndarray] | None = None,
) -> Directions:
    """Return the directions of a design, or those of a given array.

    Designs, joined by ``+``; ``n`` is ``num_units``:

    - ``sphere``: independent, uniform on the unit sphere of ``C^n`` (Gunn, *How to sketch a learning algorithm*,
      arXiv 2604.07328);
    - ``orthonormal``: rows of Haar unitaries, in blocks of at most ``n``; each row is uniform on the sphere;
    - ``basis``: the ``n`` real unit vectors ``e_u``;
    - ``indicator``: the real ``1_D`` of every set in ``deletion_sets``;
    - ``gradient``: the leading eigenvectors, real, of the Gram matrix of the units' training gradients;
    - ``common``: the common mode ``c * 1``, ``c = 1 / sqrt(n)``, and ``v + c * 1`` for every direction ``v`` of the
      other designs; these rows come last.

    Args:
        directions: how many directions each of sphere, orthonormal and gradient has; or a real or complex array
            ``(K, n)``, taken as it is, for which ``design`` and ``seed`` are not used.
        design: names of designs joined by ``+``.
        num_units: ``n``.
        seed: seed of the random designs; each has its own stream, so that its draw depends on no other design.
        deletion_sets: lists of units, for ``indicator``.
        leading: gives the first so many eigenvectors, ``(count, n)`` float64, for ``gradient``.

    Raises:
        ConfigurationError: any argument that can not be right.

    Example:
        >>> make_directions(4, "basis+common", 50).num_directions
        101
        >>> make_directions(4, "sphere", 3, seed=1).array[0].round(2).tolist()
        [(0.68-0.2j), (-0.26-0.01j), (-0.65-0.08j)]
    """
    if num_units < 1:
        raise ConfigurationError(f"`num_units` is {num_units}: directions need at least one unit.")
    if not isinstance(directions, Integral):
        return _explicit(directions, num_units, deletion_sets)
    count = int(directions)
    if isinstance(directions, bool) or count < 1:
        raise ConfigurationError(
            f"`directions` is {directions}: give how many to draw, at least 1, or an array (K, n)."
        )
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ConfigurationError(f"`seed` is {seed!r}: give an integer of at least 0.")
    names = parse_design(design)
    sets = _check_deletion_sets(deletion_sets, num_units, wanted="indicator" in names)

    recipe = {"design": "+".join(names), "count": count, "seed": int(seed), "deletion_sets": sets}
    rows = count_directions(recipe, num_units)
    if rows * num_units > MAX_ENTRIES:
        raise ConfigurationError(
            f"`design={design!r}` makes {rows} directions of {num_units} units, more than memory is meant for: group "
            "examples into fewer units with `units=`, or draw fewer random `directions`."
        )
    parts: list[np.ndarray] = []
    for name in names:
        if name == "sphere":
            parts.append(_sphere(_stream(int(seed), name), count, num_units))
        elif name == "orthonormal":
            parts.append(_orthonormal(_stream(int(seed), name), count, num_units))
        elif name == "basis":
            parts.append(np.eye(num_units, dtype=np.complex128))
        elif name == "gradient":
            if leading is None:
                raise ConfigurationError("`design='gradient'` needs the gradients of a run: read the stored array.")
            parts.append(leading(count).astype(np.complex128))
        elif name == "indicator":
            parts.append(_indicators(sets or [], num_units))
    if "common" in names:
        common = np.full((1, num_units), 1 / math.sqrt(num_units), dtype=np.complex128)
        parts += [common, *[part + common for part in parts]]
    return Directions(_read_only(np.concatenate(parts)), recipe)


def random_signs(count: int, num_units: int, seed: int) -> Directions:
    """Return ``count`` random sign patterns ``+-1/sqrt(n)`` and the common mode ``1/sqrt(n)``, all real.

    Every unit counts the same in each, so the second order of a pattern holds all that units do by themselves.

    Args:
        count: how many patterns.
        num_units: ``n``.
        seed: of the patterns.
    """
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    signs = np.concatenate([2.0 * stream.integers(0, 2, (count, num_units)) - 1, np.ones((1, num_units))])
    array = (signs / math.sqrt(num_units)).astype(np.complex128)
    recipe = {"design": "explicit", "count": len(array), "seed": seed, "deletion_sets": None}
    return Directions(_read_only(array), recipe)


def make_from_recipe(recipe: Mapping[str, Any], num_units: int) -> Directions:
    """Return the directions that a stored recipe describes.

    Raises:
        ConfigurationError: the recipe is that of an explicit array, or of gradients, which only the array itself can
            give back.
    """
    if recipe["design"] == "explicit":
        raise ConfigurationError("`recipe` is that of an explicit array: read the stored array instead.")
    return make_directions(
        recipe["count"], recipe["design"], num_units, seed=recipe["seed"], deletion_sets=recipe["deletion_sets"]
    )


def count_directions(recipe: Mapping[str, Any], num_units: int) -> int:
    """Return how many directions a recipe makes, without making them.

    Raises:
        ConfigurationError: the recipe names an unknown design.
    """
    names = parse_design(recipe["design"])
    drawn = sum(name in names for name in ("sphere", "orthonormal", "gradient"))
    rows = int(num_units * ("basis" in names) + recipe["count"] * drawn)
    rows += len(recipe["deletion_sets"] or ()) * ("indicator" in names)
    return 2 * rows + 1 if "common" in names else rows


def first_order_error(num_measurements: int, num_units: int) -> float:
    """Return the expected relative L2 error of a first-order prediction of a random deletion.

    The unbiased estimate from a random subspace of ``m`` of the ``n`` dimensions is ``n/m`` times the projection, so
    its relative error is ``sqrt(max(0, 1 - m/n) * n/m)``.

    Args:
        num_measurements: ``m``, real numbers measured per coefficient: 2 per complex direction, 1 per real one.
        num_units: ``n``.

    Example:
        >>> round(first_order_error(200, 1000), 3)
        2.0
    """
    return math.sqrt(max(0.0, 1 - num_measurements / num_units) * num_units / num_measurements)


def plain_steps(degree: int, *, real: bool) -> float:
    """Return what one direction costs, in plain training steps per step of the run, by its operation count.

    Order ``r`` of a product is two products with the primal and ``r - 1`` between coefficients; of complex numbers each
    of the former is two real products, and each of the latter four.

    Args:
        degree: ``R``.
        real: whether the direction is real.

    Example:
        >>> plain_steps(3, real=True), plain_steps(3, real=False)
        (9.0, 24.0)
    """
    return 2 * degree + degree * (degree - 1) / 2 if real else 4.0 * degree + 2 * degree * (degree - 1)


def parse_design(design: str) -> list[str]:
    """Return the names that a design joins.

    Raises:
        ConfigurationError: an unknown name, or one that stands twice.
    """
    names = [name.strip() for name in str(design).split("+")]
    if unknown := [name for name in names if name not in DESIGNS]:
        raise ConfigurationError(f"`design` names {unknown[0]!r}: join any of {', '.join(DESIGNS)} by '+'.")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"`design` is {design!r}, which names a design twice: name each once.")
    return names


def _check_deletion_sets(
    deletion_sets: Sequence[Sequence[int]] | None, num_units: int, *, wanted: bool
) -> list[list[int]] | None:
    if not wanted:
        if deletion_sets is not None:
            raise ConfigurationError(
                "`deletion_sets` is given, which only the design 'indicator' uses: add it or drop these."
            )
        return None
    if not deletion_sets:
        raise ConfigurationError("`deletion_sets` is empty: the design 'indicator' needs at least one list of units.")
    sets = []
    for deletion_set in deletion_sets:
        units = list(deletion_set)
        if not units or any(
            isinstance(u, bool) or not isinstance(u, Integral) or not 0 <= u < num_units for u in units
        ):
            raise ConfigurationError(f"`deletion_sets` holds {units}: every set lists units of 0..{num_units - 1}.")
        if len(set(units)) < len(units):
            raise ConfigurationError(f"`deletion_sets` holds {units}, with a unit twice: list every unit once.")
        sets.append([int(u) for u in units])
    return sets


def _explicit(given: ArrayLike, num_units: int, deletion_sets: object) -> Directions:
    if deletion_sets is not None:
        raise ConfigurationError("`deletion_sets` is given beside an array of directions: give one of the two.")
    try:
        array = np.array(given, dtype=np.complex128, order="C")
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"`directions` is {given!r}: give an integer or an array (K, {num_units}).") from error
    if array.ndim != 2 or array.shape[1] != num_units or not len(array):
        raise ConfigurationError(f"`directions` has shape {array.shape}: give (K, {num_units}), one column per unit.")
    if not np.isfinite(array).all():
        raise ConfigurationError("`directions` holds NaN or infinity: give finite numbers.")
    if not array.any(axis=1).all():
        row = int(np.argmin(array.any(axis=1)))
        raise ConfigurationError(
            f"`directions` has the zero direction in row {row}, which measures nothing: remove it."
        )
    recipe = {"design": "explicit", "count": len(array), "seed": None, "deletion_sets": None}
    return Directions(_read_only(array), recipe)


def _stream(seed: int, design: str) -> np.random.Generator:
    # Keyed by the design, not by its place, so that joining another design changes no draw.
    key = DESIGNS.index(design)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(key,))))


def _complex_normal(stream: np.random.Generator, count: int, num_units: int) -> np.ndarray:
    return stream.standard_normal((count, 2 * num_units)).view(np.complex128)


def _sphere(stream: np.random.Generator, count: int, num_units: int) -> np.ndarray:
    rows = _complex_normal(stream, count, num_units)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _orthonormal(stream: np.random.Generator, count: int, num_units: int) -> np.ndarray:
    blocks = []
    for start in range(0, count, num_units):
        columns = _complex_normal(stream, min(num_units, count - start), num_units).T
        q, r = np.linalg.qr(columns)
        # LAPACK leaves the phases of R's diagonal open; only R with a positive diagonal makes Q Haar distributed
        # (Mezzadri, How to generate random matrices from the classical compact groups, section 5).
        phases = np.diagonal(r) / np.abs(np.diagonal(r))
        blocks.append((q * phases).T)
    return np.concatenate(blocks)


def _indicators(sets: list[list[int]], num_units: int) -> np.ndarray:
    rows = np.zeros((len(sets), num_units), dtype=np.complex128)
    for row, units in zip(rows, sets, strict=True):
        row[units] = 1
    return rows


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _sha256(array: np.ndarray, dtype: str) -> str:
    digest = hashlib.sha256(str(tuple(array.shape)).encode())
    digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return digest.hexdigest()
