"""How many directions one pass carries, and whether the whole fits into memory; measured on the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.shadow.record import StepRecord, Weighting, replay

# glibc gives blocks above 32 MiB back to the kernel when they are freed; every operator would touch fresh pages.
_LARGEST_ON_CPU = 32 << 20
_SHARE_OF_GPU = 0.5  # of what is free, for one pass
_TRANSIENT = 4  # blocks of the largest tensor that an operator holds at a time


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
        state_tensors: how many tensors of a parameter's size the optimizer keeps.
        saved: of all tensors saved for the backward pass, parameters excepted.
        largest: of the largest single tensor.
    """

    trained: int
    state_tensors: int
    saved: int
    largest: int

    def state(self, measurements: int, degree: int) -> int:
        """Coefficients of parameters and optimizer state, kept all the time."""
        return state_bytes(self.trained, self.state_tensors, measurements, degree)

    def one_pass(self, directions: int, parts: int, degree: int) -> int:
        """What one pass needs besides: activations, gradients, and what operators hold for a moment."""
        return (self.saved + 2 * self.trained + _TRANSIENT * self.largest) * directions * parts * degree


def measure_step(
    module: Any,
    training_step: Callable[..., Any],
    weighting: Weighting,
    record: StepRecord,
    params: Mapping[str, Tensor],
    state_tensors: int,
) -> StepSize:
    """Run the recorded step once more on plain tensors and see what it keeps.

    Args:
        module: the user's LightningModule.
        training_step: its unwrapped training step.
        weighting: how weights enter the loss.
        record: the step.
        params: the parameters that the step saw, by name.
        state_tensors: how many tensors of a parameter's size the optimizer keeps.
    """
    own = {p.data_ptr() for p in params.values()}
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> None:  # nothing is kept: there is no backward pass, and a graph that holds itself leaks
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = max(sizes.get(t.data_ptr(), 0), t.numel() * t.element_size())

    weights = record.ones_like(params)
    tensors = {**params, **record.copied_buffers()}
    with saved_tensors_hooks(note, lambda kept: kept):
        replay(module, record, training_step, weighting, weights, tensors, lambda loss: None)
    largest = max([*sizes.values(), *(trained_bytes([p]) for p in params.values())])
    return StepSize(trained_bytes(params.values()), state_tensors, sum(sizes.values()), largest)


def directions_per_pass(size: StepSize, parts: int, degree: int, device: torch.device) -> int:
    """Return how many directions keep a pass in the allocator's cache (CPU) or in half of the free memory (GPU)."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return max(1, int(_SHARE_OF_GPU * free) // size.one_pass(1, parts, degree))
    return max(1, _LARGEST_ON_CPU // (size.largest * parts * degree))


def check_memory(
    size: StepSize, counts: Mapping[int, int], per_pass: Mapping[int, int], degree: int, device: torch.device
) -> int:
    """Return the bytes expected at the peak.

    Args:
        size: of one plain step.
        counts: how many real (key 1) and complex (key 2) directions there are.
        per_pass: how many of each one pass carries.
        degree: highest order.
        device: where they are kept.

    Raises:
        ConfigurationError: if that is more than is free, naming how many directions would fit.
    """
    transient = max(size.one_pass(min(per_pass[parts], count), parts, degree) for parts, count in counts.items())
    measurements = sum(parts * count for parts, count in counts.items())
    needed = size.state(measurements, degree) + transient
    free = available_bytes(device)
    if free is not None and needed > free:
        total = sum(counts.values())
        fits = max(0, (free - transient) * total // max(1, size.state(measurements, degree)))
        raise ConfigurationError(
            f"`directions`: {total} directions of degree {degree} need about {needed / 2**30:.3g} GiB, but "
            f"{free / 2**30:.3g} GiB are free: about {fits} would fit, or use a lower `degree`, or run "
            "several times with other seeds and merge the sketches."
        )
    return needed


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
