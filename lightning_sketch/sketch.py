"""The sketch: a training run and its Taylor coefficients in the deleted data, on disk.

The format and its reader are in ``_sketch_format.py``, the writer's file handling in ``_sketch_writer.py``. Longer than
most files because reading, writing and merging share one class.
"""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as parse_tensors
from torch import Tensor

from lightning_sketch._sketch_format import (
    COEFFICIENT_DTYPES,
    DTYPE_NAMES,
    DTYPES,
    FORMAT_VERSION,
    JSON_NAME,
    MAX_REGENERATED_ENTRIES,
    check_digest,
    check_header,
    damaged,
    expected_tensors,
    open_data,
    read_metadata,
)
from lightning_sketch._sketch_writer import SketchWriter, writing
from lightning_sketch.directions import Directions, count_directions, count_units, make_from_recipe, units_checksum
from lightning_sketch.errors import ConfigurationError, SketchError
from lightning_sketch.shadow.scaling import MAX_EXPONENT, scale_orders

_PROBE_TOLERANCE = 1e-9
_SAME_DIRECTION = 1e-12  # of the squared distance, in units of the squared length
# What two sketches must share to be parts of one, beside the unit map, the order of the data and, bit by bit, the final
# tensors. Those tell apart runs of another seed or hyperparameter, which are not recorded by themselves.
_SAME_RUN = ("degree", "dtype", "num_examples", "num_units", "steps", "normalization", "optimizer", "loss", "modules")


@dataclass(frozen=True)
class Shard:
    """The coefficients of some of the directions, as a run carries them.

    Args:
        indices: ``(k,)`` int64, the rows of ``Sketch.directions`` that this shard holds.
        scaled: parameter or buffer name -> ``(R, P, k, *S)`` float32 or float64: orders ``1 .. R``, ``P`` = 2 (real and
            imaginary parts) or 1 (all its directions are real), and the tensor's own shape ``S``. Order ``r`` of
            direction ``j`` is ``2^(r e_j)`` times the coefficient. A tensor that does not change with the data is
            absent.
        exponents: ``(k,)`` integers ``e``.
    """

    indices: np.ndarray
    scaled: dict[str, Tensor]
    exponents: np.ndarray

    @cached_property
    def coefficients(self) -> dict[str, Tensor]:
        """``c_jr`` themselves, float64, in the shapes of ``scaled``; 0 or infinite where float64 does not hold them."""
        return {name: scale_orders(block.double(), -self.exponents) for name, block in self.scaled.items()}


