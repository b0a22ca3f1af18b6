#!/usr/bin/env bash
# A checkpoint on every benchmark found under DATA (OTB, LaSOT, TrackingNet test, GOT-10k test), with archives for the
# servers of TrackingNet and GOT-10k:
#   CHECKPOINT=runs/... DATA=/data [RECIPE=retina for a file of weights] [OUT=runs/maml_tracker/benchmarks] benchmarks.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${CHECKPOINT:?CHECKPOINT=run folder or file of weights}" "${DATA:?DATA=folder with the benchmarks}"
: "${PYTHON:=.venv/bin/python}" "${OUT:=runs/maml_tracker/benchmarks}"
for benchmark in OTB: LaSOT:test TrackingNet:test GOT-10k:test; do
  folder="$DATA/${benchmark%%:*}" split="${benchmark##*:}"
  [ -d "$folder" ] || { echo "no $folder: left out"; continue; }
  set -x
  "$PYTHON" -m papers.maml_tracker.evaluate "$CHECKPOINT" --data "$folder" --out "$OUT/${benchmark%%:*}" \
    ${split:+--split "$split"} ${RECIPE:+--recipe "$RECIPE"}
  { set +x; } 2>/dev/null
done
