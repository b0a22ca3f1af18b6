"""A program for the VOT toolkit: ``python -m papers.sbt.vot RUN``, see common/metrics/trackers/vot.py."""

from common import run
from common.metrics.trackers import vot
from papers.sbt.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: vot.main(PAPER))
