#!/usr/bin/env bash
# Fine-tuning of a pre-trained backbone, evaluated by the test protocol at the end:
#   DATA=/data/ucf101 INIT=runs/ctp/kinetics_r3d18/... [RECIPE=ucf101_r3d18_finetune] [GPUS=8] finetune.sh [...]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." > /dev/null
: "${DATA:?DATA=folder of videos}" "${INIT:?INIT=run folder or file of weights}"
: "${RECIPE:=ucf101_r3d18_finetune}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}" "${WORKERS:=4}"
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.ctp.train "$RECIPE" \
  --data "$DATA" --init "$INIT" --workers "$WORKERS" --log-every 50 --resume auto "$@"