class Sketch:
    """A sketch on disk: the final tensors of one training run and their Taylor coefficients in the deleted data.

    Along direction ``psi_j`` a tensor is ``theta(psi_j z) = theta_0 + sum_{r=1..R} c_jr z^r``. Numbers are read from
    disk when they are asked for, and their SHA-256 is checked each time.

    Attributes:
        dirpath: the directory.
        metadata: the content of ``sketch.json``.
        degree: ``R``.
        num_directions: ``K``.
        num_units: ``n``.
        num_examples: length of the training dataset.
        exponents: ``(K,)`` int64, ``e_j`` of the coefficients in :class:`Shard`.
        num_bytes: size of all data files, in bytes.
        dtype: dtype of the coefficients, ``torch.float32`` or ``torch.float64``.
        steps: optimizer steps of the run.
        normalization: ``"batch"`` or ``"remaining"``.
        optimizer: the optimizer of the run, in words.
        loss: the loss of the run, in words.
    """

    def __init__(self, dirpath: Path, metadata: dict[str, Any]) -> None:
        """Use :meth:`load`, which checks what it reads."""
        self.dirpath = dirpath
        self.metadata = metadata
        self.degree: int = metadata["degree"]
        self.num_directions: int = metadata["num_directions"]
        self.num_units: int = metadata["num_units"]
        self.num_examples: int = metadata["num_examples"]
        self.exponents = np.array(metadata["coefficients"]["exponents"], dtype=np.int64)
        self.num_bytes: int = sum(entry["bytes"] for entry in metadata["files"].values())
        self.dtype: torch.dtype = DTYPES[metadata["dtype"]]
        self.steps: int = metadata["steps"]
        self.normalization: str = metadata["normalization"]
        self.optimizer: str = metadata["optimizer"]
        self.loss: str = metadata["loss"]

    @classmethod
    def load(cls, dirpath: str | os.PathLike[str]) -> "Sketch":
        """Open a sketch and check everything that can be checked without reading its tensors.

        That is ``sketch.json`` completely, and for each data file that it is a regular file of the recorded size whose
        header lists exactly the expected names, dtypes and shapes.

        Raises:
            SketchError: a file is missing, torn, altered, not a regular file, or of a newer format version.
        """
        path = Path(dirpath)
        metadata = read_metadata(path / JSON_NAME)
        try:
            for name, tensors in expected_tensors(metadata).items():
                check_header(path / name, metadata["files"][name], tensors)
        except SketchError:
            if read_metadata(path / JSON_NAME) == metadata:
                raise
            return cls.load(path)  # a writer replaced the sketch while we read
        return cls(path, metadata)

    def verify(self) -> None:
        """Hash every file again, and check the unit map and the directions.

        Raises:
            SketchError: a file is missing or altered, or the recipe of the directions does not give them back.
        """
        Sketch.load(self.dirpath)
        for name, entry in self.metadata["files"].items():
            with open_data(self.dirpath / name, entry) as file:
                check_digest(self.dirpath / name, entry, hashlib.file_digest(file, "sha256").hexdigest())
        self._read_units()
        self._read_directions()

    @cached_property
    def primal(self) -> dict[str, Tensor]:
        """The run's own final parameters and buffers by name, as they were: ``c_0``, shared by all directions."""
        return self._read(self.metadata["primal"]["file"])

    @cached_property
    def units(self) -> np.ndarray:
        """``(num_examples,)`` int64: the unit of each training example, -1 where it can not be deleted."""
        return self._read_units()

    @cached_property
    def directions(self) -> np.ndarray:
        """``(K, n)`` complex128: the directions ``psi_j``, one per row."""
        return self._read_directions().array

    def shards(self) -> Iterator[Shard]:
        """Yield the coefficients, one shard file at a time.

        Raises:
            SketchError: a shard is missing or altered.
        """
        for entry in self.metadata["coefficients"]["shards"]:
            indices = np.array(entry["directions"], dtype=np.int64)
            yield Shard(indices, self._read(entry["file"]), self.exponents[indices])

    def check_fits(self, module: torch.nn.Module) -> None:
        """Check that ``module`` has the tensors and the submodules of the sketched model.

        Raises:
            SketchError: a parameter, persistent buffer or submodule is missing on either side, or is of another shape
                or type.
        """
        saved = {name: tuple(entry["shape"]) for name, entry in self.metadata["primal"]["tensors"].items()}
        kept = module.state_dict().keys()
        required = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        required |= {name: tuple(buffer.shape) for name, buffer in module.named_buffers() if name in kept}
        # A sketch may also name a tied tensor twice, or hold buffers that are not persistent.
        known = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(remove_duplicate=False)}
        known |= {name: tuple(tensor.shape) for name, tensor in module.named_buffers(remove_duplicate=False)}
        types, trained = module_types(module), self.metadata["modules"]
        faults = [f"`{name}` is missing from the sketch" for name in required if name not in saved]
        faults += [f"`{name}` is missing from the module" for name in saved if name not in known]
        faults += [
            f"`{name}` has shape {shape} in the sketch and {known[name]} in the module"
            for name, shape in saved.items()
            if name in known and known[name] != shape
        ]
        faults += [
            f"`{name}` is {trained.get(name, 'missing')} in the sketch and {types.get(name, 'missing')} in the module"
            for name in sorted(types.keys() | trained.keys())
            if types.get(name) != trained.get(name)
        ]
        if faults:
            shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
            raise SketchError(
                f"`module` does not fit, the sketch `{self.dirpath}` is of another model: {shown}: "
                "give the module that was trained, built with the same arguments."
            )

    @classmethod
    def merge(cls, sketches: "Sequence[Sketch]", out: str | os.PathLike[str]) -> "Sketch":
        """Join sketches of one run along different directions; the directions are stacked in the order given.

        Args:
            sketches: at least two, from runs that differ in nothing but the directions (another ``seed``).
            out: directory of the result.

        Returns:
            The merged sketch. Shards are copied one at a time.

        Raises:
            ConfigurationError: fewer than two sketches.
            SketchError: the parts are of different runs, hold a direction twice, or one of them can not be read.
        """
        if len(sketches) < 2:
            raise ConfigurationError(f"`sketches` holds {len(sketches)}: give at least two to merge.")
        _check_mergeable(sketches)
        recipes = [sketch.metadata["directions"]["recipe"] for sketch in sketches]
        flat = [part for recipe in recipes for part in _parts(recipe)]
        stacked = Directions(
            np.concatenate([sketch.directions for sketch in sketches]), {"design": "merged", "merged": flat}
        )
        first = sketches[0]
        metadata = copy.deepcopy(first.metadata)
        with writing(out) as writer:
            metadata["primal"]["file"] = writer.copy("primal", *first._locate(first.metadata["primal"]["file"]))
            if first.metadata["units"]["file"] is not None:
                metadata["units"]["file"] = writer.copy("units", *first._locate(first.metadata["units"]["file"]))
            metadata["directions"] = _save_directions(writer, stacked)
            metadata["num_directions"] = stacked.num_directions
            shards: list[dict[str, Any]] = []
            start = 0
            for sketch in sketches:
                for entry in sketch.metadata["coefficients"]["shards"]:
                    file = writer.copy(f"coefficients-{len(shards):05d}", *sketch._locate(entry["file"]))
                    rows = [start + row for row in entry["directions"]]
                    shards.append({"file": file, "planes": entry["planes"], "directions": rows})
                start += sketch.num_directions
            metadata["coefficients"]["shards"] = writer.number(shards)
            metadata["coefficients"]["exponents"] = np.concatenate([s.exponents for s in sketches]).tolist()
            writer.commit(metadata)
        return cls.load(out)

    def __repr__(self) -> str:
        """Say what is in it and how large it is."""
        return (
            f"Sketch({str(self.dirpath)!r}: {self.num_units} units of {self.num_examples} examples, "
            f"{self.num_directions} directions, degree {self.degree}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.steps} steps of {self.optimizer}, {self.num_bytes:,} bytes)"
        )

    def _read(self, name: str) -> dict[str, Tensor]:
        """Read a data file into memory; its bytes are hashed before they become numbers."""
        path, entry = self._locate(name)
        with open_data(path, entry) as file:
            data = file.read(entry["bytes"])
        check_digest(path, entry, hashlib.sha256(data).hexdigest())
        try:
            return parse_tensors(data)
        except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise damaged(path, f"is not a safetensors file ({error})") from error

    def _locate(self, name: str) -> tuple[Path, dict[str, Any]]:
        return self.dirpath / name, self.metadata["files"][name]

    def _read_units(self) -> np.ndarray:
        name = self.metadata["units"]["file"]
        units = np.arange(self.num_examples) if name is None else self._read(name)["units"].numpy()
        if units_checksum(units) != self.metadata["units"]["checksum"]:
            raise damaged(self.dirpath / (name or JSON_NAME), "does not give the unit map that was recorded")
        if units.min() < -1 or count_units(units) != self.num_units:
            raise damaged(self.dirpath / (name or JSON_NAME), f"holds no unit map of {self.num_units} units")
        units.setflags(write=False)
        return units

    def _read_directions(self) -> Directions:
        recorded = self.metadata["directions"]
        if recorded["file"] is None:
            return self._regenerate_directions()
        array = self._read(recorded["file"])["directions"].numpy().view(np.complex128)[..., 0]
        array.setflags(write=False)
        directions = Directions(array, recorded["recipe"])
        if directions.checksum() != recorded["checksum"]:
            raise damaged(self.dirpath / recorded["file"], "does not hold the directions that were recorded")
        return directions

    def _regenerate_directions(self) -> Directions:
        recorded, path = self.metadata["directions"], self.dirpath / JSON_NAME
        try:
            directions = _follow_recipe(recorded["recipe"], self.num_units, self.num_directions)
        except ConfigurationError as error:
            raise damaged(path, f"has a recipe of directions that can not be followed ({error})") from error
        if directions.checksum() != recorded["checksum"]:
            probe = np.array(recorded["probe"], dtype=np.float64)
            if not np.allclose(_probe(directions.array), probe, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE):
                raise SketchError(
                    f"`{path}` has a recipe that gives other directions here than when it was written: install "
                    f"numpy {self.metadata['versions'].get('numpy')}, or restore the file from a backup."
                )
        return directions


