"""What the tools across papers need to know about sMLPNet (common/run/cases.py)."""

import timm
import torch

from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from papers.smlpnet.evaluate import build
from papers.smlpnet.model import VARIANTS
from papers.smlpnet.train import train

# Parameters for 32 x 32 images with 1000 classes. The mixing matrices are smaller than at 224, where the counts are
# those of the authors' code (tests/test_model.py).
PARAMS = {
    "smlpnet_tiny": 24_092_504, "smlpnet_small": 48_519_808, "smlpnet_base": 65_842_080, "smlpnet_micro": 1_283_208,
    "smlpnet_mini": 2_166_340,
}
SAMPLES = {
    "digits": 1_437, "CIFAR-10": 50_000, "Imagenette": 9_469, "Tiny-ImageNet-100": 18_000, "ImageNet-1K": 1_281_167,
}
CLASSES = {"Tiny-ImageNet-100": 100, "ImageNet-1K": 1000}

MODELS = {
    name: ModelCase(
        build=lambda name=name: timm.create_model(name, num_classes=1000, img_size=32, drop_path_rate=0.0),
        inputs=lambda: (torch.randn(2, 3, 32, 32),),
        shape=(2, 1000),
        params=PARAMS[name],
        compile=name == "smlpnet_micro",
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    """Of a comparison: all its trainings with three seeds, the paper's mixing standing for the others."""
    with torch.device("meta"):
        model = build(recipe, CLASSES.get(recipe.dataset, 10))
        image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
    trainings = len(recipe.compare) * 3 or 1
    return TrainingCost(model, (image,), SAMPLES[recipe.dataset], recipe.epochs * trainings, recipe.batch)


def rehearsal(recipe) -> Rehearsal:
    # DeiT's trainer: 5e-4 for 512 images, 1024 at once, 20 epochs of warm-up, from 1e-6 and down to 1e-5.
    return Rehearsal(train, recipe, SAMPLES[recipe.dataset], Curve(1e-3, warmup=20, start=1e-6, end=1e-5, epochs=300))
