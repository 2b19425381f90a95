"""From an ATen operator to its Taylor rule: registered, derived from another rule, or decomposed; otherwise refused.

A rule takes the operator's own arguments. Operators without side effects reach their rule only if an argument varies.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch

from lightning_sketch.errors import ConfigurationError, UnsupportedOperatorError
from lightning_sketch.jets.tensor import (
    JetTensor,
    Lead,
    arrange,
    block_of,
    coefficient_dtype,
    constant,
    jet,
    primal_of,
)

Rule = Callable[..., Any]
F = TypeVar("F", bound=Rule)

_REGISTERED: dict[OpOverload, Rule] = {}
_COMPLEX: dict[OpOverload, Rule] = {}
_SAME_FOR_COMPLEX: set[OpOverload] = set()
_RESOLVED: dict[OpOverload, Rule] = {}

# Which entries of the operator's result are on a kink along which they move, given its arguments.
Kinks = Callable[..., Tensor]
_KINKS: dict[OpOverload, Kinks] = {}
# Looking costs a host synchronisation on a GPU: only the first calls are looked at.
LOOKS = 32
_LOOKS_LEFT: dict[OpOverload, int] = {}
# Inside a decomposition, such as that of `logsumexp`, kinks cancel.
_decomposing = False


def jet_rule(*operators: OpOverload) -> Callable[[F], F]:
    """Register the Taylor rule of one or more operators.

    The rule takes the operator's own arguments, any of which may be a :class:`JetTensor`, and returns what the operator
    returns, as JetTensors. It is most easily written in terms of operators that have rules already:

    Example:
        >>> import torch
        >>> from lightning_sketch.jets import JetTensor, jet_rule
        >>> cube = torch.library.custom_op(
        ...     "jet_docs::cube", lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor"
        ... )
        >>> @jet_rule(torch.ops.jet_docs.cube.default)
        ... def cube_rule(x):
        ...     return x * x * x
        >>> x = JetTensor(torch.tensor(2.0), torch.tensor([1.0, 0.0]).reshape(2, 1, 1))  # 2 + z
        >>> torch.ops.jet_docs.cube(x).coefficients.flatten().tolist()  # (2 + z)^3 = 8 + 12 z + 6 z^2 + ...
        [12.0, 6.0]

    Args:
        *operators: exact overloads, such as ``torch.ops.aten.exp.default``.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        ConfigurationError: if an operator is not an exact overload or has a rule already.
    """

    def register(rule: F) -> F:
        for op in operators:
            if not isinstance(op, OpOverload):
                raise ConfigurationError(f"`{op}` is not an exact overload: pass for example `{op}.default`.")
            if op in _REGISTERED:
                raise ConfigurationError(f"`{op}` has a jet rule already: `{_REGISTERED[op].__qualname__}`.")
            _REGISTERED[op] = rule
        _RESOLVED.clear()  # in-place twins and refusals may rest on what was missing
        return rule

    return register


def kinks_of(*operators: OpOverload) -> Callable[[F], F]:
    """Register a function that says where an operator has no Taylor series, for the warning."""
    return _into(_KINKS, operators)


def _into(table: dict[OpOverload, Any], operators: Sequence[OpOverload]) -> Callable[[F], F]:
    def register(function: F) -> F:
        table.update(dict.fromkeys(operators, function))
        return function

    return register


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, where nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _watched(op: OpOverload, rule: Rule) -> Rule:
    """Look for kinks in the first calls, and say once what was found."""
    kinks = _KINKS.get(op)
    if kinks is None:
        return rule
    _LOOKS_LEFT.setdefault(op, LOOKS)

    def watched_rule(*args: Any, **kwargs: Any) -> Any:
        if _LOOKS_LEFT[op] and not _decomposing and not _capturing():
            _LOOKS_LEFT[op] -= 1
            found = kinks(*args, **kwargs)
            share = int(found.sum()) / max(found.numel(), 1)
            if share > 0.01:
                _LOOKS_LEFT[op] = 0
                warnings.warn(
                    f"`{op}` (in {calling_module()}) is exactly on a kink in {share:.0%} of its entries: it has no "
                    "Taylor series there, so the coefficients follow the branch that autograd takes.",
                    stacklevel=2,
                )
        return rule(*args, **kwargs)

    return watched_rule


def registered_operators() -> frozenset[OpOverload]:
    """Return every operator that has a rule of its own."""
    return frozenset(_REGISTERED)


def find_rule(op: OpOverload) -> Rule:
    """Return the rule that carries ``op`` on JetTensors.

    Raises:
        UnsupportedOperatorError: naming the operator, the module it was called from, and the remedy.
    """
    rule = _RESOLVED.get(op)
    if rule is None:
        rule = _RESOLVED[op] = _resolve(op)
    return rule


def _resolve(op: OpOverload) -> Rule:
    schema = op._schema
    rule = _REGISTERED.get(op)
    if rule is not None:
        pure = not schema.is_mutable and all(r.alias_info is None for r in schema.returns)
        return _skip_constants(op, rule) if pure else rule
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
        fused = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
        return _skip_constants(op, op.decompose) if fused else op.decompose
    if schema.name.startswith("aten::_foreach_"):
        return _each_tensor(op)
    if torch.Tag.inplace_view in op.tags:
        return _view_in_place(op)
    if schema.is_mutable:
        return _mutating_rule(op)
    if op in decomposition_table and torch.Tag.nondeterministic_seeded not in op.tags:
        return _skip_constants(op, _decomposed(op))
    raise missing_rule(op)


def _skip_constants(op: OpOverload, rule: Rule) -> Rule:
    """Where no argument varies, run the operator itself: dropout masks and factories cost nothing."""
    rule = _watched(op, rule)
    draws = torch.Tag.nondeterministic_seeded in op.tags and op is not _FLASH_ATTENTION  # must not draw twice
    direct = draws or op is torch.ops.aten._to_copy.default
    exact, exact_in_full = op in _EXACT, op in _EXACT_IN_FULL

    def pure_rule(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        if not varies(given):
            return run_constant(op, *args, **kwargs)
        dtypes = _dtypes_of(given)
        if any(d.is_complex for d in dtypes):
            return _complex_rule_of(op)(*args, **kwargs)
        low = not dtypes.isdisjoint(LOW_PRECISION)
        if direct or (exact and torch.float16 not in dtypes) or (exact_in_full and not low):
            return rule(*args, **kwargs)
        return _carry(op, rule, low, args, kwargs)

    return pure_rule


# Where kernels compute in float32 and round their result once.
LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})


def _carry(op: OpOverload, rule: Rule, low: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a rule; the primal is always the kernel's own, to the last bit.

    In low precision the coefficients are computed in float32 too, and those of bfloat16 are rounded once per operator:
    its matrix products excepted, which are what low precision is for, and whose kernels accumulate in float32.
    """
    written = {i: args[i] for i in _WRITTEN.get(op, ()) if i < len(args) and type(args[i]) is JetTensor}
    primals = [y.clone() if i in written else y for i, y in enumerate(_primals(args))]
    values = op(*primals, **_primal_values(kwargs))
    wide, wide_kwargs = list(args), kwargs
    if low:
        wide, wide_kwargs = _widened(args), dict(zip(kwargs, _widened(kwargs.values()), strict=True))
    results = rule(*wide, **wide_kwargs)
    for i, target in written.items():
        target.primal.copy_(primals[i])
        if wide[i] is not target:
            write_block(target, wide[i].block, fresh=False)
    return _with_primals(values, results)


