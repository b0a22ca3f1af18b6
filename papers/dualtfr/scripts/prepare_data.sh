#!/usr/bin/env bash
# Looks through data folders and says what is there and what is missing: prepare_data.sh FOLDER...
# Sequences (GOT-10k, LaSOT, TrackingNet, OTB, VOT) or COCO by default; for a pre-training's images: IMAGES=1
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/../../.."
[ $# -gt 0 ] || { echo "usage: [IMAGES=1] prepare_data.sh FOLDER..." >&2; exit 2; }
for folder in "$@"; do
  case "$folder" in /*) ;; *) folder="$here/$folder" ;; esac
  set -x
  "${PYTHON:-.venv/bin/python}" -m "common.data.$([ -n "${IMAGES:-}" ] && echo images || echo tracking)" "$folder"
  { set +x; } 2>/dev/null
done
