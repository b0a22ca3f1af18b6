"""What the tools across papers need to know about Retina-MAML and FCOS-MAML (common/run/cases.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from common.run import Options
from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from common.run.sweep import seeds_of
from papers.maml_tracker.data import zooms
from papers.maml_tracker.evaluate import build
from papers.maml_tracker.recipes import RECIPES, Recipe, members
from papers.maml_tracker.train import train

# Learnable elements of the detectors; batch normalisation is frozen in ResNet-18 and EfficientNet-Lite0.
PARAMS = {
    ("retina", "resnet18"): 6_330_309, ("fcos", "resnet18"): 6_332_615, ("retina", "narrow"): 105_621,
    ("fcos", "narrow"): 105_911, ("retina", "efficientnet_lite0"): 311_877,
    ("retina", "lite0_levels"): 792_165,
}


def _detector(head: str, backbone: str) -> ModelCase:
    recipe = replace(RECIPES["tiny" if backbone != "resnet18" else "retina"], head=head, backbone=backbone, crop_px=63)
    return ModelCase(
        build=lambda: build(recipe).detector, inputs=lambda: (torch.randint(256, (2, 3, 63, 63)).to(torch.uint8),),
        shape=(2, 64, 5 if head == "retina" else 6), params=PARAMS[head, backbone], compile=backbone == "narrow",
    )


MODELS = {f"{head}_{backbone}": _detector(head, backbone) for head, backbone in PARAMS}


def training_cost(recipe: Recipe) -> TrainingCost:
    """Of a comparison: all its trainings, with three seeds. A sample is a pair, as many crops as the detector sees of
    it on average, rounded up. The gradients of gradients are not in it; bench.py measures what they cost."""
    trainings = [*members(recipe).values()] * len(seeds_of(Options())) or [recipe]
    epochs = [(each.detection_epochs, 1) for each in trainings] + [(each.epochs, _crops(each)) for each in trainings]
    total = sum(count for count, _ in epochs)
    crops = math.ceil(sum(count * each for count, each in epochs) / total)
    detector = build(recipe).detector.to("meta")  # made on the CPU: anchors are computed, not declared
    images = torch.empty(crops, 3, recipe.crop_px, recipe.crop_px, device="meta")
    return TrainingCost(detector, (images,), recipe.pairs_per_epoch, total, recipe.batch)


def _crops(recipe: Recipe) -> int:
    """In one video's outer step: the support set in each gradient step, the target image before and after each."""
    return recipe.inner_steps * (len(zooms(recipe)) + 1) + 1


def rehearsal(recipe: Recipe) -> Rehearsal:
    """Of meta-training, which begins after 5 epochs of detection: 20 epochs of 60,000 pairs."""
    curve = Curve(0.01, "steps", drops=(15, 20), epochs=25)
    return Rehearsal(train, replace(recipe, imagenet=False), 60_000, curve, whole_steps=True)
