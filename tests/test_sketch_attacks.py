"""Attacks on a sketch: thousands of mutated directories, parallel and killed writers, full disks, merges of two runs.

Whatever was done to the files, a reader gives the numbers that were written or `SketchError`. A forger who also fixes
sizes and SHA-256 may give other numbers, but makes a reader neither crash, hang, run code nor allocate much.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sketches import Bomb, data_file, make_primal, make_shards, resign, write

from lightning_sketch import _sketch_format
from lightning_sketch.directions import make_directions
from lightning_sketch.errors import SketchError
from lightning_sketch.sketch import Shard, Sketch, check_writable

Kinds = dict[str, dict[str, bytes]]


def write_kind(kind: str, dirpath: Path, seed: int = 0) -> Sketch:
    """A small sketch with real, complex or both kinds of directions, drawn, given or merged."""
    if kind == "merged":
        parts = [
            write(dirpath.with_name(f"{dirpath.name} {part}"), names="orthonormal", seed=2 * seed + part)
            for part in range(2)
        ]
        return Sketch.merge(parts, dirpath)
    if kind == "float64":
        directions = make_directions(3, "sphere", 3, seed=seed)
        shards = make_shards(directions, 3, dtype=torch.float64)
        return write(dirpath, units=[0, 1, 2], directions=directions, shards=shards, degree=3)
    if kind == "real":
        return write(dirpath, design=np.eye(4) + 1 if seed else 1, names="basis")
    if kind == "explicit":
        return write(dirpath, design=np.eye(4) + seed + 1j)
    units = {"units": [0, 1, 2, 3]} if kind == "one per example" else {}
    names = {"mixed": "basis+sphere", "one per example": "sphere+common"}[kind]
    return write(dirpath, names="sphere" if seed else names, seed=seed, **units)


KINDS = ("real", "mixed", "explicit", "merged", "float64", "one per example")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """The files of a small sketch of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    return {kind: listing(write_kind(kind, root / kind).dirpath) for kind in KINDS}


def listing(dirpath: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dirpath.iterdir()}


def restore(files: dict[str, bytes], dirpath: Path) -> None:
    dirpath.mkdir()
    for name, data in files.items():
        (dirpath / name).write_bytes(data)


