#!/usr/bin/env bash
# One row of the paper's ImageNet table on one machine, 300 epochs, resumed where it was left:
#   DATA=/data/imagenet [RECIPE=imagenet_tiny] [GPUS=8] imagenet.sh [--field value ...]
# The global batch stays 1024 whatever GPUS is; with little memory add --micro-batch 64.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "ImageNet, with train/ and val/"
launch papers.smlpnet "${RECIPE:-imagenet_tiny}" --data "$DATA" --workers 10 --compile --log-every 50 --resume auto "$@"
