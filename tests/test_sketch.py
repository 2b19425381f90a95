"""The sketch on disk. Oracles: json, struct and hashlib applied to the files; the tensors that were written."""

import fcntl
import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sketches import SHAPES, UNITS, data_file, flip, make_primal, make_shards, write

from lightning_sketch.directions import make_directions
from lightning_sketch.errors import ConfigurationError, SketchError
from lightning_sketch.sketch import Shard, Sketch


def listing(dirpath: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dirpath.iterdir()}


# What is written.


def test_round_trip(tmp_path: Path) -> None:
    """Oracle: the tensors that were written."""
    written = write(tmp_path / "s", seed=5)
    directions = make_directions(3, "basis+sphere", 4, seed=5)
    for sketch in (written, Sketch.load(str(tmp_path / "s"))):
        assert (sketch.degree, sketch.num_directions, sketch.num_units, sketch.num_examples) == (2, 7, 4, 6)
        assert (sketch.dtype, sketch.steps, sketch.optimizer, sketch.normalization, sketch.loss) == (
            torch.float32,
            12,
            "SGD",
            "batch",
            "auto",
        )
        assert sketch.units.tolist() == UNITS
        np.testing.assert_array_equal(sketch.directions, directions.array)
        assert sketch.primal.keys() == make_primal().keys()
        for name, tensor in make_primal().items():
            assert sketch.primal[name].dtype == tensor.dtype
            assert torch.equal(sketch.primal[name], tensor)
        for read, expected in zip(sketch.shards(), make_shards(directions, 2), strict=True):
            assert read.indices.tolist() == expected.indices.tolist()
            assert read.exponents.tolist() == expected.exponents.tolist() == (3 * expected.indices - 4).tolist()
            assert read.scaled.keys() == expected.scaled.keys()
            assert all(torch.equal(read.scaled[name], expected.scaled[name]) for name in SHAPES)
        sketch.verify()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    degree=st.integers(1, 4),
    size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    names=st.sampled_from(["sphere", "orthonormal", "basis", "common", "basis+common", "sphere+common"]),
    units=st.lists(st.integers(-1, 6), min_size=1, max_size=9).filter(lambda units: max(units) >= 0),
)
def test_round_trip_of_any_sketch(
    tmp_path_factory: pytest.TempPathFactory, degree: int, size: int, dtype: torch.dtype, names: str, units: list[int]
) -> None:
    """Oracle: the tensors that were written."""
    directions = make_directions(3, names, max(units) + 1)
    shards = make_shards(directions, degree, size, dtype)
    dirpath = tmp_path_factory.mktemp("sketch")
    sketch = write(dirpath, names=names, units=units, degree=degree, shards=iter(shards))
    assert sketch.dtype == dtype
    assert sketch.units.tolist() == units
    np.testing.assert_array_equal(sketch.directions, directions.array)
    for read, expected in zip(sketch.shards(), shards, strict=True):
        assert read.indices.tolist() == expected.indices.tolist()
        assert all(torch.equal(read.scaled[name], expected.scaled[name]) for name in SHAPES)
    sketch.verify()


def test_format(tmp_path: Path) -> None:
    """Oracle: the bytes, read with json, struct and hashlib only."""
    write(tmp_path)
    content = json.loads((tmp_path / "sketch.json").read_text())
    assert content["format"] == "lightning_sketch"
    assert content["format_version"] == 1
    assert content["directions"]["recipe"] == {"design": "basis+sphere", "count": 3, "seed": 0, "deletion_sets": None}
    assert content["directions"]["file"] is None
    assert content["primal"]["tensors"]["precise"] == {"dtype": "BF16", "shape": [2]}
    assert set(content["versions"]) == {"python", "lightning-sketch", "torch", "numpy", "safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"sketch.json", *content["files"]}
    for name, entry in content["files"].items():
        data = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    checksum = content.pop("checksum")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(text.encode()).hexdigest()

    assert [shard["file"].rpartition("-")[0] for shard in content["coefficients"]["shards"]] == [
        f"coefficients-{index:05d}-of-00004" for index in range(4)
    ]
    last = content["coefficients"]["shards"][3]
    assert (last["planes"], last["directions"]) == (2, [6])
    data = (tmp_path / last["file"]).read_bytes()
    (header_length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_length])
    assert header["layer.bias"]["dtype"] == "F32"
    assert header["layer.bias"]["shape"] == [2, 2, 1, 3]
    begin, end = header["layer.bias"]["data_offsets"]
    values = struct.unpack("<12f", data[8 + header_length + begin : 8 + header_length + end])
    expected = make_shards(make_directions(3, "basis+sphere", 4), 2)[3].scaled["layer.bias"]
    assert list(values) == expected.flatten().tolist()
    assert content["coefficients"]["exponents"] == [-4, -1, 2, 5, 8, 11, 14]