def read_everything(dirpath: Path) -> str:
    """Go through every reader; return a digest of all that they gave."""
    sketch = Sketch.load(dirpath)
    sketch.verify()
    digest = hashlib.sha256(repr(sketch).replace(str(dirpath), "").encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(sketch.metadata, sort_keys=True).encode())
    digest.update(sketch.directions.tobytes() + sketch.units.tobytes() + sketch.exponents.tobytes())
    blocks = [sketch.primal]
    for shard in sketch.shards():
        digest.update(shard.indices.tobytes() + shard.exponents.tobytes())
        blocks += [shard.scaled, shard.coefficients]
    for block in blocks:
        for name, tensor in sorted(block.items()):
            digest.update(f"{name.encode('utf-8', 'surrogatepass')!r}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Mutations of files. Each takes the random numbers and the directory.


def any_file(draw: random.Random, dirpath: Path) -> Path:
    return draw.choice(sorted(path for path in dirpath.iterdir() if path.is_file()))


def any_data_file(draw: random.Random, dirpath: Path) -> Path:
    return draw.choice(sorted(dirpath.glob("*.safetensors")))


def truncate(draw: random.Random, dirpath: Path) -> None:
    path = any_file(draw, dirpath)
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip_bits(draw: random.Random, dirpath: Path) -> None:
    path = any_file(draw, dirpath)
    data = bytearray(path.read_bytes())
    end = draw.choice([min(200, len(data)), len(data)])  # headers are at the beginning
    for _ in range(draw.choice([1, 1, 3, 50])):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def insert(draw: random.Random, dirpath: Path) -> None:
    path = any_file(draw, dirpath)
    data, place = path.read_bytes(), draw.randrange(path.stat().st_size + 1)
    path.write_bytes(data[:place] + draw.randbytes(draw.choice([1, 8, 1000])) + data[place:])


def swap(draw: random.Random, dirpath: Path) -> None:
    first, second = any_file(draw, dirpath), any_file(draw, dirpath)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def replace_file(draw: random.Random, dirpath: Path) -> None:
    path = any_file(draw, dirpath)
    data = path.read_bytes()
    path.unlink()
    outside = dirpath.with_name("outside")
    kind = draw.randrange(9)
    if kind == 0:
        path.touch()
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/dev/full", "/proc/self/mem", "."]))
    elif kind == 4:
        outside.write_bytes(data)
        path.symlink_to(draw.choice([outside, Path("..", "outside")]))
    elif kind == 5:
        path.write_bytes(Bomb.pickled(draw.randrange(6)).ljust(draw.choice([0, len(data)]), b"."))
    elif kind == 6:
        torch.save(Bomb(), path)
    elif kind == 7:
        path.symlink_to(path.name)  # a loop


# Mutations of the safetensors header.


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edited = edit(header)
    text = edited if isinstance(edited, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def forge_header(draw: random.Random, dirpath: Path) -> None:
    path = any_data_file(draw, dirpath)
    if draw.random() < 0.2:
        length = draw.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, path.stat().st_size, draw.randrange(2**64)])
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        return

    def edit(header: dict[str, Any]) -> bytes | None:
        name = draw.choice(sorted(header))
        entry = header[name]
        kind = draw.randrange(8)
        if kind == 0:
            entry["shape"] = draw.choice([[2**62, 2**62], [0, 2**63], [], [-1], [1.5], "3", [2**64], [1] * 10**5])
        elif kind == 1:
            entry["data_offsets"] = [draw.choice([0, 1, 4, -1, 2**63, 2**64]) for _ in range(draw.choice([1, 2, 2, 3]))]
        elif kind == 2:
            entry["dtype"] = draw.choice(["F16", "F64", "F32", "I8", "BOOL", "C64", "F8_E4M3", "F4", "object", "", 7])
        elif kind == 3:
            header[draw.choice(["other", "__metadata__", "\0", "../x", "\ud800"])] = draw.choice(
                [entry, {}, {"a": "b"}]
            )
        elif kind == 4:
            del header[name]
        elif kind == 5:
            mutate_value(draw, header)
        elif kind == 6:
            twice = json.dumps(entry)
            return f'{{"{name}": {twice}, "{name}": {twice}}}'.encode()
        else:
            return draw.choice([b"[" * 10**5, b"{}", b"null", b"\xff\xfe", b'{"a":' * 10**4, b"{" + b" " * 10**6])
        return None

    edit_header(path, edit)


# Mutations of sketch.json.

ABSURD: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, False, 0, -1, 1, 7, 2**15, 2**31, 2**62, 2**63, 2**64)),
    *(lambda value=value: value for value in (10**400, 1.0, -0.5, 1e308, 5e-324, "", "x", "0" * 64, "\ud800", "\0")),
    *(lambda value=value: value for value in ("../primal-00000000.safetensors", "/etc/passwd", "/dev/zero", "F16")),
    list,
    dict,
    lambda: [[]],
    lambda: [2**62] * 60,
    lambda: [0] * 65,
    lambda: list(range(7)),
    lambda: {"merged": 5},
    lambda: {"merged": ["merged", ["merged"], {"merged": []}]},
    lambda: {"design": "sphere", "count": 2**40, "seed": 0, "deletion_sets": None},
    lambda: {"design": "sphere+common", "count": 10**4, "seed": 0, "deletion_sets": None},
    lambda: json.loads("[" * 200 + "]" * 200),
]


