#!/usr/bin/env bash
# A full-scale recipe on one machine, resumed where it was left:
#   DATA=/data [RECIPE=full] [GPUS=8] train.sh [--field value ...]
# DATA holds GOT-10k/, LaSOT/, TrackingNet/ and COCO/ (for got10k, GOT-10k/ or that folder itself). The global batch does
# not depend on GPUS; with little memory add --micro-batch 4. PVTv2-B3's weights come from timm, or --init FILE.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder with GOT-10k/ and the others}" "${RECIPE:=full}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.sbt.train "$RECIPE" \
  --data "$DATA" --workers 10 --log-every 50 --resume auto "$@"
