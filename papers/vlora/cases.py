"""What the tools across papers need to know about VLoRA (common/run/cases.py)."""

import torch
from torch import nn

from common.run.cases import ModelCase, TrainingCost
from papers.vlora import build
from papers.vlora.recipes import RECIPES, SAMPLES, Recipe


def _build(name: str) -> nn.Module:
    recipe = RECIPES[name]
    _, kind = build.METHODS[recipe.method]
    model = kind(build.blueprint(recipe))
    for key, parameter in model.named_parameters():
        if ".B_" in key:  # they start at zero, which would hide everything before them
            nn.init.normal_(parameter, std=0.02)
    return model


def _inputs() -> tuple[torch.Tensor, ...]:
    ids = torch.randint(4, 64, (2, 9))
    ids[:, 1] = 3
    return ids, torch.randn(2, 3, build.TINY_SIDE_PX, build.TINY_SIDE_PX)


MODELS = {
    "tiny": ModelCase(build=lambda: _build("tiny"), inputs=_inputs, shape=(2, 9, 64), params=1_036_544),
    "tiny_tokens": ModelCase(build=lambda: _build("tiny_tokens"), inputs=_inputs, shape=(2, 9, 64), params=197_312),
}


def training_cost(recipe: Recipe) -> TrainingCost:
    """A sample is an image and `build.TEXT_TOKENS` of text; conversations of the mixture are longer."""
    model, inputs = build.on_meta(recipe)
    samples = SAMPLES[recipe.dataset]
    per_epoch = max(1, samples // recipe.batch)
    epochs = -(-recipe.steps // per_epoch) if recipe.steps else recipe.epochs
    return TrainingCost(model, inputs, samples, epochs, recipe.batch)
