"""What the tools across papers need to know about VLoRA (common/run/cases.py)."""

import torch
from torch import nn

from common.run.cases import Curve, ModelCase, Parts, Rehearsal, TrainingCost
from common.run.hf import rates
from papers.vlora import build
from papers.vlora.data import open_dataset
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


# Tokens of a sample's text: a caption of CapsFusion, and a conversation of LLaVA-1.5's mixture, on average [ours].
MEAN_TOKENS = {"CapsFusion-30M": 40, "LLaVA-1.5 mixture": 384}
LONGEST = {"CapsFusion-30M": 128}  # of the captions; conversations are cut at max_length


def rehearsal(recipe: Recipe) -> Rehearsal:
    """The authors' schedules: one epoch at 5e-5 or 2e-5, cosine after 3 % of warm-up; LLaVA's first stage 1e-3, with
    LoRA 2e-4. Of a sample FLOPs are counted by its mean text, memory by the longest."""
    peak = 5e-5 if recipe.stage == "pretrain" else 2e-5
    peak = 1e-3 if recipe.stage == "pretrain" and recipe.method == "tokens" else peak
    peak = 2e-4 if recipe.tune == "lora" else peak
    steps = SAMPLES[recipe.dataset] // (768 if recipe.stage == "pretrain" else 128)
    curve = Curve(peak, warmup=round(0.03 * steps), in_steps=True, after_warmup=True, epochs=1)
    return Rehearsal(
        None, recipe, SAMPLES[recipe.dataset], curve, micro_batch=32 if recipe.stage == "pretrain" else 16,
        parts=lambda: _parts(recipe),
        opens=lambda root: open_dataset(root, "train", recipe),
        cost=MEAN_TOKENS.get(recipe.dataset, build.TEXT_TOKENS) / build.TEXT_TOKENS,
    )


def _parts(recipe: Recipe) -> Parts:
    with torch.device("meta"):
        _, kind = build.METHODS[recipe.method]
        model = kind(build.blueprint(recipe)).to(torch.bfloat16)
    build.choose_trained(model, recipe)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    rows, length = 32 if recipe.stage == "pretrain" else 16, LONGEST.get(recipe.dataset, recipe.max_length)
    side = model.config.vision_config.image_size
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.empty(rows, 3, side, side, device="meta")}
    steps = recipe.epochs * (SAMPLES[recipe.dataset] // recipe.batch)
    return Parts(
        model.train(), batch, lambda network, rows: network(**rows).loss, steps,
        lambda step: rates([recipe.lr], recipe.schedule, round(recipe.warmup_ratio * steps), steps, step),
        zero=int(recipe.deepspeed[-1:] or 0),
    )
