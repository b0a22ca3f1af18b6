"""A pre-trained backbone as detectron2 loads it: ``python -m papers.maskco.scripts.to_detectron2 RUN OUT.pth``.

RUN is a run folder, an exported backbone, or a checkpoint of MoCo's code. The detector's configuration must say that
the network is torchvision's: MODEL.WEIGHTS OUT.pth, MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT RGB,
MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375].
"""

from pathlib import Path

import tyro

from common import run
from papers.maskco.export import load_backbone, write_detectron2
from papers.maskco.model import build_backbone


def main(checkpoint: Path, out: Path, /, backbone: str = "resnet50") -> None:
    network = build_backbone(backbone)
    load_backbone(network, checkpoint)
    write_detectron2(network, out)
    print(f"{out} written: {sum(p.numel() for p in network.parameters()):,} parameters of {backbone}")


if __name__ == "__main__":
    run.main(lambda: tyro.cli(main))
