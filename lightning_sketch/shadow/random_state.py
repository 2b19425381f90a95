"""The global random generators, copied as bytes: the public ways make a Python number of each of their 624 words."""

from __future__ import annotations

import _random
import ctypes
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BYTES = 625 * 4  # of a Mersenne twister: 624 words, and the position among them
_PYTHON: Any = random.getstate.__self__  # type: ignore[attr-defined]  # Python's global generator
_NUMPY: Any = np.random.mtrand._rand


@dataclass(frozen=True)
class RandomState:
    """The state of the global generators: torch on CPU and on the module's own device, numpy, Python."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Read the present state."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), own, _numpy_state(), _python_state())

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.cuda.set_rng_state(self.own, self.device)
        _set_numpy_state(self.numpy)
        _set_python_state(self.python)


def _find_python_words() -> int | None:
    """Where Python's generator keeps position and words: found by what they are, so that no layout is assumed."""
    _, (*words, position), _ = random.getstate()
    expected = np.array([position, *words], dtype=np.uint32).tobytes()
    start = ctypes.string_at(id(_PYTHON), _random.Random.__basicsize__).find(expected)
    return None if start < 0 else id(_PYTHON) + start


_PYTHON_WORDS = _find_python_words()


def _python_state() -> Any:
    """The state of Python's generator, as bytes and half a pair of normals where it is where it was found."""
    if _PYTHON_WORDS is None:
        return random.getstate()
    return ctypes.string_at(_PYTHON_WORDS, _BYTES), _PYTHON.gauss_next


def _set_python_state(state: Any) -> None:
    if _PYTHON_WORDS is None:
        random.setstate(state)
        return
    words, _PYTHON.gauss_next = state
    ctypes.memmove(_PYTHON_WORDS, words, _BYTES)


@lru_cache(maxsize=1)
def _numpy_words(bits: np.random.MT19937) -> int:
    """Where a generator keeps words and position."""
    return bits.ctypes.state_address


class _NoState:
    """Takes the place of numpy's bit generator where only what is kept beside it is wanted: half a pair of normals."""

    def __init__(self) -> None:
        self.state = {"bit_generator": "MT19937", "state": None}


def _numpy_state() -> Any:
    """The state of numpy's generator, as bytes and what is kept beside them where they are those of MT19937."""
    bits = getattr(_NUMPY, "_bit_generator", None)
    if type(bits) is not np.random.MT19937:
        return np.random.get_state()
    words = ctypes.string_at(_numpy_words(bits), _BYTES)
    try:
        _NUMPY._bit_generator = _NoState()
        return words, _NUMPY.get_state(legacy=False)
    finally:
        _NUMPY._bit_generator = bits


def _set_numpy_state(state: Any) -> None:
    bits = getattr(_NUMPY, "_bit_generator", None)
    if type(bits) is not np.random.MT19937 or len(state) != 2:
        np.random.set_state(state)
        return
    words, beside = state
    try:
        _NUMPY._bit_generator = _NoState()
        _NUMPY.set_state(beside)
    finally:
        _NUMPY._bit_generator = bits
    ctypes.memmove(_numpy_words(bits), words, _BYTES)
