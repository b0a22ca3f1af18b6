#!/usr/bin/env bash
# Second stage on one machine: generator and LLM on LLaVA-1.5's mixture, from the first stage's run folder:
#   DATA=/data/llava INIT=runs/vlora/pretrain_7b/20260101-120000 LLM=... VISION=... finetune.sh [--field value ...]
# DATA holds llava_v1_5_mix665k.json and the images it names. With little memory: --deepspeed zero3, or
# RECIPE=finetune_7b_lora.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folder of the mixture}" "${INIT:?INIT=run folder of the first stage}"
: "${RECIPE:=finetune_7b}" "${GPUS:=8}" "${PYTHON:=.venv/bin/python}" "${MICRO_BATCH:=16}"
: "${LLM:=lmsys/vicuna-7b-v1.5}" "${VISION:=openai/clip-vit-large-patch14-336}"
# "--", since torchrun would take options after it that begin like its own for them
set -x
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m -- papers.vlora.train "$RECIPE" \
  --data "$DATA" --init "$INIT" --llm "$LLM" --vision "$VISION" --micro-batch "$MICRO_BATCH" --workers 8 \
  --log-every 20 --checkpoint-every 500 --resume auto "$@"
