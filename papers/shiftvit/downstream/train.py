"""Detection and segmentation (see common/run/mm.py): ``python -m papers.shiftvit.downstream.train NAME``."""

from pathlib import Path

from common import run
from common.run import mm

CONFIGS = Path(__file__).with_name("configs")
CHECKPOINT = "model.backbone.checkpoint"  # the setting that takes the weights' file

if __name__ == "__main__":
    run.main(lambda: mm.main("shiftvit", CONFIGS, CHECKPOINT))
