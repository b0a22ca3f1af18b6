#!/usr/bin/env bash
# A tracker on every benchmark found under DATA, each in a folder of its name: OTB (OTB-100, -50, -2013), LaSOT,
# LaSOT_ext, TrackingNet test, GOT-10k test, UAV123, UAV20L, NFS (30 and 240), TNL2K, AVisT; with archives for the
# servers of TrackingNet and GOT-10k. OTB's parts take OTB-100's boxes. VOT is its own toolkit's (papers/*/vot.py).
# Arguments go to evaluate; without CHECKPOINT the baselines among them are measured alone:
#   PAPER=sbt CHECKPOINT=runs/... DATA=/data [RECIPE=full for a file of weights] [OUT=runs/sbt/benchmarks] \
#     benchmarks.sh [--tracker ncc csrt] [--fresh] [--rule lasot] ...
source "$(dirname -- "${BASH_SOURCE[0]}")/../common/run/script.sh"
[ -n "${PAPER:-}" ] || fail "PAPER=... is needed: sbt, dualtfr or maml_tracker"
case " $* " in *" --tracker "*) : "${CHECKPOINT:=}" ;; esac
case "${CHECKPOINT-none}" in
  "" | shipped | shipped:*) ;;
  *) need_path CHECKPOINT "a run folder, a file of weights, or shipped"
     [ -e "$CHECKPOINT" ] || fail "no checkpoint at $CHECKPOINT" ;;
esac
need_folder DATA "a folder with OTB, LaSOT, UAV123 and the like in it"
: "${RECIPE:=}" "${OUT:=$PWD/runs/$PAPER/benchmarks}"
case "$OUT" in /*) ;; *) OUT="$here/$OUT" ;; esac
part() {  # FOLDER SPLIT: is this part of a benchmark there?
  "$PYTHON" -c "import sys, pathlib, common.data.tracking.layouts as layouts
sys.exit(sys.argv[2] not in layouts.layout_of(pathlib.Path(sys.argv[1]))[1])" "$@" > /dev/null 2>&1
}
measured=() failed=() absent=()
for benchmark in OTB: OTB:otb50 OTB:otb2013 LaSOT:test LaSOT_ext: TrackingNet:test GOT-10k:test UAV123: UAV123:uav20l \
  NFS:30 NFS:240 TNL2K: AVisT:; do
  name="${benchmark%%:*}" split="${benchmark##*:}"
  [ -d "$DATA/$name" ] || { absent+=("$name"); continue; }
  label="$name"
  case "$split" in otb* | uav20l | 30 | 240)
    label="$name-$split"; part "$DATA/$name" "$split" || { absent+=("$label"); continue; } ;;
  esac
  if (set -x; "$PYTHON" -m "papers.$PAPER.evaluate" ${CHECKPOINT:+"$CHECKPOINT"} --data "$DATA/$name" --out "$OUT/${label/%-otb*/}" \
    ${split:+--split "$split"} ${RECIPE:+--recipe "$RECIPE"} "$@"); then measured+=("$label"); else failed+=("$label"); fi
done
list() { [ $# -gt 0 ] && echo "$*" || echo none; }
echo "measured: $(list ${measured[@]+"${measured[@]}"}); failed: $(list ${failed[@]+"${failed[@]}"});" \
  "not in $DATA: $(list ${absent[@]+"${absent[@]}"})"
[ ${#measured[@]} -gt 0 ] || exit 2
[ ${#failed[@]} -eq 0 ] || exit 1
