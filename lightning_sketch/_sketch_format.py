"""The sketch format, version 1, and its reader.

A sketch is a directory of ``sketch.json`` and safetensors files:

- ``sketch.json`` MUST hold exactly the keys of ``_SCHEMA``. Units: ``bytes`` in bytes, ``steps`` in optimizer steps.
  ``checksum`` is the SHA-256 of the other keys as canonical JSON (sorted, no blanks, ASCII), so that no number in it
  can be edited unseen. ``format_version`` MUST be read first; a reader refuses a version newer than its own.
- ``files`` MUST list every data file with its size and SHA-256. Names end in an id drawn for each writing, so that a
  new sketch never overwrites the files of the one it replaces. The directory MAY hold other files; they are ignored.
- ``data_order`` is a SHA-256 of the rows of the dataset in every batch of the run, in their order: parts of one run
  MUST have the same. A process of the run takes the SHA-256 of its own last digest (64 hexadecimal digits; none before
  the first batch) and the rows of the batch as little-endian int64; ``data_order`` is that of the digests of all
  processes, by rank.
- ``modules`` names the type of every submodule but metrics, since parameters alone do not tell Tanh from ReLU.
- ``primal-*`` holds every tensor of the user's own run once. ``coefficients-*`` hold the shards, name ->
  ``(R, P, k, *S)``: orders 1 to R, ``P`` = 2 (re, im) or 1 (real directions only), and the ``k`` directions whose rows
  ``coefficients.shards[].directions`` lists, at least one. A tensor that does not change with the data is absent
  there; at least one that is there MUST have entries, so that the size of a file bounds ``R``.
- ``coefficients.exponents`` holds one integer ``e_j`` for each of the ``K`` directions, at most 4096 in size: what a
  shard holds as order ``r`` of direction ``j`` MUST be read as ``2^(r e_j)`` times the coefficient. So the high orders
  of a geometric series stay within float32.
- ``units-*`` (``units``: int64 per example, -1 = not deletable) MUST be there unless example ``i`` is unit ``i``. The
  largest unit plus one MUST be ``num_units``.
- ``directions-*`` (``directions``: ``(K, n, 2)`` float64, real and imaginary parts) MUST be there unless
  ``directions.recipe`` gives the array back and it has at most 2^26 entries. ``directions.probe`` is ``Psi w`` with
  ``w_u = cos(u)``: QR and norms differ by rounding between machines, so a regenerated array need agree with the probe
  only to 1e-9, not bit by bit.
- No file is ever unpickled, and nothing is allocated before it was compared with the size of a file that exists.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors
import torch

from lightning_sketch.errors import SketchError
from lightning_sketch.shadow.scaling import MAX_EXPONENT

FORMAT_VERSION = 1

JSON_NAME = "sketch.json"
MAX_JSON_BYTES = 2**28
MAX_REGENERATED_ENTRIES = 2**26  # K * n; 1 GiB. More must be in a file, which bounds what a reader allocates
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COEFFICIENT_DTYPES = ("F32", "F64")
DATA_FILE = re.compile(r"(primal|units|directions|coefficients-\d{5,}-of-\d{5,})-[0-9a-f]{8}\.safetensors")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_exponent(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_EXPONENT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and DATA_FILE.fullmatch(value) is not None


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(map(_is_count, value))


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in {type(choice) for choice in allowed} and value in allowed


# A dict lists the keys that must be there; (schema,) is a dict with any keys; [schema] a list; anything else a test.
_SCHEMA: dict[str, Any] = {
    "format": _one_of("lightning_sketch"),
    "format_version": _one_of(*range(1, FORMAT_VERSION + 1)),
    "checksum": _is_digest,
    "degree": _is_positive,
    "dtype": _one_of(*COEFFICIENT_DTYPES),
    "num_directions": _is_positive,
    "num_units": _is_positive,
    "num_examples": _is_positive,
    "steps": _is_count,
    "data_order": _is_digest,
    "normalization": _one_of("batch", "remaining"),
    "optimizer": _is_text,
    "loss": _is_text,
    "modules": (_is_text,),
    "units": {"checksum": _is_digest, "file": lambda value: value is None or _is_file(value)},
    "directions": {
        "recipe": lambda value: isinstance(value, dict),
        "checksum": _is_digest,
        "probe": [[lambda value: type(value) is float]],
        "file": lambda value: value is None or _is_file(value),
    },
    "primal": {"file": _is_file, "tensors": ({"dtype": _one_of(*DTYPES), "shape": _is_shape},)},
    "coefficients": {
        "names": [_is_text],
        "exponents": [_is_exponent],
        "shards": [{"file": _is_file, "planes": _one_of(1, 2), "directions": [_is_count]}],
    },
    "files": ({"bytes": _is_count, "sha256": _is_digest},),
    "versions": (_is_text,),
}


def _first_fault(value: Any, schema: Any, key: str = "") -> str | None:
    """Return the first key whose value does not obey the schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return key
        if set(value) != set(schema):
            return f"{key}.{min(set(value) ^ set(schema))}".lstrip(".")
        children = [(f"{key}.{name}".lstrip("."), value[name], schema[name]) for name in schema]
    elif isinstance(schema, tuple):
        if not isinstance(value, dict):
            return key
        children = [(f"{key}.{name}", item, schema[0]) for name, item in value.items()]
    elif isinstance(schema, list):
        if not isinstance(value, list):
            return key
        children = [(f"{key}[{index}]", item, schema[0]) for index, item in enumerate(value)]
    else:
        return None if schema(value) else key
    return next((fault for name, item, rule in children if (fault := _first_fault(item, rule, name)) is not None), None)


