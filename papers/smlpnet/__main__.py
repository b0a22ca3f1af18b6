"""The door: ``python -m papers.smlpnet RECIPE [--field value ...]``."""

from common import run
from papers.smlpnet.compare import compare
from papers.smlpnet.recipes import RECIPES
from papers.smlpnet.train import train

if __name__ == "__main__":
    run.door("smlpnet", RECIPES, train, compare)
