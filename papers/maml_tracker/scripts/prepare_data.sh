#!/usr/bin/env bash
# Looks through data folders and says what is there and what is missing: prepare_data.sh FOLDER...
# A folder is one data set, or several side by side: LaSOT, GOT-10k, TrackingNet, COCO (for training); these but COCO,
# OTB, VOT (for tests).
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look common.data.tracking "$@"
