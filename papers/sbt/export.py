"""Two ONNX graphs, template and search: ``python -m papers.sbt.export CHECKPOINT --out FOLDER``."""

from common import run
from common.metrics.trackers import export
from papers.sbt.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: export.main(PAPER))