def _overloads(names: str) -> frozenset[OpOverload]:
    """Overloads by name, ``default`` where none is named."""
    pairs = (name.partition(".") for name in names.split())
    return frozenset(getattr(getattr(torch.ops.aten, name), kind or "default") for name, _, kind in pairs)


# Rules whose primal is the kernel's in any case: products, what rounds once or not at all, and what chooses a kernel.
# In float16, whose coefficients are in float32, the factors of products must be, too.
_EXACT = _overloads(
    "mm bmm addmm baddbmm convolution convolution_backward clone neg cat stack embedding index_select _to_copy "
    "_use_cudnn_ctc_loss _use_cudnn_ctc_loss.Tensor"
)
# The same in float32; in low precision their coefficients would be rounded several times.
_EXACT_IN_FULL = _overloads("add.Tensor sub.Tensor mul.Tensor div.Tensor sum sum.dim_IntList mean.dim relu where.self")
_FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # its kernel has no dropout
# What kernels write into without saying so in their schema: running statistics.
_WRITTEN = dict.fromkeys((torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default), (3, 4))


def _widened(args: Any) -> list[Any]:
    return [_widened(a) if isinstance(a, (list, tuple)) else _wide(a) for a in args]


def _wide(x: Any) -> Any:
    """``x`` in float32 if it is in less."""
    if not isinstance(x, Tensor) or x.dtype not in LOW_PRECISION:
        return x
    if type(x) is not JetTensor:
        return x.float()
    return jet(x.primal.float(), None if x.block is None else x.block.float(), x.lead)


def _with_primals(values: Any, results: Any) -> Any:
    """``results`` with the values and in the dtypes that the kernel gave."""
    if isinstance(values, (list, tuple)):
        return type(values)(_with_primals(v, y) for v, y in zip(values, results, strict=True))
    if type(results) is not JetTensor or not (values.dtype.is_floating_point or values.dtype.is_complex):
        return values
    return jet(values, results.block, results.lead)


