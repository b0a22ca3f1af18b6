"""Mask R-CNN on Shift-S, COCO, 3x: the settings of Shift-T's, as mmdetection's Swin-S has those of its Swin-T."""

_base_ = "mask_rcnn_3x.py"
model = dict(backbone=dict(variant="shiftvit_r2_small"))
