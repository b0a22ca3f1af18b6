#!/usr/bin/env bash
# Looks through data folders and says what is there and what is missing: prepare_data.sh FOLDER...
# Sequences (GOT-10k, LaSOT, TrackingNet, OTB, VOT) or COCO by default; for a pre-training's images: IMAGES=1
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
[ -n "${IMAGES:-}" ] && look common.data.images "$@" || look common.data.tracking "$@"
