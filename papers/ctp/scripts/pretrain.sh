#!/usr/bin/env bash
# Pre-training at full scale on one machine, resumed where it was left:
#   DATA=/data/kinetics400 [RECIPE=kinetics_r3d18] [GPUS=8] pretrain.sh [--field value ...]
# The global batch stays 32 whatever GPUS is.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "a folder of videos"
launch papers.ctp "${RECIPE:-kinetics_r3d18}" --data "$DATA" --log-every 50 --resume auto "$@"
