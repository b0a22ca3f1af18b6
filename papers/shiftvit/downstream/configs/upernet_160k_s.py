"""UPerNet on Shift-S, ADE20K, 512 px: the settings of Shift-T's, as mmsegmentation's Swin-S has those of its Swin-T."""

_base_ = "upernet_160k.py"
model = dict(backbone=dict(variant="shiftvit_r2_small"))
