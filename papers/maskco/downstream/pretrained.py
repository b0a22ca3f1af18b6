"""``init_cfg=dict(type="MaskCo", checkpoint=...)`` for the stock ResNets of mmdetection and mmsegmentation.

Importing this file registers it with both.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from papers.maskco.export import load_backbone


@WEIGHT_INITIALIZERS.register_module(name="MaskCo")
class Pretrained:
    """Loads a backbone from a run folder, its exported model, or a checkpoint of MoCo's code; strict.

    Without a checkpoint the network starts from nothing. `layers` names those to load where the module is only a part
    of the network.
    """

    def __init__(self, checkpoint: str = "", layers: Sequence[str] = ()):
        self.checkpoint, self.layers = checkpoint, layers

    def __call__(self, module: nn.Module) -> None:
        if self.checkpoint:
            load_backbone(module, self.checkpoint, self.layers)
