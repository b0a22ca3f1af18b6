"""What pre-training is worth: CtP against its ablations, the baselines, and none at all, under one recipe:
``python -m papers.ctp compare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from papers.ctp import evaluate
from papers.ctp.recipes import BASELINES, Recipe

# What each member changes in the pre-training; "random" has none.
MEMBERS: dict[str, dict[str, Any] | None] = {
    "ctp": {}, "ctp_one_patch": {"patches": 1}, "ctp_never_hidden": {"visible": 1.0}, **BASELINES, "random": None,
}
COLUMNS = {
    "finetune_top1": run.Column("fine-tuned, %"), "probe_top1": run.Column("linear, %"),
    "R@1": run.Column("nearest, %"), "own_top1": run.Column("own task, %"), "iou": run.Column("IoU", "IoU", 3),
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
    val = evaluate.open_split(recipe, options.data, "val")

    def scores(home: Path, label: str) -> dict[str, float]:
        """On a downstream task, and of what was trained for: of every tracker in the same games."""
        own = replace(options, seed=run.read_json(home / "results.json")["seed"])
        found = run.read_scores(home)
        if label == "random":
            return evaluate.frozen_scores("", members[label], own, world) | {"finetune_top1": found["top1"]}
        model, trained_by, _ = evaluate.load_run(home)
        if trained_by.method == "ctp":
            found = evaluate.trained(model.to(world.device), val, recipe, world, workers=options.workers)
        else:
            found = {"own_top1": found["top1"]}
        downstream = home.parents[2] / "downstream" / label
        return found | evaluate.transfer_scores(home, downstream, recipe, own, world, train)

    return run.sweep(
        "ctp", name, recipe, options, world, members, train, COLUMNS, scores=scores, title="pre-training"
    )


README_PARTS = {"compare": lambda records: run.tables(records, ("compare",), COLUMNS, "pre-training")}
