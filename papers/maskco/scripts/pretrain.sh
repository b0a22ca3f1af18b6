#!/usr/bin/env bash
# Pre-training at full scale on one machine, resumed where it was left:
#   DATA=/data/coco [RECIPE=coco] [GPUS=8] pretrain.sh [--field value ...]
# The global batch stays 256 whatever GPUS is. Under Slurm: srun --ntasks=1 pretrain.sh in a job with requeue.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "a folder of pictures"
launch papers.maskco "${RECIPE:-coco}" --data "$DATA" --log-every 50 --resume auto "$@"
