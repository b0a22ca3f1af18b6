#!/usr/bin/env bash
# First stage on one machine: the generator alone on captions. Resumed where it was left:
#   DATA=/data/capsfusion LLM=/models/vicuna-7b-v1.5 VISION=/models/clip-l-336 pretrain.sh [--field value ...]
# DATA holds webdataset shards train-000000.tar ... (KEY.jpg, KEY.txt). The global batch stays 768 whatever GPUS is.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder of shards}" "${RECIPE:=pretrain_7b}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}"
: "${LLM:=lmsys/vicuna-7b-v1.5}" "${VISION:=openai/clip-vit-large-patch14-336}" "${MICRO_BATCH:=32}"
# "--", since torchrun would take options after it that begin like its own for them
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.vlora.train "$RECIPE" \
  --data "$DATA" --llm "$LLM" --vision "$VISION" --micro-batch "$MICRO_BATCH" --workers 8 --log-every 50 \
  --checkpoint-every 1000 --resume auto "$@"
