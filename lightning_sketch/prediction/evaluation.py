"""Metrics of the model that training without some units would have given, with error bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from lightning_sketch.errors import ConfigurationError
from lightning_sketch.prediction.effect import Effect
from lightning_sketch.prediction.queries import table


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Metrics of the run as it was and of its counterfactuals, by the metrics' names.

    A standard error is the root mean square, over draws of the predictions, of how far the metric is from
    ``counterfactual``. Draws are Gaussian with the standard errors of the predictions. How the errors of different
    predictions are correlated is not known; assumed is that at every order of the series they are as its coefficients
    are over the measured directions. What the orders left out hold is not in ``stderr``; ``truncation`` warns of it.

    Shape:
        ``*s`` is the shape of one metric, mostly ``()``; after ``m`` deletions it is ``(m, *s)``.

    Args:
        baseline: ``(*s)``, of the output of the run as it was.
        counterfactual: ``(*s)`` or ``(m, *s)``, of the predicted output.
        stderr: as ``counterfactual``.
        truncation: as ``counterfactual``, how far the last order of the series moves the metric.
    """

    baseline: dict[str, Tensor]
    counterfactual: dict[str, Tensor]
    stderr: dict[str, Tensor]
    truncation: dict[str, Tensor]

    def __repr__(self) -> str:
        rows = [["metric", "deletion", "baseline", "counterfactual", "stderr", "truncation"]]
        for name, before in self.baseline.items():
            after = self.counterfactual[name]
            many = after.ndim > before.ndim
            for i in range(len(after) if many else 1):
                cells = (d[name][i] if many else d[name] for d in (self.counterfactual, self.stderr, self.truncation))
                values, errors, last = (float(cell.double().mean()) for cell in cells)
                shown = name if before.ndim == 0 else f"mean of {name}"
                numbers = [f"{float(before.double().mean()):.4f}", f"{values:.4f}", f"{errors:.2g}", f"{last:.2g}"]
                rows.append([shown, str(i), *numbers])
        if all(row[1] == "0" for row in rows[1:]):
            rows = [[row[0], *row[2:]] for row in rows]
        return table(rows)


def evaluate(
    effect: Effect,
    targets: Tensor,
    metrics: torchmetrics.Metric | torchmetrics.MetricCollection,
    delete: Any,
    estimator: str,
    degree: int | None,
    samples: int,
    seed: int,
) -> Evaluation:
    """See :meth:`DeletionPredictor.evaluate`; predictions are ``(N, ...)`` and ``targets`` ``(N, ...)`` on the CPU."""
    if len(targets) != len(effect.baseline):
        raise ConfigurationError(
            f"`targets` gives {len(targets)} targets to {len(effect.baseline)} predictions: give one each."
        )
    sets, many = _several(delete)
    degree = effect.degree if degree is None else degree
    p = effect.delete_many(sets, estimator=estimator, degree=degree)

    def compute(predictions: Tensor) -> dict[str, Tensor]:
        return _compute(metrics, predictions, targets)

    baseline = compute(effect.baseline)
    at_value = [compute(value) for value in p.value]
    lower = p.by_degree[-2] if len(p.by_degree) > 1 else effect.baseline.expand_as(p.value)
    at_lower = [compute(value) for value in lower]
    squares: list[dict[str, Tensor]] = [{name: torch.zeros_like(v) for name, v in after.items()} for after in at_value]
    for errors in _draws(effect, sets, estimator, degree, int(samples), seed):
        for value, error, after, square in zip(p.value, errors, at_value, squares, strict=True):
            if not error.any():  # measured exactly
                continue
            for name, drawn in compute(value + error).items():
                square[name] += (drawn - after[name]) ** 2 / samples

    def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) if many else rows[0][name] for name in baseline}

    return Evaluation(
        baseline=baseline,
        counterfactual=stack(at_value),
        stderr=stack([{name: v.sqrt() for name, v in square.items()} for square in squares]),
        truncation=stack(
            [{n: (v - low[n]).abs() for n, v in after.items()} for after, low in zip(at_value, at_lower, strict=True)]
        ),
    )


def check_arguments(metrics: Any, samples: Any) -> None:
    """Refuse what can not be right before the model is run.

    Raises:
        ConfigurationError: naming the argument.
    """
    if not isinstance(metrics, torchmetrics.Metric | torchmetrics.MetricCollection):
        raise ConfigurationError(
            f"`metrics` must be a torchmetrics.Metric or MetricCollection but is {type(metrics).__name__}."
        )
    if isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1:
        raise ConfigurationError(f"`samples` is {samples!r}: give an integer of 1 or more.")


def _several(delete: Any) -> tuple[Any, bool]:
    """Return deletions as :meth:`Effect.delete_many` takes them, and whether more than one could have been given."""
    if isinstance(delete, np.ndarray | Tensor):
        return (delete, True) if delete.ndim > 1 else (delete[None], False)
    if not isinstance(delete, Sequence):
        raise ConfigurationError(
            f"`delete` is {delete!r}: give a list of units, a list of such lists, or an array of deletion weights."
        )
    several = len(delete) > 0 and not isinstance(delete[0], Integral)
    return (delete, True) if several else ([delete], False)


def _compute(
    metrics: torchmetrics.Metric | torchmetrics.MetricCollection, predictions: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return every metric as a floating-point tensor, from a clone of the user's objects."""
    clone = metrics.clone().to(predictions.device)
    clone.reset()
    clone.update(predictions, targets)
    result = clone.compute()
    values = dict(result) if isinstance(result, Mapping) else {type(metrics).__name__: result}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"`metrics`: {name!r} computes a {type(value).__name__}, but a tensor is needed: leave it out."
            )
    return {str(name): value.double() for name, value in values.items()}


def _draws(effect: Effect, sets: Any, estimator: str, degree: int, samples: int, seed: int) -> Iterator[Tensor]:
    """Yield draws of the errors of the predictions of all deletions, ``(m, *out)`` each."""
    shape = effect.baseline.shape
    known = [effect.delete_many(sets, estimator=estimator, degree=r).stderr.double() ** 2 for r in range(1, degree + 1)]
    orders = torch.stack(known).diff(dim=0, prepend=torch.zeros_like(known[0])[None]).clamp_min(0)
    total = orders.sum(dim=0)
    shares = torch.where(total > 0, orders * known[-1] / total, 0).sqrt()  # (degree, m, *out)
    generator = np.random.default_rng(seed)
    noise = np.zeros((degree, samples, int(np.prod(shape))))
    for r, coefficients in enumerate(effect.coefficients[:degree].cpu().flatten(2).numpy()):
        measured = np.concatenate([coefficients.real, coefficients.imag])  # (2 K, outputs)
        norm = np.linalg.norm(measured, axis=0)
        pattern = np.divide(measured, norm, out=np.zeros_like(measured), where=norm > 0)
        # What a direction measured, times a normal number for each direction: correlated as coefficients are
        noise[r] = generator.standard_normal((samples, len(pattern))) @ pattern
    patterns = torch.from_numpy(noise).reshape(degree, samples, *shape)
    for s in range(samples):
        yield (shares * patterns[:, s, None]).sum(dim=0).to(effect.baseline)
