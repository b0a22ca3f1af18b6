#!/usr/bin/env bash
# Looks through a data folder and says what is there and what is missing: prepare_data.sh FOLDER
# Sequences (GOT-10k, LaSOT, TrackingNet, OTB, VOT) or COCO by default; for a pre-training's images: IMAGES=1
set -euo pipefail
cd "$(dirname "$0")/../../.."
data="${1:?usage: [IMAGES=1] prepare_data.sh FOLDER}"
set -x
exec "${PYTHON:-.venv/bin/python}" -m "common.data.$([ -n "${IMAGES:-}" ] && echo images || echo tracking)" "$data"
