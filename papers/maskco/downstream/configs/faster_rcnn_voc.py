"""VOC detection: Faster R-CNN R50-C4, 24k iterations of 16 pictures, trainval 07+12 to test 07, as MoCo transfers.

All layers are tuned, with synchronised batch normalisation, and one more behind the last stage. 8 GPUs x 2 pictures.
The average precisions are 11-point ones, over IoU 0.5 to 0.95.
"""

_base_ = "mmdet::pascal_voc/faster-rcnn_r50-caffe-c4_ms-18k_voc0712.py"
custom_imports = dict(imports=["papers.maskco.downstream.pretrained", "papers.maskco.downstream.c4"])
about = "VOC trainval 2007+2012, test 2007"
checkpoint_in = ["model.backbone.init_cfg.checkpoint", "model.roi_head.shared_head.init_cfg.checkpoint"]

_norm = dict(type="SyncBN", requires_grad=True)
_start = dict(_delete_=True, type="MaskCo")
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        frozen_stages=-1, norm_cfg=_norm, norm_eval=False, style="pytorch",
        init_cfg=dict(**_start, layers=["conv1", "bn1", "layer1", "layer2", "layer3"]),
    ),
    roi_head=dict(
        shared_head=dict(norm_cfg=_norm, norm_eval=False, style="pytorch", init_cfg=dict(**_start, layers=["layer4"])),
        bbox_head=dict(type="NormedBBoxHead", norm_cfg=_norm),
    ),
)
_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="KeepDifficult"),
    dict(type="RandomChoiceResize", scales=[(1333, side) for side in range(480, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", ignore_keys=["dataset_type"], datasets=[
    dict(
        type="VOCDataset", data_root="data/VOCdevkit/", ann_file=f"VOC{year}/ImageSets/Main/trainval.txt",
        data_prefix=dict(sub_data_root=f"VOC{year}/"), filter_cfg=dict(filter_empty_gt=True), pipeline=_pipeline,
    )
    for year in (2007, 2012)
]))
val_evaluator = dict(iou_thrs=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=24_000, val_interval=24_000)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", milestones=[18_000, 22_000], gamma=0.1, by_epoch=False),
]
