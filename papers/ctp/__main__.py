"""The door: ``python -m papers.ctp RECIPE [--field value ...]``."""

from common import run
from papers.ctp.compare import compare
from papers.ctp.recipes import RECIPES
from papers.ctp.train import train

if __name__ == "__main__":
    run.door("ctp", RECIPES, train, compare)