def write_sketch(
    dirpath: str | os.PathLike[str],
    *,
    primal: dict[str, Tensor],
    shards: Iterable[Shard],
    directions: Directions,
    unit_of_example: np.ndarray,
    degree: int,
    normalization: str,
    steps: int,
    data_order: str,
    optimizer: str,
    loss: str,
    modules: dict[str, str],
) -> Sketch:
    """Write a sketch; a sketch that was in ``dirpath`` stays readable until the new one is complete, then goes.

    Args:
        dirpath: the directory, made if need be.
        primal: the run's final parameters and buffers by name.
        shards: the coefficients; each shard is written as it comes, so that one at a time is in memory. Together they
            hold each direction once, and each holds the same names.
        directions: the ``K`` directions in ``C^n``.
        unit_of_example: ``(num_examples,)`` int64, the unit of each training example, -1 = not deletable.
        degree: ``R``.
        normalization: ``"batch"`` or ``"remaining"``.
        steps: optimizer steps done.
        data_order: SHA-256, 64 hexadecimal digits, of the rows of all batches in their order.
        optimizer: the optimizer, in words.
        loss: the loss, in words.
        modules: :func:`module_types` of the model.

    Returns:
        The sketch, loaded from what was written.

    Raises:
        ConfigurationError: the arguments do not fit each other.
        SketchError: the directory can not be written, or another process is writing it.
    """
    units = np.asarray(unit_of_example, dtype=np.int64)
    num_units = count_units(units)
    if directions.num_units != num_units:
        raise ConfigurationError(
            f"`directions` has {directions.num_units} columns and `unit_of_example` {num_units} units: make them agree."
        )
    if unsupported := [name for name, tensor in primal.items() if tensor.dtype not in DTYPE_NAMES]:
        raise ConfigurationError(
            f"`primal` holds `{unsupported[0]}` of {primal[unsupported[0]].dtype}: use one of {', '.join(DTYPES)}."
        )
    real = directions.real
    with writing(dirpath) as writer:
        primal_file = writer.save("primal", primal)
        units_file = None
        if not np.array_equal(units, np.arange(len(units))):
            units_file = writer.save("units", {"units": torch.from_numpy(units)})
        recorded_directions = _save_directions(writer, directions)
        entries: list[dict[str, Any]] = []
        layout: tuple[tuple[str, ...], torch.dtype] | None = None
        held: list[int] = []
        exponents: dict[int, int] = {}
        for shard in shards:
            layout = _check_shard(shard, primal, real, degree, layout)
            file = writer.save(f"coefficients-{len(entries):05d}", shard.scaled)
            rows = [int(row) for row in shard.indices]
            exponents.update(zip(rows, shard.exponents.tolist(), strict=True))
            planes = next(iter(shard.scaled.values())).shape[1]
            entries.append({"file": file, "planes": planes, "directions": rows})
            held += rows
        if layout is None or sorted(held) != list(range(directions.num_directions)):
            raise ConfigurationError(
                f"`shards` holds {len(held)} directions, {len(set(held))} of them different, "
                f"of {directions.num_directions}: give each once."
            )
        names, dtype = layout
        writer.commit(
            {
                "format": "lightning_sketch",
                "format_version": FORMAT_VERSION,
                "degree": int(degree),
                "dtype": DTYPE_NAMES[dtype],
                "num_directions": directions.num_directions,
                "num_units": num_units,
                "num_examples": len(units),
                "steps": int(steps),
                "data_order": data_order,
                "normalization": normalization,
                "optimizer": optimizer,
                "loss": loss,
                "modules": modules,
                "units": {"checksum": units_checksum(units), "file": units_file},
                "directions": recorded_directions,
                "primal": {
                    "file": primal_file,
                    "tensors": {
                        name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
                        for name, tensor in primal.items()
                    },
                },
                "coefficients": {
                    "names": list(names),
                    "exponents": [exponents[row] for row in range(directions.num_directions)],
                    "shards": writer.number(entries),
                },
            }
        )
    return Sketch.load(dirpath)