def complex_rule(*operators: OpOverload) -> Callable[[F], F]:
    """Register what carries operators where an argument is complex; rules of real tensors never see complex ones."""
    return _into(_COMPLEX, operators)


def holds_for_complex(*operators: OpOverload) -> None:
    """Say that the registered rules of these operators are right where an argument is complex, too."""
    _SAME_FOR_COMPLEX.update(operators)


def _complex_rule_of(op: OpOverload) -> Rule:
    rule = _REGISTERED.get(op) if op in _SAME_FOR_COMPLEX else _COMPLEX.get(op)
    if rule is None:
        raise UnsupportedOperatorError(
            f"`{op}` (in {calling_module()}) has no jet rule for complex tensors: of these only linear operators, "
            "products, quotients, absolute values and Fourier transforms are carried. Write it in real and imaginary "
            "parts, with `torch.view_as_real`."
        )
    return rule


def _dtypes_of(args: Any) -> set[torch.dtype]:
    """Return the dtypes of all tensors among the arguments, also inside lists."""
    found: set[torch.dtype] = set()
    for a in args:
        if isinstance(a, Tensor):
            found.add(a.dtype)
        elif isinstance(a, complex):
            found.add(torch.complex128)
        elif isinstance(a, (list, tuple)):
            found |= _dtypes_of(a)
    return found


def _decomposed(op: OpOverload) -> Rule:
    """Carry ``op`` by torch's decomposition; what is missing inside is reported as ``op``, which the user wrote."""
    decomposition = decomposition_table[op]

    def decomposed_rule(*args: Any, **kwargs: Any) -> Any:
        global _decomposing
        outer, _decomposing = _decomposing, True
        try:
            return decomposition(*args, **kwargs)
        except UnsupportedOperatorError as error:
            raise missing_rule(op) from error
        finally:
            _decomposing = outer

    return decomposed_rule


def _mutating_rule(op: OpOverload) -> Rule:
    """Carry ``foo_`` and ``foo.out`` by the rule of ``foo``, written back into the storage of the targets."""
    schema = op._schema
    written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    functional = _functional_twin(op)
    if functional is None or len(written) != len(functional._schema.returns):
        raise missing_rule(op)
    rule = find_rule(functional)
    outs = {a.name for _, a in written if a.is_out}

    def mutating_rule(*args: Any, **kwargs: Any) -> Any:
        targets = [kwargs[a.name] if a.name in kwargs else args[i] for i, a in written]
        inputs = {k: v for k, v in kwargs.items() if k not in outs}
        lead = lead_of((*args, *kwargs.values()))
        if varies((*args, *inputs.values())):
            results = rule(*args, **inputs)
        else:
            results = _wrap_constants(functional(*_primals(args), **_primal_values(inputs)), lead)
        for target, result in zip(targets, results if len(targets) > 1 else [results], strict=True):
            write_back(op, target, result)
        return targets[0] if len(targets) == 1 else tuple(targets)

    return mutating_rule


def _view_in_place(op: OpOverload) -> Rule:
    """Carry ``squeeze_`` and its like: the tensor becomes its own view, in the same storage."""
    functional = _functional_twin(op)
    if functional is None:
        raise missing_rule(op)
    rule = find_rule(functional)

    def view_in_place_rule(x: JetTensor, *args: Any, **kwargs: Any) -> JetTensor:
        view = rule(x, *args, **kwargs)
        x.primal, x._cell = view.primal, view._cell
        with no_dispatch():  # shape and strides of the wrapper itself
            op(x, *args, **kwargs)
        return x

    return view_in_place_rule


