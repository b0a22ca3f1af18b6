#!/usr/bin/env bash
# Looks through a data folder and says how many captioned images and regions it has: prepare_data.sh FOLDER
set -euo pipefail
data="$(realpath "${1:?usage: prepare_data.sh FOLDER}")"
cd "$(dirname "$0")/../../.."
exec "${PYTHON:-.venv/bin/python}" -m papers.mm_gem.data "$data"
