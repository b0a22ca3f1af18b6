#!/usr/bin/env bash
# Fine-tuning of a pre-trained backbone, evaluated by the test protocol at the end:
#   DATA=/data/ucf101 INIT=runs/ctp/kinetics_r3d18/... [RECIPE=ucf101_r3d18_finetune] [GPUS=8] finetune.sh [...]
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "a folder of videos"
need_path INIT "a pre-training's run folder, or a file of weights"
launch papers.ctp "${RECIPE:-ucf101_r3d18_finetune}" --data "$DATA" --init "$INIT" --log-every 50 --resume auto "$@"
