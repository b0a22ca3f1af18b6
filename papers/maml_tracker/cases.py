"""What the tools across papers need to know about Retina-MAML and FCOS-MAML (common/run/cases.py)."""

from __future__ import annotations

from dataclasses import replace

import torch

from common.run.cases import ModelCase, TrainingCost
from papers.maml_tracker.data import zooms
from papers.maml_tracker.model import build
from papers.maml_tracker.recipes import RECIPES, Recipe

# Learnable elements of the detectors; batch normalisation is frozen in ResNet-18 and EfficientNet-Lite0.
PARAMS = {
    ("retina", "resnet18"): 6_330_309, ("fcos", "resnet18"): 6_332_615, ("retina", "narrow"): 105_621,
    ("fcos", "narrow"): 105_911, ("retina", "efficientnet_lite0"): 311_877,
}


def _detector(head: str, backbone: str) -> ModelCase:
    recipe = replace(RECIPES["tiny" if backbone != "resnet18" else "retina"], head=head, backbone=backbone, crop_px=63)
    return ModelCase(
        build=lambda: build(recipe).detector, inputs=lambda: (torch.randint(256, (2, 3, 63, 63)).to(torch.uint8),),
        shape=(2, 64, 5 if head == "retina" else 6), params=PARAMS[head, backbone], compile=backbone == "narrow",
    )


MODELS = {f"{head}_{backbone}": _detector(head, backbone) for head, backbone in PARAMS}


def training_cost(recipe: Recipe) -> TrainingCost:
    """The crops that the detector sees in one video's outer step: the support set in each gradient step, the target
    image before and after each. The gradients of gradients are not in it; bench.py measures what they cost."""
    detector = build(recipe).detector.to("meta")  # made on the CPU: anchors are computed, not declared
    crops = recipe.inner_steps * (len(zooms(recipe)) + 1) + 1
    images = torch.empty(crops, 3, recipe.crop_px, recipe.crop_px, device="meta")
    return TrainingCost(detector, (images,), recipe.pairs_per_epoch, recipe.epochs, recipe.batch)
