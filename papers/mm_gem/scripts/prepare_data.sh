#!/usr/bin/env bash
# Looks through a data folder and says how many captioned images and regions it has: prepare_data.sh FOLDER
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look papers.mm_gem.data "$@"
