"""How many directions one pass carries, and whether the whole fits into memory; measured on the first batch."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.jets.tensor import coefficient_dtype
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.shadow.record import StepRecord, Weighting, replay

# glibc gives blocks above 32 MiB back to the kernel when they are freed; every operator would touch fresh pages.
_LARGEST_ON_CPU = 32 << 20
_SHARE_OF_GPU = 0.5  # of what is free, for one pass
_HOLES = 1.7  # what the heap of glibc takes over what is alive in it, after some steps
_TRANSIENT = 3  # blocks of the largest tensor that a rule holds beside what a plain operator holds


def trained_bytes(params: Iterable[Tensor]) -> int:
    """Bytes of the parameters that are trained."""
    return sum(p.numel() * p.element_size() for p in params if p.requires_grad)


def state_bytes(trained: int, state_tensors: int, measurements: int, degree: int) -> int:
    """Bytes of the coefficients of parameters and optimizer state; a complex direction is two measurements."""
    return (1 + state_tensors) * trained * measurements * degree


@dataclass(frozen=True)
class StepSize:
    """Bytes of one plain training step.

    Attributes:
        trained: of all trained parameters.
        frozen: of all other parameters, and of buffers.
        state_tensors: how many tensors of a parameter's size the optimizer keeps.
        peak: of all tensors that forward and backward pass hold at a time, parameters excepted.
        largest: of the largest single tensor.
    """

    trained: int
    state_tensors: int
    peak: int
    largest: int
    frozen: int = 0

    def state(self, measurements: int, degree: int) -> int:
        """Coefficients of parameters and optimizer state, kept all the time."""
        return state_bytes(self.trained, self.state_tensors, measurements, degree)

    def copies(self) -> int:
        """Plain values: of the run, to compare with and to start from, and those that a pass computes itself."""
        return (5 + 3 * self.state_tensors) * self.trained + 2 * self.frozen + self.peak

    def one_pass(self, directions: int, parts: int, degree: int) -> int:
        """What one pass needs besides: activations and gradients, or in the update gradients and copies of them."""
        return (max(self.peak, 2 * self.trained) + _TRANSIENT * self.largest) * directions * parts * degree


class _LiveBytes(TorchDispatchMode):
    """Within, follows the bytes of the tensors that operators make, as if in the dtype of coefficients, until freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._now = 0
        self._sizes: dict[int, int] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, new=True)
        self.peak = max(self.peak, self._now)
        return result

    def _meet(self, values: Any, new: bool) -> None:
        for t in tree_leaves(values):
            if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                widening = coefficient_dtype(t.dtype).itemsize // t.dtype.itemsize
                size = storage.nbytes() * widening if new else 0  # what was there before costs nothing
                self._sizes[key] = size
                self._now += size
                self.largest = max(self.largest, size)
                weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def measure_step(
    module: Any,
    training_step: Callable[..., Any],
    weighting: Weighting,
    record: StepRecord,
    params: Mapping[str, Tensor],
    state_tensors: int,
) -> StepSize:
    """Run the recorded step and its backward pass once more on plain tensors and see what they hold.

    Args:
        module: the user's LightningModule.
        training_step: its unwrapped training step.
        weighting: how weights enter the loss.
        record: the step.
        params: the parameters that the step saw, by name.
        state_tensors: how many tensors of a parameter's size the optimizer keeps.
    """
    tensors = record.fresh_tensors(params)
    trained = [t for name in params if (t := tensors[name]).requires_grad]
    weights = record.ones_like(params)

    def differentiate(loss: Tensor) -> None:
        torch.autograd.grad(loss, trained, allow_unused=True)

    with quiet(record.module_state.places, record.random_state.device) as start, _LiveBytes() as live:
        replay(start, module, record, training_step, weighting, weights, tensors, differentiate)
    size = trained_bytes(trained)
    held = size if record.accumulate > 1 else 0  # the gradient of the micro-batches before
    largest = max([live.largest, *(trained_bytes([p]) for p in trained)])
    frozen = sum(t.numel() * t.element_size() for t in tensors.values()) - size
    return StepSize(size, state_tensors, live.peak + held, largest, frozen)


def directions_per_pass(
    size: StepSize, parts: int, degree: int, device: torch.device, kept: int = 0, processes: int = 1
) -> int:
    """Return how many directions keep a pass in the allocator's cache (CPU) or in half of the free memory (GPU).

    Args:
        size: of one plain step.
        parts: 1 for real directions, 2 for complex ones.
        degree: highest order.
        device: where they are kept.
        kept: bytes of what is free that the coefficients of all directions will take.
        processes: how many share what is free on the device.
    """
    if device.type == "cuda":
        free = (available_bytes(device) or 0) // processes - kept
        return max(1, int(_SHARE_OF_GPU * free) // size.one_pass(1, parts, degree))
    return max(1, _LARGEST_ON_CPU // (size.largest * parts * degree))


def check_memory(
    size: StepSize,
    counts: Mapping[int, int],
    per_pass: Mapping[int, int],
    degree: int,
    device: torch.device,
    units: int = 0,
    processes: int = 1,
) -> int:
    """Return the bytes expected at the peak.

    Args:
        size: of one plain step.
        counts: how many real (key 1) and complex (key 2) directions there are.
        per_pass: how many of each one pass carries.
        degree: highest order.
        device: where they are kept.
        units: how many units the directions have.
        processes: how many of the run share what is free on the device, each with counts like these.

    Raises:
        ConfigurationError: if that is more than is free, naming how many directions would fit.
    """

    def planned(counts: Mapping[int, int], per_pass: Mapping[int, int] = per_pass) -> int:
        passes = (size.one_pass(min(per_pass[parts], count), parts, degree) for parts, count in counts.items() if count)
        transient = max(passes, default=0)
        if device.type != "cuda":
            transient = int(_HOLES * transient)
        measurements = sum(parts * count for parts, count in counts.items())
        directions = measurements * units * 8  # float64 at most
        return size.copies() + size.state(measurements, degree) + directions + transient

    needed = planned(counts)
    free = available_bytes(device)
    if free is None or needed <= free // processes:
        return needed
    free //= processes
    total = sum(counts.values())
    fit = bisect_right(range(total + 1), free, key=lambda fewer: planned(_in_proportion(counts, fewer))) - 1
    each = f" for each of the {processes} processes here" if processes > 1 else ""
    passes = "a smaller `directions_per_pass`, " * (planned(counts, dict.fromkeys(per_pass, 1)) <= free)
    raise ConfigurationError(
        f"`directions`: {total} directions of degree {degree} need about {needed / 2**30:.3g} GiB, but "
        f"{free / 2**30:.3g} GiB are free{each}: {max(fit, 0)} would fit, or use {passes}a lower `degree`, or run "
        "several times with other seeds and merge the sketches."
    )


def _in_proportion(counts: Mapping[int, int], total: int) -> dict[int, int]:
    """As many directions as ``total``, real and complex ones in the proportion of ``counts``."""
    real = total * counts.get(1, 0) // sum(counts.values())
    return {1: real, 2: total - real}


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; ``None`` where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    in_group = _available_in_group(Path("/sys/fs/cgroup"))
    return free if in_group is None else min(free, in_group)


def _available_in_group(group: Path) -> int | None:
    """What a container may still take; files that the kernel caches are given up when memory is needed."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return int(limit) - int(used) + int(stat["inactive_file"]) + int(stat["active_file"])
