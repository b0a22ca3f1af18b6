"""Picture in, picture out: ``python -m papers.shiftvit.demo cat.jpg --checkpoint RUN [--out answer.png]``."""

from common import run
from common.metrics import classification
from papers.shiftvit.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: classification.demo(PAPER))
