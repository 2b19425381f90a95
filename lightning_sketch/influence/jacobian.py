"""The Jacobian of a network's outputs by its parameters, and kernels made of it, in tiles of examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from lightning_sketch.errors import ConfigurationError

TILE_BYTES = 1 << 30
CHUNK = 256  # examples that run through the network at once


class Points(Protocol):
    """Points of data with the outputs of a trained model there, as kernels see them.

    ``c`` is the number of outputs that a row of the kernel tells apart: ``C``, or 1 where the kernel is the same for
    every output and none between them, so that the outputs of a point are ``C`` columns of one row.

    Attributes:
        outputs: ``(n, C)`` float64.
        output_shape: shape of the model's output at one point, ``()`` or ``(C,)``.
        block: ``c``.
        basis: ``(n c, q)``, derivatives by unpenalised parameters; None if there are none.
    """

    outputs: Tensor
    output_shape: tuple[int, ...]
    block: int
    basis: Tensor | None

    def cross(self, train: Points) -> Tensor:
        """Return the kernel between these points and training points, ``(n c, n_train c)``."""

    def times(self, train: Points, v: Tensor) -> Tensor:
        """Return ``cross(train) @ v`` for ``(n_train c, r)``."""


class Network:
    """A module as a function of flat vectors of its trainable parameters, ``P`` penalised and ``q`` unpenalised ones.

    It is a copy in float64 and in evaluation mode, so that no example's output depends on another's.

    Args:
        module: called with a batch of inputs, it returns ``(B,)`` or ``(B, C)``. Parameters that do not require a
            gradient are constants.
        unpenalized: names of parameters without a ridge.
        jacobian_at: parameters at which derivatives are taken, by name; None is the module's own.

    Raises:
        ConfigurationError: no such parameters, or none to change.
    """

    def __init__(
        self, module: nn.Module, unpenalized: Sequence[str] = (), jacobian_at: Mapping[str, Tensor] | None = None
    ) -> None:
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if unknown := [name for name in unpenalized if name not in trained]:
            raise ConfigurationError(f"`unpenalized` holds {unknown}: the module's trainable parameters are {trained}.")
        self.unpenalized = [name for name in trained if name in unpenalized]
        self.penalized = [name for name in trained if name not in unpenalized]
        if not self.penalized:
            raise ConfigurationError("`module` has no penalised parameter that requires a gradient: leave one free.")
        self.module = copy.deepcopy(module).double().eval().requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())
        self.trained = self.vectors(self._parameters, "module")
        self.linearised = self.trained if jacobian_at is None else self.vectors(jacobian_at, "jacobian_at")

    def vectors(self, parameters: Mapping[str, Tensor], argument: str) -> tuple[Tensor, Tensor]:
        """Return the penalised and the unpenalised parameters of a mapping as flat float64 vectors, ``(P,), (q,)``.

        Raises:
            ConfigurationError: if the mapping, the ``argument`` of that name, lacks one of them.
        """
        flat: list[Tensor] = []
        for names in (self.penalized, self.unpenalized):
            parts = [torch.zeros(0, dtype=torch.float64, device=self._parameters[self.penalized[0]].device)]
            for name in names:
                value, own = parameters.get(name), self._parameters[name]
                if not isinstance(value, Tensor) or value.shape != own.shape:
                    raise ConfigurationError(
                        f"`{argument}` has no tensor `{name}` of shape {tuple(own.shape)}: give a `state_dict()` of "
                        "the module."
                    )
                parts.append(value.detach().to(own).flatten())
            flat.append(torch.cat(parts))
        return flat[0], flat[1]

    def named(self, penalized: Tensor, unpenalized: Tensor) -> dict[str, Tensor]:
        """Return flat vectors, ``(*m, P)`` and ``(*m, q)``, as tensors ``(*m, *S)`` by name."""
        found: dict[str, Tensor] = {}
        for names, flat in ((self.penalized, penalized), (self.unpenalized, unpenalized)):
            sizes = [self._parameters[name].numel() for name in names]
            for name, part in zip(names, flat.split(sizes, dim=-1), strict=True):
                found[name] = part.reshape(*flat.shape[:-1], *self._parameters[name].shape)
        return found

    def __call__(self, penalized: Tensor, unpenalized: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs, ``(B,)`` or ``(B, C)``, of inputs ``(B, ...)`` under the given parameters.

        Raises:
            ConfigurationError: if the module has no forward pass, or returns something else.
        """
        try:
            outputs = functional_call(self.module, self.named(penalized, unpenalized), (inputs,))
        except NotImplementedError as error:
            raise ConfigurationError(
                f"`module` can not be called with the inputs ({error}): define `forward`, or give a part that has it."
            ) from error
        if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or len(outputs) != len(inputs):
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigurationError(
                f"`module` returned {found} for {len(inputs)} inputs: it must return (B,) or (B, C)."
            )
        return outputs


