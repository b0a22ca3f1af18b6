#!/usr/bin/env bash
# Looks through data folders and says what is there and what is missing: prepare_data.sh FOLDER...
# A folder is one data set, or several side by side: GOT-10k, LaSOT, TrackingNet, COCO (for training); OTB, VOT (for
# tests).
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look common.data.tracking "$@"
