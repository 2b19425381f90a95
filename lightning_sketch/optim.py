"""``StableAdamW``: Adam with ``eps`` inside the root, so that a training run stays analytic in its example weights."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_sketch.errors import ConfigurationError

__all__ = ["StableAdamW"]


class StableAdamW(Optimizer):
    r"""AdamW whose denominator is ``sqrt(v_hat + eps)`` in place of ``sqrt(v_hat) + eps``.

    With the gradient :math:`g_t`, element by element:

    .. math::
        \theta &\leftarrow \theta - \eta \lambda \theta, \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        \theta &\leftarrow \theta - \eta \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \epsilon}}.

    ``sqrt(v_hat)`` is singular at ``v_hat = 0``, close to which parameters with small gradients always are;
    ``sqrt(v_hat + eps)`` is singular only at ``v_hat = -eps``, at a distance that ``eps`` sets. So a training run stays
    an analytic function of its example weights, and its high-order derivatives stay small. ``eps`` has the units of a
    squared gradient, hence its large default.

    Source: moments and bias correction Kingma & Ba, *Adam* (2015), Algorithm 1; decoupled decay Loshchilov & Hutter,
    *Decoupled Weight Decay Regularization* (2019), Algorithm 2; ``eps`` inside the root Gunn, *How to sketch a learning
    algorithm* (arXiv 2604.07328).

    Args:
        params: Real parameters, or dictionaries of parameter groups, each of which may set its own ``lr``, ``betas``,
            ``eps`` and ``weight_decay``.
        lr: Learning rate ``eta >= 0``.
        betas: Decay rates ``(beta1, beta2)`` of the two moments, each in ``[0, 1)``.
        eps: Added to ``v_hat`` under the root; ``>= 0``, in units of a squared gradient.
        weight_decay: Decoupled decay ``lambda >= 0``; zero leaves it out.

    Shape:
        State per parameter: ``step`` (0-dimensional float32 tensor on the CPU), ``exp_avg`` and ``exp_avg_sq`` (shape,
        dtype and device of the parameter).

    Raises:
        ConfigurationError: If an argument is out of its range, or a parameter is complex or has a sparse gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = StableAdamW([weight], lr=0.1, eps=1.0, weight_decay=0.0)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()  # 1 - 0.1 * 2 / sqrt(2 ** 2 + 1)
        >>> round(weight.item(), 4)
        0.9106
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim.Optimizer`` does, once its settings are checked.

        Args:
            param_group: ``params``, and any of ``lr``, ``betas``, ``eps``, ``weight_decay``; what is absent takes the
                defaults.

        Raises:
            ConfigurationError: If a setting is out of its range or a parameter is complex.
        """
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(param.is_complex() for param in self.param_groups[-1]["params"]):
            raise ConfigurationError(
                "`params` holds a complex tensor: give its real and imaginary parts as real parameters."
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again, calls ``backward`` and returns the loss; called once, before the update.

        Returns:
            What ``closure`` returned, or None without one.

        Raises:
            ConfigurationError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Take one step of ``param``, shape ``(*S)``, in place, along its gradient ``(*S)``."""
        if grad.is_sparse:
            raise ConfigurationError(
                "`params` holds a parameter with a sparse gradient: build its layer with `sparse=False`."
            )
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)  # on the CPU, as torch's own: read at every step
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]

        state["step"] += 1
        step = state["step"].item()
        # theta = theta - lr * lambda * theta
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        # m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # theta = theta - lr * m_hat / sqrt(v_hat + eps)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).add_(group["eps"]).sqrt()
        param.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**step))


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise ConfigurationError for a setting out of its range; NaN is out of every range."""
    for name in ("lr", "eps", "weight_decay"):
        if not settings[name] >= 0.0:
            raise ConfigurationError(f"`{name}` is {settings[name]}: give a number that is at least 0.")
    betas = settings["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigurationError(f"`betas` is {betas}: give two numbers, each at least 0 and below 1.")