def mutate_value(draw: random.Random, content: Any) -> None:
    """Change one node of a tree of dicts and lists, at any depth."""
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            return
        key = draw.choice(keys)
        if not isinstance(node[key], (dict, list)) or draw.random() < 0.2:
            break
        node = node[key]
    kind = draw.randrange(8)
    if kind < 4:
        node[key] = draw.choice(ABSURD)()
    elif kind == 4:
        del node[key]
    elif kind == 5:
        other = draw.choice(keys)
        node[key], node[other] = node[other], node[key]
    elif kind == 6 and isinstance(node, dict):
        node[draw.choice(["other", "file", "merged", f"{key} "])] = node[key]
    elif kind == 6:
        node.append(node[key])
    elif isinstance(node[key], (int, float)):
        node[key] = draw.choice([node[key] + 1, float(node[key]), str(node[key]), node[key] * 2, -node[key]])
    else:
        node[key] = [node[key]]


def mutate_metadata(draw: random.Random, dirpath: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for _ in range(draw.choice([1, 1, 2, 4])):
            part = draw.choice(["", "", "directions", "coefficients"])
            mutate_value(draw, content.get(part, content))

    if draw.random() < 0.8:
        resign(dirpath, change)
    else:
        path = dirpath / "sketch.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def mutate_text(draw: random.Random, dirpath: Path) -> None:
    """What json alone would forgive, or not survive."""
    path = dirpath / "sketch.json"
    text = path.read_text()
    content = json.loads(text)
    key = draw.choice(sorted(content))
    texts = [
        json.dumps(content, indent=draw.choice([None, 0, 4])),
        text + " \n\t" * draw.randrange(1000),
        "\ufeff" + text,
        text + text,
        text + "{}",
        text.replace("{", f'{{"{key}": 0, ', 1),  # the key twice
        text.rstrip().removesuffix("}") + f', "{key}": {draw.choice(["0", "NaN", "[]", "Infinity"])}}}',
        text.replace(f'"{key}": ', f'"{key}": NaN, "": ', 1),
        text.replace(f'"{key}": ', f'"{key}": {"9" * draw.choice([400, 5000])}, "": ', 1),
        text.replace(f'"{key}": ', f'"{key}": 1e400, "": ', 1),
        text.replace(f'"{key}": ', f'"{key}": {"[" * 10**5}, "": ', 1),
        text.replace(f'"{key}": ', f'"{key}": {"[" * 900}{"]" * 900}, "": ', 1),
        text.replace(f'"{key}"', "".join(f"\\u{ord(character):04x}" for character in f"{key}").join('""'), 1),
    ]
    path.write_bytes(draw.choice(texts).encode(draw.choice(["utf-8"] * 8 + ["utf-16", "utf-32"])))


def forge_everything(draw: random.Random, dirpath: Path) -> None:
    """Write files and metadata that agree with each other and are absurd: empty tensors, huge degrees, odd dtypes."""
    sizes = {"F64": 8, "F32": 4, "I64": 8, "BF16": 2, "U8": 1, "BOOL": 1}
    dtype = draw.choice(["F32", "F64"])
    shapes = [[], [0], [2], [1, 1], [0, 2**20], [2**62, 0], [0, 2**62, 2**62], [1] * 64, [0] * 64]
    tensors = {
        name: {"dtype": draw.choice(sorted(sizes)), "shape": draw.choice(shapes)}
        for name in draw.sample(["scale", "layer.bias", "\0", "", "é"], draw.choice([1, 2]))
    }
    degree = draw.choice([1, 2, 2, 10**6, 2**40, 2**62])

    def change(content: dict[str, Any]) -> None:
        content["degree"], content["dtype"], content["primal"]["tensors"] = degree, dtype, tensors
        content["coefficients"]["names"] = sorted(tensors)
        files = {content["primal"]["file"]: tensors}
        for shard in content["coefficients"]["shards"]:
            leading = [degree, shard["planes"], len(shard["directions"])]
            files[shard["file"]] = {
                name: {"dtype": dtype, "shape": leading + entry["shape"]} for name, entry in tensors.items()
            }
        for name, entries in files.items():
            header, end = {}, 0
            for key, entry in entries.items():
                entries_bytes = sizes[entry["dtype"]] * int(np.prod(np.array(entry["shape"], dtype=object)))
                start, end = end, end + min(entries_bytes, 2**12)
                header[key] = {**entry, "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            (dirpath / name).write_bytes(struct.pack("<Q", len(text)) + text + draw.randbytes(end))

    resign(dirpath, change)


def forge_units(draw: random.Random, dirpath: Path) -> None:
    """Another unit map, with the right checksum."""
    for path in dirpath.glob("units-*"):
        units = np.array([draw.choice([0, 1, 2, 3, -1, -2, 4, 2**40, -(2**63)]) for _ in range(6)])
        path.write_bytes(path.read_bytes()[: -units.nbytes] + units.tobytes())
        checksum = hashlib.sha256(b"(6,)" + units.tobytes()).hexdigest()
        resign(dirpath, lambda content, checksum=checksum: content["units"].update(checksum=checksum))


def record_sizes_and_digests(dirpath: Path) -> None:
    """Do what a forger does last: record the sizes and the SHA-256 of the files as they are now."""

    def change(content: dict[str, Any]) -> None:
        for name in content["files"]:
            if (dirpath / name).is_file():
                data = (dirpath / name).read_bytes()
                content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    resign(dirpath, change)


FILE_MUTATIONS = (truncate, flip_bits, insert, swap, replace_file, forge_header)
METADATA_MUTATIONS = (mutate_metadata, mutate_metadata, mutate_text, forge_everything, forge_units)


def attack(draw: random.Random, dirpath: Path) -> bool:
    """Mutate a sketch; return whether sizes and SHA-256 were made to fit, so that other numbers may be read."""
    if draw.random() < 0.5:
        draw.choice(FILE_MUTATIONS)(draw, dirpath)
        fixed = draw.random() < 0.6
    else:
        draw.choice(METADATA_MUTATIONS)(draw, dirpath)
        fixed = True
    if fixed and (dirpath / "sketch.json").is_file():
        # raised where sketch.json is no longer what can be forged further
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            record_sizes_and_digests(dirpath)
    return fixed


class Hang(BaseException):
    """Nothing in the library catches this."""


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Run something in at most 10 s and 256 MiB of new address space, touched or not, without executing a pickle."""
    monkeypatch.chdir(tmp_path)
    # 1 GiB of directions from a recipe are allowed by the format; here so many are absurd
    monkeypatch.setattr(_sketch_format, "MAX_REGENERATED_ENTRIES", 2**18)

    def hang(*_: object) -> None:
        raise Hang

    def peak() -> int:
        if not Path("/proc/self/status").exists():  # not Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(Path("/proc/self/status").read_text().partition("VmPeak:")[2].split()[0])

    def run(what: Callable[[], Any]) -> Any:
        before = peak()
        signal.setitimer(signal.ITIMER_REAL, 10)
        try:
            return what()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert peak() - before < 2**18  # KiB
            assert not (tmp_path / "executed").exists()

    previous, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # a failure must not fill the machine
        resource.setrlimit(resource.RLIMIT_AS, (peak() * 2**10 + 2**31, limits[1]))
    yield run
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, previous)


def fuzz(kinds: Kinds, tmp_path: Path, guarded: Callable[..., Any], seeds: range) -> dict[str, int]:
    originals = {}
    for kind, files in kinds.items():
        restore(files, tmp_path / kind)
        originals[kind] = read_everything(tmp_path / kind)
        write_kind(kind, tmp_path / f"{kind} again", seed=1)
    outcomes = {"refused": 0, "equal": 0, "forged": 0, "merged": 0}
    for seed in seeds:
        draw = random.Random(seed)
        kind = draw.choice(KINDS)
        dirpath = tmp_path / "attacked"
        restore(kinds[kind], dirpath)
        fixed = attack(draw, dirpath)
        try:
            read = guarded(lambda dirpath=dirpath: read_everything(dirpath))
            equal = read == originals[kind]
            assert equal or fixed, f"seed {seed}: other numbers were read from an altered {kind} sketch"
            outcomes["equal" if equal else "forged"] += 1
            if not equal:  # what a reader accepts, `merge` accepts or refuses
                parts = [Sketch.load(dirpath), Sketch.load(tmp_path / f"{kind} again")]
                guarded(lambda parts=parts: Sketch.merge(parts, tmp_path / "out").verify())
                outcomes["merged"] += 1
        except SketchError:
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, of a {kind} sketch")
            raise
        shutil.rmtree(dirpath)
        (tmp_path / "outside").unlink(missing_ok=True)
    return outcomes


def test_mutated_sketches(kinds: Kinds, tmp_path: Path, guarded: Callable[..., Any]) -> None:
    outcomes = fuzz(kinds, tmp_path, guarded, range(300))
    assert outcomes["refused"] > 200
    assert min(outcomes.values()) > 0  # every outcome was met


@pytest.mark.slow
def test_many_mutated_sketches(kinds: Kinds, tmp_path: Path, guarded: Callable[..., Any]) -> None:
    outcomes = fuzz(kinds, tmp_path, guarded, range(1000, 3000))
    assert outcomes["refused"] > 1400
    assert min(outcomes.values()) > 0


# Forgeries that random changes seldom reach, or that failed once.


def test_degree_that_no_file_bounds(kinds: Kinds, tmp_path: Path, guarded: Callable[..., Any]) -> None:
    """Tensors without entries and shards without directions fit any degree: 2^40 orders must not be counted out."""
    restore(kinds["real"], tmp_path / "s")
    files = json.loads((tmp_path / "s" / "sketch.json").read_text())["coefficients"]["shards"]

    def change(content: dict[str, Any]) -> None:
        content["degree"] = 2**40
        content["primal"]["tensors"] = {"scale": {"dtype": "F32", "shape": [0]}}
        content["coefficients"]["names"] = ["scale"]
        for name, leading in [(content["primal"]["file"], [])] + [
            (shard["file"], [2**40, shard["planes"], len(shard["directions"])]) for shard in files
        ]:
            header = {"scale": {"dtype": "F32", "shape": [*leading, 0], "data_offsets": [0, 0]}}
            text = json.dumps(header).encode()
            (tmp_path / "s" / name).write_bytes(struct.pack("<Q", len(text)) + text)

    resign(tmp_path / "s", change)
    record_sizes_and_digests(tmp_path / "s")
    with pytest.raises(SketchError, match=r"`primal\.tensors`"):
        guarded(lambda: read_everything(tmp_path / "s"))


@pytest.mark.parametrize("unit", [4, -2, 2**62])
def test_unit_map_of_other_units(tmp_path: Path, unit: int) -> None:
    write(tmp_path)
    path = data_file(tmp_path, "units")
    units = np.array([0, 1, 2, 3, 3, unit])
    path.write_bytes(path.read_bytes()[: -units.nbytes] + units.tobytes())
    checksum = hashlib.sha256(b"(6,)" + units.tobytes()).hexdigest()
    resign(tmp_path, lambda content: content["units"].update(checksum=checksum))
    record_sizes_and_digests(tmp_path)
    with pytest.raises(SketchError, match="holds no unit map of 4 units"):
        Sketch.load(tmp_path).verify()


RECIPES = [
    {},
    {"merged": 5},
    {"merged": "merged"},
    {"design": "sphere"},
    {"design": "sphere", "count": 2**24, "seed": 0, "deletion_sets": None},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_merge_does_not_trust_a_recipe_beside_stored_directions(
    tmp_path: Path, guarded: Callable[..., Any], recipe: dict[str, Any]
) -> None:
    """The directions are in a file and right, so the recipe was not looked at before."""
    forged = write(tmp_path / "a", design=np.eye(4) + 1j)
    resign(tmp_path / "a", lambda content: content["directions"].update(recipe=recipe))
    other = write(tmp_path / "b", names="sphere")
    merged = guarded(lambda: Sketch.merge([Sketch.load(tmp_path / "a"), other], tmp_path / "out"))
    np.testing.assert_array_equal(merged.directions, np.concatenate([forged.directions, other.directions]))


def test_forged_sketch_that_does_not_name_its_numpy(tmp_path: Path) -> None:
    write(tmp_path)

    def change(content: dict[str, Any]) -> None:
        content["directions"]["recipe"]["seed"] = 1
        content["versions"] = {}
        content["directions"]["checksum"] = "0" * 64

    resign(tmp_path, change)
    with pytest.raises(SketchError, match="other directions here"):
        Sketch.load(tmp_path).verify()


# Writers that meet, fail or die.


def in_child(work: Callable[[], object]) -> int:
    """Fork, work and end there; return the id of the process. Its exit status is 0 unless ``work`` raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; none of them holds a lock
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_two_processes_write_one_directory(tmp_path: Path) -> None:
    """The second is refused while the first writes, and let in when the first was killed."""
    sketch = write(tmp_path / "s")
    reading, writing = os.pipe()

    def slow() -> None:
        def stream() -> Iterator[Shard]:
            os.write(writing, b".")
            time.sleep(60)
            yield from ()

        write(tmp_path / "s", shards=stream())

    child = in_child(slow)
    try:
        assert os.read(reading, 1) == b"."
        for second in (lambda: write(tmp_path / "s"), lambda: check_writable(tmp_path / "s")):
            with pytest.raises(SketchError, match=r"s` is being written by another writer: give each run"):
                second()
        sketch.verify()  # readers are not kept out
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert list((tmp_path / "s").glob(".writing-*"))
    write(tmp_path / "s", steps=99)
    assert not list((tmp_path / "s").glob(".writing-*"))


@pytest.mark.parametrize("function", ["os.fsync", "safetensors"])
def test_full_disk_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """The n-th call finds the disk full, for every n. Oracle: the bytes of the directory before."""
    from lightning_sketch import _sketch_writer

    sketch = write(tmp_path)
    before = listing(tmp_path)
    owner, name = {"os.fsync": (os, "fsync"), "safetensors": (_sketch_writer, "save_file")}[function]
    real, refusals = getattr(owner, name), 0
    for survivors in range(40):
        calls: list[object] = []

        def full(*arguments: Any, calls: list[object] = calls, limit: int = survivors, **keywords: Any) -> Any:
            calls.append(arguments)
            if len(calls) > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            try:
                write(tmp_path, steps=99)
                message = ""
            except SketchError as error:
                message = str(error)
        if message:
            assert str(tmp_path) in message
            assert "No space left on device): free some space or choose another `dirpath`" in message
            assert listing(tmp_path) == before
            refusals += 1
        elif len(calls) <= survivors:
            break  # no call failed
        else:  # only what is best effort failed (the sync of the directory)
            before = listing(tmp_path)
    assert refusals >= 6  # one for each data file at least
    assert Sketch.load(tmp_path).steps == 99
    with pytest.raises(SketchError, match="is missing"):
        sketch.verify()  # its files went with the last write
    Sketch.load(tmp_path).verify()


@pytest.mark.parametrize("limit", [0, 100, 400, 1500])
def test_files_that_the_system_does_not_let_grow(tmp_path: Path, limit: int) -> None:
    """A real error of write(2), that of a quota. Oracle: the bytes of the directory before."""
    write(tmp_path)
    before = listing(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(SketchError, match=r"can not be written.*free some space"):
            write(tmp_path, steps=99)

    assert os.waitpid(in_child(limited), 0)[1] == 0
    assert listing(tmp_path) == before
    Sketch.load(tmp_path).verify()


def test_killed_writers(tmp_path: Path) -> None:
    """SIGKILL at 20 moments: the old or the new sketch is there, whole; the next writer removes what was left.

    Half of the moments are random, the others are before a file reaches the disk.
    """

    def killed_at(count: int, steps: int) -> None:
        calls, fsync = itertools.count(1), os.fsync

        def kill_or_sync(fd: int) -> None:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(fd)

        os.fsync = kill_or_sync  # type: ignore[assignment]
        write(tmp_path, steps=steps)

    write(tmp_path)
    began = time.monotonic()
    os.waitpid(in_child(lambda: write(tmp_path, steps=13)), 0)
    duration = time.monotonic() - began
    draw = random.Random(0)
    seen = {Sketch.load(tmp_path).steps}
    assert seen == {13}
    left = 0
    for steps in range(100, 120):
        previous = Sketch.load(tmp_path).steps
        if steps % 2:
            child = in_child(lambda steps=steps: killed_at(1 + steps % 3, steps))
        else:
            child = in_child(lambda steps=steps: write(tmp_path, steps=steps))
            time.sleep(draw.uniform(0, 1.2 * duration))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sketch = Sketch.load(tmp_path)
        sketch.verify()
        assert sketch.steps in (previous, steps)
        left += len({path.name for path in tmp_path.iterdir()} - {"sketch.json", *sketch.metadata["files"]})
    assert left > 0  # some were killed midway
    sketch = write(tmp_path, steps=99)
    assert {path.name for path in tmp_path.iterdir()} == {"sketch.json", *sketch.metadata["files"]}


# Merges. Two parts are of one run if the metadata of `_SAME_RUN`, the unit map, the order of the data, the names of the
# coefficients and every bit of the final tensors are equal. Hyperparameters are compared through the tensors they lead
# to. What leaves all of this equal is not told apart: a dataset in another order, visited in the same order.


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", "Adam"), ("loss", "other.loss"), ("modules", {"layer": "Bilinear"}), ("normalization", "remaining")],
)
def test_merge_compares_what_the_run_was(tmp_path: Path, key: str, value: Any) -> None:
    parts = [write(tmp_path / "a", names="sphere"), write(tmp_path / "b", names="sphere", seed=1, **{key: value})]
    with pytest.raises(SketchError, match=rf"another run.*\({key} differ\)"):
        Sketch.merge(parts, tmp_path / "out")


@pytest.mark.parametrize("name", list(make_primal()))
def test_merge_compares_every_bit_of_the_final_tensors(tmp_path: Path, name: str) -> None:
    primal = make_primal()
    flat = primal[name].clone().reshape(-1)
    flat.view(torch.uint8)[0] ^= 1  # the last bit of the first entry
    primal[name] = flat.reshape(primal[name].shape)
    parts = [write(tmp_path / "a", names="sphere"), write(tmp_path / "b", names="sphere", seed=1, primal=primal)]
    with pytest.raises(SketchError, match=r"another run.*\(final parameters differ\)"):
        Sketch.merge(parts, tmp_path / "out")


def test_merge_refuses_one_draw_that_two_machines_rounded_differently(tmp_path: Path) -> None:
    directions = make_directions(3, "orthonormal", 4).array
    rounded = directions * (1 + 1e-14)
    assert not (rounded == directions).any()
    first, second = write(tmp_path / "a", design=directions), write(tmp_path / "b", design=rounded[1:])
    for parts in ([first, second], [second, first], [first, first]):
        with pytest.raises(SketchError, match=r"earlier part holds too.*another `seed`"):
            Sketch.merge(parts, tmp_path / "out")
    close = write(tmp_path / "c", design=directions * (1 + 1e-4))  # others, if near
    assert Sketch.merge([first, close], tmp_path / "out").num_directions == 6
