"""Make a trained model forget examples, as far as it can be done without retraining.

Every method has :meth:`~Unlearner.unlearn`, takes a LightningModule or a plain module, leaves it as it was unless
``inplace=True``, and returns an :class:`UnlearningReport` with the unlearned one. None of them gives a guarantee:
compare with a retrained model.

- :class:`GradientAscent` ascends the loss of the examples to forget, all alike;
- :class:`IMU` weights them by their influence at the classifier, and moves that alone (Fan et al., arXiv 2508.01620);
- :class:`IAU` takes one step of first order, corrected by the retained examples (Liu et al., arXiv 2507.23257); its
  part in training is the callback :class:`~lightning_sketch.GradientRestriction`;
- :class:`SketchStep` sets the parameters that a sketch predicts for the retrained model;
- :class:`CounterfactualDistillation` fits the outputs that a sketch predicts for the retrained model;
- :class:`KernelStep` adds the change of parameters that kernel influence functions predict.

    >>> import torch
    >>> from lightning_sketch.unlearning import IAU, IMU
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(60, 4)
    >>> y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x[:50]), y[:50]).backward()
    ...     optimizer.step()

    Forget the first five of the fifty examples; the last ten were never trained on, and say when to stop:

    >>> forget, retain, held_out = (x[:5], y[:5]), (x[5:50], y[5:50]), (x[50:], y[50:])
    >>> report = IMU(lr=0.1).unlearn(model, forget, retain, held_out=held_out)
    >>> report.steps, report.stopped
    (8, 'held_out')
    >>> report.forget_loss
    LossPair(before=0.02..., after=0.29...)
    >>> report.details["scores"]  # two examples contradict the others, and are left out
    tensor([ 0.0..., -0.0..., -0.4..., -1.8...,  0.0...], dtype=torch.float64)
    >>> IAU(lr=0.01).unlearn(model, forget, retain).retain_loss
    LossPair(before=0.058..., after=0.057...)

:func:`audit` says whether that was enough, and not too much, beside the retrained model or a sketch's prediction of it.
"""

from lightning_sketch.unlearning.audit import AuditReport, Measure, audit
from lightning_sketch.unlearning.distillation import CounterfactualDistillation
from lightning_sketch.unlearning.gradient_ascent import GradientAscent
from lightning_sketch.unlearning.iau import IAU, TotalGradient, total_gradient
from lightning_sketch.unlearning.imu import IMU, influence_weights
from lightning_sketch.unlearning.protocol import LossPair, Unlearner, UnlearningReport
from lightning_sketch.unlearning.steps import KernelStep, SketchStep

__all__ = [
    "IAU",
    "IMU",
    "AuditReport",
    "CounterfactualDistillation",
    "GradientAscent",
    "KernelStep",
    "LossPair",
    "Measure",
    "SketchStep",
    "TotalGradient",
    "Unlearner",
    "UnlearningReport",
    "audit",
    "influence_weights",
    "total_gradient",
]
