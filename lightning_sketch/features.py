"""Features of units: projected training gradients, whose inner products say which units act alike on a model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from scipy.linalg import svd

from lightning_sketch.directions import count_units, units_checksum
from lightning_sketch.errors import ConfigurationError, SketchError

FILE_NAME = "features.safetensors"
_FORMAT = "lightning_sketch.features.2"
RIDGE = 3.0  # of the second moment of the gradients, in mean eigenvalues
_RANK = 1e-5  # singular values below this part of the largest are rounding of float32


@dataclass(frozen=True, eq=False)
class UnitFeatures:
    """Projected training gradients of every unit at several points of training.

    Args:
        array: ``(points, n, m)`` float32; inner products over ``m`` approximate those of the gradients.
        losses: ``(points, n)`` float32, the mean of every unit's losses at these points.
        units: :func:`units_checksum` of the unit map.
        seed: of the projection.
    """

    array: np.ndarray
    losses: np.ndarray
    units: str
    seed: int

    def save(self, dirpath: str | os.PathLike[str]) -> None:
        """Write them to a directory, made if need be; what was there before stays until all is written.

        Raises:
            SketchError: the directory can not be written.
        """
        directory = Path(dirpath)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".writing-", delete=False) as file:
                arrays = {"features": self.array, "losses": self.losses}
                content = {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in arrays.items()}
                header = {"format": _FORMAT, "units": self.units, "seed": str(self.seed)}
                file.write(safetensors.numpy.save(content, header))
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, directory / FILE_NAME)
        except OSError as error:
            raise SketchError(f"`{directory}` can not be written ({error}): choose another `dirpath`.") from error

    @classmethod
    def load(cls, dirpath: str | os.PathLike[str], unit_of_example: np.ndarray) -> UnitFeatures:
        """Read what :meth:`save` wrote; no code is run.

        Args:
            dirpath: the directory.
            unit_of_example: ``(num_examples,)``, the units that the features must be of.

        Raises:
            SketchError: there are none, or they can not be read.
            ConfigurationError: they are of other units.
        """
        path = Path(dirpath) / FILE_NAME
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header, names = file.metadata() or {}, sorted(file.keys())
                seed = header.get("seed", "")
                if header.get("format") != _FORMAT or names != ["features", "losses"] or not seed.isdecimal():
                    raise SketchError(f"`{path}` holds no features of units: give the `dirpath` of GradientFeatures.")
                array, losses = file.get_tensor("features"), file.get_tensor("losses")
        except (OSError, safetensors.SafetensorError) as error:
            raise SketchError(f"`{path}` can not be read ({error}): run GradientFeatures again.") from error
        if header.get("units") != units_checksum(unit_of_example):
            raise ConfigurationError(
                f"`features`: `{path}` is of other units: record it with the `units` of this run, on the same dataset."
            )
        if array.dtype != np.float32 or array.ndim != 3 or array.shape[1] != count_units(unit_of_example):
            raise SketchError(f"`{path}` holds {array.dtype} of shape {array.shape}: run GradientFeatures again.")
        if losses.dtype != np.float32 or losses.shape != array.shape[:2]:
            raise SketchError(f"`{path}` holds losses of shape {losses.shape}: run GradientFeatures again.")
        if not (np.isfinite(array).all() and np.isfinite(losses).all()):
            raise SketchError(f"`{path}` holds NaN or infinity: run GradientFeatures again on a run that is stable.")
        return cls(array, losses, header["units"], int(seed))

    @cached_property
    def spectra(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every point, the left singular vectors of the gradients, ``(n, p)``, and the squares of the values."""
        found = []
        for gradients in self.array.astype(np.float64):
            left, singular, _ = svd(gradients, full_matrices=False)
            found.append((left, singular**2))
        return found

    def flattened(self) -> np.ndarray:
        """Return features whose inner products are the prior covariance of units, float64, ``(n, points * m)``.

        At each point they are ``(g_u . (C + c I)^-1 g_v)``, with ``C`` the second moment of the gradients and ``c``
        :data:`RIDGE` times its mean eigenvalue among the ``n``: what units share, training has unlearned by its end, so
        that plain products of gradients overrate it (the kernel of Park et al., *TRAK*, arXiv 2303.14186, section 3.2,
        with a ridge).
        """
        parts = []
        for left, squares in self.spectra:
            ridge = RIDGE * squares.sum() / len(left) + np.finfo(np.float64).tiny
            parts.append(left * np.sqrt(squares / (squares + ridge)))
        return np.concatenate(parts, axis=1)

    def leading_directions(self, count: int) -> np.ndarray:
        """Return the leading eigenvectors of the units' prior covariance, ``(count, n)``, orthonormal rows.

        Along them units that act alike are measured together. They are the left singular vectors of
        :meth:`flattened`, so no ``(n, n)`` matrix is made.

        Raises:
            ConfigurationError: there are fewer than ``count``.
        """
        left, singular, _ = svd(self.flattened(), full_matrices=False)
        rank = int((singular > _RANK * singular[0]).sum()) if singular.size else 0
        if count > rank:
            raise ConfigurationError(
                f"`directions` is {count}, but the gradients of the units have {rank} independent directions: draw "
                "fewer, give features of a larger `projection`, or join another design."
            )
        rows: np.ndarray = left[:, :count].T
        signs = np.sign(rows[np.arange(count), np.abs(rows).argmax(axis=1)])  # LAPACK leaves them open
        return rows * signs[:, None]
