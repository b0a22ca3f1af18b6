"""The door: ``python -m papers.mm_gem RECIPE``."""

from common import run
from papers.mm_gem.compare import compare
from papers.mm_gem.recipes import RECIPES
from papers.mm_gem.train import train

if __name__ == "__main__":
    run.door("mm_gem", RECIPES, train, compare)
