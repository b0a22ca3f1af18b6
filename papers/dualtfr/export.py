"""Two ONNX graphs, template and search: ``python -m papers.dualtfr.export CHECKPOINT --out FOLDER``."""

from common import run
from common.metrics.trackers import export
from papers.dualtfr.evaluate import PAPER

if __name__ == "__main__":
    run.main(lambda: export.main(PAPER))