def module_types(module: torch.nn.Module) -> dict[str, str]:
    """Return the type of every submodule by name, but for metrics, which may come and go."""
    return {
        name: type(m).__name__
        for name, m in module.named_modules()
        if name and not any(c.__module__.startswith("torchmetrics.") for c in type(m).__mro__)
    }


def check_writable(dirpath: str | os.PathLike[str]) -> None:
    """Make the directory and try to write there, so that hours of training do not end at a full or foreign disk.

    Raises:
        SketchError: the directory can not be written, or another process is writing it.
    """
    with writing(dirpath):
        pass


def _check_shard(
    shard: Shard,
    primal: dict[str, Tensor],
    real: np.ndarray,
    degree: int,
    layout: tuple[tuple[str, ...], torch.dtype] | None,
) -> tuple[tuple[str, ...], torch.dtype]:
    """Check a shard against the primal and the shard before it; return the names and the dtype it holds."""
    indices, tensors, exponents = np.asarray(shard.indices), shard.scaled, np.asarray(shard.exponents)
    if not tensors or indices.ndim != 1 or not len(indices) or indices.dtype.kind not in "iu":
        raise ConfigurationError(
            "`shards` holds one without integer `indices` (k,) or without coefficients: leave it out."
        )
    if indices.min() < 0 or indices.max() >= len(real):
        raise ConfigurationError(f"`shards` holds rows {indices.tolist()}: give rows of the {len(real)} directions.")
    if exponents.shape != indices.shape or exponents.dtype.kind not in "iu" or abs(exponents).max() > MAX_EXPONENT:
        raise ConfigurationError(
            f"`shards` has exponents {exponents.tolist()} for rows {indices.tolist()}: give an integer for each, of "
            f"size at most {MAX_EXPONENT}."
        )
    planes = next(iter(tensors.values())).shape[1:2]
    if planes not in ((2,), (1,)) or (planes == (1,) and not real[indices].all()):
        raise ConfigurationError(
            f"`shards` has P = {list(planes)} for rows {indices.tolist()}: 2, or 1 if all are real."
        )
    for name, tensor in tensors.items():
        if name not in primal:
            raise ConfigurationError(f"`shards` holds `{name}`, which is not in `primal`: give the same names to both.")
        expected = (degree, *planes, len(indices), *primal[name].shape)
        if tuple(tensor.shape) != expected or DTYPE_NAMES.get(tensor.dtype) not in COEFFICIENT_DTYPES:
            raise ConfigurationError(
                f"`shards` holds `{name}` of shape {tuple(tensor.shape)} and {tensor.dtype}: "
                f"give (R, P, k, *S) = {expected}, float32 or float64."
            )
    found = tuple(sorted(tensors)), next(iter(tensors.values())).dtype
    if any(tensor.dtype != found[1] for tensor in tensors.values()) or layout not in (None, found):
        raise ConfigurationError(
            "`shards` holds different names or dtypes: give every shard the same names and one dtype."
        )
    return found