def _each_tensor(op: OpOverload) -> Rule:
    """Carry ``_foreach_foo`` by ``foo``, one tensor at a time."""
    name = op._schema.name.removeprefix("aten::_foreach_")
    single = _SINGLE.get(name) or getattr(torch.ops.aten, name, None)
    takes_list = str(op._schema.arguments[0].type) == "List[Tensor]"
    if single is None or not takes_list or any(a.is_out for a in op._schema.arguments):
        raise missing_rule(op)

    def foreach_rule(tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if name.startswith("addc") and len(args) == 3:  # by keyword in the operator on single tensors
            args, kwargs = args[:2], {"value": args[-1]}
        results = []
        for i, x in enumerate(tensors):
            own = [a[i] if isinstance(a, (list, tuple)) else a for a in args]
            named = {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
            results.append(single(x, *own, **named))
        return None if name.endswith("_") else results

    return foreach_rule


# where torch gives the operator on single tensors another name
_SINGLE: dict[str, Callable[..., Any]] = {
    "norm": torch.linalg.vector_norm,
    "maximum": torch.clamp_min,
    "maximum_": torch.clamp_min_,
    "minimum": torch.clamp_max,
    "minimum_": torch.clamp_max_,
}


def _functional_twin(op: OpOverload) -> OpOverload | None:
    namespace, name = op._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if packet is None:
        return None
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
    for overload in packet.overloads():
        twin: OpOverload = getattr(packet, overload)
        if not twin._schema.is_mutable and [(a.name, str(a.type)) for a in twin._schema.arguments] == wanted:
            return twin
    return None


def write_back(op: OpOverload, target: Any, result: Any) -> Any:
    """Copy ``result`` into the storage of ``target``, so that every alias of it sees the change."""
    block = block_of(result)
    if type(target) is not JetTensor:
        if block is not None:
            raise UnsupportedOperatorError(
                f"`{op}` (in {calling_module()}) writes a value that depends on the weights into a tensor created "
                "without them: create that tensor by `new_zeros`, `zeros_like` or `empty_like` of the value."
            )
        return target.copy_(primal_of(result))
    if target.shape != result.shape:
        raise UnsupportedOperatorError(
            f"`{op}` (in {calling_module()}) writes shape {tuple(result.shape)} into a tensor of shape "
            f"{tuple(target.shape)}, but jets are not resized: give a tensor of the result's shape."
        )
    target.primal.copy_(primal_of(result))
    write_block(target, block, fresh=True)
    return target


def write_block(target: JetTensor, block: Tensor | None, *, fresh: bool) -> None:
    """Write coefficients into those of ``target``; ``fresh`` says that nothing else refers to ``block``."""
    if block is None:
        if target.block is not None:
            target.block.zero_()
    elif target.block is None and fresh and _fits(block, target) and isinstance(target._cell, list):
        target._cell[0] = arrange(block, target.primal)
    else:
        target.coefficients.copy_(block)


def _fits(block: Tensor, target: JetTensor) -> bool:
    return block.shape[3:] == target.shape and block.dtype == coefficient_dtype(target.dtype)


def varies(args: Any) -> bool:
    """Whether any argument, also inside lists, has coefficients that are not known to be zero.

    Raises:
        ConfigurationError: if two JetTensors differ in degree, directions, or real against complex.
    """
    found, lead = False, None
    for a in args:
        if type(a) is JetTensor:
            found = found or a._cell[0] is not None
            if lead is not None and a.lead != lead:
                raise ConfigurationError(
                    f"JetTensors of one computation must agree in (R, P, K), but {lead} meets {a.lead}."
                )
            lead = a.lead
        elif isinstance(a, (list, tuple)) and varies(a):
            found = True
    return found


def lead_of(args: Any) -> Lead:
    """Return ``(R, P, K)`` of the first JetTensor among the arguments, also inside lists.

    Raises:
        LookupError: if there is none.
    """
    for a in args:
        if type(a) is JetTensor:
            return a.lead
        if isinstance(a, (list, tuple)):
            try:
                return lead_of(a)
            except LookupError:
                continue
    raise LookupError("no JetTensor among the arguments")


def _primals(args: Any) -> list[Any]:
    return [_primals(a) if isinstance(a, (list, tuple)) else primal_of(a) for a in args]


def _primal_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(kwargs, _primals(kwargs.values()), strict=True))


def run_constant(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on primals; floating-point results become JetTensors with zero coefficients."""
    lead = lead_of((*args, *kwargs.values()))
    result = op(*_primals(args), **_primal_values(kwargs))
    return _wrap_constants(result, lead)


def _wrap_constants(result: Any, lead: Lead) -> Any:
    if isinstance(result, Tensor):
        return constant(result, lead) if result.dtype.is_floating_point or result.dtype.is_complex else result
    if isinstance(result, (list, tuple)):
        return type(result)(_wrap_constants(r, lead) for r in result)
    return result


def missing_rule(op: OpOverload) -> UnsupportedOperatorError:
    """Return the error for an operator without a rule."""
    return UnsupportedOperatorError(
        f"`{op}` (in {calling_module()}) has no jet rule: use another operator there, or add a rule with "
        f"`@lightning_sketch.jets.jet_rule(torch.ops.{op})`."
    )


def calling_module() -> str:
    """Return the path of the innermost ``nn.Module`` whose code is running, such as ``net.0``, found on the stack."""
    modules: list[torch.nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and (not modules or modules[-1] is not module):
            modules.append(module)
        frame = frame.f_back
    if not modules:
        return "the backward pass, the optimizer, or code outside any module"
    for outer in reversed(modules):
        path = next((name for name, m in outer.named_modules() if m is modules[0]), "")
        if path:
            return f"`{path}`"
    return f"`{type(modules[0]).__name__}`"


JetTensor.rule_of = staticmethod(find_rule)
