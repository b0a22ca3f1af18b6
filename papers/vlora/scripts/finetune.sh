#!/usr/bin/env bash
# Second stage on one machine: generator and LLM on LLaVA-1.5's mixture, from the first stage's run folder:
#   DATA=/data/llava INIT=runs/vlora/pretrain_7b/20260101-120000 LLM=... VISION=... finetune.sh [--field value ...]
# DATA holds llava_v1_5_mix665k.json and the images it names. With little memory: --deepspeed zero3, or
# RECIPE=finetune_7b_lora.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "the folder of the mixture"
need_path INIT "the run folder of the first stage"
launch papers.vlora "${RECIPE:-finetune_7b}" --data "$DATA" --init "$INIT" \
  --llm "$(absolute "${LLM:-lmsys/vicuna-7b-v1.5}")" \
  --vision "$(absolute "${VISION:-openai/clip-vit-large-patch14-336}")" --micro-batch "${MICRO_BATCH:-16}" \
  --log-every 20 --checkpoint-every 500 --resume auto "$@"
