"""``JetTensor``: a tensor that carries truncated Taylor series along ``K`` directions through every ATen operator.

The subclass sits below autograd (``__torch_dispatch__``), so ``loss.backward()`` on JetTensors yields the series of the
gradient, and below the optimizer, so a ``torch.optim`` class stepped on JetTensor parameters yields the series of the
update. Coefficients are normalised everywhere: order ``r`` holds ``(1/r!) f^(r)(0)[psi, ..., psi]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sketch.errors import ConfigurationError, UnsupportedOperatorError
from lightning_sketch.jets.memory import keep_freed_memory

Lead = tuple[int, int, int]

_WIDER = {torch.float16: torch.float32, torch.complex32: torch.complex64}


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the coefficients of values of ``dtype``.

    It is the same, but for half precision, whose exponents hold neither high orders nor those of scaled losses.
    """
    return _WIDER.get(dtype, dtype)


class JetTensor(torch.Tensor):
    """A real tensor (the primal) with the Taylor coefficients ``1..R`` of its value along ``K`` directions.

    Behaves like ``primal`` under every operator, and applies truncated Taylor arithmetic to the coefficients.

    Args:
        primal: the value at the expansion point, floating point, shape ``S``.
        coefficients: orders ``1..R``, shape ``(R, P, K, *S)``, dtype and device of ``primal``, float32 where that is
            float16; ``P = 2`` holds real and imaginary parts of complex coefficients, ``P = 1`` real ones (all
            directions real).
        requires_grad: whether autograd records operations on this tensor.

    Raises:
        ConfigurationError: if shapes, dtypes or devices do not agree.
    """

    primal: Tensor
    lead: Lead
    # One cell per storage, shared by aliases of the whole tensor. None stands for coefficients that are all zero and
    # not yet allocated: those of a factory such as `zeros_like`, of a dropout mask, of a parameter that is not trained.
    _cell: list[Tensor | None] | ViewCell
    # Set by the registry, whose rules are written in terms of this class.
    rule_of: ClassVar[Callable[[Any], Callable[..., Any]]]

    @staticmethod
    def __new__(cls, primal: Tensor, coefficients: Tensor, requires_grad: bool = False) -> JetTensor:
        """Wrap ``primal`` and ``coefficients``, copying only what has gaps, overlaps or another memory order."""
        _validate(primal, coefficients)
        keep_freed_memory()
        if not _is_dense(primal):
            primal = primal.clone(memory_format=torch.contiguous_format)
        r, p, k = coefficients.shape[:3]
        return wrap(primal, [arrange(coefficients, primal)], (r, p, k), requires_grad)

    @property
    def coefficients(self) -> Tensor:
        """Orders ``1..R`` as one real tensor ``(R, P, K, *S)``; writing into it changes this tensor."""
        return _allocated(self._cell, self.primal, self.lead)

    @property
    def block(self) -> Tensor | None:
        """The coefficients, or ``None`` while they are all zero and not allocated."""
        return self._cell[0]

    @property
    def data(self) -> Tensor:
        """This tensor without its history; assigning makes this tensor an alias of another of the same shape."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype or value.stride() != self.stride():
            raise ConfigurationError(
                f"`data` must keep shape, dtype and strides ({tuple(self.shape)}, {self.dtype}, {self.stride()}) but "
                f"got {tuple(value.shape)}, {value.dtype}, {value.stride()}: make a new tensor instead."
            )
        self.primal, self._cell = primal_of(value), value._cell if type(value) is JetTensor else [None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape, dtype, degree and number of directions."""
        r, p, k = self.lead
        kind = "complex" if p == 2 else "real"
        return f"JetTensor(shape={tuple(self.shape)}, dtype={self.dtype}, degree={r}, directions={k} {kind})"

    def __format__(self, spec: str) -> str:
        """Format the primal of a single number, as torch does; text carries no coefficients."""
        return format(self.primal.item(), spec) if spec and not self.ndim else repr(self)

    def tolist(self) -> Any:
        """Refuse: a list of numbers would drop the coefficients.

        Raises:
            UnsupportedOperatorError: always.
        """
        raise _leaves_torch("tolist")

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse: an array would drop the coefficients.

        Raises:
            UnsupportedOperatorError: always.
        """
        raise _leaves_torch("numpy")

    def __array__(self, dtype: Any = None) -> Any:
        """Refuse, as :meth:`numpy` does."""
        return self.numpy()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Apply the Taylor rule of the ATen operator ``func``."""
        return cls.rule_of(func)(*args, **(kwargs or {}))


