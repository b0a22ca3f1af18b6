"""Model-agnostic meta-learning of a detector: an initialisation from which a few gradient steps make a tracker.

Any detector will do that is a module and has a loss. Nothing is copied and no parameter is ever written to: adapted
parameters are a dict that takes the place of the module's own for the length of a call (`torch.func.functional_call`).

theta   online parameters, {name: tensor}: what gradient steps adapt        phi    offline parameters: all others
alpha   learning rates of the steps, learned with theta_0                   GD_k   k steps of gradient descent
Ds, Dt  support and target set, drawn from one video; each is whatever the detector's loss takes
gamma   weight of the target loss after each step, 0..k
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Theta = dict[str, torch.Tensor]
Granularity = Literal["per_tensor", "per_filter"]
MultiStep = Literal["uniform", "annealed", "last"]


class _Call(nn.Module):
    """Makes any function of a module its forward, so that it can be called with other parameters."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable, *args):
        return function(self.module, *args)


class MAML(nn.Module):
    """A detector with learned rates; `forward` is the offline objective, `adapt` what a tracker does online.

    loss(detector, set) is the mean loss of a set, a scalar. `online` names the parameters that gradient steps adapt.
    `prepare(detector, set)` does once what only depends on offline parameters, such as the early layers: the loss then
    takes its result. `checkpointing` keeps no graph of a step but computes it anew in the backward pass: then memory
    does not grow with k, but for theta.
    """

    def __init__(
        self, detector: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], online: Iterable[str], *,
        prepare: Callable[[nn.Module, Any], Any] | None = None, rate: float = 1e-3,
        granularity: Granularity = "per_tensor", second_order: bool = True, checkpointing: bool = False,
    ):
        super().__init__()
        self.detector, self.loss = detector, loss
        self.prepare = prepare or (lambda _detector, data: data)
        self.second_order, self.checkpointing = second_order, checkpointing
        online = set(online)
        parameters = dict(detector.named_parameters())
        if not online or online - parameters.keys():
            got = ", ".join(sorted(online - parameters.keys())) or "nothing"
            raise ValueError(f"online parameters are parameters of the detector; got {got}")
        self.online = [name for name in parameters if name in online]
        # One learned rate for each tensor ("kernel-wise": a convolution is a tensor), or for each of its filters.
        self.rates = nn.ParameterDict({
            _key(name): nn.Parameter(p.detach().new_full(_rate_shape(p, granularity), rate))
            for name, p in parameters.items() if name in online
        })
        self._callable = [_Call(detector)]  # in a list: the detector is no submodule twice

    def theta_0(self) -> Theta:
        """The initialisation: the module's own online parameters."""
        parameters = dict(self.detector.named_parameters())
        return {name: parameters[name] for name in self.online}

    def call(self, theta: Theta, function: Callable, *args) -> Any:
        """function(detector, *args), the detector having theta for its online parameters."""
        return functional_call(self._callable[0], {f"module.{n}": p for n, p in theta.items()}, (function, *args))

    def objective(self, theta: Theta, data: Any) -> torch.Tensor:
        """L(data; theta), for a prepared set."""
        return self.call(theta, self.loss, data)

    def step(self, theta: Theta, support: Any, objective: Callable[[Theta, Any], torch.Tensor] | None = None) -> Theta:
        """theta_{j-1} -> theta_j = theta_{j-1} - alpha * grad L(Ds; theta_{j-1}), for a prepared support set.

        The first-order version takes the gradient for a constant. Without grad mode no graph is left behind.
        `objective` computes L in place of the method, such as a compiled one.
        """
        keep = self.second_order and torch.is_grad_enabled()
        at = theta if keep else {name: p.detach().requires_grad_() for name, p in theta.items()}
        with torch.enable_grad():
            loss = (objective or self.objective)(at, support)
            grads = torch.autograd.grad(loss, list(at.values()), create_graph=keep, allow_unused=True)
        return {
            name: p if grad is None else p - self.rates[_key(name)] * grad
            for (name, p), grad in zip(theta.items(), grads)
        }

    def adapt(
        self, support: Any, steps: int, theta: Theta | None = None,
        objective: Callable[[Theta, Any], torch.Tensor] | None = None,
    ) -> Theta:
        """GD_k on a prepared support set, from theta (default: theta_0); the result has no graph."""
        theta = {name: p.detach() for name, p in (theta or self.theta_0()).items()}
        with torch.no_grad():
            for _ in range(steps):
                theta = self.step(theta, support, objective)
        return theta

    def forward(self, support: Any, target: Any, gamma: torch.Tensor) -> torch.Tensor:
        """(k + 1,) losses on Dt after 0..k steps on Ds, where gamma (k + 1,) has a weight for each.

        (losses * gamma).sum() is the outer objective of one video. Losses of weight 0 are computed without a graph.
        With k = 0 this is plain detection training on Dt, and Ds is not looked at.
        """
        steps = len(gamma) - 1
        if steps:
            with torch.set_grad_enabled(self.second_order and torch.is_grad_enabled()):
                support = self.prepare(self.detector, support)
        target = self.prepare(self.detector, target)
        theta, losses = self.theta_0(), []
        for j, weighs in enumerate((gamma != 0).tolist()):
            if j:
                theta = self._run(self.step, theta, support)
            with torch.set_grad_enabled(weighs and torch.is_grad_enabled()):
                losses.append(self._run(self.objective, theta, target))
        return torch.stack(losses)

    def _run(self, function: Callable, *args) -> Any:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    def mean_rate(self) -> float:
        """Over all learned rates."""
        return torch.cat([rate.detach().flatten() for rate in self.rates.values()]).mean().item()

    @torch.no_grad()
    def clamp_rates(self) -> None:
        """After an outer step: a negative rate would climb the support loss."""
        for rate in self.rates.values():
            rate.clamp_(min=0)


def multi_step_weights(kind: MultiStep, steps: int, progress: float = 0.0) -> torch.Tensor:
    """gamma (steps + 1,), summing to 1.

    "uniform": 1 / (k + 1) each. "last": after the last step alone. "annealed", from "How to train your MAML": uniform
    at the start of training (`progress` 0), then shifted to the last step, where at its end (1) nearly all weight is.
    """
    if kind == "last":
        return torch.eye(steps + 1)[steps]
    floor = 0.03
    share = 1.0 if kind == "uniform" else max(1 - progress, floor)
    gamma = torch.full((steps + 1,), share / (steps + 1))
    gamma[-1] += 1 - share
    return gamma


def _key(name: str) -> str:
    return name.replace(".", "/")  # modules take no dots in the names of parameters


def _rate_shape(parameter: torch.Tensor, granularity: Granularity) -> tuple[int, ...]:
    """A filter is a row of the weight, with its bias."""
    if granularity == "per_tensor" or not parameter.ndim:
        return ()
    return (len(parameter), *(1,) * (parameter.ndim - 1))
