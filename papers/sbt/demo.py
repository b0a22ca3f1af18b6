"""Video in, video out: ``python -m papers.sbt.demo VIDEO --box x,y,w,h --checkpoint RUN [--out answer.mp4]``."""

from common import run
from common.metrics.trackers import demo
from papers.sbt.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: demo.main(PAPER))
