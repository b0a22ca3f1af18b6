"""What the tools across papers need to know about MM-GEM (common/run/cases.py)."""

import torch

from common.run.cases import Curve, ModelCase, Parts, Rehearsal, TrainingCost
from common.run.hf import rates
from papers.mm_gem import build
from papers.mm_gem.contrastive import contrastive
from papers.mm_gem.data import Rows, open_captions, open_regions
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


MICRO_BATCH = 64  # of scripts/full.sh
MEAN_TOKENS = 40  # of a text [ours]


def rehearsal(recipe: Recipe) -> Rehearsal:
    """The schedules of this reproduction's sheet: the paper's are not at hand. FLOPs are counted by a mean text."""
    peak, warmup, epochs = (2e-5, 500, 3) if recipe.region_fraction else (1e-4, 2000, 1)
    curve = Curve(peak, warmup=warmup, in_steps=True, after_warmup=True, epochs=epochs)
    return Rehearsal(
        None, recipe, recipe.samples, curve, micro_batch=MICRO_BATCH, parts=lambda: _parts(recipe),
        opens=lambda root: Rows(
            open_captions(root, "train"), open_regions(root, "train") if recipe.region_fraction else []
        ),
        cost=MEAN_TOKENS / build.TEXT_TOKENS,
    )


def _parts(recipe: Recipe) -> Parts:
    """Both paths of MICRO_BATCH pairs and both terms of the loss."""
    model, (_, pixels) = build.on_meta(recipe)
    model.to(torch.bfloat16)
    if recipe.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = MICRO_BATCH
    batch = {
        "input_ids": torch.zeros(rows, 77, dtype=torch.long, device="meta"),
        "pixel_values": torch.empty(rows, *pixels.shape[1:], device="meta"),
    }

    def loss(network, batch):
        v, t, tokens = network(**batch)
        return sum(contrastive(v, t, network.model._bounded_log_scale().exp())) + tokens / batch["input_ids"].numel()

    steps = recipe.epochs * (recipe.samples // recipe.batch)
    return Parts(
        model.train(), batch, loss, steps,
        lambda step: rates([recipe.lr], recipe.schedule, recipe.warmup_steps, steps, step),
        zero=int(recipe.deepspeed[-1:] or 0),
    )
