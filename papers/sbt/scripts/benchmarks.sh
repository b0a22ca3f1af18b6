#!/usr/bin/env bash
# A checkpoint on every benchmark found under DATA (GOT-10k test, LaSOT, TrackingNet test, OTB), with archives for the
# servers of GOT-10k and TrackingNet:
#   CHECKPOINT=runs/... DATA=/data [RECIPE=full for a file of weights] [OUT=runs/sbt/benchmarks] benchmarks.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${CHECKPOINT:?CHECKPOINT=run folder or file of weights}" "${DATA:?DATA=folder with the benchmarks}"
: "${PYTHON:=.venv/bin/python}" "${OUT:=runs/sbt/benchmarks}"
for benchmark in GOT-10k:test LaSOT:test TrackingNet:test OTB:; do
  folder="$DATA/${benchmark%%:*}" split="${benchmark##*:}"
  [ -d "$folder" ] || { echo "no $folder: left out"; continue; }
  set -x
  "$PYTHON" -m papers.sbt.evaluate "$CHECKPOINT" --data "$folder" --out "$OUT/${benchmark%%:*}" \
    ${split:+--split "$split"} ${RECIPE:+--recipe "$RECIPE"}
  { set +x; } 2>/dev/null
done
