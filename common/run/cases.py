"""What a paper tells the tools that work across papers: ``papers/<name>/cases.py`` defines

    MODELS: dict[str, ModelCase]                   every public model, for the test of what holds for all
    def training_cost(recipe) -> TrainingCost      what training a recipe amounts to, for ``make plan``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelCase:
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
class TrainingCost:
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


@dataclass(frozen=True)
class Rehearsal:
    """A full-scale training as tools/rehearse.py walks through it."""

    train: Callable[..., Any]
    """The paper's own ``train(name, recipe, options, world)``."""
    recipe: Any
    """The recipe, without start weights that would have to be fetched."""
    samples: int
    """Of a real epoch."""
    gpus: int = 8
    """The paper's, or those of its scripts."""
    micro_batch: int = 0
    """Of the paper's scripts."""
    whole_steps: bool = False
    """The loop needs forward and backward to come to its end: then they run at every step that is looked at."""