def test_coefficients_are_what_is_stored_times_powers_of_two(tmp_path: Path) -> None:
    """Oracle: ``ldexp`` of the stored numbers; orders that float32 does not hold, in float64."""
    blocks = {"scale": torch.full((100, 1, 2), 0.75)}
    shards = [Shard(np.array([1, 0]), blocks, np.array([7, -3]))]
    sketch = write(tmp_path, directions=make_directions(np.eye(4)[:2], "", 4), degree=100, shards=shards)
    assert sketch.exponents.tolist() == [-3, 7]
    (shard,) = sketch.shards()
    found = shard.coefficients["scale"]
    assert found.dtype == torch.float64
    assert found[:, 0].tolist() == [[0.75 * 2.0 ** (-7 * r), 0.75 * 2.0 ** (3 * r)] for r in range(1, 101)]


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    """Oracle: the mode of a file made by `open`."""
    write(tmp_path / "s")
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()} == {expected}


def test_one_example_per_unit_needs_no_unit_file(tmp_path: Path) -> None:
    sketch = write(tmp_path, units=[0, 1, 2])
    assert not list(tmp_path.glob("units*"))
    assert sketch.units.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        sketch.units[0] = 1


@pytest.mark.parametrize("imaginary", [0.0, -0.0, 1.0])
def test_explicit_directions_are_stored(tmp_path: Path, imaginary: float) -> None:
    """Oracle: the bytes of the array, the sign of zero included."""
    array = np.arange(1.0, 9.0).reshape(2, 4).astype(np.complex128)
    array.imag = imaginary
    sketch = write(tmp_path, design=array)
    assert data_file(tmp_path, "directions")
    assert sketch.directions.tobytes() == array.tobytes()
    sketch.verify()


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    """Oracle: the values, of tensors that share memory, overlap or are not contiguous."""
    whole = torch.arange(12.0)
    primal = {
        "layer.weight": whole[:6].view(3, 2),
        "layer.bias": whole[::4],
        "scale": whole[3],
        "tied": whole[:6].view(3, 2),
    }
    sketch = write(tmp_path, primal=primal)
    assert sketch.primal.keys() == primal.keys()
    assert all(torch.equal(sketch.primal[name], primal[name]) for name in primal)


def test_size(tmp_path: Path) -> None:
    """Oracle: ``(1 + K P R) |theta| itemsize`` bytes, of the design, to 2 %."""
    theta = torch.zeros(20_000)
    directions = make_directions(8, "orthonormal", 50)
    shards = [Shard(np.arange(4 * i, 4 * i + 4), {"w": torch.zeros(3, 2, 4, 20_000)}, np.arange(4)) for i in range(2)]
    sketch = write(
        tmp_path, primal={"w": theta}, directions=directions, shards=shards, degree=3, units=list(range(50)) * 2
    )
    expected = (1 + 8 * 2 * 3) * 20_000 * 4
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert expected < total < 1.02 * expected
    assert sketch.num_bytes == total - (tmp_path / "sketch.json").stat().st_size
    assert "50 units of 100 examples, 8 directions, degree 3, float32" in repr(sketch)


