"""``python -m papers.dualtfr RECIPE``: trains a tracker, its branch as a classifier (pretrain*), or many (ablation)."""

from pathlib import Path

from common import run
from papers.dualtfr import pretrain, train
from papers.dualtfr.compare import compare
from papers.dualtfr.recipes import RECIPES, Pretrain, Recipe


def by_kind(name: str, recipe: Recipe | Pretrain, options: run.Options, world: run.World) -> Path:
    return (pretrain if isinstance(recipe, Pretrain) else train).train(name, recipe, options, world)


if __name__ == "__main__":
    run.door("dualtfr", RECIPES, by_kind, compare)
