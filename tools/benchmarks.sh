#!/usr/bin/env bash
# A tracker on every benchmark found under DATA (OTB, LaSOT, TrackingNet test, GOT-10k test), with archives for the
# servers of TrackingNet and GOT-10k:
#   PAPER=sbt CHECKPOINT=runs/... DATA=/data [RECIPE=full for a file of weights] [OUT=runs/sbt/benchmarks] benchmarks.sh
set -euo pipefail
here="$PWD"
: "${PAPER:?PAPER=sbt, dualtfr or maml_tracker}" "${CHECKPOINT:?CHECKPOINT=run folder or file of weights}"
: "${DATA:?DATA=folder with the benchmarks}" "${RECIPE:=}"
case "$CHECKPOINT" in /*) ;; *) CHECKPOINT="$here/$CHECKPOINT" ;; esac
case "$DATA" in /*) ;; *) DATA="$here/$DATA" ;; esac
cd "$(dirname "$0")/.."
: "${PYTHON:=.venv/bin/python}" "${OUT:=runs/$PAPER/benchmarks}"
for benchmark in OTB: LaSOT:test TrackingNet:test GOT-10k:test; do
  name="${benchmark%%:*}" split="${benchmark##*:}"
  [ -d "$DATA/$name" ] || { echo "no $DATA/$name: left out"; continue; }
  set -x
  "$PYTHON" -m "papers.$PAPER.evaluate" "$CHECKPOINT" --data "$DATA/$name" --out "$OUT/$name" \
    ${split:+--split "$split"} ${RECIPE:+--recipe "$RECIPE"}
  { set +x; } 2>/dev/null
done
