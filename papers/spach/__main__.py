"""The door: ``python -m papers.spach RECIPE [--field value ...]``."""

from common import run
from papers.spach.compare import compare
from papers.spach.recipes import RECIPES
from papers.spach.train import train

if __name__ == "__main__":
    run.door("spach", RECIPES, train, compare)
