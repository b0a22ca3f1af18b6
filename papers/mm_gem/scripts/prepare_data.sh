#!/usr/bin/env bash
# Looks through a data folder and says how many captioned images and regions it has: prepare_data.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/../../.."
data="${1:?usage: prepare_data.sh FOLDER}"
exec "${PYTHON:-.venv/bin/python}" -m papers.mm_gem.data "$data"
