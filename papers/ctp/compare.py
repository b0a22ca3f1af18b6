"""What pre-training is worth where motion counts: CtP against its ablations, the baselines, and none at all, under one
recipe: ``python -m papers.ctp compare --data FOLDER``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from common import run
from papers.ctp import evaluate, motion
from papers.ctp.official import load_backbone
from papers.ctp.recipes import BASELINES, Recipe

# What each member changes in the pre-training; "random" has none.
MEMBERS: dict[str, dict[str, Any] | None] = {
    "ctp": {}, "ctp_one_patch": {"patches": 1}, "ctp_never_hidden": {"visible": 1.0}, **BASELINES, "random": None,
}
COLUMNS = {
    "camera_direction": run.Column("camera: direction, %"), "camera_speed": run.Column("speed, %"),
    "object_direction": run.Column("object: direction, %"), "object_speed": run.Column("speed, %"),
    "order": run.Column("order, %"), "camera_shuffled": run.Column("camera's direction, frames shuffled, %"),
    "object_shuffled": run.Column("object's, %"), "finetune_top1": run.Column("fine-tuned, %"),
    "own_top1": run.Column("own task, %"), "iou": run.Column("IoU", "IoU", 3),
    "iou_hidden": run.Column("IoU hidden", "IoU", 3),
}


def member(recipe: Recipe, label: str) -> Recipe:
    """The recipe of one pre-training; of "random", that of the training which the others come before."""
    changes = MEMBERS[label]
    if changes is None:
        return evaluate.downstream(recipe, init="")
    # Sizes stay those of the recipe's clips, the schedule the recipe's own.
    changes = {k: v for k, v in changes.items() if k not in ("milestones", "short_sides_px")}
    return replace(recipe, compare=(), downstream="", **changes)


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Pre-trains each member with each seed and judges it; returns the comparison's folder."""
    run.check_members(recipe.compare, MEMBERS)
    evaluate.downstream(recipe, init="")  # is there one?
    members = {label: member(recipe, label) for label in recipe.compare}
    videos, val = (evaluate.open_split(recipe, options.data, split) for split in ("train", "val"))
    known = cache(lambda: motion.both_splits(videos, val, recipe, world))

    def train_one(label: str, its: Recipe, own: run.Options, world: run.World) -> Path:
        """Pre-trains on the data given; what is fine-tuned learns the built-in clips."""
        return train(label, its, replace(own, data=None) if its.method == "recognize" else own, world)

    def scores(home: Path, label: str) -> dict[str, float]:
        """Of motion, fine-tuned, and of what was trained for: of every tracker in the same games."""
        own = replace(options, seed=run.read_json(home / "results.json")["seed"])
        found, backbone = run.read_scores(home), motion.untrained(recipe, own.seed)
        if label == "random":
            return motion.scores(backbone, known(), world) | {"finetune_top1": found["top1"]}
        load_backbone(backbone, home)
        model, trained_by, _ = evaluate.load_run(home)
        if trained_by.method == "ctp":
            found = evaluate.trained(model.to(world.device), val, recipe, world, workers=options.workers)
        else:
            found = {"own_top1": found["top1"]}
        tuned = evaluate.tuned_top1(home, home.parents[2] / "downstream" / label, recipe, own, world, train_one)
        return found | motion.scores(backbone, known(), world) | {"finetune_top1": tuned}

    return run.sweep(
        "ctp", name, recipe, options, world, members, train_one, COLUMNS, scores=scores, title="pre-training"
    )


README_PARTS = {"compare": lambda records: run.tables(records, ("compare",), COLUMNS, "pre-training")}
