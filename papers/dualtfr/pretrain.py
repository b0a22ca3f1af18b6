"""Trains a branch as an image classifier, to start a tracker from: ``python -m papers.dualtfr.train pretrain``.

The exported model is timm's to load; a tracker's recipe takes the run folder as its `weights`.
``python -m papers.dualtfr.pretrain CHECKPOINT --data FOLDER`` gives the accuracy of a run or of a file of weights.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from common import classifier, run
from common.metrics import classification
from papers.dualtfr.model import VARIANTS
from papers.dualtfr.recipes import RECIPES, Pretrain


def build(recipe: Pretrain, classes: int) -> torch.nn.Module:
    """The recipe's classifier, at random."""
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    return timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)


PAPER = classification.Paper(
    "dualtfr", {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Pretrain)}, build,
    lambda weights, _model: weights,
)


def train(name: str, recipe: Pretrain, options: run.Options, world: run.World) -> Path:
    """Trains, evaluates and reports one classifier; returns its folder."""
    return classifier.train("dualtfr", name, recipe, options, world, build, warmup_lr=recipe.warmup_lr)


if __name__ == "__main__":
    run.main(lambda: classification.main(PAPER))
