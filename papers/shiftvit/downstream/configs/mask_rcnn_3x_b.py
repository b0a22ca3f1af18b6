"""Mask R-CNN on Shift-B, COCO, 3x: the settings of Shift-T's, on wider maps."""

_base_ = "mask_rcnn_3x.py"
model = dict(backbone=dict(variant="shiftvit_r2_base"), neck=dict(in_channels=[128, 256, 512, 1024]))
