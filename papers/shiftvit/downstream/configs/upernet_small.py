"""A small UPerNet on the micro model that learns a few COCO pictures' masks by heart: 20 minutes on 2 CPU cores."""

_base_ = ["mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["papers.shiftvit.downstream.backbone"])
data_root = "data/coco"
about = "COCO semantic masks: 8 training pictures, tested on the same ones"

_norm = dict(type="BN", requires_grad=True)
_head = dict(num_classes=200, norm_cfg=_norm, dropout_ratio=0.0)  # COCO's category ids, 1 to 200
model = dict(
    data_preprocessor=dict(size_divisor=32),
    backbone=dict(_delete_=True, type="ShiftViT", variant="shiftvit_micro"),
    decode_head=dict(**_head, in_channels=[32, 64, 128, 256], channels=64),
    auxiliary_head=dict(**_head, in_channels=128, channels=64),
)
_dataset = dict(
    type="BaseSegDataset", data_root=data_root, img_suffix=".jpg", seg_map_suffix=".png", reduce_zero_label=True,
    data_prefix=dict(img_path="train2017", seg_map_path="semantic_train2017"), indices=8,
    metainfo=dict(classes=[str(i) for i in range(1, 201)], palette=[[i, 255 - i, i * 7 % 256] for i in range(1, 201)]),
)
_resize = dict(type="Resize", scale=(128, 96), keep_ratio=False)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler"),
    dataset=dict(**_dataset, pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True), _resize,
        dict(type="PackSegInputs"),
    ]),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**_dataset, pipeline=[
        dict(type="LoadImageFromFile"), _resize, dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="PackSegInputs"),
    ]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=150, val_interval=150)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01))
param_scheduler = [dict(type="CosineAnnealingLR", T_max=150, by_epoch=False)]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=150, max_keep_ckpts=1))
