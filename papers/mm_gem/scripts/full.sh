#!/usr/bin/env bash
# Both stages with TinyLlama and ViT-L on one machine, each resumed where it was left, the first skipped once done:
#   PAIRS=/data/pairs REGIONS=/data/regions [GPUS=8] [STAGE1_ARGS="--lr 5e-5"] [STAGE2_ARGS="--epochs 1"] full.sh
# PAIRS holds webdataset shards, training and validation; REGIONS images with captions and instances in COCO's format.
# Where weights cannot be downloaded: LLM=FOLDER VISION=FOLDER. With less memory take a smaller MICRO_BATCH: the loss
# stays the same.
set -euo pipefail
cd "$(dirname "$0")/../../.."
[ $# -eq 0 ] || { echo "found $*: a stage's own options go into STAGE1_ARGS or STAGE2_ARGS" >&2; exit 2; }
: "${PAIRS:?PAIRS=folder with train-*.tar and val-*.tar}" "${REGIONS:?REGIONS=folder with annotations/}"
: "${GPUS:=8}" "${PYTHON:=.venv/bin/python}" "${RUNS:=runs}" "${MICRO_BATCH:=64}" "${WORKERS:=10}"
: "${STAGE1:=stage1}" "${STAGE2:=stage2}" "${STAGE1_ARGS:=}" "${STAGE2_ARGS:=}"
common=(--out "$RUNS" --workers "$WORKERS" --micro-batch "$MICRO_BATCH" --checkpoint-every 500 --resume auto)
common+=(${LLM:+--llm "$LLM"} ${VISION:+--vision "$VISION"})

train() {  # "--", since torchrun would take options after it that begin like its own for them
  (set -x; "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.mm_gem.train "$@")
}
finished() {  # the newest run of stage 1 that has its results
  find "$RUNS/mm_gem/$STAGE1" -mindepth 2 -maxdepth 2 -name results.json 2>/dev/null | sort | tail -1 || true
}

# shellcheck disable=SC2086  # several words each
[ -n "$(finished)" ] || train "$STAGE1" --data "$PAIRS" "${common[@]}" $STAGE1_ARGS
# shellcheck disable=SC2086
train "$STAGE2" --data "$REGIONS" --init "$(dirname "$(finished)")" "${common[@]}" $STAGE2_ARGS
