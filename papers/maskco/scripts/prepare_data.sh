#!/usr/bin/env bash
# Says how many pictures a folder holds for pre-training, and whether they can be probed: prepare_data.sh FOLDER
set -euo pipefail
data="$(realpath "${1:?usage: prepare_data.sh FOLDER}")"
cd "$(dirname "$0")/../../.."
exec "${PYTHON:-.venv/bin/python}" -m papers.maskco.data "$data"
