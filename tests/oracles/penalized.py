"""Fits with a ridge, their refits and their Newton steps, by automatic differentiation of the whole objective."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.functional import hessian


@dataclass
class Penalized:
    """``F(theta) = sum_i w_i (1 - x_i) l_i(theta) + (ridge / 2) sum_p penalty_p (theta_p - centre_p)^2``.

    Args:
        losses: Parameters ``(P,)`` -> loss of every example, ``(n,)``.
        weight: ``w``, ``(n,)``.
        penalty: ``(P,)``, 1 for parameters with a ridge and 0 for those without.
        centre: ``(P,)``.
    """

    losses: Callable[[Tensor], Tensor]
    weight: Tensor
    penalty: Tensor
    centre: Tensor

    def objective(self, theta: Tensor, x: Tensor, ridge: float) -> Tensor:
        """``F``."""
        of_losses = (self.weight * (1 - x) * self.losses(theta)).sum()
        return of_losses + ridge / 2 * (self.penalty * (theta - self.centre).square()).sum()

    def gradient(self, theta: Tensor, x: Tensor, ridge: float) -> Tensor:
        """Gradient of ``F``, ``(P,)``."""
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.objective(theta, x, ridge), theta)[0]

    def step(self, theta: Tensor, x: Tensor, ridge: float, x_of_hessian: Tensor, ridge_of_hessian: float) -> Tensor:
        """Minus the gradient of ``F`` divided by a Hessian at other weights; the shortest where that is singular."""
        h = hessian(lambda t: self.objective(t, x_of_hessian, ridge_of_hessian), theta)
        return -torch.linalg.pinv(h, hermitian=True, rtol=1e-13) @ self.gradient(theta, x, ridge)

    def newton(self, theta: Tensor, x: Tensor, ridge: float) -> Tensor:
        """One Newton step on what remains."""
        return self.step(theta, x, ridge, x, ridge)

    def first_order(self, theta: Tensor, x: Tensor, ridge: float, ridge_before: float) -> Tensor:
        """The same with the Hessian before the deletion."""
        return self.step(theta, x, ridge, torch.zeros_like(x), ridge_before)

    def minimise(self, theta: Tensor, x: Tensor, ridge: float) -> Tensor:
        """Newton's method with halved steps, to a gradient of rounding; the objective must be convex."""
        for _ in range(60):
            step = self.newton(theta, x, ridge)
            value = self.objective(theta, x, ridge)
            while self.objective(theta + step, x, ridge) > value + 1e-12 * value.abs():
                step = step / 2
            theta = (theta + step).detach()
            if step.norm() <= 1e-14 * theta.norm():
                break
        assert self.gradient(theta, x, ridge).norm() < 1e-10, "the oracle did not converge"
        return theta
