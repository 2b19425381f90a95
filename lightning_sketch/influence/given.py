"""Kernels that are given as numbers, in any of the shapes in which they come."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.influence.jacobian import Points


class KernelPoints:
    """Points whose kernel with the training points is known.

    Args:
        kernel: ``(n c, n_train c)``, float64.
        outputs: ``(n, C)``.
        output_shape: ``()`` or ``(C,)``.
        block: ``c``, 1 or ``C``.
        basis: ``(n c, q)`` or None.
    """

    def __init__(
        self, kernel: Tensor, outputs: Tensor, output_shape: tuple[int, ...], block: int, basis: Tensor | None
    ) -> None:
        self.kernel = kernel
        self.outputs = outputs
        self.output_shape = output_shape
        self.block = block
        self.basis = basis

    def cross(self, train: Points) -> Tensor:
        """Return the kernel."""
        return self.kernel

    def times(self, train: Points, v: Tensor) -> Tensor:
        """Return the product with the kernel."""
        return self.kernel @ v


def given_points(
    kernel: Tensor, outputs: Tensor, basis: Tensor | None, columns: int, block: int | None
) -> KernelPoints:
    """Return points from a kernel with ``columns`` training points and from the outputs of a fit.

    Args:
        kernel: ``(n, columns)``, ``(n, columns, C, C)`` or ``(nC, columns C)``.
        outputs: ``(n,)`` or ``(n, C)``.
        basis: ``(n, q)`` or None.
        columns: number of training points.
        block: ``c``; None is 1 for a kernel ``(n, columns)`` and ``C`` otherwise.

    Raises:
        ConfigurationError: shapes that do not fit each other, or numbers that are not finite.
    """
    if outputs.ndim not in (1, 2):
        raise ConfigurationError(f"`outputs` has shape {tuple(outputs.shape)}: give (n,) or (n, C).")
    f = outputs.detach().double().reshape(len(outputs), -1)
    n, size = f.shape
    k = kernel.detach().to(f)
    scalar = k.shape == (n, columns)
    if not scalar and k.shape != (n, columns, size, size) and k.shape != (n * size, columns * size):
        raise ConfigurationError(
            f"`kernel` has shape {tuple(kernel.shape)}: with {n} points of {size} outputs and {columns} training "
            f"points give {(n, columns)}, {(n, columns, size, size)} or {(n * size, columns * size)}."
        )
    if not torch.isfinite(k).all() or not torch.isfinite(f).all():
        raise ConfigurationError("`kernel` or `outputs` holds NaN or infinity: give those of a fit that converged.")
    block = block or (1 if scalar else size)
    if block == 1 and not scalar:
        raise ConfigurationError(f"`kernel` has shape {tuple(kernel.shape)}: give {(n, columns)}, as for training.")
    identity = torch.eye(block, dtype=f.dtype, device=f.device)
    if scalar:
        k = torch.kron(k, identity)
    elif k.ndim == 4:
        k = k.transpose(1, 2).reshape(n * size, columns * size)
    if basis is not None:
        if basis.ndim != 2 or len(basis) != n:
            raise ConfigurationError(f"`basis` has shape {tuple(basis.shape)}: give ({n}, q).")
        basis = torch.kron(basis.detach().to(f), identity)
    return KernelPoints(k, f, tuple(outputs.shape[1:]), block, basis)
