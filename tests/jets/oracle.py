"""The oracle of these tests: plain torch run along real curves, and polynomials fitted to what it gives.

A jet is right if its coefficients are those of ``z -> f(x_0 + sum_r c_r z^r)``. The function is run on ordinary
tensors at the Chebyshev points of ``[-h, h]`` and interpolated by polynomials of several degrees, whose difference
says how good the fit is. For complex coefficients ``c_r = a_r + i b_r`` the order-``r`` coefficient of ``f`` along
``a_r + t b_r`` is a polynomial of degree ``r`` in ``t``; it is fitted at real ``t`` and read off at ``t = i``. No
code is shared with the library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from lightning_sketch.jets import JetTensor

# radius and number of points: many where the function is smooth, few against rounding where a kink is near
FITS = ((0.3, 11), (0.1, 11), (0.03, 11), (8e-3, 11), (2e-3, 11), (2e-3, 7), (3e-4, 11), (3e-4, 7), (3e-6, 5))

# from ordinary tensors or JetTensors to tensors of the same kind
Function = Callable[[list[Tensor]], Sequence[Tensor]]


class InconclusiveError(Exception):
    """The oracle does not know the coefficients well enough to judge."""


@dataclass(frozen=True)
class Curve:
    """A point ``(*S)`` and the coefficients ``(R, P, K, *S)`` of ``K`` curves through it."""

    point: Tensor
    coefficients: Tensor

    def jet(self, requires_grad: bool = False) -> JetTensor:
        return JetTensor(self.point.clone(), self.coefficients.clone(), requires_grad=requires_grad)


def make_curve(point: Tensor, degree: int, parts: int, directions: int, generator: torch.Generator) -> Curve:
    """Draw curves of unit size through ``point``."""
    shape = (degree, parts, directions, *point.shape)
    return Curve(point, torch.randn(shape, generator=generator, dtype=torch.float64).to(point.dtype))


@functools.cache
def _weights(order: int, radius: float, count: int, keep: int) -> Tensor:
    """``(order + 1, count)``: values at the points to Taylor coefficients, from the first ``keep`` polynomials."""
    points = chebyshev.chebpts1(count)
    transform = chebyshev.chebvander(points, count - 1).T * 2 / count
    transform[0] /= 2
    monomials = np.stack([np.pad(chebyshev.cheb2poly(np.eye(keep)[j]), (0, keep - 1 - j)) for j in range(keep)])
    scaled = monomials.T @ transform[:keep] / radius ** np.arange(keep)[:, None]
    return torch.as_tensor(scaled[: order + 1])


def _along(
    function: Function, points: list[Tensor], slopes: list[Tensor], radius: float, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Coefficients ``(R, *S)`` and their errors along one real curve per input, whose ``slopes`` are ``(R, *S)``."""
    order = slopes[0].shape[0]
    values: list[list[Tensor]] = []
    for z in radius * chebyshev.chebpts1(count):
        at = [x + sum(float(z) ** (r + 1) * c[r] for r in range(order)) for x, c in zip(points, slopes, strict=True)]
        values.append([y.detach().double() for y in function(at)])
    full, *shorter = (_weights(order, radius, count, count - dropped) for dropped in range(min(5, count - order)))
    result = []
    for ys in zip(*values, strict=True):
        y = torch.stack(ys)
        fitted = torch.tensordot(full, y, 1)
        rounding = 4e-16 * full.abs().sum(1) * (y.abs().nan_to_num(0.0, 0.0).max() if y.numel() else 0.0)
        error = rounding.reshape(-1, *[1] * (y.ndim - 1)).expand(fitted.shape)
        for short, trust in zip(shorter, (1, 1, 0.1, 0.1), strict=False):
            error = torch.maximum(error, trust * (fitted - torch.tensordot(short, y, 1)).abs())
        # A kink inside the interval may leave single orders untouched, by symmetry: trust none where one is bad.
        powers = radius ** torch.arange(order + 1.0, dtype=torch.float64).reshape(-1, *[1] * (y.ndim - 1))
        error = (error * powers).amax(0) / powers
        result.append((fitted[1:], error[1:]))
    return result


