"""``IMU``: ascent weighted by influence at the classifier (Fan et al., arXiv 2508.01620)."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_sketch.errors import check_choice
from lightning_sketch.influence.classifier import CURVATURES, Curvature
from lightning_sketch.unlearning.gradient_ascent import GradientAscent, Trainable, UniformWeights
from lightning_sketch.unlearning.head import find_head, head_influence
from lightning_sketch.unlearning.protocol import Run, check_number, check_positive

Recompute = Literal["once", "epoch", "batch"]
Weighting = Literal["influence", "shuffle", "uniform"]


def influence_weights(scores: Tensor, *, power: float = 0.5, clip: float = 0.93, top: float = 1.0) -> Tensor:
    """Return the weights of examples in the ascent, ``(n,)`` float64, at least 0.

    Examples of negative score, which support the others, are kept, the ``top`` fraction of them by ``|I|``; their
    weight is ``|I|^power``, clipped from above at the quantile ``clip`` of those kept. The others have weight 0. If no
    score is negative, all are kept by ``|I|``; if all are 0, all weigh 1.

    Args:
        scores: ``I``, ``(n,)``.
        power: of ``|I|``.
        clip: quantile, 0 to 1; 1 clips nothing.
        top: fraction kept, above 0.

    Example:
        >>> influence_weights(torch.tensor([-4.0, 1.0, -1.0, -0.25]), clip=1.0)
        tensor([2.0000, 0.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    size = scores.detach().double().abs()
    kept = scores < 0 if bool((scores < 0).any()) else size > 0
    if not bool(kept.any()):
        return torch.ones_like(size)
    count = math.ceil(top * int(kept.sum()))
    chosen = torch.where(kept, size, -1.0).topk(count).indices
    weights = torch.zeros_like(size)
    weights[chosen] = size[chosen] ** power
    return weights.clamp(max=float(torch.quantile(weights[chosen], clip)))


class InfluenceWeights(UniformWeights):
    """Weights from the scores of the examples to forget, once or as often as the method says.

    ``details`` holds the last ``scores`` and ``weights``, ``(n,)`` in the order of the batches to forget.
    """

    def __init__(self, run: Run, method: IMU, head: str) -> None:
        super().__init__(run)
        self._method = method
        self._head = head
        start = torch.tensor([0, *run.sizes["forget"]]).cumsum(0).tolist()
        self._rows = [slice(a, b) for a, b in itertools.pairwise(start)]
        empty = torch.zeros(start[-1], dtype=torch.float64)
        self.details = {"scores": empty, "weights": empty.clone()}

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        recompute = self._method.recompute
        if recompute == "epoch" or (recompute == "once" and epoch == 0):
            self._compute(list(range(len(self._rows))))

    def of_batch(self, index: int) -> Tensor:
        """Return the weights of a batch to forget, ``(B,)``."""
        if self._method.recompute == "batch":
            self._compute([index])
        return self.details["weights"][self._rows[index]].to(super().of_batch(index))

    def _compute(self, indices: list[int]) -> None:
        method, run = self._method, self._run
        batches = [run.forget[i] for i in indices]
        scores = head_influence(run, self._head, batches, method.curvature, method.damping).cpu()
        weights = influence_weights(scores, power=method.power, clip=method.clip, top=method.top)
        if method.weights == "shuffle":
            weights = weights[torch.randperm(len(weights), generator=run.generator)]
        rows = torch.cat([torch.arange(len(self.details["scores"]))[self._rows[i]] for i in indices])
        self.details["scores"][rows] = scores
        self.details["weights"][rows] = weights


class IMU(GradientAscent):
    """Influence-guided machine unlearning (Fan et al., arXiv 2508.01620): ascent of what supports the forget set.

    Descends ``L = -sum_i w_i l_i / sum_i w_i + l1 ||W||_1`` over each batch of examples to forget, where ``W`` are the
    parameters of the head and the weights ``w_i = |I_i|^power`` come from the influence ``I_i`` of example ``i`` on the
    mean loss of the examples to forget, through the head alone
    (:func:`~lightning_sketch.influence.classifier_influence`, :func:`influence_weights`). They are constants of the
    ascent. The loss must be the cross-entropy of the head's outputs. No retained data are used. The report's
    ``details`` hold ``scores`` and ``weights``, ``(n,)``, in the order in which ``forget`` gave the examples.

    As in the authors' code, the head alone moves by default. Compare with ``weights="uniform"``, which is
    :class:`GradientAscent` of the head, and with ``weights="shuffle"``: what they lose is what the influence gives.
    Features stay as they were, so that what is forgotten can be learnt again from them.

    Args:
        lr: learning rate of SGD.
        epochs: at most so many passes over the examples to forget.
        momentum: of SGD.
        weight_decay: of SGD.
        trainable: ``"head"`` or ``"all"`` parameters.
        head: name of the linear layer that gives the logits; ``"auto"`` takes the ``nn.Linear`` that is called last.
        max_change: as in :class:`GradientAscent`.
        recompute: influence ``"once"`` before the first epoch, before each ``"epoch"``, or for each ``"batch"`` and
            among its examples alone.
        power: of ``|I|``; the paper's text has 1, the authors' code 0.5.
        clip: quantile of the weights at which they are clipped.
        top: fraction of the examples kept.
        curvature: as in :func:`~lightning_sketch.influence.classifier_influence`.
        damping: likewise.
        l1: weight of the sum of absolute parameters of the head.
        weights: ``"influence"``; or, to see what it is worth, ``"shuffle"``, the same weights given to examples at
            random, or ``"uniform"``.

    Raises:
        ConfigurationError: any argument that can not be right.
    """

    def __init__(
        self,
        *,
        lr: float = 0.01,
        epochs: int = 10,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trainable: Trainable = "head",
        head: str = "auto",
        max_change: float | None = None,
        recompute: Recompute = "once",
        power: float = 0.5,
        clip: float = 0.93,
        top: float = 1.0,
        curvature: Curvature = "diag_fisher",
        damping: float = 0.01,
        l1: float = 0.0,
        weights: Weighting = "influence",
    ) -> None:
        super().__init__(
            lr=lr,
            epochs=epochs,
            momentum=momentum,
            weight_decay=weight_decay,
            trainable=trainable,
            head=head,
            max_change=max_change,
        )
        check_choice("recompute", recompute, ("once", "epoch", "batch"))
        check_choice("weights", weights, ("influence", "shuffle", "uniform"))
        check_choice("curvature", curvature, CURVATURES)
        check_positive(power=power, damping=damping)
        check_number("clip", clip, lambda v: 0 <= v <= 1, "a quantile from 0 to 1")
        check_number("top", top, lambda v: 0 < v <= 1, "a fraction above 0, at most 1")
        check_number("l1", l1, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        self.recompute = recompute
        self.power = power
        self.clip = clip
        self.top = top
        self.curvature: Curvature = curvature
        self.damping = damping
        self.l1 = l1
        self.weights = weights

    def _head(self, run: Run) -> str:
        return find_head(run, self.head)

    def _weights(self, run: Run, head: str | None) -> UniformWeights:
        assert head is not None
        return UniformWeights(run) if self.weights == "uniform" else InfluenceWeights(run, self, head)

    def _penalty(self, head: nn.Module | None) -> Tensor | float:
        assert head is not None
        return self.l1 * torch.stack([p.abs().sum() for p in head.parameters()]).sum() if self.l1 else 0.0
