"""A small Mask R-CNN on a ResNet-18 of half width that learns a few COCO pictures by heart: minutes on 2 CPU cores."""

_base_ = "../../../../common/run/mm_configs/mask_rcnn_small.py"
custom_imports = dict(imports=["papers.maskco.downstream.pretrained"])
model = dict(
    backbone=dict(
        depth=18, base_channels=32, stem_channels=64, frozen_stages=-1, norm_eval=False,
        init_cfg=dict(_delete_=True, type="MaskCo"),
    ),
)