def test_one_shard_in_memory_at_a_time(tmp_path: Path) -> None:
    """Oracle: when the next shard is asked for, the one before it is on disk."""
    shards = make_shards(make_directions(3, "basis+sphere", 4), 2)
    seen = []

    def stream() -> Iterator[Shard]:
        for shard in shards:
            seen.append(len(list(tmp_path.glob(".writing-*/coefficients-*"))))
            yield shard

    write(tmp_path, shards=stream())
    assert seen == [0, 1, 2, 3]


# What the writer refuses.

BAD_SHARDS: dict[str, Callable[[list[Shard]], list[Shard]]] = {
    "give each once": lambda shards: shards[:-1],
    "of them different": lambda shards: [*shards, shards[0]],
    "rows of the 7 directions": lambda shards: [replace(shards[0], indices=np.array([6, 7]))],
    "P = ": lambda shards: [replace(shards[0], indices=np.array([5, 6]))],
    "not in `primal`": lambda shards: [replace(shards[0], scaled={"other": shards[0].scaled["scale"]})],
    "of shape": lambda shards: [replace(shards[0], scaled={"scale": shards[0].scaled["layer.bias"]})],
    "float16": lambda shards: [replace(shards[0], scaled={"scale": shards[0].scaled["scale"].half()})],
    "different names": lambda shards: [
        shards[0],
        replace(shards[1], scaled={"scale": shards[1].scaled["scale"]}),
    ],
    "integer for each": lambda shards: [replace(shards[0], exponents=np.zeros(3, dtype=int))],
    "exponents .1.5": lambda shards: [replace(shards[0], exponents=np.array([1.5, 0]))],
    "size at most 4096": lambda shards: [replace(shards[0], exponents=np.array([0, 4097]))],
    "without coefficients": lambda shards: [replace(shards[0], scaled={})],
}


@pytest.mark.parametrize("sentence", BAD_SHARDS)
def test_refuses_shards(tmp_path: Path, sentence: str) -> None:
    shards = make_shards(make_directions(3, "basis+sphere", 4), 2)
    with pytest.raises(ConfigurationError, match=f"`shards`.*{sentence}"):
        write(tmp_path, shards=BAD_SHARDS[sentence](shards))
    assert not list(tmp_path.iterdir())


def test_refuses_primal_that_the_format_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`primal`.*`spectrum`.*complex64"):
        write(tmp_path, primal={**make_primal(), "spectrum": torch.zeros(2, dtype=torch.complex64)})


def test_refuses_directions_of_other_units(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`directions`.*9.*`unit_of_example`.*4"):
        write(tmp_path, directions=make_directions(3, "sphere", 9))


# Replacing a sketch.


def test_replacing_leaves_only_the_new_sketch_and_what_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    (tmp_path / ".writing-killed").mkdir()
    sketch = write(tmp_path, steps=99)
    assert Sketch.load(tmp_path).steps == 99
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sketch.json", "notes.txt", "model.safetensors", *sketch.metadata["files"]}
    sketch.verify()


def test_old_sketch_stays_when_the_run_fails_midway(tmp_path: Path) -> None:
    """Oracle: the bytes of the directory before."""
    sketch = write(tmp_path)
    before = listing(tmp_path)

    def failing() -> Iterator[Shard]:
        yield make_shards(make_directions(3, "basis+sphere", 4), 2)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, shards=failing(), steps=99)
    assert listing(tmp_path) == before
    sketch.verify()


@pytest.mark.parametrize("survivors", range(8))
def test_old_sketch_stays_when_any_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    """Oracle: the bytes of the directory before. Of 7 renames (6 data files, sketch.json) ``survivors`` succeed."""
    write(tmp_path)
    before = listing(tmp_path)
    real_replace, done = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if len(done) == survivors:
            raise OSError(28, "No space left on device")
        done.append(target)
        return real_replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        if survivors < 7:
            with pytest.raises(SketchError, match=r"sketch\.json` can not be written.*No space.*unchanged"):
                write(tmp_path, steps=99)
        else:
            write(tmp_path, steps=99)
    assert (listing(tmp_path) == before) == (survivors < 7)
    assert Sketch.load(tmp_path).steps == (12 if survivors < 7 else 99)
    Sketch.load(tmp_path).verify()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = write(tmp_path)
    before = listing(tmp_path)

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_sketch._sketch_writer.save_file", full)
        with pytest.raises(SketchError, match=r"primal.*can not be written.*free some space"):
            write(tmp_path)
    assert listing(tmp_path) == before
    sketch.verify()


