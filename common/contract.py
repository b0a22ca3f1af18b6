"""What a paper tells the tools that work across papers: ``papers/<name>/contract.py`` defines

    MODELS: dict[str, Model]                       every public model, for the contract test
    def workload(recipe) -> Workload               what training a recipe amounts to, for ``make plan``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """A public model and what holds for it, at a size small enough for a CPU."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    """Arguments of forward: a batch of two samples."""
    shape: tuple[int, ...]
    """Shape of the output (of its first tensor, if there are several)."""
    params: int
    """Learnable elements of the model that `build` makes, shared ones once."""
    compile: bool = False
    """Also hold torch.compile(fullgraph=True) to the eager result (slow: one per kind of model)."""


@dataclass(frozen=True)
class Workload:
    """One training."""

    model: torch.nn.Module
    """On the meta device: nothing is allocated."""
    inputs: tuple[torch.Tensor, ...]
    """Arguments of forward for one sample, on the meta device."""
    samples: int
    """Training samples of an epoch."""
    epochs: int
    batch: int
    """Global batch."""
