"""The paper's claim in miniature: the same network with sparse, unshared and dense mixing, under one recipe.

``python -m papers.smlpnet sharing`` trains and compares them; ``--resume auto`` goes on where it was killed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common import run
from papers.smlpnet.figures import draw_sharing
from papers.smlpnet.model import MIXINGS
from papers.smlpnet.recipes import RECIPES, Recipe

COLUMNS = {
    "top1": run.Column("test, %", digits=2), "train_top1": run.Column("training, %", digits=2),
    "gap": run.Column("gap, points", "points", 2), "params": run.PARAMS, "flops": run.MULTIPLY_ADDS,
}


def member(recipe: Recipe, mixing: str) -> Recipe:
    """The recipe of one training."""
    return replace(recipe, compare=(), train_accuracy=True, model_args={**recipe.model_args, "mixing": mixing})


def compare(name: str, recipe: Recipe, options: run.Options, world: run.World, train: run.Train) -> Path:
    """Trains each mixing with each seed and reports; returns the comparison's folder."""
    run.check_members(recipe.compare, MIXINGS)
    members = {mixing: member(recipe, mixing) for mixing in recipe.compare}
    return run.sweep("smlpnet", name, recipe, options, world, members, train, COLUMNS, picture=picture, title="mixing")


def picture(folder: Path, _runs: object) -> None:
    metrics = run.read_json(folder / "results.json")["metrics"]
    draw_sharing(folder / "sharing.png", run.by_member(metrics, COLUMNS))


COMPARISONS = [name for name, recipe in RECIPES.items() if recipe.compare]
README_PARTS = {"compare": lambda records: run.tables(records, COMPARISONS, COLUMNS, "mixing")}
