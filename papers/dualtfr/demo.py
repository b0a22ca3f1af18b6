"""Video in, video out: ``python -m papers.dualtfr.demo VIDEO --box x,y,w,h --checkpoint RUN [--out answer.mp4]``."""

from common import run
from common.metrics import tracker_demo
from papers.dualtfr.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: tracker_demo.main(PAPER))
