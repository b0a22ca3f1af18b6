"""Scores of a tracker: ``python -m papers.maml_tracker.evaluate CHECKPOINT --data FOLDER [--baselines]``.

CHECKPOINT is a run folder, or a file of weights with --recipe NAME.
"""

from __future__ import annotations

from common import run
from common.metrics import trackers
from papers.maml_tracker.model import build
from papers.maml_tracker.recipes import RECIPES
from papers.maml_tracker.tracker import MAMLTracker

PAPER = trackers.Paper(name="maml_tracker", recipes=RECIPES, build=build, make_tracker=MAMLTracker)

if __name__ == "__main__":
    run.main(lambda: trackers.main(PAPER))
