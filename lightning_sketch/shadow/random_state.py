"""The global random generators, copied as bytes: the public ways make a Python number of each of their 624 words."""

from __future__ import annotations

import _random
import ctypes
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_BYTES = 625 * 4  # of a Mersenne twister: 624 words, and the position among them
_PAIR_BYTES = 16  # of numpy's second normal of a pair: whether there is one, and it
# The objects behind the functions of the two modules
_PYTHON, _NUMPY = cast(Any, random.getstate).__self__, cast(Any, np.random.get_state).__self__
_numpy_bits: Callable[[], np.random.BitGenerator] = cast(Any, np.random).get_bit_generator


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


def _python_words() -> int | None:
    """Where Python's generator keeps position and words: found by what they are, so that no layout is assumed."""
    _, (*words, position), _ = random.getstate()
    expected = np.array([position, *words], dtype=np.uint32).tobytes()
    start = ctypes.string_at(id(_PYTHON), _random.Random.__basicsize__).find(expected)
    return None if start < 0 else id(_PYTHON) + start


def _numpy_pair() -> int | None:
    """Where numpy's generator keeps the second normal of a pair, found on another that has a known one."""
    other: Any = np.random.RandomState(0)
    normal = -1.2345678901234567e-287
    size, pair = type(other).__basicsize__, struct.pack("qd", 1, normal)
    if type(_NUMPY) is not type(other) or len(pair) != _PAIR_BYTES:
        return None
    other.set_state((*other.get_state()[:3], 1, normal))
    start = ctypes.string_at(id(other), size).find(pair)
    return None if start < 0 else id(_NUMPY) + start


_PYTHON_WORDS, _NUMPY_PAIR = _python_words(), _numpy_pair()


def _python_state() -> Any:
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
def _numpy_words(bits: np.random.BitGenerator) -> int | None:
    """Where numpy's generator keeps words and position, if it is a Mersenne twister."""
    return bits.ctypes.state_address if type(bits) is np.random.MT19937 else None


def _numpy_state() -> Any:
    words = _numpy_words(_numpy_bits())
    if _NUMPY_PAIR is None or words is None:
        return np.random.get_state(legacy=False)
    return ctypes.string_at(words, _BYTES), ctypes.string_at(_NUMPY_PAIR, _PAIR_BYTES)


def _set_numpy_state(state: Any) -> None:
    words = _numpy_words(_numpy_bits())
    if _NUMPY_PAIR is None or words is None:
        np.random.set_state(state)
        return
    ctypes.memmove(words, state[0], _BYTES)
    ctypes.memmove(_NUMPY_PAIR, state[1], _PAIR_BYTES)