class NetworkPoints:
    """Inputs of a network, where its outputs and its Jacobian ``J``, ``(n C, P)``, are taken.

    Args:
        network: the network.
        inputs: ``(n, ...)``.
        tile_size: examples whose Jacobian is held at once, two times over; None is as many as 1 GiB holds. If all fit,
            the Jacobian is kept.
    """

    def __init__(self, network: Network, inputs: Tensor, tile_size: int | None = None) -> None:
        device = network.trained[0].device
        self.network = network
        self.inputs = inputs.to(device, torch.float64 if inputs.is_floating_point() else None)
        self.output_shape = tuple(network(*network.trained, self.inputs[:1]).shape[1:])
        self.outputs = self.outputs_at(*network.trained)
        self.block = self.outputs.shape[1]
        self.num_parameters = len(network.trained[0])
        per_example = 8 * self.num_parameters * self.outputs.shape[1]
        self.tile_size = tile_size
        self._tile = min(len(inputs), tile_size or max(1, TILE_BYTES // per_example))
        self.basis = None
        if network.unpenalized:
            blocks = [self._jacobian(chunk, 1) for chunk in self.inputs.split(CHUNK)]
            self.basis = torch.cat(blocks).flatten(0, 1)

    def outputs_at(self, penalized: Tensor, unpenalized: Tensor) -> Tensor:
        """Return the outputs under these parameters, ``(n, C)``."""
        chunks = [self.network(penalized, unpenalized, chunk) for chunk in self.inputs.split(CHUNK)]
        return torch.cat(chunks).reshape(len(self.inputs), -1)

    def tiles(self) -> list[Tensor]:
        """Return the examples of each tile."""
        return list(torch.arange(len(self.inputs), device=self.inputs.device).split(self._tile))

    def rows(self, examples: Tensor) -> Tensor:
        """Return the Jacobian of some examples, ``(m, C, P)``."""
        return self._jacobian(self.inputs[examples], 0) if self._kept is None else self._kept[examples]

    def pull(self, v: Tensor) -> Tensor:
        """Return ``J' v``, ``(P, r)`` for ``(n C, r)``."""
        if self._kept is not None:
            return self._kept.flatten(0, 1).T @ v
        columns = v.T.reshape(-1, len(self.inputs), *self.output_shape)
        found = v.new_zeros(self.num_parameters, v.shape[1])
        for i, column in enumerate(columns):
            for inputs, part in zip(self.inputs.split(CHUNK), column.split(CHUNK), strict=True):
                found[:, i] += vjp(self._of_vector(0, inputs), self.network.linearised[0])[1](part)[0]
        return found

    def push(self, direction: Tensor) -> Tensor:
        """Return ``J d``, ``(n C, r)`` for ``(P, r)``."""
        if self._kept is not None:
            return self._kept.flatten(0, 1) @ direction
        return torch.cat([self._push(inputs, direction) for inputs in self.inputs.split(CHUNK)])

    def _push(self, inputs: Tensor, direction: Tensor) -> Tensor:
        # J'v is linear in v, so its own vector-Jacobian product is J d
        outputs, pull = vjp(self._of_vector(0, inputs), self.network.linearised[0])[:2]
        push = vjp(lambda v: pull(v)[0], torch.zeros_like(outputs))[1]
        return torch.stack([push(column)[0].flatten() for column in direction.T], dim=1)

    def cross(self, train: Points) -> Tensor:
        """Return ``J J_train'``, tile by tile."""
        assert isinstance(train, NetworkPoints)
        c = self.outputs.shape[1]
        kernel = self.outputs.new_empty(len(self.inputs) * c, len(train.inputs) * c)
        for a in self.tiles():
            rows = self.rows(a).flatten(0, 1)
            for b in train.tiles():
                if train is self and b[0] < a[0]:
                    continue  # symmetric
                block = rows @ (rows if train is self and b[0] == a[0] else train.rows(b).flatten(0, 1)).T
                kernel[_span(a, c), _span(b, c)] = block
                if train is self:
                    kernel[_span(b, c), _span(a, c)] = block.T
        return kernel

    def times(self, train: Points, v: Tensor) -> Tensor:
        """Return ``J J_train' v`` without the kernel."""
        assert isinstance(train, NetworkPoints)
        return self.push(train.pull(v))

    def _of_vector(self, which: int, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """The outputs of some inputs as a function of the penalised (0) or the unpenalised (1) parameters."""
        at = self.network.linearised
        if which:
            return lambda b: self.network(at[0], b, inputs)
        return lambda p: self.network(p, at[1], inputs)

    @cached_property
    def _kept(self) -> Tensor | None:
        """The whole Jacobian, ``(n, C, P)``, if it fits into one tile."""
        return self._jacobian(self.inputs, 0) if self._tile == len(self.inputs) else None

    def _jacobian(self, inputs: Tensor, which: int) -> Tensor:
        """``(m, C, size of the vector)``, example by example."""
        at = self.network.linearised[which]
        return vmap(lambda x: jacrev(self._of_vector(which, x[None]))(at)[0].reshape(-1, len(at)))(inputs)


def _span(examples: Tensor, size: int) -> slice:
    return slice(int(examples[0]) * size, (int(examples[-1]) + 1) * size)
