"""Small sketches for tests, and the numbers that they hold."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_sketch.directions import Directions, make_directions
from lightning_sketch.sketch import Shard, Sketch, write_sketch

SHAPES = {"layer.weight": (3, 2), "layer.bias": (3,), "scale": ()}
UNITS = [0, 0, 1, 2, -1, 3]


def make_primal(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    primal = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).float() for name, shape in SHAPES.items()
    }
    return {**primal, "steps_seen": torch.tensor(7), "precise": torch.ones(2, dtype=torch.bfloat16)}


def make_shards(directions: Directions, degree: int, size: int = 2, dtype: torch.dtype = torch.float32) -> list[Shard]:
    """Shards of random numbers with exponents ``3 j - 4``; real directions first, at most ``size`` in each."""
    generator = torch.Generator().manual_seed(1)
    shards = []
    for rows, planes in ((np.flatnonzero(directions.real), 1), (np.flatnonzero(~directions.real), 2)):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            blocks = {
                name: torch.randn(degree, planes, len(part), *shape, generator=generator, dtype=dtype)
                for name, shape in SHAPES.items()
            }
            shards.append(Shard(part, blocks, 3 * part - 4))
    return shards


def write(dirpath: Path, *, design: Any = 3, names: str = "basis+sphere", seed: int = 0, **changes: Any) -> Sketch:
    units = np.array(changes.pop("units", UNITS))
    directions = changes.get("directions") or make_directions(design, names, int(units.max()) + 1, seed=seed)
    degree = changes.get("degree", 2)
    arguments = {
        "primal": make_primal(),
        "shards": make_shards(directions, degree),
        "directions": directions,
        "unit_of_example": units,
        "degree": degree,
        "normalization": "batch",
        "steps": 12,
        "data_order": "0" * 64,
        "optimizer": "SGD",
        "loss": "auto",
        "modules": {"layer": "Linear"},
    }
    return write_sketch(dirpath, **{**arguments, **changes})


def data_file(dirpath: Path, stem: str) -> Path:
    (path,) = dirpath.glob(f"{stem}*.safetensors")
    return path


def flip(position: float) -> Callable[[Path], None]:
    def flip_bit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return flip_bit


def resign(dirpath: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit ``sketch.json`` as a forger would: with the right checksum."""
    path = dirpath / "sketch.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))


class Bomb:
    """A pickle of this makes a directory when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)

    @staticmethod
    def pickled(protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
        return pickle.dumps(Bomb(), protocol)
