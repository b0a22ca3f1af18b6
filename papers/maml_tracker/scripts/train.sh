#!/usr/bin/env bash
# A full-scale recipe on one machine, resumed where it was left:
#   DATA=/data [RECIPE=retina] [GPUS=8] train.sh [--field value ...]
# DATA holds LaSOT/, GOT-10k/, TrackingNet/ and COCO/. The global batch does not depend on GPUS: meta-training takes one
# video after another; what the detection stage takes at once is --micro-batch. ResNet-18's ImageNet weights come from
# torchvision, which looks in torch.hub's cache first.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder with LaSOT/, GOT-10k/, TrackingNet/ and COCO/}" "${RECIPE:=retina}" "${GPUS:=8}"
: "${PYTHON:=.venv/bin/python}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.maml_tracker.train "$RECIPE" \
  --data "$DATA" --workers 8 --log-every 50 --checkpoint-every 500 --resume auto "$@"
