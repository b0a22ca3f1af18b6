"""A small Mask R-CNN on the micro model that learns a few COCO pictures by heart: minutes on 2 CPU cores."""

_base_ = "../../../../common/run/mm_configs/mask_rcnn_small.py"
custom_imports = dict(imports=["papers.shiftvit.downstream.backbone"])
model = dict(backbone=dict(_delete_=True, type="ShiftViT", variant="shiftvit_micro"))
