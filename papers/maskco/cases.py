"""What the tools across papers need to know about MaskCo (common/run/cases.py)."""

from __future__ import annotations

import torch

from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from papers.maskco import probe, train
from papers.maskco.evaluate import build, inputs, region_boxes
from papers.maskco.model import LinearProbe, MaskCo, MoCoV2
from papers.maskco.recipes import Recipe

SAMPLES = {"digits": 1_437, "ImageNet-1K": 1_281_167, "COCO": 118_287, "Conceptual Captions": 3_318_333}


def _views(S: int = 64) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, S, S), torch.randn(2, 3, S, S)


def _boxes(S: int = 64) -> tuple[torch.Tensor, ...]:
    return region_boxes(2, 1, 2, S)


MODELS = {
    "maskco_resnet50": ModelCase(
        build=lambda: MaskCo(queue=61), inputs=lambda: (*_views(), *_boxes()), shape=(2, 64), params=34_789_568,
    ),
    "maskco_resnet10": ModelCase(
        build=lambda: MaskCo("resnet10_narrow", output_stride=8, mph_width=64, queue=61),
        inputs=lambda: (*_views(), *_boxes()), shape=(2, 64), params=448_352, compile=True,
    ),
    "moco_v2_resnet10": ModelCase(
        build=lambda: MoCoV2("resnet10_narrow", queue=61), inputs=_views, shape=(2, 62), params=357_600,
    ),
    "linear_resnet10": ModelCase(
        build=lambda: LinearProbe("resnet10_narrow", 32, 10), inputs=lambda: _views()[:1], shape=(2, 10), params=1_290,
    ),
}


def training_cost(recipe: Recipe) -> TrainingCost:
    with torch.device("meta"):
        model, sample = build(recipe, 1000), inputs(recipe)
    return TrainingCost(model, sample, SAMPLES.get(recipe.dataset, recipe.batch), recipe.epochs, recipe.batch)


def rehearsal(recipe: Recipe) -> Rehearsal:
    """MoCo's schedules; on COCO DenseCL's rate, on Conceptual Captions as many pictures as 200 epochs of ImageNet."""
    samples = SAMPLES[recipe.dataset]
    if recipe.method == "linear":
        return Rehearsal(probe.train, recipe, samples, Curve(30.0, "steps", drops=(60, 80), epochs=100))
    peak, epochs = (0.3, 800) if recipe.dataset == "COCO" else (0.03, round(200 * 1_281_167 / samples))
    return Rehearsal(train.train, recipe, samples, Curve(peak, epochs=epochs), whole_steps=True)
