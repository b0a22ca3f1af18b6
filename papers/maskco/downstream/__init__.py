"""A backbone pre-trained here under detectors and segmenters of mmdetection and mmsegmentation; see tools/mm.sh."""
