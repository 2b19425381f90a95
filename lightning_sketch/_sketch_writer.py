"""Writing a sketch: every file under a temporary name and synced, then in place, ``sketch.json`` last."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from lightning_sketch._sketch_format import (
    DATA_FILE,
    JSON_NAME,
    MAX_JSON_BYTES,
    check_digest,
    open_data,
    self_checksum,
)
from lightning_sketch.errors import SketchError

_STAGING = ".writing-"


class SketchWriter:
    """Collects files in a staging directory inside ``dirpath``; ``commit`` puts them in place, ``sketch.json`` last."""

    def __init__(self, dirpath: Path, staging: Path) -> None:
        self.dirpath = dirpath
        self.files: dict[str, dict[str, Any]] = {}
        self._staging = staging
        self._id = secrets.token_hex(4)

    def save(self, stem: str, tensors: dict[str, Tensor]) -> str:
        """Write tensors to a file and return its name."""
        name, path = self._stage(stem)
        dense = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with _as_sketch_error(self.dirpath / name):
            path.touch()
            mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner can read
            save_file(_without_sharing(dense), path)
            path.chmod(mode)
            with path.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            self.files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        return name

    def copy(self, stem: str, source: Path, entry: dict[str, Any]) -> str:
        """Copy a data file of another sketch, checking its SHA-256 on the way, and return its new name."""
        name, path = self._stage(stem)
        digest = hashlib.sha256()
        with open_data(source, entry) as original, _as_sketch_error(self.dirpath / name), path.open("xb") as file:
            while chunk := original.read(2**22):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        check_digest(source, entry, digest.hexdigest())
        self.files[name] = dict(entry)
        return name

    def number(self, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put the number of shards, known only when all are written, into the names of their files."""
        for index, shard in enumerate(shards):
            old, (new, path) = shard["file"], self._stage(f"coefficients-{index:05d}-of-{len(shards):05d}")
            with _as_sketch_error(self.dirpath / new):
                (self._staging / old).rename(path)
            self.files[new] = self.files.pop(old)
            shard["file"] = new
        return shards

    def commit(self, metadata: dict[str, Any]) -> None:
        """Write ``sketch.json`` and put all files in place; what the directory held of an older sketch goes."""
        content = {**metadata, "files": self.files, "versions": _versions()}
        content["checksum"] = self_checksum(content)
        staged = self._staging / JSON_NAME
        with _as_sketch_error(self.dirpath / JSON_NAME):
            with staged.open("x", encoding="ascii") as file:
                json.dump(content, file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            if staged.stat().st_size > MAX_JSON_BYTES:
                raise OSError(f"{staged.stat().st_size} bytes of metadata, at most {MAX_JSON_BYTES} are allowed")
            for name in self.files:
                (self._staging / name).replace(self.dirpath / name)
            _sync_directory(self.dirpath)
            staged.replace(self.dirpath / JSON_NAME)  # from here on a reader sees the new sketch
            _sync_directory(self.dirpath)
        with contextlib.suppress(OSError):
            for path in list(self.dirpath.iterdir()):
                if DATA_FILE.fullmatch(path.name) and path.name not in self.files:
                    path.unlink()

    def _stage(self, stem: str) -> tuple[str, Path]:
        name = f"{stem}-{self._id}.safetensors"
        return name, self._staging / name


@contextlib.contextmanager
def writing(dirpath: str | os.PathLike[str]) -> Iterator[SketchWriter]:
    """Give a writer whose files are gone afterwards unless it committed them; refuse a second writer."""
    path = Path(dirpath)
    with _as_sketch_error(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path) as locked:
        # With the lock held, what a killed writer left is nobody's.
        for left in path.glob(f"{_STAGING}*") if locked else ():
            shutil.rmtree(left, ignore_errors=True)
        with _as_sketch_error(path):
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=path))
        writer = SketchWriter(path, staging)
        try:
            yield writer
        finally:
            if (staging / JSON_NAME).exists():  # `commit` failed halfway: what it put in place belongs to no sketch
                for name in writer.files:
                    (path / name).unlink(missing_ok=True)
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(dirpath: Path) -> Iterator[bool]:
    """Hold the directory against other writers (the kernel lets go when the process dies); yield whether it is held."""
    if sys.platform == "win32":  # no directory handles
        yield False
        return
    import fcntl

    with _as_sketch_error(dirpath):
        descriptor = os.open(dirpath, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SketchError(
                f"`{dirpath}` is being written by another writer: give each run a `dirpath` of its own."
            ) from error
        except OSError:  # some network file systems have no locks
            locked = False
        try:
            yield locked
        finally:
            if locked:  # explicitly: a forked data loader worker shares the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_sketch_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise SketchError(
            f"`{path}` can not be written ({error}): free some space or choose another `dirpath`; "
            "a sketch that was there before is unchanged."
        ) from error


def _sync_directory(path: Path) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # some file systems can not sync directories
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory (tied weights, views of a flat buffer), which safetensors refuses."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lightning-sketch", "torch", "numpy", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