def _inconsistency(metadata: dict[str, Any]) -> str | None:
    """Return the first key that contradicts the others, of metadata that obey the schema."""
    shards, primal = metadata["coefficients"]["shards"], metadata["primal"]
    names, probe = metadata["coefficients"]["names"], metadata["directions"]["probe"]
    files = [primal["file"], *(shard["file"] for shard in shards)]
    files += [metadata[key]["file"] for key in ("units", "directions") if metadata[key]["file"] is not None]
    rows = [row for shard in shards for row in shard["directions"]]
    n, k = metadata["num_units"], metadata["num_directions"]
    checks = {
        "num_examples": metadata["units"]["file"] is not None or metadata["num_examples"] == n,
        "num_directions": len(rows) == k and sorted(rows) == list(range(k)),
        "directions.file": metadata["directions"]["file"] is not None or n * k <= MAX_REGENERATED_ENTRIES,
        "directions.probe": len(probe) == k and all(len(row) == 2 for row in probe),
        "coefficients.exponents": len(metadata["coefficients"]["exponents"]) == k,
        # Only tensors with entries and shards with directions bound `degree` by the size of a file.
        "coefficients.shards": all(shard["directions"] for shard in shards),
        "coefficients.names": names and len(set(names)) == len(names) and set(names) <= set(primal["tensors"]),
        "primal.tensors": any(0 not in primal["tensors"][name]["shape"] for name in names if name in primal["tensors"]),
        "files": sorted(files) == sorted(metadata["files"]),
    }
    return next((key for key, holds in checks.items() if not holds), None)


def self_checksum(metadata: dict[str, Any]) -> str:
    content = {key: value for key, value in metadata.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, MAX_JSON_BYTES))
    try:
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_JSON_BYTES}")
        metadata = json.loads(data.decode("utf-8"))
        version = metadata.get("format_version") if isinstance(metadata, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise SketchError(
                f"`{path}` has format version {version} and this release reads up to {FORMAT_VERSION}: "
                "upgrade with `python -m pip install -U lightning-sketch`."
            )
        fault = _first_fault(metadata, _SCHEMA)
        if fault is None:
            fault = _inconsistency(metadata)
        if fault is not None:
            raise ValueError(f"wrong, missing or unknown key `{fault}`")
        if self_checksum(metadata) != metadata["checksum"]:
            raise ValueError("its checksum is not that of its content")
    except (ValueError, RecursionError, MemoryError) as error:
        raise damaged(path, f"is not what a sketch was written with ({error})") from error
    return dict(metadata)


def expected_tensors(metadata: dict[str, Any]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Return what each data file must hold: file -> tensor -> (dtype, shape)."""
    primal = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in metadata["primal"]["tensors"].items()}
    expected = {metadata["primal"]["file"]: primal}
    for shard in metadata["coefficients"]["shards"]:
        leading = (metadata["degree"], shard["planes"], len(shard["directions"]))
        expected[shard["file"]] = {
            name: (metadata["dtype"], leading + primal[name][1]) for name in metadata["coefficients"]["names"]
        }
    if metadata["units"]["file"] is not None:
        expected[metadata["units"]["file"]] = {"units": ("I64", (metadata["num_examples"],))}
    if metadata["directions"]["file"] is not None:
        shape = (metadata["num_directions"], metadata["num_units"], 2)
        expected[metadata["directions"]["file"]] = {"directions": ("F64", shape)}
    return expected


def check_header(path: Path, entry: dict[str, Any], expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with open_data(path, entry):
        pass
    try:
        # Only maps the file, and checks the header against the file's size before anything else.
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise damaged(path, f"is not a safetensors file ({error})") from error
    if found != expected:
        name = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise damaged(path, f"holds {found.get(name)} for `{name}` where `{JSON_NAME}` says {expected.get(name)}")


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file that is no link, pipe or device: those could lead out of the directory, or hang."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise (missing(path) if path.name == JSON_NAME else damaged(path, "is missing")) from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"is not a regular file that can be opened ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged(path, "is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


@contextlib.contextmanager
def open_data(path: Path, entry: dict[str, Any]) -> Iterator[BufferedReader]:
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise damaged(path, f"has {size} bytes and not the {entry['bytes']} that were written")
        yield file


def check_digest(path: Path, entry: dict[str, Any], digest: str) -> None:
    if digest != entry["sha256"]:
        raise damaged(path, "was altered: its SHA-256 is not the one that was recorded")


def missing(path: Path) -> SketchError:
    return SketchError(
        f"`{path}` is missing, so there is no sketch: give the `dirpath` of a SketchCallback whose training has ended "
        "and that did not give the sketch up, which it says in a warning."
    )


def damaged(path: Path, what: str) -> SketchError:
    return SketchError(f"`{path}` {what}: restore the whole directory from a backup, or sketch the run again.")
