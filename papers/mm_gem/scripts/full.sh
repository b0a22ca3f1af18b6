#!/usr/bin/env bash
# Both stages with TinyLlama and ViT-L on one machine, each resumed where it was left, the first skipped once done:
#   PAIRS=/data/pairs REGIONS=/data/regions [GPUS=8] [STAGE1_ARGS="--lr 5e-5"] [STAGE2_ARGS="--epochs 1"] full.sh
# PAIRS holds webdataset shards, training and validation; REGIONS images with captions and instances in COCO's format.
# Where weights cannot be downloaded: LLM=FOLDER VISION=FOLDER. With less memory take a smaller MICRO_BATCH: the loss
# stays the same.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
[ $# -eq 0 ] || fail "found $*: a stage's own options go into STAGE1_ARGS or STAGE2_ARGS"
need_folder PAIRS "the folder with train-*.tar and val-*.tar"
need_folder REGIONS "the folder with annotations/"
: "${RUNS:=runs}" "${STAGE1:=stage1}" "${STAGE2:=stage2}" "${STAGE1_ARGS:=}" "${STAGE2_ARGS:=}"
common=(--out "$RUNS" --micro-batch "${MICRO_BATCH:-64}" --checkpoint-every 500 --resume auto)
common+=(${LLM:+--llm "$(absolute "$LLM")"} ${VISION:+--vision "$(absolute "$VISION")"} ${WORKERS:+--workers "$WORKERS"})
finished() {  # the newest run of stage 1 that has its results
  find "$RUNS/mm_gem/$STAGE1" -mindepth 2 -maxdepth 2 -name results.json 2>/dev/null | sort | tail -1 || true
}

# shellcheck disable=SC2086  # several words each
[ -n "$(finished)" ] || launch papers.mm_gem "$STAGE1" --data "$PAIRS" "${common[@]}" $STAGE1_ARGS
# shellcheck disable=SC2086
launch papers.mm_gem "$STAGE2" --data "$REGIONS" --init "$(dirname "$(finished)")" "${common[@]}" $STAGE2_ARGS
