"""The door: ``python -m papers.maskco RECIPE [--field value ...]``."""

from pathlib import Path

from common import run
from papers.maskco import probe, train
from papers.maskco.compare import compare
from papers.maskco.recipes import RECIPES, Recipe


def choose(name: str, recipe: Recipe, options: run.Options, world: run.World) -> Path:
    """A linear classifier on a frozen backbone has a loop of its own."""
    trainer = probe if recipe.method == "linear" else train
    return trainer.train(name, recipe, options, world)


if __name__ == "__main__":
    run.door("maskco", RECIPES, choose, compare)
