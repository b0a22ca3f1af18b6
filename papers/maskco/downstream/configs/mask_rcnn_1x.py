"""COCO detection and instance segmentation: Mask R-CNN R50-FPN, 90k iterations of 16 pictures, as MoCo transfers.

All layers are tuned, with synchronised batch normalisation in backbone, pyramid and heads. 8 GPUs x 2 pictures.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/datasets/coco_instance.py",
          "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["papers.maskco.downstream.pretrained"])
about = "COCO train2017, val2017"
_norm = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(frozen_stages=-1, norm_cfg=_norm, norm_eval=False, init_cfg=dict(_delete_=True, type="MaskCo")),
    neck=dict(norm_cfg=_norm),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=_norm), mask_head=dict(norm_cfg=_norm)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomChoiceResize", scales=[(1333, s) for s in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(sampler=dict(type="InfiniteSampler"), dataset=dict(pipeline=train_pipeline))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90_000, val_interval=10_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", milestones=[60_000, 80_000], gamma=0.1, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10_000, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
