"""``python -m papers.sbt RECIPE``: trains a tracker, its backbone as a classifier (pretrain*), or many (ablation)."""

from pathlib import Path

from common import run
from papers.sbt import pretrain, train
from papers.sbt.compare import compare
from papers.sbt.recipes import RECIPES, Pretrain, Recipe


def by_kind(name: str, recipe: Recipe | Pretrain, options: run.Options, world: run.World) -> Path:
    return (pretrain if isinstance(recipe, Pretrain) else train).train(name, recipe, options, world)


if __name__ == "__main__":
    run.door("sbt", RECIPES, by_kind, compare)
