"""The paper's claim: where pictures show many things, comparing regions teaches more than comparing whole views.

MaskCo and MoCo v2, pre-trained on pictures of many objects and on as many of one, judged place by place and as a whole:
``python -m papers.maskco compare --data FOLDER --probe IMAGENETTE --dense COCO``, where FOLDER holds `many_objects` and
`one_object` (scripts/mini_sets.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from common import run
from common.run import UserError
from papers.maskco import data, dense, evaluate
from papers.maskco.model import build_backbone
from papers.maskco.recipes import Recipe

SETS = ("many_objects", "one_object")
# label: method, and what it is pre-trained on
MEMBERS = {f"{method}_{pictures}": (method, pictures) for pictures in SETS for method in ("maskco", "moco_v2")}
COLUMNS = {
    "cell_miou": run.Column("cells, mIoU %"), "cell_top1": run.Column("cells, top-1 %"),
    "region_R@1": run.Column("regions, R@1 %"), "region_R@5": run.Column("regions, R@5 %"),
    "probe_top1": run.Column("whole pictures, top-1 %"),
}


def judge(backbone: torch.nn.Module, recipe: Recipe, options: run.Options, world: run.World) -> dict[str, float]:
    """Scores of a backbone as it stands, by the keys of `COLUMNS`."""
    labelled = data.open_labelled(recipe.probe)
    whole = evaluate.probe_scores(backbone, *labelled, recipe, world, workers=options.workers)
    return dense.scores(backbone, Path(recipe.dense), world) | whole


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Pre-trains each member with each seed and judges it; returns the comparison's folder."""
    run.check_members(recipe.compare, MEMBERS)
    if not (options.data and recipe.probe and recipe.dense):
        raise UserError(f"a comparison needs --data, a folder of {' and '.join(SETS)}; --probe, pictures of classes; "
                        "and --dense, COCO with its panoptic masks")
    members = {
        label: replace(recipe, method=MEMBERS[label][0], compare=(), probe="", dense="") for label in recipe.compare
    }

    def pre_train(label: str, member: Recipe, own: run.Options, world: run.World) -> Path:
        return train(label, member, replace(own, data=options.data / MEMBERS[label][1]), world)

    def scores(home: Path, _label: str) -> dict[str, float]:
        model, _, _ = evaluate.load_run(home)
        return judge(model.backbone.to(world.device), recipe, options, world)

    def untrained(folder: Path) -> dict[str, dict[str, float]]:
        """Mean scores of networks as the seeds start them."""
        found = []
        for seed in run.seeds_of(options):
            run.seed_all(seed)
            backbone = build_backbone(recipe.backbone, recipe.output_stride).to(world.device)
            found.append(judge(backbone, recipe, options, world))
        return {"untrained": {key: sum(each[key] for each in found) / len(found) for key in COLUMNS}}

    return run.sweep("maskco", name, recipe, options, world, members, pre_train, COLUMNS, scores=scores,
                     fixed=untrained, title="pre-training")


README_PARTS = {"compare": lambda records: run.tables(records, ("compare",), COLUMNS, "pre-training")}
