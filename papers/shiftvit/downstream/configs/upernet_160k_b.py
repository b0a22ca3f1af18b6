"""UPerNet on Shift-B, ADE20K, 512 px: the settings of Shift-T's, on wider maps."""

_base_ = "upernet_160k.py"
model = dict(
    backbone=dict(variant="shiftvit_r2_base"), decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
