"""Memory that tensors free stays with the process, since the next operator wants the same sizes; until it is short."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Callable

import torch

# Parameters of glibc's mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, for the whole process, instead of giving it back to the kernel.

    By default every block above 32 MiB is given back, and the end of the heap when more than 64 MiB of it are free;
    then each page of the next block is a fault, which takes as long as the arithmetic. Nothing is changed where the
    environment configures the allocator (``MALLOC_*``, ``GLIBC_TUNABLES``) or where there is no glibc.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc before 2.35 takes
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give back to the kernel what :func:`keep_freed_memory` has kept so far."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def collect_garbage() -> None:
    """Free the tensors that an exception keeps alive in cycles, and give back what CUDA has cached."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing happens where CUDA is not in use


def _of_libc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows
        return None
