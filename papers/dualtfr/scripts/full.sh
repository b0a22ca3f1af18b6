#!/usr/bin/env bash
# The full schedule on one machine, resumed where it was left:
#   DATA=/data/tracking [RECIPE=full] [GPUS=8] full.sh [--field value ...]
# DATA holds GOT-10k, LaSOT, TrackingNet and COCO; RECIPE=got10k needs GOT-10k alone, RECIPE=pretrain ImageNet. The
# global batch is the recipe's whatever GPUS is; with little memory add --micro-batch 10. Without a network, say where the
# branch's weights are: --init swin_tiny.safetensors.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder of data sets}" "${RECIPE:=full}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.dualtfr.train "$RECIPE" \
  --data "$DATA" --workers 10 --log-every 50 --resume auto "$@"
