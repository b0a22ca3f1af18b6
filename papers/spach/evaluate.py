"""Top-1 and top-5 of a checkpoint: ``python -m papers.spach.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

import timm
import torch

from common import run
from common.metrics import classification
from papers.spach.model import VARIANTS, checkpoint_filter_fn
from papers.spach.recipes import RECIPES, Recipe


def build(recipe: Recipe, classes: int) -> torch.nn.Module:
    """The recipe's model, for as many tokens as the recipe's images make."""
    if not timm.is_model(recipe.model):
        raise run.UserError(f"timm knows no model {recipe.model!r}; ours are {', '.join(VARIANTS)}")
    size = recipe.input_size_px
    try:
        return timm.create_model(recipe.model, num_classes=classes, img_size=size, **recipe.model_args)
    except (TypeError, ValueError) as error:
        args = "".join(f", {key}={value}" for key, value in recipe.model_args.items())
        raise run.UserError(f"cannot build {recipe.model} for {size} px{args}: {error}") from None


PAPER = classification.Paper("spach", RECIPES, build, checkpoint_filter_fn)

if __name__ == "__main__":
    run.main(lambda: classification.main(PAPER))
