"""Jets of the optimizer's update: the user's own optimizer class, stepped on JetTensor parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sketch.jets.tensor import JetTensor, Lead, constant, wrap

# (name of the parameter, key of the optimizer's state) -> coefficients, None where they are zero
StateBlocks = dict[tuple[str, str], Tensor | None]


@dataclass(frozen=True)
class OptimizerSnapshot:
    """An optimizer before its step: what its update is a function of.

    Attributes:
        optimizer: the user's.
        groups: parameter groups; hyper-parameters copied, parameters by name.
        params: values by name, copied.
        state: state by name of the parameter, copied.
        gradients: the user's gradients by name, copied; ``None`` where there is none.
    """

    optimizer: Optimizer
    groups: list[dict[str, Any]]
    params: dict[str, Tensor]
    state: dict[str, dict[str, Any]]
    gradients: dict[str, Tensor | None]

    @classmethod
    def capture(cls, optimizer: Optimizer, names: dict[Tensor, str]) -> OptimizerSnapshot:
        """Copy what the coming step will change; ``names`` maps the module's parameters to their names."""
        params, state, gradients, groups = {}, {}, {}, []
        for group in optimizer.param_groups:
            members = []
            for p in group["params"]:
                name = names[p]
                members.append(name)
                params[name] = p.detach().clone()
                gradients[name] = None if p.grad is None else p.grad.detach().clone()
                state[name] = {k: _copy(v) for k, v in optimizer.state.get(p, {}).items()}
            groups.append({**{k: _copy(v) for k, v in group.items() if k != "params"}, "params": members})
        return cls(optimizer, groups, params, state, gradients)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def step(
    snapshot: OptimizerSnapshot,
    params: dict[str, JetTensor],
    gradients: dict[str, JetTensor | None],
    blocks: StateBlocks,
    lead: Lead,
    clip: Callable[[Optimizer], None],
) -> StateBlocks:
    """Update ``params`` in place by one step of the user's optimizer class.

    Args:
        snapshot: the user's optimizer before its own step.
        params: parameters by name; primal and coefficients are updated in place.
        gradients: their gradients; parameters without one are left alone by the optimizer, as in the user's run.
        blocks: coefficients of the optimizer's state.
        lead: ``(R, P, K)``.
        clip: the user's gradient clipping, given the optimizer that holds the JetTensor parameters.

    Returns:
        The coefficients of the state after the step.
    """
    twin = _twin(snapshot.optimizer)
    twin.param_groups = [{**group, "params": [params[name] for name in group["params"]]} for group in snapshot.groups]
    for group in twin.param_groups:
        for kernel in ("foreach", "fused", "capturable"):  # they hide the structure of the update
            if kernel in group:
                group[kernel] = False
    for name, jet in params.items():
        jet.grad = gradients[name]
        if snapshot.state[name]:
            twin.state[jet] = {k: _state_jet(name, k, v, jet, blocks, lead) for k, v in snapshot.state[name].items()}
    clip(twin)
    with torch.no_grad():
        # One wrapper off: the outer one runs hooks that are registered for every optimizer of the process.
        method = type(twin).step
        getattr(method, "__wrapped__", method)(twin)
    after: StateBlocks = {}
    for name, jet in params.items():
        for key, value in twin.state.get(jet, {}).items():
            if type(value) is JetTensor:
                after[name, key] = value.block
    return after


def _twin(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and attributes without parameters, state or hooks."""
    twin: Optimizer = object.__new__(type(optimizer))
    for key, value in optimizer.__dict__.items():
        if key in ("step", "state", "param_groups"):  # a scheduler wraps `step` on the instance
            continue
        twin.__dict__[key] = OrderedDict() if "_hooks" in key else _copy(value)
    twin.state = defaultdict(dict)
    return twin


def _state_jet(name: str, key: str, value: Any, param: JetTensor, blocks: StateBlocks, lead: Lead) -> Any:
    """A tensor of the state as a JetTensor, if it depends on gradients: known to from the last step, or shaped like the parameter."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return _copy(value)
    value = value.clone()
    if (name, key) in blocks:
        return wrap(value, [blocks[name, key]], lead)
    return constant(value, lead) if value.ndim and value.shape == param.shape else value


def count_state_tensors(optimizer: Optimizer) -> int:
    """How many tensors of a parameter's shape the optimizer keeps for each parameter, tried on a copy of one parameter."""
    param = next(p for group in optimizer.param_groups for p in group["params"]).detach().clone().requires_grad_()
    twin = _twin(optimizer)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [param], "fused": False, "foreach": False}]
    param.grad = torch.zeros_like(param)
    with torch.no_grad():
        type(twin).step(twin)
    return sum(isinstance(v, Tensor) and v.shape == param.shape for v in twin.state[param].values())
