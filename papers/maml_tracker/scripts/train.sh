#!/usr/bin/env bash
# A full-scale recipe on one machine, resumed where it was left:
#   DATA=/data [RECIPE=retina] [GPUS=8] train.sh [--field value ...]
# DATA holds LaSOT/, GOT-10k/, TrackingNet/ and COCO/. The global batch does not depend on GPUS: meta-training takes one
# video after another; what the detection stage takes at once is --micro-batch. ResNet-18's ImageNet weights come from
# torchvision, which looks in torch.hub's cache first.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
need_folder DATA "the folder with LaSOT/, GOT-10k/, TrackingNet/ and COCO/"
launch papers.maml_tracker "${RECIPE:-retina}" --data "$DATA" --log-every 50 --checkpoint-every 500 --resume auto "$@"
