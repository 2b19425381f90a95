"""Memory that tensors free on the CPU stays with the process: the next operator wants the same sizes."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

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


def _of_libc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows
        return None
