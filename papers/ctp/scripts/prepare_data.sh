#!/usr/bin/env bash
# Looks through a folder of videos and says what is there and what is missing: prepare_data.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/../../.."
data="${1:?usage: prepare_data.sh FOLDER}"
exec "${PYTHON:-.venv/bin/python}" -m common.data.video "$data"
