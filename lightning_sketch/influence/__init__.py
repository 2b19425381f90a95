"""Influence functions of a trained model: what it would be without some examples, from the model alone.

No training run is followed here, as for a sketch: the model is taken to be a minimum of a loss with a ridge, and linear
in its parameters over what a deletion changes. :class:`KernelInfluence` may compute with the kernel of the outputs
instead of the Hessian of the parameters (*dual* influence functions, Sun and Valaee, arXiv 2605.11239), in a system of
the size of the smaller of the two. :func:`classifier_influence` looks at a classifier's last layer alone (*IMU*, Fan et
al., arXiv 2508.01620).

    >>> import torch
    >>> from lightning_sketch.influence import KernelInfluence
    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None] ** torch.arange(1, 4)
    >>> y = (3 * x[:, :1]).sin()
    >>> ridge = 0.1 * torch.eye(3, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)  # any module; this one is trained in closed form
    >>> model.weight.data = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T

    >>> influence = KernelInfluence.from_module(model, (x, y), loss="squared", ridge=0.1)
    >>> influence.solver  # 3 parameters are fewer than 20 outputs
    'primal'
    >>> diagnostics = influence.diagnostics()
    >>> diagnostics.stationarity.stationary, round(diagnostics.leverage.max().item(), 2)
    (True, 0.5)
    >>> effect = influence.prepare((x[:2], y[:2]))  # where to predict; once
    >>> p = effect.delete([0, 1, 2])  # as often as you like
    >>> p.change.T
    tensor([[-0.5652, -0.4147]], dtype=torch.float64)
    >>> p.loss
    LossChange(shape=(2,), mean change=0.1615)
    >>> weights = torch.zeros(20)
    >>> weights[4] = 0.5  # takes half of the weight of example 4
    >>> effect.delete(weights=weights, mode="first_order")
    OutputChange(shape=(2, 1), mean change=0.004097)
    >>> effect.leave_one_out().change.shape  # every example alone
    torch.Size([20, 2, 1])

What a deletion changes in the parameters, beside a fit to the other examples:

    >>> influence.parameter_change(influence.delete([0, 1, 2], mode="exact"))["weight"]
    tensor([[-0.0635, -0.2523,  0.3764]], dtype=torch.float64)
    >>> torch.linalg.solve(x[3:].T @ x[3:] + ridge, x[3:].T @ y[3:]).T - model.weight.data
    tensor([[-0.0635, -0.2523,  0.3764]], dtype=torch.float64)
"""

from lightning_sketch.influence.classifier import classifier_influence
from lightning_sketch.influence.diagnostics import Diagnostics, Stationarity
from lightning_sketch.influence.effect import KernelEffect, LossChange, OutputChange
from lightning_sketch.influence.kernel import KernelInfluence, Removal
from lightning_sketch.influence.losses import LOSSES, Loss, autograd_loss

__all__ = [
    "LOSSES",
    "Diagnostics",
    "KernelEffect",
    "KernelInfluence",
    "Loss",
    "LossChange",
    "OutputChange",
    "Removal",
    "Stationarity",
    "autograd_loss",
    "classifier_influence",
]
