"""What the tools across papers need to know about ShiftViT (common/run/cases.py)."""

import timm
import torch

from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from papers.shiftvit.model import VARIANTS
from papers.shiftvit.train import train

# Parameters with 1000 classes, counted on the authors' code; the micro and mini models on ours.
PARAMS = {
    "shiftvit_light_tiny": 19_608_328, "shiftvit_r2_tiny": 28_566_664, "shiftvit_r4_tiny": 31_426_312,
    "shiftvit_light_small": 33_796_360, "shiftvit_r2_small": 50_304_136, "shiftvit_r4_small": 51_523_336,
    "shiftvit_light_base": 59_708_776, "shiftvit_r2_base": 89_026_408, "shiftvit_r4_base": 87_271_528,
    "shiftvit_micro": 914_536, "shiftvit_mini": 1_897_064,
}
SAMPLES = {
    "digits": 1_437, "CIFAR-10": 50_000, "Imagenette": 9_469, "Tiny-ImageNet-100": 18_000, "ImageNet-1K": 1_281_167,
}
CLASSES = {"Tiny-ImageNet-100": 100, "ImageNet-1K": 1000}

MODELS = {
    name: ModelCase(
        build=lambda name=name: timm.create_model(name, num_classes=1000, drop_path_rate=0.0),
        inputs=lambda: (torch.randn(2, 3, 32, 32),),
        shape=(2, 1000),
        params=PARAMS[name],
        compile=name == "shiftvit_micro",
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    """Of a comparison: all its trainings with three seeds, the shift standing for the others."""
    with torch.device("meta"):
        model = timm.create_model(recipe.model, num_classes=CLASSES.get(recipe.dataset, 10), **recipe.model_args)
        image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
    trainings = len(recipe.compare) * 3 or 1
    return TrainingCost(model, (image,), SAMPLES[recipe.dataset], recipe.epochs * trainings, recipe.batch)


def rehearsal(recipe) -> Rehearsal:
    # DeiT's trainer: 5e-4 for 512 images, 1024 at once, 20 epochs of warm-up, from 1e-6 and down to 1e-5.
    return Rehearsal(train, recipe, SAMPLES[recipe.dataset], Curve(1e-3, warmup=20, start=1e-6, end=1e-5, epochs=300))
