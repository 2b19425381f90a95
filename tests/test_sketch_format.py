"""Every way a file of a sketch can be wrong gives `SketchError`: no number, no executed code, no giant allocation."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sketches import Bomb, data_file, flip, resign, write

from lightning_sketch.directions import Directions
from lightning_sketch.errors import SketchError
from lightning_sketch.sketch import Sketch


def read_all(sketch: Sketch) -> None:
    """Touch every number of a sketch."""
    assert sketch.primal
    assert list(sketch.shards())
    assert len(sketch.units)
    assert len(sketch.directions)


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def absurd_shape(path: Path) -> None:
    rewrite_header(path, lambda header: next(iter(header.values())).update(shape=[2**62, 2**62]))


def absurd_header_length(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit flipped": flip(0),
    "header bit flipped": flip(0.1),
    "last bit flipped": flip(1),
    "pickle": lambda path: path.write_bytes(Bomb.pickled()),
    "pickle of the same size": lambda path: path.write_bytes(Bomb.pickled().ljust(path.stat().st_size, b".")),
    "link out of the directory": replace_by_link,
    "pipe": replace_by_pipe,
    "directory": replace_by_directory,
}
DATA_FAULTS = {**FAULTS, "absurd shape": absurd_shape, "absurd header length": absurd_header_length}


@pytest.mark.parametrize("fault", DATA_FAULTS)
@pytest.mark.parametrize("stem", ["primal", "units", "directions", "coefficients-00001"])
def test_wrong_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, fault: str) -> None:
    """Whatever is wrong with a file, its name is in the error, before any number was given out."""
    monkeypatch.chdir(tmp_path)
    sketch = write(tmp_path / "s", design=np.eye(4) + 1j)
    path = data_file(tmp_path / "s", stem)
    DATA_FAULTS[fault](path)
    with pytest.raises(SketchError, match=path.name):
        read_all(Sketch.load(tmp_path / "s"))
    with pytest.raises(SketchError, match=path.name):
        read_all(sketch)  # opened before the fault
    with pytest.raises(SketchError, match=path.name):
        sketch.verify()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_metadata_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    sketch = write(tmp_path / "s")
    FAULTS[fault](tmp_path / "s" / "sketch.json")
    with pytest.raises(SketchError, match=r"sketch\.json"):
        Sketch.load(tmp_path / "s")
    with pytest.raises(SketchError, match=r"sketch\.json"):
        sketch.verify()
    assert not (tmp_path / "executed").exists()


def test_swapped_shards(tmp_path: Path) -> None:
    """Two shards of equal size, names and shapes: only the SHA-256 tells them apart."""
    write(tmp_path)
    first, second = data_file(tmp_path, "coefficients-00000"), data_file(tmp_path, "coefficients-00001")
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    sketch = Sketch.load(tmp_path)
    with pytest.raises(SketchError, match=rf"{first.name}.*SHA-256"):
        next(sketch.shards())
    with pytest.raises(SketchError, match=first.name):
        sketch.verify()


def test_extra_files_are_tolerated(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "primal-00000000.safetensors").write_bytes(Bomb.pickled())
    Sketch.load(tmp_path).verify()


def test_no_sketch_at_all(tmp_path: Path) -> None:
    with pytest.raises(SketchError, match=r"sketch\.json` is missing"):
        Sketch.load(tmp_path / "nothing")


def test_newer_version(tmp_path: Path) -> None:
    write(tmp_path)
    resign(tmp_path, lambda content: content.update(format_version=2, new_key="unknown"))
    with pytest.raises(SketchError, match=r"format version 2.*up to 1.*upgrade"):
        Sketch.load(tmp_path)


def test_every_edited_number_in_the_metadata(tmp_path: Path) -> None:
    """Changing a decimal digit of sketch.json, those of the checksums too, is found at load."""
    write(tmp_path)
    path = tmp_path / "sketch.json"
    text = path.read_text()
    positions = [index for index, character in enumerate(text) if character.isdigit()]
    assert len(positions) > 500
    for index in positions[::3]:
        edited = f"{text[:index]}{(int(text[index]) + 1) % 10}{text[index + 1 :]}"
        if json.loads(edited) == json.loads(text):  # a digit beyond the precision of a double
            continue
        path.write_text(edited)
        with pytest.raises(SketchError, match=r"sketch\.json"):
            Sketch.load(tmp_path)


def test_metadata_that_is_json_but_absurd(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "1" * 10_000, "[]", "null", '{"format_version": 1}', '{"a": NaN}', "\ud800"):
        (tmp_path / "sketch.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(SketchError, match=r"sketch\.json"):
            Sketch.load(tmp_path)


def forge(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def delete(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def rename_file(new: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"][new] = content["files"].pop(content["primal"]["file"])
        content["primal"]["file"] = new

    return change


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "missing key": delete("steps"),
    "unknown key": forge("surprise", value=1),
    "degree 0": forge("degree", value=0),
    "steps of another type": forge("steps", value=True),
    "degree that the shards have not": forge("degree", value=3),
    "huge degree": forge("degree", value=2**62),
    "beyond 64 bits": forge("steps", value=2**64),
    "other dtype": forge("dtype", value="F64"),
    "unknown dtype": forge("dtype", value="C64"),
    "huge dataset": forge("num_examples", value=2**60),
    "huge number of units": forge("num_units", value=2**60),
    "huge number of directions": forge("num_directions", value=2**60),
    "path in a name": rename_file("../outside.safetensors"),
    "absolute path": rename_file("/etc/passwd"),
    "absurd shape": forge("primal", "tensors", "scale", "shape", value=[2**62] * 60),
    "negative shape": forge("primal", "tensors", "scale", "shape", value=[-1]),
    "name that is not there": forge("coefficients", "names", value=["scale", "layer.bias", "other"]),
    "no names": forge("coefficients", "names", value=[]),
    "no exponents": lambda content: content["coefficients"].pop("exponents"),
    "exponents that are no list": forge("coefficients", "exponents", value=0),
    "too few exponents": lambda content: content["coefficients"]["exponents"].pop(),
    "too many exponents": lambda content: content["coefficients"]["exponents"].append(0),
    "exponent that is a float": forge("coefficients", "exponents", 0, value=1.0),
    "exponent that is a boolean": forge("coefficients", "exponents", 0, value=True),
    "exponent that is text": forge("coefficients", "exponents", 0, value="1"),
    "exponent that is null": forge("coefficients", "exponents", 6, value=None),
    "huge exponent": forge("coefficients", "exponents", 6, value=4097),
    "huge negative exponent": forge("coefficients", "exponents", 6, value=-(2**70)),
    "one direction twice": forge("coefficients", "shards", 0, "directions", value=[0, 0]),
    "file that is not listed": lambda content: content["files"].pop(content["primal"]["file"]),
    "no shards": forge("coefficients", "shards", value=[]),
    "recipe of another type": forge("directions", "recipe", value=[]),
    "recipe of another seed": forge("directions", "recipe", "seed", value=1),
    "recipe of too many": forge("directions", "recipe", "count", value=2**40),
    "recipe of no number": forge("directions", "recipe", "count", value=[1]),
    "recipe with blanks": forge(
        "directions",
        "recipe",
        value={"design": "indicator+ sphere", "count": 2**22, "seed": 0, "deletion_sets": [[0]] * 7},
    ),
    "recipe of an unknown design": forge("directions", "recipe", "design", value="magic"),
    "empty recipe": forge("directions", "recipe", value={}),
    "recipe of merged nonsense": forge("directions", "recipe", value={"merged": [5, "x", {"merged": []}]}),
    "recipe of more and less": forge(
        "directions",
        "recipe",
        value={
            "merged": [
                {"design": "sphere", "count": count, "seed": 0, "deletion_sets": None} for count in (2**22, 7 - 2**22)
            ]
        },
    ),
    "explicit recipe": forge("directions", "recipe", "design", value="explicit"),
    "other unit map": forge("units", "checksum", value="0" * 64),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_metadata(tmp_path: Path, forgery: str) -> None:
    """A ``sketch.json`` that lies, with the right checksum: an error, no crash, and no allocation of what it claims."""
    write(tmp_path)
    resign(tmp_path, FORGERIES[forgery])
    tracemalloc.start()
    try:
        with pytest.raises(SketchError, match=r"sketch\.json|\.safetensors"):
            read_all(Sketch.load(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_exponents_at_the_ends_of_their_range_are_read(tmp_path: Path) -> None:
    """Oracle: ``ldexp``; nothing but zeros and infinities comes of them, at no great cost."""
    write(tmp_path, degree=3)
    resign(tmp_path, forge("coefficients", "exponents", value=[4096, -4096, 0, 0, 0, 0, 0]))
    first = next(Sketch.load(tmp_path).shards())
    assert first.exponents.tolist() == [4096, -4096]
    assert not first.coefficients["scale"][:, :, 0].any()
    assert first.coefficients["scale"][:, :, 1].isinf().all()


def test_forged_checksum_of_stored_directions(tmp_path: Path) -> None:
    write(tmp_path, design=np.eye(4) + 1j)
    resign(tmp_path, forge("directions", "checksum", value="0" * 64))
    with pytest.raises(SketchError, match=r"directions-.*does not hold the directions"):
        Sketch.load(tmp_path).directions  # noqa: B018


def test_forged_identity_units_allocate_nothing(tmp_path: Path) -> None:
    write(tmp_path, units=[0, 1, 2], names="common", design=1)
    resign(tmp_path, lambda content: content.update(num_examples=2**60))
    with pytest.raises(SketchError, match=r"`num_examples`"):
        Sketch.load(tmp_path)
    resign(tmp_path, lambda content: content.update(num_units=2**60))
    with pytest.raises(SketchError, match=r"`directions\.file`"):
        Sketch.load(tmp_path)


def test_directions_that_differ_by_rounding_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another LAPACK rounds otherwise: the probe decides, to 1e-9."""
    from lightning_sketch import sketch as module

    write(tmp_path, names="orthonormal")
    real_make = module.make_from_recipe
    for relative_error, accepted in ((1e-14, True), (1e-6, False)):

        def make(recipe: dict[str, Any], num_units: int, error: float = relative_error) -> Directions:
            made = real_make(recipe, num_units)
            return Directions(made.array * (1 + error), made.recipe)

        monkeypatch.setattr(module, "make_from_recipe", make)
        if accepted:
            Sketch.load(tmp_path).verify()
        else:
            with pytest.raises(SketchError, match=r"other directions here.*install numpy"):
                Sketch.load(tmp_path).verify()
