"""ShiftViT under detectors and segmenters of mmdetection and mmsegmentation. tools/mm.sh installs them."""