class ViewCell:
    """The cell of a view of a tensor that has no coefficients yet: it has none either, until that tensor has.

    Args:
        base: the tensor.
        view: the same view of a block of coefficients.
    """

    def __init__(self, base: JetTensor, view: Callable[[Tensor], Tensor]) -> None:
        self._base, self._primal, self._lead = base._cell, base.primal, base.lead
        self._view = view
        self._block: Tensor | None = None

    def __getitem__(self, index: int) -> Tensor | None:
        if self._block is None and (block := self._base[0]) is not None:
            self._block = self._view(block)
        return self._block

    def __setitem__(self, index: int, block: Tensor) -> None:
        self._block = block

    def __reduce__(self) -> Any:
        return list, ([self[0]],)  # a copy is a view of nothing

    def allocate(self) -> Tensor:
        """Give the base coefficients and return their view."""
        block = self._block = self._view(_allocated(self._base, self._primal, self._lead))
        return block


def _allocated(cell: list[Tensor | None] | ViewCell, primal: Tensor, lead: Lead) -> Tensor:
    """What is in a cell, after zeros have been put there if it was empty."""
    block = cell[0]
    if block is not None:
        return block
    if isinstance(cell, ViewCell):
        return cell.allocate()
    block = cell[0] = like_layout(primal, lead, torch.zeros)
    return block


def _validate(primal: Tensor, coefficients: Tensor) -> None:
    for name, value in (("primal", primal), ("coefficients", coefficients)):
        if not isinstance(value, Tensor) or isinstance(value, JetTensor) or value.layout != torch.strided:
            raise ConfigurationError(f"`{name}` must be an ordinary dense tensor but is a {type(value).__name__}.")
        if value.requires_grad:
            raise ConfigurationError(f"`{name}` requires grad: detach it, and pass `requires_grad=True` here instead.")
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
    dtype = coefficient_dtype(primal.dtype)
    if coefficients.dtype != dtype or coefficients.device != primal.device:
        raise ConfigurationError(
            f"`coefficients` must have dtype and device of `primal` ({primal.dtype}, {primal.device}; float32 for "
            f"float16) but has {coefficients.dtype}, {coefficients.device}."
        )


def _leaves_torch(method: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"`{method}()` would drop the dependence of these values on the weights: keep them in torch, or call it "
        "outside of what is differentiated."
    )


def wrap(primal: Tensor, cell: list[Tensor | None] | ViewCell, lead: Lead, requires_grad: bool = False) -> JetTensor:
    """Make a JetTensor of parts that are known to fit."""
    jet: JetTensor = torch.Tensor._make_wrapper_subclass(
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
    """Make a JetTensor of a fresh operator result; the coefficients take dtype and memory order from the primal."""
    if not primal.dtype.is_floating_point and not primal.dtype.is_complex:
        raise UnsupportedOperatorError(
            f"A value that depends on the weights became {primal.dtype}, but jets are of floating-point values: leave "
            "it in floating point, or compute it from `detach()`ed values."
        )
    if block is not None:
        dtype = coefficient_dtype(primal.dtype)
        if block.dtype != dtype:
            block = block.to(dtype)
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
    if block.is_contiguous() and primal.is_contiguous():  # as almost always, and sooner told
        return True
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
    if primal.is_complex():  # the two parts of a number lie side by side
        return factor is None or factor == 1
    return factor is None or (factor >= 1 and factor == int(factor))


def arrange(block: Tensor, primal: Tensor) -> Tensor:
    """Return ``block`` in the memory order of ``primal``, copying it only if it is in another one."""
    if is_arranged(block, primal):
        return block
    lead = (block.shape[0], block.shape[1], block.shape[2])
    return like_layout(primal, lead, torch.empty).copy_(block)


def _is_dense(primal: Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlaps, in any order of the dimensions."""
    if primal.is_contiguous():
        return True
    dense = torch.empty_like(primal, memory_format=torch.preserve_format)
    return all(n <= 1 or a == b for n, a, b in zip(primal.shape, dense.stride(), primal.stride(), strict=True))


def like_layout(primal: Tensor, lead: Lead, factory: Callable[..., Tensor]) -> Tensor:
    """A block ``(R, P, K, *S)`` whose trailing strides are those of the primal, with its gaps and overlaps."""
    span = 1 + sum((n - 1) * s for n, s in zip(primal.shape, primal.stride(), strict=True)) if primal.numel() else 0
    flat = factory(*lead, span, dtype=coefficient_dtype(primal.dtype), device=primal.device)
    return flat.as_strided((*lead, *primal.shape), (*flat.stride()[:3], *primal.stride()))
