"""``JetTensor``: a tensor that carries truncated Taylor series along ``K`` directions through every ATen operator.

The subclass sits below autograd (``__torch_dispatch__``), so ``loss.backward()`` on JetTensors yields the series of the
gradient, and below the optimizer, so a ``torch.optim`` class stepped on JetTensor parameters yields the series of the update.
Coefficients are normalised everywhere: order ``r`` holds ``(1/r!) f^(r)(0)[psi, ..., psi]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError

Lead = tuple[int, int, int]


class JetTensor(torch.Tensor):
    """A real tensor (the primal) with the Taylor coefficients ``1..R`` of its value along ``K`` directions.

    Behaves like ``primal`` under every operator, and applies truncated Taylor arithmetic to the coefficients.

    Args:
        primal: the value at the expansion point, floating point, shape ``S``.
        coefficients: orders ``1..R``, shape ``(R, P, K, *S)``, dtype and device of ``primal``; ``P = 2`` holds real and imaginary
            parts of complex coefficients, ``P = 1`` real ones (all directions real).
        requires_grad: whether autograd records operations on this tensor.

    Raises:
        ConfigurationError: if shapes, dtypes or devices do not agree.
    """

    primal: Tensor
    lead: Lead
    # One cell per storage, shared by aliases of the whole tensor. None stands for coefficients that are all zero and not
    # yet allocated: what a factory such as `zeros_like` or a dropout mask gives.
    _cell: list[Tensor | None]

    @staticmethod
    def __new__(cls, primal: Tensor, coefficients: Tensor, requires_grad: bool = False) -> JetTensor:
        """Wrap ``primal`` and ``coefficients`` without copying them."""
        _validate(primal, coefficients)
        r, p, k = coefficients.shape[:3]
        return wrap(primal, [arrange(coefficients, primal)], (r, p, k), requires_grad)

    @property
    def coefficients(self) -> Tensor:
        """Orders ``1..R`` as one real tensor ``(R, P, K, *S)``; writing into it changes this tensor."""
        if self._cell[0] is None:
            self._cell[0] = _zeros_like_layout(self.primal, self.lead)
        return self._cell[0]

    @property
    def block(self) -> Tensor | None:
        """The coefficients, or ``None`` while they are all zero and not allocated."""
        return self._cell[0]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return shape, dtype, degree and number of directions."""
        r, p, k = self.lead
        kind = "complex" if p == 2 else "real"
        return f"JetTensor(shape={tuple(self.shape)}, dtype={self.dtype}, degree={r}, directions={k} {kind})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Apply the Taylor rule of the ATen operator ``func``."""
        return registry.find_rule(func)(*args, **(kwargs or {}))


def _validate(primal: Tensor, coefficients: Tensor) -> None:
    if not primal.dtype.is_floating_point:
        raise ConfigurationError(f"`primal` must be floating point but has dtype {primal.dtype}; convert it first.")
    if coefficients.ndim != primal.ndim + 3 or coefficients.shape[3:] != primal.shape:
        raise ConfigurationError(
            f"`coefficients` must have shape (R, P, K, *{tuple(primal.shape)}) but has {tuple(coefficients.shape)}."
        )
    if coefficients.shape[0] < 1 or coefficients.shape[1] not in (1, 2):
        raise ConfigurationError(
            f"`coefficients` must have at least one order and P = 1 or 2 but has shape {tuple(coefficients.shape)}."
        )
    if coefficients.dtype != primal.dtype or coefficients.device != primal.device:
        raise ConfigurationError(
            f"`coefficients` must have dtype and device of `primal` ({primal.dtype}, {primal.device}) "
            f"but has {coefficients.dtype}, {coefficients.device}."
        )


def wrap(primal: Tensor, cell: list[Tensor | None], lead: Lead, requires_grad: bool = False) -> JetTensor:
    """Make a JetTensor of parts that are known to fit."""
    jet: JetTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        JetTensor,
        primal.shape,
        strides=primal.stride(),  # the primal's: dropout draws its mask in the memory order of its input
        storage_offset=primal.storage_offset(),
        dtype=primal.dtype,
        device=primal.device,
        requires_grad=requires_grad,
    )
    jet.primal = primal
    jet._cell = cell
    jet.lead = lead
    return jet


def jet(primal: Tensor, block: Tensor | None, lead: Lead) -> JetTensor:
    """Make a JetTensor of a fresh operator result; the coefficients take the primal's dtype and memory order."""
    if block is not None:
        if block.dtype != primal.dtype:
            block = block.to(primal.dtype)
        block = arrange(block, primal)
    return wrap(primal, [block], lead)


def constant(primal: Tensor, lead: Lead) -> JetTensor:
    """Make a JetTensor whose coefficients are all zero, without allocating them."""
    return wrap(primal, [None], lead)


def primal_of(x: Any) -> Any:
    """Return the primal of a JetTensor, or ``x`` itself."""
    return x.primal if type(x) is JetTensor else x


def block_of(x: Any) -> Tensor | None:
    """Return the coefficients of a JetTensor, or ``None`` for anything constant."""
    return x._cell[0] if type(x) is JetTensor else None


def is_arranged(block: Tensor, primal: Tensor) -> bool:
    """Whether the trailing strides of ``block`` are one common multiple of the strides of ``primal``.

    Then every view that exists of the primal exists of the coefficients too, so that aliasing is never lost.
    """
    factor: float | None = None
    for size, mine, other in zip(primal.shape, block.stride()[3:], primal.stride(), strict=True):
        if size <= 1:
            continue
        if other == 0:
            if mine != 0:
                return False
            continue
        ratio = mine / other
        if factor is None:
            factor = ratio
        elif factor != ratio:
            return False
    return factor is None or (factor >= 1 and factor == int(factor))


def arrange(block: Tensor, primal: Tensor) -> Tensor:
    """Return ``block`` in the memory order of ``primal``, copying it only if it is in another one."""
    if is_arranged(block, primal):
        return block
    lead = (block.shape[0], block.shape[1], block.shape[2])
    return _empty_like_layout(primal, lead).copy_(block)


def _empty_like_layout(primal: Tensor, lead: Lead) -> Tensor:
    r, p, k = lead
    numel = primal.numel()
    dense = torch.empty_like(primal, memory_format=torch.preserve_format)
    strides = (p * k * numel, k * numel, numel, *dense.stride())
    return torch.empty_strided((*lead, *primal.shape), strides, dtype=primal.dtype, device=primal.device)


def _zeros_like_layout(primal: Tensor, lead: Lead) -> Tensor:
    return _empty_like_layout(primal, lead).zero_()


from lightning_sketch.jets import registry  # noqa: E402  (the registry's rules are written in terms of JetTensor)
