"""``DeletionPredictor``: run a sketch's jets through the model, once per batch of questions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.jets.tensor import JetTensor, Lead, constant, wrap
from lightning_sketch.prediction.effect import Effect
from lightning_sketch.shadow.example_ids import batch_size
from lightning_sketch.shadow.quiet import RandomState, quiet
from lightning_sketch.shadow.record import call_with_tensors, differentiable_kernels
from lightning_sketch.shadow.scaling import scale_orders
from lightning_sketch.shadow.weighting import LossWeighting, training_loss
from lightning_sketch.sketch import Shard, Sketch

if TYPE_CHECKING:
    from lightning_sketch.metrics import Calibration

Output = Callable[[Any, Any], Tensor]


class DeletionPredictor:
    """Predict what a model would output had some training units not been there.

    The module only lends its code: parameters and buffers are the sketch's, and the module is left as it was.

    Args:
        sketch: a sketch of the training run.
        module: a module of the class that was trained.
        output: ``"loss"`` for the per-example training loss in evaluation mode, or
            ``callable(module, batch) -> tensor`` whose first dimension is examples.

    Raises:
        SketchError: if the sketch is of another model.
        ConfigurationError: if ``output`` is neither, or the loss was given as a callable that a sketch cannot keep.
    """

    def __init__(self, sketch: Sketch, module: nn.Module, output: str | Output = "loss") -> None:
        if not isinstance(sketch, Sketch):
            raise ConfigurationError(f"`sketch` must be a Sketch but is {type(sketch).__name__}: use `Sketch.load`.")
        if output != "loss" and not callable(output):
            raise ConfigurationError(
                f"`output` must be 'loss' or a callable(module, batch) -> tensor but is {output!r}."
            )
        if output == "loss" and sketch.loss != "auto":
            raise ConfigurationError(
                f"`output='loss'`: the sketch was made with `loss={sketch.loss}`, which it cannot keep; pass that "
                "callable as `output`."
            )
        sketch.check_fits(module)
        self.sketch = sketch
        self.module = module
        self.output = output

    def prepare(self, batch: Any) -> Effect:
        """Run the Taylor coefficients through the model on one batch; any number of deletions follow at no such cost.

        Args:
            batch: what ``training_step`` or the output callable takes, on the device of the module.

        Returns:
            The output at ``x = 0`` and its coefficients along every direction.

        Raises:
            ConfigurationError: if the output is not one tensor entry per example, or is not finite.
        """
        device = next((t.device for t in self.module.parameters()), torch.device("cpu"))
        primal = {name: t.to(device) for name, t in self.sketch.primal.items()}
        baseline: Tensor | None = None
        coefficients: Tensor | None = None
        for shard in self.sketch.shards():
            jet = self._run(shard, primal, batch, device)
            self._check(jet, batch)
            block = scale_orders(jet.coefficients.detach().cpu().double(), -shard.exponents)
            if baseline is None or coefficients is None:
                baseline = jet.primal.detach().cpu()
                shape = (self.sketch.degree, self.sketch.num_directions, *baseline.shape)
                coefficients = torch.zeros(shape, dtype=torch.complex128)  # complex64 does not hold high orders
            imaginary = block[:, 1] if block.shape[1] == 2 else torch.zeros_like(block[:, 0])
            coefficients[:, torch.as_tensor(shard.indices)] = torch.complex(block[:, 0], imaginary)
        assert baseline is not None, "a sketch has at least one direction"
        assert coefficients is not None
        return Effect(baseline, coefficients, self.sketch.directions, self.sketch.units)

    def calibrate(
        self, batch: Any, retrained: Mapping[tuple[int, ...], nn.Module | Mapping[str, Tensor]], level: float = 0.9
    ) -> Calibration:
        """Compare predictions with models that were really trained without some units (see :class:`Reweight`).

        Args:
            batch: as in :meth:`prepare`.
            retrained: tuple of deleted units -> the module trained without them, or its ``state_dict``. Five sets of
                the size that will be asked for tell honest intervals from idle ones; a score of ranks wants more.
            level: of the intervals whose coverage is asked for.

        Raises:
            ConfigurationError: no model, or one that is not of the sketched class.
        """
        from lightning_sketch.metrics import calibrate  # its room is below this one

        if not retrained:
            raise ConfigurationError("`retrained` is empty: give at least one model trained without some units.")
        tensors = [self._tensors_of(units, model) for units, model in retrained.items()]
        prediction = self.prepare(batch).delete_many([list(units) for units in retrained])
        return calibrate(prediction, torch.stack([self._output_of(each, batch) for each in tensors]), level)

    def _tensors_of(self, units: tuple[int, ...], model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a retrained model that stand for those of the sketch."""
        if not isinstance(units, tuple):
            raise ConfigurationError(f"`retrained` has the key {units!r}: give a tuple of units, such as (3,).")
        given = model.state_dict() if isinstance(model, nn.Module) else model
        stored, tensors = self.module.state_dict(), dict(self.sketch.primal)
        for name in tensors.keys() & stored.keys():  # the others are buffers that no state_dict holds
            value = given.get(name)
            if not isinstance(value, Tensor) or value.shape != tensors[name].shape:
                raise ConfigurationError(
                    f"`retrained[{units}]` has no `{name}` of shape {tuple(tensors[name].shape)}: give a module of the "
                    "class that was sketched, or its `state_dict()`."
                )
            tensors[name] = value.detach().to(tensors[name].dtype)
        return tensors

    def _output_of(self, tensors: dict[str, Tensor], batch: Any) -> Tensor:
        """The output with ``tensors`` in place of those of the sketch."""
        device = next((t.device for t in self.module.parameters()), torch.device("cpu"))
        constant = Shard(np.zeros(1, dtype=np.int64), {}, np.zeros(1, dtype=np.int64))
        jet = self._run(constant, {name: t.to(device) for name, t in tensors.items()}, batch, device)
        self._check(jet, batch)
        return jet.primal.detach().cpu()

    def _run(self, shard: Shard, primal: dict[str, Tensor], batch: Any, device: torch.device) -> JetTensor:
        parts = next(iter(shard.scaled.values())).shape[1] if shard.scaled else 1
        lead: Lead = (self.sketch.degree, parts, len(shard.indices))
        tensors: dict[str, Tensor] = {}
        for name, value in primal.items():
            block = shard.scaled.get(name)
            tensors[name] = value if block is None else wrap(value, [block.to(device)], lead)
        module, output = self.module, self.output
        with quiet(module, device) as start, differentiable_kernels():
            start(RandomState.capture(device), None)
            module.eval()
            if isinstance(output, str):
                result = self._losses(tensors, batch, lead)
            else:
                with torch.no_grad():
                    result = call_with_tensors(module, tensors, lambda: output(module, batch))
        if not isinstance(result, Tensor):
            raise ConfigurationError(f"`output` must return a tensor but returned {type(result).__name__}.")
        if not result.dtype.is_floating_point:
            raise ConfigurationError(
                f"`output` must return floating-point values, but returned {result.dtype}, which does not vary "
                "smoothly: return logits or losses."
            )
        return result if type(result) is JetTensor else constant(result, lead)

    def _losses(self, tensors: dict[str, Tensor], batch: Any, lead: Lead) -> Tensor:
        module: Any = self.module
        weighting = LossWeighting("auto", "batch")
        function = weighting.per_example(module)
        if function is not None:
            with torch.no_grad():
                return call_with_tensors(module, tensors, lambda: function(module, batch))
        size = batch_size(batch)
        if size is None:
            raise ConfigurationError(
                "`output='loss'` needs a batch whose tensors share their first dimension (the examples): pass such a "
                "batch, or a callable(module, batch) -> (B,) losses as `output`."
            )
        # The loss is affine in the example weights: its gradient by them is the examples' shares, l_i = B dL/dw_i.
        floating = next(t for t in tensors.values() if t.dtype.is_floating_point)
        primal = torch.ones(size, dtype=floating.dtype, device=floating.device)
        weights = wrap(primal, [None], lead, requires_grad=True)
        step = module.training_step
        with torch.enable_grad():
            frozen = {name: t.detach() for name, t in tensors.items()}
            count = len(inspect.signature(step).parameters)
            args = (batch, 0)[:count]
            loss = training_loss(call_with_tensors(module, frozen, lambda: weighting(module, step, args, weights)))
        if loss is None:
            raise ConfigurationError("`output='loss'`: `training_step` returned None for this batch.")
        (gradient,) = torch.autograd.grad(loss, weights)
        return gradient * size

    def _check(self, jet: JetTensor, batch: Any) -> None:
        size = batch_size(batch)
        if jet.ndim == 0 or (size is not None and jet.shape[0] != size):
            examples = "one per example" if size is None else f"{size}"
            raise ConfigurationError(
                f"`output` must return a tensor whose first dimension is examples ({examples}), but returned shape "
                f"{tuple(jet.shape)}."
            )
        if not bool(jet.primal.isfinite().all()) or not bool(jet.coefficients.isfinite().all()):
            raise ConfigurationError("`output` is not finite on this batch: check the batch and the model.")
