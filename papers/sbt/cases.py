"""What the tools across papers need to know about SBT (common/run/cases.py)."""

from dataclasses import replace

import timm
import torch

from common import run
from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from common.run.sweep import seeds_of
from papers.sbt import pretrain, train
from papers.sbt.evaluate import build, crop_shapes
from papers.sbt.model import VARIANTS, create_tracker
from papers.sbt.recipes import Pretrain

# Parameters of the tracking network and of the classifier with 1000 classes. Base, large and huge in tracking are
# counted on the authors' code; the others on ours (light's and small's classifiers are PVTv2-B1 and -B2).
PARAMS = {
    "sbt_light": (7_193_926, 14_009_000), "sbt_small": (15_374_918, 25_362_856), "sbt_base": (22_000_198, 31_988_136),
    "sbt_large": (35_250_758, 45_238_696), "sbt_huge": (52_568_134, 62_556_072), "sbt_micro": (513_878, 470_328),
}
# Training sequences and images of the data sets, for the length of an epoch.
IMAGES = {"digits": 1_437, "Imagenette": 9_469, "ImageNet-1K": 1_281_167}

MODELS = {
    name: ModelCase(
        build=lambda name=name: create_tracker(name, drop_path_rate=0.0),
        # The head fixes the search crop's size, not the template's.
        inputs=lambda: (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 256, 256)),
        shape=(2, 1024, 2),
        params=PARAMS[name][0],
        compile=name == "sbt_micro",
    )
    for name in VARIANTS
} | {
    f"{name}-classifier": ModelCase(
        build=lambda name=name: timm.create_model(name, drop_path_rate=0.0),
        inputs=lambda: (torch.randn(2, 3, 64, 64),),
        shape=(2, 1000),
        params=PARAMS[name][1],
        compile=name == "sbt_micro",
    )
    for name in VARIANTS
}


def training_cost(recipe) -> TrainingCost:
    """Of a comparison: all its trainings, the paper's network standing for the others."""
    with torch.device("meta"):
        if isinstance(recipe, Pretrain):
            classes = 1000 if recipe.dataset == "ImageNet-1K" else 10
            model = timm.create_model(recipe.model, num_classes=classes, **recipe.model_args)
            image = torch.empty(1, 3, recipe.input_size_px, recipe.input_size_px)
            return TrainingCost(model, (image,), IMAGES[recipe.dataset], recipe.epochs, recipe.batch)
        trainings = len(recipe.compare) * len(seeds_of(run.Options())) or 1
        epochs = recipe.epochs * trainings
        return TrainingCost(build(recipe), crop_shapes(recipe), recipe.pairs_per_epoch, epochs, recipe.batch)


def rehearsal(recipe) -> Rehearsal:
    if isinstance(recipe, Pretrain):
        curve = Curve(1e-3, warmup=5, start=1e-6, end=1e-5, epochs=300)
        return Rehearsal(pretrain.train, recipe, IMAGES[recipe.dataset], curve)
    # The authors' configurations, of 60,000 pairs an epoch: the base model 500, larger ones 300, on GOT-10k alone 100;
    # a drop after four fifths.
    epochs = 100 if recipe.dataset == "GOT-10k" else 500 if recipe.model == "sbt_base" else 300
    curve = Curve(1e-3, "steps", drops=(epochs * 4 // 5,), epochs=epochs)
    return Rehearsal(train.train, replace(recipe, init=None), 60_000, curve)
