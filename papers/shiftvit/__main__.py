"""The door: ``python -m papers.shiftvit RECIPE [--field value ...]``."""

from common import run
from papers.shiftvit.compare import compare
from papers.shiftvit.recipes import RECIPES
from papers.shiftvit.train import train

if __name__ == "__main__":
    run.door("shiftvit", RECIPES, train, compare)
