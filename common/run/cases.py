"""What a paper tells the tools that work across papers: ``papers/<name>/cases.py`` defines

    MODELS: dict[str, ModelCase]                   every public model, for the test of what holds for all
    def training_cost(recipe) -> TrainingCost      what training a recipe amounts to, for ``make plan``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
class Parts:
    """A step of a training whose loop is transformers' Trainer's: what that is handed, on the meta device."""

    model: torch.nn.Module
    """In training mode, gradient checkpointing and frozen parameters as in the training."""
    batch: dict[str, torch.Tensor]
    """A micro-batch, its texts as long as they may be."""
    loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    steps: int
    rates: Callable[[int], list[float]]
    """Learning rates of the optimizer's groups, by the step."""
    zero: int = 0
    """DeepSpeed's stage: 2 shares gradients and the optimizer's states between the GPUs, 3 the weights, too."""


@dataclass(frozen=True)
class Curve:
    """A learning rate as the paper tells it, written down apart from the recipe: what tools/rehearse compares with."""

    peak: float
    kind: Literal["cosine", "steps", "constant"] = "cosine"
    warmup: float = 0
    """Length of the linear warm-up: epochs, or steps if `in_steps`."""
    in_steps: bool = False
    start: float = 0.0
    """Rate that the warm-up begins with."""
    drops: tuple[int, ...] = ()
    """Epochs after which the rate is a tenth of what it was."""
    end: float = 0.0
    """Rate that the cosine ends in."""
    after_warmup: bool = False
    """The cosine begins at the warm-up's end (transformers'), and not at step 0 (DeiT's)."""
    epochs: int = 0
    """Of the whole training; 0: not checked."""


@dataclass(frozen=True)
class Rehearsal:
    """A full-scale training as tools/rehearse walks through it."""

    train: Callable[..., Any] | None
    """The paper's own ``train(name, recipe, options, world)``; None: `parts` stand for it."""
    recipe: Any
    """The recipe, without start weights that would have to be fetched."""
    samples: int
    """Of a real epoch."""
    curve: Curve
    """Of the first group of parameters."""
    gpus: int = 8
    """The paper's, or those of its scripts."""
    micro_batch: int = 0
    """Of the paper's scripts."""
    whole_steps: bool = False
    """The loop needs forward and backward to come to its end: then they run at every step that is looked at."""
    parts: Callable[[], Parts] | None = None
    opens: Callable[[Path], Any] | None = None
    """Opens the training data where `train` is not called."""
    cost: float = 1.0
    """Multiply-adds of a sample's forward pass over those of the sample that `training_cost` counts."""
