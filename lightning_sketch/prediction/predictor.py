"""``DeletionPredictor``: run a sketch's jets through the model, once per batch of questions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.features import UnitFeatures
from lightning_sketch.jets.tensor import JetTensor, Lead, constant, wrap
from lightning_sketch.prediction.effect import Effect
from lightning_sketch.prediction.evaluation import Evaluation, check_arguments, evaluate
from lightning_sketch.prediction.influence import Influence
from lightning_sketch.prediction.outputs import PARAMETER, Output, named_output, targets_of
from lightning_sketch.shadow.example_ids import batch_size
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import quiet
from lightning_sketch.shadow.random_state import RandomState
from lightning_sketch.shadow.record import call_with_tensors, differentiable_kernels
from lightning_sketch.shadow.scaling import scale_orders
from lightning_sketch.shadow.unit_gradients import CountSketch
from lightning_sketch.shadow.weighting import LossWeighting, training_loss
from lightning_sketch.shadow.wrapping import arguments_of
from lightning_sketch.sketch import Shard, Sketch

if TYPE_CHECKING:
    import torchmetrics

    from lightning_sketch.metrics import Calibration


class DeletionPredictor:
    """Predict what a model would output had some training units not been there.

    The module only lends its code: parameters and buffers are the sketch's, and the module is left as it was, in
    evaluation mode while it runs.

    Args:
        sketch: a sketch of the training run.
        module: a module of the class that was trained.
        output: what is predicted, per example unless said otherwise:

            - ``"loss"``: the training loss, ``(B,)``; predicted through margins where that is better
              (:class:`~lightning_sketch.prediction.estimators.margins.MarginEstimator`), unlike losses of a callable;
            - ``"logits"``: what ``forward`` returns for the inputs of the batch, or its entry ``"logits"``;
            - ``"probabilities"``: their softmax over classes, ``(B, C)``, or the sigmoid of single logits;
            - ``"margin"``: ``log(p / (1 - p))`` of the example's own class, ``(B,)``;
            - ``"embedding:net.2"``: what the submodule ``net.2`` returns during ``forward``;
            - ``"parameter:net.0.weight"``: that parameter or buffer, in its own shape, without a batch;
            - ``callable(module, batch) -> tensor`` whose first dimension is examples.

            All but the loss and callables read the inputs from batches ``x``, ``(x,)`` or ``(x, y)`` with ``x`` a
            tensor, or from mappings, whose entries but ``labels``, ``label`` and ``y`` are the keywords of ``forward``.
        features: ``dirpath`` of :class:`GradientFeatures` of this run or a like one. The kernel estimator then may take
            units of like gradients to act alike, and influence functions for a prior mean, where that predicts
            directions held out better. `prepare` then takes the gradient of every entry of the output.

    Raises:
        SketchError: if the sketch is of another model.
        ConfigurationError: if ``output`` is none of these, or the loss was given as a callable that a sketch cannot
            keep.
    """

    def __init__(
        self,
        sketch: Sketch,
        module: nn.Module,
        output: str | Output = "loss",
        *,
        features: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(sketch, Sketch):
            raise ConfigurationError(f"`sketch` must be a Sketch but is {type(sketch).__name__}: use `Sketch.load`.")
        if not isinstance(output, str) and not callable(output):
            raise ConfigurationError(
                f"`output` must be a name or a callable(module, batch) -> tensor but is {output!r}."
            )
        if output == "loss" and sketch.loss != "auto":
            raise ConfigurationError(
                f"`output='loss'`: the sketch was made with `loss={sketch.loss}`, which it cannot keep; pass that "
                "callable as `output`."
            )
        sketch.check_fits(module)
        self._features = None if features is None else UnitFeatures.load(features, sketch.units)
        self.sketch = sketch
        self.module = module
        self.output = output
        self._parameter: str | None = None
        self._function: Output | None = None  # of module and batch; None for losses and parameters
        if not isinstance(output, str):
            self._function = output
        elif output.startswith(PARAMETER):
            self._parameter = output.removeprefix(PARAMETER)
            self._check_parameter(self._parameter)
        elif output != "loss":
            self._function = named_output(output, module)

    def prepare(self, batches: Any = None) -> Effect:
        """Run the Taylor coefficients through the model; any number of deletions follow at no such cost.

        Tensors of a batch are moved to the device of the module, and those of floating point are converted to float64
        where the run was in float64, as a Trainer of ``precision="64-true"`` does. Each shard of the sketch is read
        once, and one at a time, for all batches. So a dataloader is iterated once per shard, each time from the same
        random state. What is kept is 16 bytes per order, direction and entry of the output, on the CPU.

        Args:
            batches: a batch, what ``training_step`` or the output callable takes; or a ``DataLoader`` of such batches
                in a fixed order, whose outputs are concatenated along the examples. Absent for a parameter.

        Returns:
            The output at ``x = 0`` and its coefficients along every direction.

        Raises:
            ConfigurationError: if the output is not one tensor entry per example, or is not finite; or if a dataloader
                is empty, shuffles, or gives other examples when iterated again.
        """
        if (batches is None) is (self._parameter is None):
            needs = "no batch" if self._parameter is not None else "a batch or a DataLoader"
            raise ConfigurationError(f"`batches`: the output {self.output!r} needs {needs}.")
        device = self._device
        primal = {name: t.to(device) for name, t in self.sketch.primal.items()}
        baseline: Tensor | None = None
        coefficients: Tensor | None = None
        influence = self._influence(primal, batches)
        for shard in self.sketch.shards():
            if influence is not None:
                self._project_displacements(shard, influence.displacements)
            value, block = self._along(shard, primal, batches)
            if baseline is None or coefficients is None:
                baseline = value
                shape = (self.sketch.degree, self.sketch.num_directions, *baseline.shape)
                coefficients = torch.zeros(shape, dtype=torch.complex128)  # complex64 does not hold high orders
            _check_repeats(value, baseline)
            rows = torch.as_tensor(shard.indices)
            coefficients.real[:, rows] = block[:, 0]
            if block.shape[1] == 2:
                coefficients.imag[:, rows] = block[:, 1]
            del shard, block  # before the next one is read
        assert baseline is not None, "a sketch has at least one direction"
        assert coefficients is not None
        features = None if self._features is None else self._features.flattened()
        return Effect(
            baseline,
            coefficients,
            self.sketch.directions,
            self.sketch.units,
            features,
            influence,
            losses=self.output == "loss",
        )

    def _influence(self, primal: dict[str, Tensor], batches: Any) -> Influence | None:
        """Return the influences on the output, whose displacements are still to be filled in."""
        if self._features is None or self._parameter is not None:
            return None
        size = self._features.array.shape[2]
        projection = CountSketch(size, self._features.seed)
        params = {name: primal[name].detach().requires_grad_() for name, p in self._trained().items() if name in primal}
        found = []
        for batch in self._batches(batches):
            with torch.enable_grad():
                output = self._run(primal | params, batch, None)
                for entry in output.reshape(-1):
                    gradients = torch.autograd.grad(entry, list(params.values()), retain_graph=True, allow_unused=True)
                    total = torch.zeros(1, size, dtype=torch.float64, device=entry.device)
                    for name, gradient in zip(params, gradients, strict=True):
                        if gradient is not None:
                            projection.add(total, name, gradient[None])
                    found.append(total.cpu())
        displacements = np.zeros((self.sketch.num_directions, size), dtype=np.complex128)
        return Influence(self._features, torch.cat(found).numpy(), displacements)

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _project_displacements(self, shard: Shard, displacements: NDArray[np.complex128]) -> None:
        """Write the projected first-order coefficients of the parameters along the directions of a shard."""
        assert self._features is not None
        projection = CountSketch(displacements.shape[1], self._features.seed)
        parts = next(iter(shard.scaled.values())).shape[1] if shard.scaled else 1
        for part in range(parts):
            total = torch.zeros(len(shard.indices), displacements.shape[1], dtype=torch.float64)
            for name in self._trained().keys() & shard.scaled.keys():
                block = shard.scaled[name][:1].double()
                projection.add(total, name, scale_orders(block, -shard.exponents)[0, part].cpu())
            displacements[shard.indices] += total.numpy() * (1j if part else 1)

    def calibrate(
        self, batches: Any, retrained: Mapping[tuple[int, ...], nn.Module | Mapping[str, Tensor]], level: float = 0.9
    ) -> Calibration:
        """Compare predictions with models that were really trained without some units (see :class:`Reweight`).

        Args:
            batches: as in :meth:`prepare`.
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
        nothing = Shard(np.zeros(1, dtype=np.int64), {}, np.zeros(1, dtype=np.int64))
        prediction = self.prepare(batches).delete_many([list(units) for units in retrained])
        return calibrate(prediction, torch.stack([self._along(nothing, each, batches)[0] for each in tensors]), level)

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
        return {name: t.to(self._device) for name, t in tensors.items()}

    def evaluate(
        self,
        batches: Any,
        metrics: torchmetrics.Metric | torchmetrics.MetricCollection,
        delete: Sequence[int] | Sequence[Sequence[int]] | NDArray[Any] | Tensor,
        *,
        targets: Callable[[Any], Tensor] | None = None,
        estimator: str = "auto",
        degree: int | None = None,
        samples: int = 100,
        seed: int = 0,
    ) -> Evaluation:
        """Predict what metrics would say of the model had units not been there.

        The metrics are given the output as predictions: ``"logits"`` for classification, or a callable's.

        Args:
            batches: as for :meth:`prepare`.
            metrics: called with ``(predictions, targets)`` of all examples at once, each giving one tensor. Clones are
                used, which start empty and run on the CPU.
            delete: a list of units; or several such lists; or deletion weights, an array ``(n,)`` or ``(m, n)``.
            targets: of a batch, ``(B, ...)``; ``None`` takes ``y`` of batches ``(x, y)``, or the entry ``labels``,
                ``label`` or ``y`` of mappings.
            estimator: as in :meth:`Effect.delete`.
            degree: as in :meth:`Effect.delete`.
            samples: draws of the predictions from which the standard errors are taken.
            seed: of these draws.

        Returns:
            Every metric of the baseline and of each deletion; see :class:`Evaluation` for what is assumed.

        Raises:
            ConfigurationError: any argument that can not be right; or an output other than logits and callables, which
                metrics do not take as predictions.
        """
        if self.output != "logits" and isinstance(self.output, str):
            raise ConfigurationError(
                f"`evaluate` gives the output to metrics as predictions, which {self.output!r} is not (predicted "
                "probabilities may leave [0, 1]): use DeletionPredictor(..., output='logits') or a callable."
            )
        check_arguments(metrics, samples)
        find = targets_of if targets is None else targets
        found = [find(batch) for batch in self._batches(batches)]
        others = [type(t).__name__ for t in found if not isinstance(t, Tensor)]
        if others:
            raise ConfigurationError(f"`targets` must return a tensor but returned {others[0]}.")
        effect = self.prepare(batches)
        return evaluate(effect, torch.cat(found).cpu(), metrics, delete, estimator, degree, samples, seed)

    @property
    def _device(self) -> torch.device:
        return next((t.device for t in self.module.parameters()), torch.device("cpu"))

    def _batches(self, batches: Any) -> Iterator[Any]:
        """Yield the batches as the run would have had them, leaving the random state as it was."""
        dtypes = {t.dtype for t in self.sketch.primal.values() if t.dtype.is_floating_point}
        double = dtypes == {torch.float64}
        device = self._device

        def move(t: Tensor) -> Tensor:
            return t.to(device, torch.float64) if double and t.is_floating_point() else t.to(device)

        if not isinstance(batches, DataLoader):
            yield apply_to_collection(batches, Tensor, move)
            return
        if isinstance(batches.sampler, RandomSampler):
            raise ConfigurationError(
                "`batches` is a DataLoader that shuffles, so that it is not known which row of the output is which "
                "example: make one with shuffle=False."
            )
        random_state, empty = RandomState.capture(device), True
        try:
            for batch in batches:
                empty = False
                yield apply_to_collection(batch, Tensor, move)
        finally:
            random_state.restore()
        if empty:
            raise ConfigurationError("`batches` is an empty DataLoader: give at least one batch.")

    def _along(self, shard: Shard, primal: dict[str, Tensor], batches: Any) -> tuple[Tensor, Tensor]:
        """Return the output, ``(*out)``, and its coefficients along the directions of a shard, ``(R, P, k, *out)``.

        Both are on the CPU, the coefficients in float64.
        """
        parts = next(iter(shard.scaled.values())).shape[1] if shard.scaled else 1
        lead: Lead = (self.sketch.degree, parts, len(shard.indices))
        device = self._device
        tensors: dict[str, Tensor] = {}
        for name, value in primal.items():
            block = shard.scaled.get(name)
            tensors[name] = value if block is None else wrap(value, [block.to(device)], lead)

        def collect(result: Tensor) -> tuple[Tensor, Tensor]:
            jet = result if type(result) is JetTensor else constant(result, lead)
            if not bool(jet.primal.isfinite().all()) or not bool(jet.coefficients.isfinite().all()):
                raise ConfigurationError("`output` is not finite on this batch: check the batch and the model.")
            block = scale_orders(jet.coefficients.detach().cpu().double(), -shard.exponents)
            return jet.primal.detach().cpu(), block

        if self._parameter is not None:
            return collect(tensors[self._parameter])
        parts_of_output: list[tuple[Tensor, Tensor]] = []
        for batch in self._batches(batches):
            result = self._run(tensors, batch, lead)
            _check_examples(result, batch)
            parts_of_output.append(collect(result))
        values, blocks = zip(*parts_of_output, strict=True)
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(shapes) > 1:
            raise ConfigurationError(
                f"`output` has the shapes {sorted(shapes)} per example in different batches, which can not be "
                "concatenated: pad to a common one, or return one number per example."
            )
        return torch.cat(values), torch.cat(blocks, dim=3)

    def _run(self, tensors: dict[str, Tensor], batch: Any, lead: Lead | None) -> Tensor:
        """Return the output on one batch, with the module's tensors replaced; differentiable if ``lead`` is None."""
        module, function, device = self.module, self._function, self._device
        buffers = dict(module.named_buffers())  # a batch may change them, but not for the next one
        tensors = {name: t.clone() if name in buffers else t for name, t in tensors.items()}
        with quiet(Places(module), device) as start, differentiable_kernels(module.modules()):
            start(RandomState.capture(device), None)
            module.eval()
            if function is None:
                result = self._losses(tensors, batch, lead)
            else:
                with torch.set_grad_enabled(lead is None):
                    result = call_with_tensors(Places(module), tensors, lambda: function(module, batch))
        if not isinstance(result, Tensor):
            raise ConfigurationError(f"`output` must return a tensor but returned {type(result).__name__}.")
        if not result.dtype.is_floating_point:
            raise ConfigurationError(
                f"`output` must return floating-point values, but returned {result.dtype}, which does not vary "
                "smoothly: return logits or losses."
            )
        return result

    def _losses(self, tensors: dict[str, Tensor], batch: Any, lead: Lead | None) -> Tensor:
        module: Any = self.module
        weighting = LossWeighting("auto", "batch")
        function = weighting.per_example(module)
        if function is not None:
            with torch.set_grad_enabled(lead is None):
                return call_with_tensors(Places(module), tensors, lambda: function(module, batch))
        size = batch_size(batch)
        if size is None:
            raise ConfigurationError(
                "`output='loss'` needs a batch whose tensors share their first dimension (the examples): pass such a "
                "batch, or a callable(module, batch) -> (B,) losses as `output`."
            )
        # The loss is affine in the example weights: its gradient by them is the examples' shares, l_i = B dL/dw_i.
        floating = next(t for t in tensors.values() if t.dtype.is_floating_point)
        primal = torch.ones(size, dtype=floating.dtype, device=floating.device)
        weights = primal.requires_grad_() if lead is None else wrap(primal, [None], lead, requires_grad=True)
        step = module.training_step
        with torch.enable_grad():
            frozen = tensors if lead is None else {name: t.detach() for name, t in tensors.items()}
            args = arguments_of(step, batch, 0)
            weighted = call_with_tensors(Places(module), frozen, lambda: weighting(module, step, args, weights))
            loss = training_loss(weighted)
        if loss is None:
            raise ConfigurationError("`output='loss'`: `training_step` returned None for this batch.")
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=lead is None)
        return gradient * size

    def _check_parameter(self, name: str) -> None:
        known = sorted(n for n, t in self.sketch.primal.items() if t.dtype.is_floating_point)
        if name not in known:
            raise ConfigurationError(f"`output={self.output!r}`: the sketch has no parameter {name!r}, but {known}.")


def _check_examples(result: Tensor, batch: Any) -> None:
    size = batch_size(batch)
    if result.ndim == 0 or (size is not None and result.shape[0] != size):
        examples = "one per example" if size is None else f"{size}"
        flattened = result.ndim and size and len(result) and len(result) % size == 0
        remedy = f": undo its flattening by `.unflatten(0, ({size}, -1))`" if flattened else ""
        raise ConfigurationError(
            f"`output` must return a tensor whose first dimension is examples ({examples}), but returned shape "
            f"{tuple(result.shape)}{remedy}."
        )


def _check_repeats(value: Tensor, baseline: Tensor) -> None:
    """Refuse another baseline along other directions, but for the rounding of kernels that do not repeat themselves."""
    tolerance = torch.finfo(baseline.dtype).eps ** 0.5
    size = float(baseline.double().square().mean().sqrt())
    if value.shape != baseline.shape or not torch.allclose(value, baseline, rtol=tolerance, atol=tolerance * size):
        raise ConfigurationError(
            "`batches` gives other examples when iterated again, or the output is random: give a DataLoader in a fixed "
            "order, without random augmentation."
        )