def _check_mergeable(sketches: Sequence[Sketch]) -> None:
    """Refuse parts that are not of one run, and directions that two parts hold."""
    first = sketches[0]
    for position, sketch in enumerate(sketches):
        differing = [key for key in _SAME_RUN if sketch.metadata[key] != first.metadata[key]]
        if sketch.metadata["units"]["checksum"] != first.metadata["units"]["checksum"]:
            differing.append("unit map")
        if sketch.metadata["data_order"] != first.metadata["data_order"]:
            differing.append("order of the data")
        if _primal_digest(sketch) != _primal_digest(first) or (
            sketch.metadata["coefficients"]["names"] != first.metadata["coefficients"]["names"]
        ):
            differing.append("final parameters")
        if differing:
            raise SketchError(
                f"`{sketch.dirpath}` is of another run than `{first.dirpath}` ({', '.join(differing)} differ): "
                "merge only sketches of runs that are equal but for their directions (batches are drawn alike after "
                "the same `seed_everything`, in the same number of processes)."
            )
        if any(_share_a_direction(sketch.directions, earlier.directions) for earlier in sketches[:position]):
            raise SketchError(
                f"`{sketch.dirpath}` holds directions that an earlier part holds too: sketch with another `seed`, "
                "and with what a design does not draw (basis, indicator, common) in one part only."
            )


