"""What the tools across papers need to know about SPACH (common/run/cases.py)."""

import timm
import torch
from torch import nn

from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from papers.spach.compare import member
from papers.spach.evaluate import build
from papers.spach.model import VARIANTS
from papers.spach.train import train

# Parameters for 32 x 32 images with 1000 classes. Spatial MLPs are smaller than at 224, where the counts are those of
# the authors' code (tests/test_model.py); the others are the same.
PARAMS = {
    "spach_xxs_patch16_224_conv": 7_828_840, "spach_xxs_patch16_224_attn": 3_931_048,
    "spach_xxs_patch16_224_mlp": 7_842_928, "spach_xs_patch16_224_conv": 14_975_848,
    "spach_xs_patch16_224_attn": 14_938_984, "spach_xs_patch16_224_mlp": 15_004_024,
    "spach_s_patch16_224_conv": 38_854_120, "spach_s_patch16_224_attn": 32_507_368,
    "spach_s_patch16_224_mlp": 38_891_512, "spach_ms_xxs_patch4_224_conv": 5_085_224,
    "spach_ms_xxs_patch4_224_attn": 2_372_744, "spach_ms_xxs_patch4_224_mlp": 5_094_372,
    "spach_ms_xs_patch4_224_conv": 17_302_120, "spach_ms_xs_patch4_224_attn": 14_479_080,
    "spach_ms_xs_patch4_224_mlp": 17_326_556, "spach_ms_s_patch4_224_conv": 43_576_168,
    "spach_ms_s_patch4_224_attn": 39_537_544, "spach_ms_s_patch4_224_mlp": 43_608_284,
    "spach_ms_xs_patch4_224_hybrid": 27_956_584, "spach_ms_s_patch4_224_hybrid": 63_028_584,
    "spach_ms_xs_patch4_224_hybrid_plus": 28_060_072, "spach_ms_s_patch4_224_hybrid_plus": 63_138_728,
    "spach_ms_micro_patch4_conv": 854_888, "spach_ms_micro_patch4_attn": 1_268_520,
    "spach_ms_micro_patch4_mlp": 856_944, "spach_ms_mini_patch4_64_hybrid": 2_139_784,
}
SAMPLES = {
    "digits": 1_437, "CIFAR-10": 50_000, "Imagenette": 9_469, "Tiny-ImageNet-100": 18_000, "ImageNet-1K": 1_281_167,
}
CLASSES = {"Tiny-ImageNet-100": 100, "ImageNet-1K": 1000}


def _build(name: str) -> nn.Module:
    model = timm.create_model(name, num_classes=1000, img_size=32)
    nn.init.normal_(model.head.fc.weight, std=0.02)  # it starts at zero, which would hide everything below it
    return model


MODELS = {
    name: ModelCase(
        build=lambda name=name: _build(name),
        inputs=lambda: (torch.randn(2, 3, 32, 32),),
        shape=(2, 1000),
        params=PARAMS[name],
        compile="micro" in name,
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    """Of a comparison: all its trainings with three seeds, the last network at the largest width standing for the
    others."""
    trainings = len(recipe.compare) * len(recipe.widths) * 3
    if trainings:
        recipe = member(recipe, recipe.compare[-1], max(recipe.widths))
    with torch.device("meta"):
        model = build(recipe, CLASSES.get(recipe.dataset, 10))
        image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
    return TrainingCost(model, (image,), SAMPLES[recipe.dataset], recipe.epochs * (trainings or 1), recipe.batch)


def rehearsal(recipe) -> Rehearsal:
    # DeiT's trainer: 5e-4 for 512 images, 1024 at once, 20 epochs of warm-up, from 1e-6 and down to 1e-5.
    return Rehearsal(train, recipe, SAMPLES[recipe.dataset], Curve(1e-3, warmup=20, start=1e-6, end=1e-5, epochs=300))