def taylor(function: Function, curves: list[Curve], radius: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """Coefficients ``(R, P, K, *S)`` of every output, and their estimated errors."""
    points = [c.point for c in curves]
    order, parts, directions = curves[0].coefficients.shape[:3]
    per_direction = []
    for k in range(directions):
        if parts == 1:
            found = _along(function, points, [c.coefficients[:, 0, k] for c in curves], radius, count)
            per_direction.append([(y[:, None], e[:, None]) for y, e in found])
            continue
        ts = np.linspace(-1.5, 1.5, order + 1)
        runs = [
            _along(
                function, points, [c.coefficients[:, 0, k] + t * c.coefficients[:, 1, k] for c in curves], radius, count
            )
            for t in ts
        ]
        at_i = np.linalg.solve(np.vander(ts, increasing=True).T, 1j ** np.arange(order + 1))
        both = torch.as_tensor(np.stack([at_i.real, at_i.imag]))
        outputs = []
        for many in zip(*runs, strict=True):
            y = torch.tensordot(both, torch.stack([m[0] for m in many]), 1).transpose(0, 1)
            e = torch.tensordot(both.abs(), torch.stack([m[1] for m in many]), 1).transpose(0, 1)
            outputs.append((y, e))
        per_direction.append(outputs)
    return [
        (torch.stack([d[i][0] for d in per_direction], 2), torch.stack([d[i][1] for d in per_direction], 2))
        for i in range(len(per_direction[0]))
    ]


def jets_of(function: Function, curves: list[Curve]) -> list[tuple[Tensor, Tensor]]:
    """Values and coefficients that the library gives; a plain output has zero coefficients."""
    lead = curves[0].coefficients.shape[:3]
    result = []
    for y in function([c.jet() for c in curves]):
        value = y.detach()
        if isinstance(value, JetTensor):
            result.append((value.primal, value.coefficients))
        else:
            result.append((value, torch.zeros(()).double().expand(*lead, *value.shape)))
    return result


def difference(function: Function, curves: list[Curve], tolerance: float = 1e-6) -> str:
    """Compare the library with the oracle; return what is wrong, or an empty string.

    Every coefficient is taken from the radius at which it is known best: smooth functions are fitted widely, piecewise
    ones so closely that no kink is crossed. Errors are relative to the largest coefficient of the order. Entries that
    are not finite at order 0, and one in twenty that lie too near to a kink, are left out.

    Raises:
        InconclusiveError: if no radius tells the others to ``tolerance``.
    """
    ours = jets_of(function, curves)
    plain = [y.detach() for y in function([c.point.clone() for c in curves])]
    assert len(ours) == len(plain), "the library gives another number of outputs"
    for i, ((value, _), y) in enumerate(zip(ours, plain, strict=True)):
        if value.shape != y.shape or value.dtype != y.dtype:
            return f"output {i} is {tuple(value.shape)} {value.dtype}, not {tuple(y.shape)} {y.dtype}"
        if not torch.allclose(value.double(), y.double(), rtol=1e-9, atol=1e-11, equal_nan=True):
            return f"order 0 of output {i} is off by {(value.double() - y.double()).abs().max():.1e}"
    best: list[tuple[Tensor, Tensor]] = []
    unknown = "the curves leave the domain"
    for radius, count in FITS:
        try:
            found = taylor(function, curves, radius, count)
        except (RuntimeError, ValueError):
            continue
        best = [_better(a, b) for a, b in zip(best, found, strict=True)] if best else found
        unknown, wrong = "", ""
        for i, ((_, block), (expected, error), y) in enumerate(zip(ours, best, plain, strict=True)):
            finite = y.isfinite().expand(expected.shape)
            if not y.is_floating_point() or not y.numel():
                continue
            floor = 1e-2 * (1 + y.double().abs().nan_to_num(0.0, 0.0).max())
            for r in range(expected.shape[0]):
                size = expected[r].abs().nan_to_num(0.0, 0.0).max() + floor
                off, known = (block[r] - expected[r]).abs() / size, error[r] / size <= tolerance
                if not bool((known | ~finite[r]).double().mean() >= 0.95):
                    unknown = f"order {r + 1} of output {i} is known to {(error[r] / size)[finite[r]].max():.1e} only"
                elif not bool(((off <= tolerance + 10 * error[r] / size) | ~finite[r] | ~known).all()):
                    wrong = wrong or f"order {r + 1} of output {i} is off by {off[finite[r]].max():.1e}"
        if not unknown:
            return wrong
    raise InconclusiveError(f"the oracle is inconclusive: {unknown}")


def _better(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    closer = (b[1] < a[1]) | a[1].isnan()
    return torch.where(closer, b[0], a[0]), torch.where(closer, b[1], a[1])


def assert_right(function: Function, curves: list[Curve], tolerance: float = 1e-6) -> None:
    """Fail with what is wrong."""
    message = difference(function, curves, tolerance)
    assert not message, message
