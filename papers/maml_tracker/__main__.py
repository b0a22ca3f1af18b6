"""Trains a detector to become a tracker, or several in comparison: ``python -m papers.maml_tracker RECIPE``."""

from common import run
from papers.maml_tracker.compare import compare
from papers.maml_tracker.recipes import RECIPES
from papers.maml_tracker.train import train

if __name__ == "__main__":
    run.door("maml_tracker", RECIPES, train, compare)
