"""What the tools across papers need to know about MM-GEM (common/run/cases.py)."""

import torch

from common.run.cases import ModelCase, TrainingCost
from papers.mm_gem import build
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.recipes import RECIPES, Recipe


def _inputs() -> tuple[torch.Tensor, ...]:
    ids = torch.randint(4, 40, (2, 9))
    ids[:, -1] = build.blueprint(RECIPES["tiny"]).emb_token_id
    return ids, torch.randn(2, 3, build.TINY_SIDE_PX, build.TINY_SIDE_PX)


MODELS = {
    "tiny": ModelCase(
        build=lambda: MMGEMModel(build.blueprint(RECIPES["tiny"])), inputs=_inputs, shape=(), params=195_649
    ),
}


def training_cost(recipe: Recipe) -> TrainingCost:
    """A sample is an image and `build.TEXT_TOKENS` of text."""
    model, inputs = build.on_meta(recipe)
    epochs = -(-recipe.steps // max(1, recipe.samples // recipe.batch)) if recipe.steps else recipe.epochs
    return TrainingCost(model, inputs, recipe.samples, epochs, recipe.batch)
