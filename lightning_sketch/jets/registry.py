"""From an ATen operator to its Taylor rule: registered, derived from a functional twin, or decomposed; otherwise refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from lightning_sketch.errors import ConfigurationError, UnsupportedOperatorError
from lightning_sketch.jets.tensor import JetTensor, Lead, arrange, block_of, constant, primal_of

Rule = Callable[..., Any]
F = TypeVar("F", bound=Rule)

_REGISTERED: dict[OpOverload, Rule] = {}
_RESOLVED: dict[OpOverload, Rule] = {}


def jet_rule(*operators: OpOverload) -> Callable[[F], F]:
    """Register the Taylor rule of one or more operators.

    The rule takes the operator's own arguments, any of which may be a :class:`JetTensor`, and returns what the operator
    returns, as JetTensors. It is most easily written in terms of operators that have rules already:

    Example:
        >>> import torch
        >>> from lightning_sketch.jets import JetTensor, jet_rule
        >>> cube = torch.library.custom_op("jet_docs::cube", lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor")
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
            _RESOLVED.pop(op, None)
        return rule

    return register


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
        return op.decompose
    if schema.is_mutable:
        return _mutating_rule(op)
    if op in decomposition_table and torch.Tag.nondeterministic_seeded not in op.tags:
        return _skip_constants(op, decomposition_table[op])
    raise missing_rule(op)


def _skip_constants(op: OpOverload, rule: Rule) -> Rule:
    """Where no argument varies, run the operator itself: dropout masks and factories cost nothing."""

    def pure_rule(*args: Any, **kwargs: Any) -> Any:
        if varies(args) or (kwargs and varies(kwargs.values())):
            return rule(*args, **kwargs)
        return run_constant(op, *args, **kwargs)

    return pure_rule


def _mutating_rule(op: OpOverload) -> Rule:
    """Carry ``foo_`` and ``foo.out`` by the rule of ``foo``, written back into the storage of the target."""
    schema = op._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    functional = _functional_twin(op)
    if functional is None or len(written) != 1:
        raise missing_rule(op)
    rule = find_rule(functional)
    target_name, position = written[0].name, schema.arguments.index(written[0])
    is_out = written[0].is_out

    def in_place_rule(*args: Any, **kwargs: Any) -> Any:
        target = kwargs[target_name] if target_name in kwargs else args[position]
        if varies(args) or varies(kwargs.values()):
            inputs = {k: v for k, v in kwargs.items() if not (is_out and k == target_name)}
            return write_back(op, target, rule(*args, **inputs))
        op(*_primals(args), **{k: _primals((v,))[0] for k, v in kwargs.items()})
        return target

    return in_place_rule


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
                f"`{op}` writes a value that depends on the weights into a tensor created without them (in "
                f"`{calling_module()}`): create that tensor by `new_zeros`, `zeros_like` or `empty_like` of the value."
            )
        return target.copy_(primal_of(result))
    target.primal.copy_(primal_of(result))
    write_block(target, block, fresh=True)
    return target


def write_block(target: JetTensor, block: Tensor | None, *, fresh: bool) -> None:
    """Write coefficients into those of ``target``; ``fresh`` says that nothing else refers to ``block``."""
    if block is None:
        if target.block is not None:
            target.block.zero_()
    elif target.block is None and fresh and block.shape[3:] == target.shape and block.dtype == target.dtype:
        target._cell[0] = arrange(block, target.primal)
    else:
        target.coefficients.copy_(block)


def varies(args: Any) -> bool:
    """Whether any argument, also inside lists, has coefficients that are not known to be zero."""
    for a in args:
        if type(a) is JetTensor:
            if a._cell[0] is not None:
                return True
        elif isinstance(a, (list, tuple)) and varies(a):
            return True
    return False


def lead_of(args: Any) -> Lead:
    """Return ``(R, P, K)`` of the first JetTensor among the arguments.

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
    return [[primal_of(b) for b in a] if isinstance(a, (list, tuple)) else primal_of(a) for a in args]


def run_constant(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on primals; floating-point results become JetTensors with zero coefficients."""
    lead = lead_of((*args, *kwargs.values()))
    result = op(*_primals(args), **{k: _primals((v,))[0] for k, v in kwargs.items()})
    return _wrap_constants(result, lead)


def _wrap_constants(result: Any, lead: Lead) -> Any:
    if isinstance(result, Tensor):
        return constant(result, lead) if result.dtype.is_floating_point else result
    if isinstance(result, (list, tuple)):
        return type(result)(_wrap_constants(r, lead) for r in result)
    return result


def missing_rule(op: OpOverload) -> UnsupportedOperatorError:
    """Return the error for an operator without a rule."""
    return UnsupportedOperatorError(
        f"`{op}` (in `{calling_module()}`) has no jet rule: use another operator there, or add a rule with "
        f"`@lightning_sketch.jets.jet_rule(torch.ops.{op})`."
    )


def calling_module() -> str:
    """Return the path of the innermost ``nn.Module`` whose code is being run, such as ``net.0``; found on the Python stack."""
    modules: list[torch.nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and (not modules or modules[-1] is not module):
            modules.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return "the backward pass or code outside any module"
    inner, root = modules[0], modules[-1]
    for candidate in reversed(modules):
        names = {id(m): name for name, m in candidate.named_modules()}
        if names.get(id(inner)):
            return names[id(inner)]
    return type(inner).__name__ if inner is not root else type(root).__name__
