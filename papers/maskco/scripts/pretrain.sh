#!/usr/bin/env bash
# Pre-training at full scale on one machine, resumed where it was left:
#   DATA=/data/coco [RECIPE=coco] [GPUS=8] pretrain.sh [--field value ...]
# The global batch stays 256 whatever GPUS is. Under Slurm: srun --ntasks=1 pretrain.sh in a job with requeue.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder of pictures}" "${RECIPE:=coco}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.maskco.train "$RECIPE" \
  --data "$DATA" --workers 8 --log-every 50 --resume auto "$@"
