"""What the tools across papers need to know about VLoRA (common/run/cases.py)."""

import copy

import torch
from torch import nn

from common.run.cases import ModelCase, TrainingCost
from papers.vlora import parts
from papers.vlora.recipes import RECIPES
from papers.vlora.train import choose_trained

TEXT_TOKENS = 32
SAMPLES = {"scenes": 4_000, "COCO captions": 239, "CapsFusion-30M": 30_000_000, "LLaVA-1.5 mixture": 665_298}


def _build(name: str) -> nn.Module:
    recipe = RECIPES[name]
    _, kind = parts.METHODS[recipe.method]
    model = kind(parts.blueprint(recipe))
    for key, parameter in model.named_parameters():
        if ".B_" in key:  # they start at zero, which would hide everything before them
            nn.init.normal_(parameter, std=0.02)
    return model


def _inputs() -> tuple[torch.Tensor, ...]:
    ids = torch.randint(4, 64, (2, 9))
    ids[:, 1] = 3
    return ids, torch.randn(2, 3, parts.TINY_SIDE_PX, parts.TINY_SIDE_PX)


MODELS = {
    "tiny": ModelCase(build=lambda: _build("tiny"), inputs=_inputs, shape=(2, 9, 64), params=1_036_544),
    "tiny_tokens": ModelCase(build=lambda: _build("tiny_tokens"), inputs=_inputs, shape=(2, 9, 64), params=197_312),
}


def training_cost(recipe) -> TrainingCost:
    """A sample is an image and `TEXT_TOKENS` of text; conversations of the mixture are longer.

    Attention is the eager one, since SDPA's masks look at values, which a meta tensor has not.
    """
    _, kind = parts.METHODS[recipe.method]
    with torch.device("meta"):
        config = copy.deepcopy(parts.blueprint(recipe))
        config.text_config._attn_implementation = "eager"
        model = kind(config)
        choose_trained(model, recipe)
        vision = model.config.vision_config
        side = getattr(vision, "image_size", 224)
        inputs = torch.zeros(1, TEXT_TOKENS, dtype=torch.long), torch.empty(1, 3, side, side)
    samples = SAMPLES[recipe.dataset]
    epochs = -(-recipe.steps // (samples // recipe.batch)) if recipe.steps else recipe.epochs
    return TrainingCost(model, inputs, samples, epochs, recipe.batch)
