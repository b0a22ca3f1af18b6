"""Trains the single-image path as a classifier to start trackers from: ``python -m papers.sbt.train pretrain_tiny``.

All four stages train; ``--weights RUN`` of a tracking recipe then takes the first three (official.load_backbone). The
run's model/ is a timm model: ``timm.create_model("local-dir:RUN/model", pretrained=True, features_only=True)``.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from common import classifier, run
from papers.sbt.model import VARIANTS
from papers.sbt.recipes import Pretrain


def build(recipe: Pretrain, classes: int) -> torch.nn.Module:
    """The recipe's classifier, at random."""
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    return timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)


def train(name: str, recipe: Pretrain, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one classifier; returns its folder."""
    return classifier.train("sbt", name, recipe, options, world, build, warmup_lr=1e-6)
