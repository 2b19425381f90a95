"""Gradients of the training loss of every unit, at the present parameters, projected to a few numbers each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sketch.directions import count_units
from lightning_sketch.errors import ConfigurationError
from lightning_sketch.jets.tensor import JetTensor, Lead, wrap
from lightning_sketch.shadow.example_ids import batch_size, refuse_untraceable
from lightning_sketch.shadow.places import Places
from lightning_sketch.shadow.quiet import ModuleState, quiet
from lightning_sketch.shadow.random_state import RandomState
from lightning_sketch.shadow.record import StepRecord, replay
from lightning_sketch.shadow.verification import verify_weighting
from lightning_sketch.shadow.weighting import LossWeighting
from lightning_sketch.shadow.wrapping import arguments_of, own_training_step

PROJECTION = 4096  # numbers kept for each unit and point unless said otherwise
_LARGEST = 256 << 20  # bytes of the gradients of units that one pass carries


class CountSketch:
    """A random projection that keeps inner products: every coordinate goes, with a random sign, into one of few sums.

    The inner product of two projected vectors has the mean ``<a, b>`` and a variance of at most
    ``(|a|^2 |b|^2 + <a, b>^2) / size`` (Charikar, Chen & Farach-Colton, *Finding frequent items in data streams*;
    Weinberger et al., *Feature hashing for large scale multitask learning*, arXiv 0902.2206, lemma 2).

    Args:
        size: of the projected vectors.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, total: Tensor, name: str, vectors: Tensor) -> None:
        """Add the projection of ``vectors``, ``(U, *S)``, a part of longer ones, to ``total``, ``(U, m)``."""
        flat = vectors.reshape(len(vectors), -1)
        if name not in self._drawn:
            key = [self._seed, *name.encode()]
            stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
            buckets = torch.from_numpy(stream.integers(self.size, size=flat.shape[1], dtype=np.int32))
            signs = torch.from_numpy(2 * stream.integers(2, size=flat.shape[1], dtype=np.int8) - 1)
            self._drawn[name] = buckets.to(flat.device), signs.to(flat.device)
        buckets, signs = self._drawn[name]
        total.index_add_(1, buckets, (flat * signs).to(total.dtype))


def project_gradients(
    trainer: Any, module: Any, weighting: LossWeighting, unit_of_example: np.ndarray, projection: CountSketch
) -> tuple[Tensor, Tensor]:
    """Run the train dataset once through the module, in evaluation mode, without a trace.

    Args:
        trainer: with its train dataloader.
        module: the LightningModule, with the parameters at which gradients are taken.
        weighting: how weights enter the loss; with the normalization ``"batch"``.
        unit_of_example: ``(num_examples,)``.
        projection: of the gradients.

    Returns:
        The mean of every unit's losses, ``(n,)``, and the projected gradient of their sum, ``(n, m)``; float32 on the
        CPU.

    Raises:
        ConfigurationError: if the dataset cannot be read by rows, or the loss not be split into examples.
    """
    features = torch.zeros(count_units(unit_of_example), projection.size, dtype=torch.float64)
    losses = torch.zeros(len(features), dtype=torch.float64)
    places, step = Places(module), own_training_step(module)
    params = places.params
    with quiet(places, module.device) as start:
        present, state = RandomState.capture(module.device), ModuleState(places)
        for index, (rows, batch) in enumerate(_batches(trainer, module)):
            units = unit_of_example[rows]
            buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
            record = StepRecord(
                args=arguments_of(step, batch, index),
                units=torch.from_numpy(units).to(module.device),
                random_state=present,
                module_state=state,
                buffers=buffers,
                accumulate=1,
                loss=torch.zeros((), dtype=torch.float64),
            )
            if index == 0:
                ones, tensors = record.ones_like(params), record.fresh_tensors(params)
                record.loss, _ = replay(start, module, record, step, weighting, ones, tensors, _value)
                verify_weighting(module, step, weighting, record, params)
            for some in _chunks(np.unique(units[units >= 0]), module):
                of_units = _of_units(start, module, weighting, record, some, projection)
                losses[some] += of_units[0].cpu()
                features[some] += of_units[1].cpu()
    counts = np.bincount(unit_of_example[unit_of_example >= 0], minlength=len(features))
    return (losses / torch.from_numpy(counts).clamp(min=1)).float(), features.float()


def _value(loss: Tensor) -> Tensor:
    return loss.detach().double()


def _of_units(
    start: Any, module: Any, weighting: LossWeighting, record: StepRecord, units: np.ndarray, projection: CountSketch
) -> tuple[Tensor, Tensor]:
    """The losses of what is in one batch of these units, ``(U,)``, and their projected gradients, ``(U, m)``."""
    lead: Lead = (1, 1, len(units))
    params = dict(module.named_parameters())
    of_unit = record.units == torch.from_numpy(units).to(record.units.device)[:, None]
    ones = record.ones_like(params)
    weights = JetTensor(ones, of_unit.to(ones.dtype)[None, None])
    tensors: dict[str, Tensor] = {
        name: wrap(p.detach(), [None], lead, requires_grad=p.requires_grad) for name, p in params.items()
    }
    tensors |= record.copied_buffers()
    trained = {name: t for name, t in tensors.items() if t.requires_grad}

    def evaluated(module: Any, step: Callable[..., Any], args: tuple[Any, ...], weights: Tensor) -> Any:
        module.eval()
        return weighting(module, step, args, weights)

    def differentiate(loss: Tensor) -> tuple[Tensor, Sequence[Any]]:
        shares = loss.coefficients[0, 0] if type(loss) is JetTensor else torch.zeros(len(units))
        return shares.detach().double(), torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

    (losses, found), _ = replay(
        start, module, record, own_training_step(module), evaluated, weights, tensors, differentiate
    )
    total = torch.zeros(len(units), projection.size, dtype=torch.float64, device=ones.device)
    for name, gradient in zip(trained, found, strict=True):
        block = gradient.block if type(gradient) is JetTensor else None
        if block is not None:
            projection.add(total, name, block[0, 0] * len(record.units))
    return losses * len(record.units), total


def _batches(trainer: Any, module: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Every row of the train dataset, in order, in batches of the size of training, on the module's device."""
    loader = trainer.train_dataloader
    refuse_untraceable(loader)
    size = getattr(loader.batch_sampler, "batch_size", None) or 32
    in_order = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)
    start = 0
    for batch in in_order:
        rows = np.arange(start, min(start + size, len(loader.dataset)))
        start += size
        if batch_size(batch) not in (None, len(rows)):
            raise ConfigurationError(
                f"GradientFeatures: a batch of {len(rows)} rows of the train dataset holds {batch_size(batch)} "
                "examples, so that they cannot be told apart: let `collate_fn` keep every row."
            )
        yield rows, trainer.strategy.batch_to_device(batch)


def _chunks(units: np.ndarray, module: Any) -> Iterator[np.ndarray]:
    """Units whose gradients fit into memory together."""
    one = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    size = max(1, _LARGEST // max(one, 1))
    for start in range(0, len(units), size):
        yield units[start : start + size]
