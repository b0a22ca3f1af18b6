"""A small Mask R-CNN that learns a few COCO pictures by heart: minutes on 2 CPU cores.

A paper's configuration of the same name adds its backbone to this one: four maps of 32, 64, 128, 256 channels.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
data_root = "data/coco"
pictures = 8
about = f"COCO: {pictures} training pictures, tested on the same ones"

model = dict(
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
_image, _resize = dict(type="LoadImageFromFile"), dict(type="Resize", scale=(256, 192), keep_ratio=True)
_truth = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
_dataset = dict(
    type="CocoDataset", data_root=data_root, ann_file="annotations/instances_train2017.json",
    data_prefix=dict(img="train2017/"),
)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler"),
    dataset=dict(**_dataset, pipeline=[
        _image, _truth, _resize, dict(type="RandomFlip", prob=0.0), dict(type="PackDetInputs"),
    ]),
)
_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**_dataset, test_mode=True, pipeline=[
        _image, _resize, _truth, dict(type="PackDetInputs", meta_keys=_keys),  # the truth keeps its own size
    ]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=240, val_interval=240)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01), clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", T_max=240, by_epoch=False),
]
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=120, max_keep_ckpts=1), logger=dict(interval=20),
    visualization=dict(draw=True, test_out_dir="seen"),  # truth beside prediction, in the run folder
)
log_processor = dict(by_epoch=False)
