"""The door: ``python -m papers.vlora RECIPE``."""

from common import run
from papers.vlora.compare import compare
from papers.vlora.recipes import RECIPES
from papers.vlora.train import train

if __name__ == "__main__":
    run.door("vlora", RECIPES, train, compare)
