#!/usr/bin/env bash
# Looks through a data folder and says what is there and what is missing: prepare_data.sh FOLDER
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look common.data.images "$@"