def test_dirpath_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SketchError, match="can not be written"):
        write(tmp_path / "file")


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Oracle: a lock held as another process would hold it, then let go."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(SketchError, match="being written by another"):
        write(tmp_path)
    os.close(descriptor)
    write(tmp_path)


def test_writer_inside_a_writer_is_refused(tmp_path: Path) -> None:
    def stream() -> Iterator[Shard]:
        write(tmp_path)
        yield from ()

    with pytest.raises(SketchError, match="being written by another"):
        write(tmp_path, shards=stream())


def test_a_reader_that_meets_a_writer_gets_the_new_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sketch is replaced between reading sketch.json and opening the files that it lists."""
    from lightning_sketch import sketch as module

    write(tmp_path)
    real_check, calls = module.check_header, []

    def check(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            write(tmp_path, steps=99)
        real_check(*arguments)

    monkeypatch.setattr(module, "check_header", check)
    assert Sketch.load(tmp_path).steps == 99


# Merging.


def test_merge(tmp_path: Path) -> None:
    """Oracle: the parts' own numbers, stacked."""
    parts = [
        write(tmp_path / "a", names="basis+sphere", seed=0),
        write(tmp_path / "b", names="sphere", seed=1),
        write(tmp_path / "c", design=np.array([[1.0, 2, 3, 4]])),
    ]
    merged = Sketch.merge(parts, tmp_path / "out")
    assert merged.num_directions == 11
    np.testing.assert_array_equal(merged.directions, np.concatenate([part.directions for part in parts]))
    assert merged.exponents.tolist() == [-4, -1, 2, 5, 8, 11, 14, -4, -1, 2, -4]
    assert merged.units.tolist() == UNITS
    assert all(torch.equal(merged.primal[name], tensor) for name, tensor in make_primal().items())
    shards = [(offset, shard) for offset, part in zip((0, 7, 10), parts, strict=True) for shard in part.shards()]
    for read, (offset, expected) in zip(merged.shards(), shards, strict=True):
        assert read.indices.tolist() == (expected.indices + offset).tolist()
        assert read.exponents.tolist() == expected.exponents.tolist()
        assert all(torch.equal(read.scaled[name], expected.scaled[name]) for name in SHAPES)
    merged.verify()
    Sketch.load(tmp_path / "out").verify()


def test_merge_stores_no_array_that_recipes_give_back(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(seed), names="orthonormal", seed=seed) for seed in range(3)]
    merged = Sketch.merge([Sketch.merge(parts[:2], tmp_path / "two"), parts[2]], tmp_path / "three")
    assert [part["seed"] for part in merged.metadata["directions"]["recipe"]["merged"]] == [0, 1, 2]
    assert not list((tmp_path / "three").glob("directions*"))
    np.testing.assert_array_equal(merged.directions, np.concatenate([part.directions for part in parts]))


