#!/usr/bin/env bash
# Looks through a data folder and says what is there and what is missing: prepare_data.sh FOLDER
set -euo pipefail
data="$(realpath "${1:?usage: prepare_data.sh FOLDER}")"
cd "$(dirname "$0")/../../.."
exec "${PYTHON:-.venv/bin/python}" -m papers.vlora.data "$data"
