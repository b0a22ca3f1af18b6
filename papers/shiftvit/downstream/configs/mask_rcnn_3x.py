"""Mask R-CNN on Shift-T, COCO, 3x with multi-scale training: Swin's settings of mmdetection, batch 16 on 8 GPUs."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["papers.shiftvit.downstream.backbone"])
about = "COCO train2017, val2017"
model = dict(backbone=dict(_delete_=True, type="ShiftViT", variant="shiftvit_r2_tiny", drop_path_rate=0.2))
