#!/usr/bin/env bash
# First stage on one machine: the generator alone on captions. Resumed where it was left:
#   DATA=/data/capsfusion LLM=/models/vicuna-7b-v1.5 VISION=/models/clip-l-336 pretrain.sh [--field value ...]
# DATA holds webdataset shards train-000000.tar ... (KEY.jpg, KEY.txt). The global batch stays 768 whatever GPUS is.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "the folder of shards"
launch papers.vlora "${RECIPE:-pretrain_7b}" --data "$DATA" --llm "$(absolute "${LLM:-lmsys/vicuna-7b-v1.5}")" \
  --vision "$(absolute "${VISION:-openai/clip-vit-large-patch14-336}")" --micro-batch "${MICRO_BATCH:-32}" \
  --log-every 50 --checkpoint-every 1000 --resume auto "$@"
