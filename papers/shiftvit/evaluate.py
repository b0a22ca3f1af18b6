"""Top-1 and top-5 of a checkpoint: ``python -m papers.shiftvit.evaluate CHECKPOINT --recipe NAME --data FOLDER``.

CHECKPOINT is a run folder, or a file of weights: ours, or the authors' as published.
"""

from __future__ import annotations

import timm
import torch

from common import run
from common.metrics import classification
from papers.shiftvit.model import VARIANTS, ShiftViT, checkpoint_filter_fn
from papers.shiftvit.recipes import RECIPES, Recipe


def build(recipe: Recipe, classes: int) -> torch.nn.Module:
    """The recipe's model."""
    if not timm.is_model(recipe.model):
        raise run.UserError(f"timm knows no model {recipe.model!r}; ours are {', '.join(VARIANTS)}")
    model = timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)
    if isinstance(model, ShiftViT) and recipe.input_size_px < (stride := model.feature_info[-1]["reduction"]):
        raise run.UserError(
            f"--input-size-px {recipe.input_size_px}: {recipe.model} needs at least {stride} px, its last stride"
        )
    return model


PAPER = classification.Paper("shiftvit", RECIPES, build, checkpoint_filter_fn)

if __name__ == "__main__":
    run.main(lambda: classification.main(PAPER))
