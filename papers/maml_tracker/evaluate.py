"""Scores of a tracker: ``python -m papers.maml_tracker.evaluate CHECKPOINT --data FOLDER [--baselines]``.

CHECKPOINT is a run folder, or a file of weights with --recipe NAME.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.distributed as dist

from common import run
from common.data import loader, pairs
from common.metrics import trackers
from papers.maml_tracker.data import VideoSets, support_set, target_set
from papers.maml_tracker.maml import MAML, Granularity, MultiStep
from papers.maml_tracker.model import BACKBONES, HEADS, Detector
from papers.maml_tracker.recipes import RECIPES, Recipe
from papers.maml_tracker.tracker import MAMLTracker


def build(recipe: Recipe, *, imagenet: bool = False) -> MAML:
    """The recipe's detector, as what is meta-trained; with `imagenet` its backbone has ImageNet weights."""
    choices = (
        (recipe.backbone, BACKBONES), (recipe.head, HEADS), (recipe.granularity, get_args(Granularity)),
        (recipe.multi_step, get_args(MultiStep)), (recipe.speed, ("eager", "compile")),
    )
    for value, known in choices:
        if value not in known:
            raise run.UserError(f"no {value!r}; there are {', '.join(known)}")
    backbone = BACKBONES[recipe.backbone](imagenet)
    size = {"width": recipe.head_width, "depth": recipe.head_depth}
    detector = Detector(backbone, HEADS[recipe.head], recipe.crop_px, recipe.anchor_px, **size)
    return MAML(
        detector, Detector.loss, detector.online(), prepare=Detector.prepare, rate=recipe.rate,
        granularity=recipe.granularity, second_order=recipe.second_order, checkpointing=recipe.checkpointing,
    )


def validate(
    maml: MAML, data: pairs.Data, recipe: Recipe, world: run.World, workers: int = 0, steps: int | None = None
) -> list[float]:
    """Mean losses on the target images of all validation pairs after 0..k gradient steps on their support sets; k is
    `steps`, or the recipe's on the first frame. The pairs are the same every time; in all of them the target is there.
    Nothing where there are none."""
    if not (data.test and recipe.val_pairs):
        return []
    maml.eval()
    samples = pairs.Pairs(
        {"test": data.test}, VideoSets(recipe), length=recipe.val_pairs, max_gap=recipe.max_gap, limit=0
    )
    mine = range(world.rank, len(samples), world.size)
    batches = torch.utils.data.DataLoader(samples, batch_sampler=[[(i, i)] for i in mine], num_workers=workers)
    gamma = torch.ones((recipe.first_steps if steps is None else steps) + 1)
    total = torch.zeros(len(gamma), device=world.device, dtype=torch.float64)
    for batch in loader.progress(batches, "validating", active=world.is_main):
        support, target = support_set(batch, 0, world.device), target_set(batch, slice(0, 1), world.device)
        with torch.no_grad(), world.autocast():
            total += maml(support, target, gamma)
    if world.size > 1:
        dist.all_reduce(total)
    return (total / len(samples)).tolist()


PAPER = trackers.Paper(name="maml_tracker", recipes=RECIPES, build=build, make_tracker=MAMLTracker)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
