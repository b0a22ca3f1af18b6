"""What carries the paper: how many blocks let the images attend to each other, and where they stand; beside it the
head, and the features in a plain correlation tracker: ``python -m papers.sbt.train ablation``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run
from common.data import pairs
from common.metrics import trackers
from common.run import drawing
from common.run.sweep import Train
from papers.sbt.model import VARIANTS
from papers.sbt.recipes import RECIPES, Recipe

COLUMNS = {
    "ao": run.Column("AO, %"), "iou": run.Column("IoU on validation pairs, %"), "params": run.PARAMS,
    "flops": run.MULTIPLY_ADDS,
}


def changes(model: str) -> dict[str, dict[str, Any]]:
    """What each member changes in a recipe of `model`; 'interleaved' is the paper's network. Nothing reads the
    template of 'none'; it goes through the network all the same, and its multiply-adds count."""
    blocks = VARIANTS[model]["depths"][2]
    half = len(VARIANTS[model]["cross_blocks"][2])

    def cross(*numbers: int) -> dict[str, Any]:
        return {"model_args": {"cross_blocks": ((), (), tuple(numbers))}}

    return {
        "none": cross(),
        "one": cross(VARIANTS[model]["cross_blocks"][2][0]),
        "early": cross(*range(1, half + 1)),
        "interleaved": {},
        "late": cross(*range(blocks - half + 1, blocks + 1)),
        "all": cross(*range(1, blocks + 1)),
        "mlp_head": {"head": "mlp"},
        "correlation": cross() | {"head": "correlation"},
        "correlation_sbt": {"head": "correlation"},
    }


def members(recipe: Recipe) -> dict[str, Recipe]:
    if recipe.model not in VARIANTS:
        raise run.UserError(f"no variant {recipe.model!r}; there are {', '.join(VARIANTS)}")
    known = changes(recipe.model)
    run.check_members(recipe.compare, known)
    return {
        label: replace(recipe, compare=(), **known[label] | {
            "model_args": {**recipe.model_args, **known[label].get("model_args", {})}
        })
        for label in recipe.compare
    }


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: Train) -> Path:
    """Trains every member with every seed and reports; returns the comparison's folder."""
    trained = members(recipe)
    root = trackers.data_folder(recipe, options.data)
    if not pairs.open_data(recipe, root, coco_side_px=recipe.coco_side_px).val:
        raise run.UserError(f"members are scored on a validation split, and {root} has none that the recipe uses")
    return run.sweep("sbt", name, recipe, options, world, trained, train, COLUMNS, scores=scores, picture=draw)


def scores(home: Path, _label: str = "") -> dict[str, float]:
    """Of a finished run, by the keys of `COLUMNS`."""
    found = run.read_scores(home)
    return {"ao": found["got10k ao"], "iou": found["pairs iou"], "params": found["params"], "flops": found["flops"]}


def draw(folder: Path, homes: Mapping[str, list[Path]]) -> None:
    """Bars of both scores, the paper's network in red."""
    figure, axes = drawing.plt.subplots(1, 2, figsize=(9, 0.35 * len(homes) + 1.2), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("iou", "ao")):
        found = [run.spread([scores(home)[key] for home in its]) for its in homes.values()]
        colors = ["tab:red" if label == "interleaved" else "tab:gray" for label in homes]
        axis.barh(list(homes), [s["value"] for s in found], xerr=[s.get("spread", 0) for s in found], color=colors)
        axis.set_xlabel(COLUMNS[key].title)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    drawing.save(figure, folder / "compare.png")


COMPARISONS = [name for name, recipe in RECIPES.items() if getattr(recipe, "compare", ())]
README_PARTS = {"compare": lambda records: run.tables(records, COMPARISONS, COLUMNS)}
SHARED_PARTS = {"real": trackers.real_table}
