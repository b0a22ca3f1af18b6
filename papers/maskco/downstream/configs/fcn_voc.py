"""VOC segmentation: FCN on a dilated ResNet-50, train_aug2012 to val2012, 512 px, 20k iterations of 16: DenseCL's."""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py"
custom_imports = dict(imports=["papers.maskco.downstream.pretrained"])
about = "VOC 2012 train_aug, val"
model = dict(
    pretrained=None,
    backbone=dict(type="ResNet", init_cfg=dict(type="MaskCo"), contract_dilation=False),
    auxiliary_head=None,
)
