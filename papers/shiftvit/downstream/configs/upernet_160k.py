"""UPerNet on Shift-T, ADE20K, 512 px: Swin's settings of mmsegmentation (AdamW 6e-5, 160k iterations), batch 16."""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["papers.shiftvit.downstream.backbone"])
about = "ADE20K training, validation"
model = dict(backbone=dict(_delete_=True, type="ShiftViT", variant="shiftvit_r2_tiny", drop_path_rate=0.3))
