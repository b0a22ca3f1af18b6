#!/usr/bin/env bash
# One row of the paper's ImageNet table on one machine, 300 epochs, resumed where it was left:
#   DATA=/data/imagenet [RECIPE=imagenet_ms_s_hybrid] [GPUS=8] imagenet.sh [--field value ...]
# The global batch stays 1024 whatever GPUS is; with little memory add --micro-batch 64.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder with train/ and val/}" "${RECIPE:=imagenet_ms_s_hybrid}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.spach.train "$RECIPE" \
  --data "$DATA" --workers 10 --compile --log-every 50 --resume auto "$@"