def _share_a_direction(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether a row of one is in the other, up to the rounding by which two machines differ in the same draw."""
    norms = [np.einsum("kn,kn->k", rows, rows.conj()).real for rows in (first, second)]
    distances = norms[0][:, None] + norms[1] - 2 * (first @ second.conj().T).real
    return bool((distances <= _SAME_DIRECTION * norms[0][:, None]).any())


def _primal_digest(sketch: Sketch) -> str:
    return str(sketch.metadata["files"][sketch.metadata["primal"]["file"]]["sha256"])


def _save_directions(writer: SketchWriter, directions: Directions) -> dict[str, Any]:
    """Record directions, as an array only where their recipe does not give them back."""
    array = directions.array
    recorded: dict[str, Any] = {
        "recipe": directions.recipe,
        "checksum": directions.checksum(),
        "probe": _probe(array).tolist(),
        "file": None,
    }
    if array.size <= MAX_REGENERATED_ENTRIES:
        with contextlib.suppress(ConfigurationError):  # raised for an explicit array
            followed = _follow_recipe(directions.recipe, directions.num_units, directions.num_directions)
            if followed.checksum() == recorded["checksum"]:
                return recorded
    parts = np.stack([array.real, array.imag], axis=-1)
    return {**recorded, "file": writer.save("directions", {"directions": torch.from_numpy(parts)})}


def _follow_recipe(recipe: dict[str, Any], num_units: int, num_directions: int) -> Directions:
    """Return the directions of a recipe, be it a stranger's; all that can be wrong with it is ConfigurationError."""
    try:
        # Counted first: it must not make us allocate more than `sketch.json` says.
        if (rows := _count_rows(recipe, num_units)) != num_directions:
            raise ValueError(f"{rows} directions and not {num_directions}")
        if "merged" not in recipe:
            return make_from_recipe(recipe, num_units)
        array = np.concatenate([make_from_recipe(part, num_units).array for part in recipe["merged"]])
        array.setflags(write=False)
        return Directions(array, recipe)
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ConfigurationError(f"`recipe` is not one of directions: {error!r}.") from error


def _parts(recipe: dict[str, Any]) -> list[Any]:
    return recipe["merged"] if isinstance(recipe.get("merged"), list) else [recipe]


def _count_rows(recipe: dict[str, Any], num_units: int) -> int:
    """Return how many directions a recipe makes, without making them."""
    if "merged" in recipe:
        return sum(_count_rows(part, num_units) for part in recipe["merged"] if "merged" not in part)
    if int(recipe["count"]) < 1:
        raise ValueError(f"`count` is {recipe['count']}")
    return count_directions(recipe, num_units)


def _probe(array: np.ndarray) -> np.ndarray:
    """``(K, 2)`` float64: real and imaginary part of ``Psi w``, ``w_u = cos(u)``."""
    products = array @ np.cos(np.arange(array.shape[1]))
    return np.stack([products.real, products.imag], axis=1)
