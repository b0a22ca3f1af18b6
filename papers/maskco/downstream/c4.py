"""What MoCo's transfer to VOC detection adds to mmdetection's Faster R-CNN C4. Importing this file registers it."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_norm_layer
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor


@MODELS.register_module()
class NormedBBoxHead(BBoxHead):
    """A batch normalisation of (regions, C, h, w), the last stage's output, before boxes and classes are read off."""

    def __init__(self, norm_cfg: dict[str, Any], **kwargs):
        super().__init__(**kwargs)
        self.norm = build_norm_layer(norm_cfg, self.in_channels)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(x))


@TRANSFORMS.register_module()
class KeepDifficult:
    """Boxes that VOC calls difficult are trained on like the others, as in detectron2; mmdetection leaves them out."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_ignore_flags"][:] = False
        return results
