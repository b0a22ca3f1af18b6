"""What the tools across papers need to know about DualTFR (common/run/cases.py)."""

from dataclasses import replace

import timm
import torch
from torch import nn

from common import run
from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from common.run.sweep import seeds_of
from papers.dualtfr import pretrain, train
from papers.dualtfr.evaluate import build, crop_shapes
from papers.dualtfr.model import VARIANTS, DualTFR, create_tracker
from papers.dualtfr.recipes import Pretrain

CLASSES = {"Tiny-ImageNet-100": 100, "ImageNet-1K": 1000}
# Of a pre-training; pairs are drawn.
SAMPLES = {"digits": 1_437, "Imagenette": 9_469, "Tiny-ImageNet-100": 18_000, "ImageNet-1K": 1_281_167}


class Joined(nn.Module):
    """A tracker's network whose answer is one tensor, (B, N, 6): logits and boxes side by side."""

    def __init__(self, pair: DualTFR):
        super().__init__()
        self.pair = pair

    def forward(self, template, search):
        return torch.cat(self.pair(template, search), -1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.pair.set_grad_checkpointing(enable)


# The branches as classifiers with 1000 classes, and the trackers; crops of half the usual side for the large one.
PARAMS = {"dualtfr": (12_577_330, 19_883_856), "dualtfr_micro": (166_566, 252_484)}
CROPS = {"dualtfr": (64, 112), "dualtfr_micro": (32, 64)}
MODELS = {
    name: ModelCase(
        build=lambda name=name: timm.create_model(name, drop_path_rate=0.0),
        inputs=lambda: (torch.randn(2, 3, 64, 64),), shape=(2, 1000), params=PARAMS[name][0],
        compile=name == "dualtfr_micro",  # of the tracker a test captures the graph; compiling it takes minutes
    )
    for name in VARIANTS
} | {
    f"{name}_tracker": ModelCase(
        build=lambda name=name: Joined(create_tracker(name, drop_path_rate=0.0)),
        inputs=lambda name=name: tuple(torch.randn(2, 3, side, side) for side in CROPS[name]),
        shape=(2, 49 if name == "dualtfr" else 64, 6), params=PARAMS[name][1],
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    """Of a comparison: all its trainings, the reconstruction standing for the others."""
    with torch.device("meta"):
        if isinstance(recipe, Pretrain):
            model = pretrain.build(recipe, CLASSES.get(recipe.dataset, 10))
            image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
            return TrainingCost(model, (image,), SAMPLES[recipe.dataset], recipe.epochs, recipe.batch)
        trainings = len(recipe.compare) * len(seeds_of(run.Options())) or 1
        epochs = recipe.epochs * trainings
        return TrainingCost(build(recipe), crop_shapes(recipe), recipe.pairs_per_epoch, epochs, recipe.batch)


def rehearsal(recipe) -> Rehearsal:
    if isinstance(recipe, Pretrain):
        curve = Curve(1e-3, warmup=20, start=5e-7, end=5e-6, epochs=300)  # Swin's
        return Rehearsal(pretrain.train, recipe, SAMPLES[recipe.dataset], curve)
    # As SBT trains: 500 epochs of 60,000 pairs and a drop after 400; on GOT-10k alone 100 and 80.
    epochs = 100 if recipe.dataset == "GOT-10k" else 500
    curve = Curve(1e-3, "steps", drops=(epochs * 4 // 5,), epochs=epochs)
    return Rehearsal(train.train, replace(recipe, init=None), 60_000, curve)
