#!/usr/bin/env bash
# Looks through data folders and says what is there and what is missing: prepare_data.sh FOLDER...
# A folder is one data set: LaSOT, GOT-10k, TrackingNet, COCO (for training); these but COCO, OTB, VOT (for tests).
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/../../.."
[ $# -gt 0 ] || { echo "usage: prepare_data.sh FOLDER..." >&2; exit 2; }
for folder in "$@"; do
  case "$folder" in /*) ;; *) folder="$here/$folder" ;; esac
  set -x
  "${PYTHON:-.venv/bin/python}" -m common.data.tracking "$folder"
  { set +x; } 2>/dev/null
done
