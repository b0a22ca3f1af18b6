#!/usr/bin/env bash
# Both stages with TinyLlama and ViT-L on one machine, resumed where they were left:
#   PAIRS=/data/pairs REGIONS=/data/regions [GPUS=8] full.sh [--field value ...]
# PAIRS holds webdataset shards, training and validation; REGIONS images with captions and instances in COCO's format. Where weights cannot be
# downloaded, add --llm FOLDER --vision FOLDER. With less memory take a smaller --micro-batch: the loss stays the same.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${PAIRS:?PAIRS=folder with train-*.tar and val-*.tar}" "${REGIONS:?REGIONS=folder with annotations/}"
: "${GPUS:=8}" "${PYTHON:=.venv/bin/python}" "${RUNS:=runs}"
set -x
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m papers.mm_gem.train stage1 \
  --data "$PAIRS" --out "$RUNS" --workers 10 --micro-batch 64 --checkpoint-every 500 --resume auto "$@"
first="$(ls -d "$RUNS"/mm_gem/stage1/*/ | tail -1)"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.mm_gem.train stage2 \
  --start "$first" --data "$REGIONS" --out "$RUNS" --workers 10 --micro-batch 64 --checkpoint-every 500 --resume auto "$@"
