#!/usr/bin/env bash
# A full-scale recipe on one machine, resumed where it was left:
#   DATA=/data [RECIPE=full] [GPUS=8] train.sh [--field value ...]
# DATA holds GOT-10k/, LaSOT/, TrackingNet/ and COCO/ (for got10k, GOT-10k/ or that folder itself). The global batch does
# not depend on GPUS; with little memory add --micro-batch 4. PVTv2-B3's weights come from timm, or --init FILE.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "the folder with GOT-10k/ and the others"
launch papers.sbt "${RECIPE:-full}" --data "$DATA" --log-every 50 --resume auto "$@"
