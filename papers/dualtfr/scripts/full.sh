#!/usr/bin/env bash
# The full schedule on one machine, resumed where it was left:
#   DATA=/data/tracking [RECIPE=full] [GPUS=8] full.sh [--field value ...]
# DATA holds GOT-10k, LaSOT, TrackingNet and COCO; RECIPE=got10k needs GOT-10k alone, RECIPE=pretrain ImageNet. The
# global batch is the recipe's whatever GPUS is; with little memory add --micro-batch 10. Without a network, say where the
# branch's weights are: --init swin_tiny.safetensors.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "the folder of data sets"
launch papers.dualtfr "${RECIPE:-full}" --data "$DATA" --log-every 50 --resume auto "$@"
