"""What the tools across papers need to know about CtP (common/run/cases.py)."""

from __future__ import annotations

import torch

from common.run.cases import Curve, ModelCase, Rehearsal, TrainingCost
from papers.ctp import baselines
from papers.ctp.evaluate import build, inputs
from papers.ctp.model import CtP, Recognizer
from papers.ctp.recipes import Recipe
from papers.ctp.train import train

SAMPLES = {  # training videos of an epoch
    "clips": 288, "UCF101": 9_537, "HMDB51": 3_570, "Something-Something v1": 86_017, "Kinetics-400": 240_436,
}
CLASSES = {"UCF101": 101, "HMDB51": 51, "Something-Something v1": 174}


def _clip(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 16, 32, 32)


def _query(B: int) -> torch.Tensor:
    return torch.tensor([[2.0, 3, 17, 21], [9, 1, 30, 12], [5, 5, 9, 30]]).expand(B, 3, 4)


def _started(model: torch.nn.Module) -> torch.nn.Module:
    """With last layers that start near zero grown, which would hide everything below them."""
    for name, parameter in model.named_parameters():
        if name in ("fc.weight", "head.fc1.weight", "head.fc2.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


MODELS = {
    **{
        f"ctp_{net}": ModelCase(
            build=lambda net=net: _started(CtP(net)), inputs=lambda: (_clip(2, 3), _query(2)), shape=(2, 3, 16, 4),
            params=params, compile=net == "r3d18",
        )
        for net, params in (("r3d18", 40_278_016), ("r2plus1d18", 40_277_383))
    },
    **{
        f"recognizer_{net}": ModelCase(
            build=lambda net=net: _started(Recognizer(net)), inputs=lambda: (_clip(2, 3),), shape=(2, 101),
            params=params,
        )
        for net, params in (("r3d18", 33_218_085), ("r2plus1d18", 33_217_452))
    },
    "vcop_r3d18": ModelCase(
        build=lambda: baselines.VCOP(width=16), inputs=lambda: (_clip(2, 3, 3),), shape=(2, 6), params=2_115_190,
    ),
    "moco_r3d18": ModelCase(
        build=lambda: baselines.MoCo(width=16, queue=64), inputs=lambda: (_clip(2, 2, 3),), shape=(2, 65),
        params=2_113_008,
    ),
}


def training_cost(recipe: Recipe) -> TrainingCost:
    """Of a comparison: one of its trainings."""
    with torch.device("meta"):
        model, sample = build(recipe, CLASSES.get(recipe.dataset, 8)), inputs(recipe)
    return TrainingCost(model, sample, SAMPLES.get(recipe.dataset, recipe.batch), recipe.epochs, recipe.batch)


def rehearsal(recipe: Recipe) -> Rehearsal:
    """The curves are those of the authors' configurations."""
    if recipe.method == "recognize":
        small = Curve(0.01, "steps", drops=(60, 120), epochs=150)
        ssv1 = Curve(0.01, "steps", warmup=1000, in_steps=True, start=0.001, drops=(40, 60, 80), epochs=90)
        curve = ssv1 if recipe.dataset == "Something-Something v1" else small
    elif recipe.method == "moco":
        curve = Curve(0.01, epochs=90)
    else:
        peak, drops, epochs = 0.001 if recipe.method == "vcop" else 0.01, (30, 60), 90
        curve = Curve(peak, "steps", drops=drops, epochs=epochs)
        if recipe.dataset == "UCF101":
            curve = Curve(peak, "steps", drops=(100, 200), epochs=300)
    return Rehearsal(train, recipe, SAMPLES[recipe.dataset], curve, whole_steps=recipe.method == "moco")
