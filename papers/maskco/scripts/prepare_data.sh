#!/usr/bin/env bash
# Says how many pictures a folder holds for pre-training, and whether they can be probed: prepare_data.sh FOLDER
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look papers.maskco.data "$@"
