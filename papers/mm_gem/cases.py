"""What the tools across papers need to know about MM-GEM (common/run/cases.py)."""

import torch
from torch import nn

from common.run.cases import ModelCase, TrainingCost
from papers.mm_gem import parts
from papers.mm_gem.model import MMGEMModel
from papers.mm_gem.recipes import RECIPES

TEXT_TOKENS = 32


def _inputs() -> tuple[torch.Tensor, ...]:
    ids = torch.randint(4, 40, (2, 9))
    ids[:, -1] = parts.blueprint(RECIPES["tiny"]).emb_token_id
    return ids, torch.randn(2, 3, parts.TINY_SIDE_PX, parts.TINY_SIDE_PX)


MODELS = {
    "tiny": ModelCase(
        build=lambda: MMGEMModel(parts.blueprint(RECIPES["tiny"])), inputs=_inputs, shape=(), params=195_649
    ),
}


class Pass(nn.Module):
    """Both paths of a pair, without the checks and the pooling, which look at values: a meta tensor has none."""

    def __init__(self, model: MMGEMModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values):
        end = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        g = self.model.config.grid
        cells = self.model.feature_map(pixel_values)[:, :, :1, :1].expand(-1, -1, g, g)
        v, t = self.model._image_embedding(cells), self.model._text_embedding(input_ids, end)
        return v, t, self.model._caption_loss(cells, input_ids, end)


def training_cost(recipe) -> TrainingCost:
    """A sample is an image and `TEXT_TOKENS` of text, which pass the LLM twice, once with the visual tokens.

    Attention is the eager one, since SDPA's masks look at values.
    """
    with torch.device("meta"):
        model = MMGEMModel._from_config(parts.blueprint(recipe), attn_implementation="eager")
        parts.choose_trained(model, recipe)
        side = getattr(model.config.vision_config, "image_size", 224)
        inputs = torch.zeros(1, TEXT_TOKENS, dtype=torch.long), torch.empty(1, 3, side, side)
    epochs = -(-recipe.steps // max(1, recipe.samples // recipe.batch)) if recipe.steps else recipe.epochs
    return TrainingCost(Pass(model), inputs, recipe.samples, epochs, recipe.batch)
