"""Products and powers of arrays, without overflow and without waiting threads."""

import numpy as np
import torch


def times_power(values: np.ndarray, base: np.ndarray, exponent: int) -> np.ndarray:
    """Return ``values * base^exponent``, in two halves: the power alone may be more than float64 holds."""
    half = exponent // 2
    result: np.ndarray = values * base**half * base ** (exponent - half)
    return result


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply by torch, whose threads wait for each other far less than numpy's where the processor is shared."""
    dtype = np.result_type(a, b)
    product: np.ndarray = (torch.from_numpy(a.astype(dtype)) @ torch.from_numpy(b.astype(dtype))).numpy()
    return product


def power(base: np.ndarray, exponent: int) -> np.ndarray:
    """Return ``base^exponent`` by products."""
    result = base
    for _ in range(exponent - 1):  # numpy's own complex power goes through logarithms: slower and less exact
        result = result * base
    return result


def measurements(values: np.ndarray) -> np.ndarray:
    """Return ``[Re, Im]`` stacked on the first axis; real arrays have no second half."""
    return np.concatenate([values.real, values.imag]) if np.iscomplexobj(values) else values
