"""Video in, video out: ``python -m papers.maml_tracker.demo VIDEO --box x,y,w,h [--checkpoint RUN]``."""

from common import run
from common.metrics.trackers import demo
from papers.maml_tracker.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: demo.main(PAPER))