@pytest.mark.parametrize("merged", [False, True])
def test_too_many_directions_to_be_drawn_again_are_in_a_file(
    merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: ``K n`` entries, and whether there is a file; 3 directions of 4 units, or 6."""
    parts = [write(tmp_path / str(seed), names="orthonormal", seed=seed) for seed in range(2)]
    for most, stored in ((24 if merged else 12, False), (23 if merged else 11, True)):
        for module in ("sketch", "_sketch_format"):
            monkeypatch.setattr(f"lightning_sketch.{module}.MAX_REGENERATED_ENTRIES", most)
        out = tmp_path / f"out{most}"
        sketch = Sketch.merge(parts, out) if merged else write(out, names="orthonormal")
        assert bool(list(out.glob("directions*"))) == stored
        sketch.verify()
        expected = [part.directions for part in parts] if merged else [parts[0].directions]
        np.testing.assert_array_equal(Sketch.load(out).directions, np.concatenate(expected))


def test_merge_into_a_part(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(seed), names="sphere", seed=seed) for seed in range(2)]
    directions = np.concatenate([part.directions for part in parts])
    merged = Sketch.merge(parts, tmp_path / "0")
    np.testing.assert_array_equal(merged.directions, directions)
    merged.verify()


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "degree": {"degree": 3},
    "steps": {"steps": 13},
    "normalization": {"normalization": "remaining"},
    "final parameters": {"primal": make_primal(seed=1)},
    "unit map": {"units": [0, 0, 1, 3, -1, 2]},
    "num_units": {"units": [0, 0, 1, 2, 4, 3]},
    "order of the data": {"data_order": "1" * 64},
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_merge_refuses_another_run(tmp_path: Path, difference: str) -> None:
    parts = [
        write(tmp_path / "a", names="sphere"),
        write(tmp_path / "b", names="sphere", seed=1, **OTHER_RUNS[difference]),
    ]
    with pytest.raises(
        SketchError, match=rf"b` is of another run than.*\(.*{difference}.* differ\).*`seed_everything`"
    ):
        Sketch.merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_another_dtype(tmp_path: Path) -> None:
    directions = make_directions(3, "sphere", 4, seed=1)
    parts = [
        write(tmp_path / "a", names="sphere"),
        write(tmp_path / "b", directions=directions, shards=make_shards(directions, 2, dtype=torch.float64)),
    ]
    with pytest.raises(SketchError, match=r"\(dtype differ\)"):
        Sketch.merge(parts, tmp_path / "out")


@pytest.mark.parametrize("names", ["sphere", "basis+orthonormal", "explicit"])
def test_merge_refuses_a_direction_twice(tmp_path: Path, names: str) -> None:
    """The same recipe; another seed but the same basis; another array with one row of the first."""
    changes: list[dict[str, Any]] = {
        "sphere": [{"names": names}] * 2,
        "basis+orthonormal": [{"names": names}, {"names": names, "seed": 1}],
        "explicit": [{"design": np.eye(4)[:3]}, {"design": np.eye(4)[2:]}],
    }[names]
    parts = [write(tmp_path / str(index), **change) for index, change in enumerate(changes)]
    with pytest.raises(SketchError, match=r"earlier part holds too.*another `seed`"):
        Sketch.merge(parts, tmp_path / "out")


def test_merge_of_an_altered_part(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(seed), names="sphere", seed=seed) for seed in range(2)]
    path = data_file(tmp_path / "1", "coefficients-00001")
    flip(1)(path)
    with pytest.raises(SketchError, match=path.name):
        Sketch.merge(parts, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_merge_of_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`sketches` holds 1"):
        Sketch.merge([write(tmp_path)], tmp_path / "out")


# Which model.


class Net(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, width)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps_seen", torch.tensor(0))
        self.register_buffer("precise", torch.ones(2))
        self.register_buffer("scratch", torch.ones(5), persistent=False)


def test_check_fits_its_own_model(tmp_path: Path) -> None:
    net = Net()
    net.tied = net.layer  # named twice, saved once
    write(tmp_path).check_fits(net)


def test_check_fits_refuses_another_model(tmp_path: Path) -> None:
    sketch = write(tmp_path)
    with pytest.raises(SketchError, match=r"another model: `layer.weight` has shape \(3, 2\).*and \(4, 2\) in the mod"):
        sketch.check_fits(Net(width=4))
    fewer = Net()
    del fewer.precise
    with pytest.raises(SketchError, match="`precise` is missing from the module"):
        sketch.check_fits(fewer)
    more = Net()
    more.register_buffer("extra", torch.ones(1))
    with pytest.raises(SketchError, match="`extra` is missing from the sketch"):
        sketch.check_fits(more)
    with pytest.raises(SketchError, match="and 10 more"):
        sketch.check_fits(torch.nn.Sequential(Net()))
