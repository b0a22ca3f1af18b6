#!/usr/bin/env bash
# Pre-training at full scale on one machine, resumed where it was left:
#   DATA=/data/kinetics400 [RECIPE=kinetics_r3d18] [GPUS=8] pretrain.sh [--field value ...]
# The global batch stays 32 whatever GPUS is.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." > /dev/null
: "${DATA:?DATA=folder of videos}" "${RECIPE:=kinetics_r3d18}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}" "${WORKERS:=4}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.ctp.train "$RECIPE" \
  --data "$DATA" --workers "$WORKERS" --log-every 50 --resume auto "$@"
