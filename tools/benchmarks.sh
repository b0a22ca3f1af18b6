#!/usr/bin/env bash
# A tracker on every benchmark found under DATA (OTB, LaSOT, TrackingNet test, GOT-10k test), with archives for the
# servers of TrackingNet and GOT-10k; VOT is its own toolkit's (papers/*/vot.py). Arguments go to evaluate:
#   PAPER=sbt CHECKPOINT=runs/... DATA=/data [RECIPE=full for a file of weights] [OUT=runs/sbt/benchmarks] \
#     benchmarks.sh [--baselines] [--fresh] [--rule lasot] ...
source "$(dirname -- "${BASH_SOURCE[0]}")/../common/run/script.sh"
[ -n "${PAPER:-}" ] || fail "PAPER=... is needed: sbt, dualtfr or maml_tracker"
need_path CHECKPOINT "a run folder or a file of weights"
need_folder DATA "a folder with OTB, LaSOT, TrackingNet or GOT-10k in it"
[ -e "$CHECKPOINT" ] || fail "no checkpoint at $CHECKPOINT"
: "${RECIPE:=}" "${OUT:=$PWD/runs/$PAPER/benchmarks}"
case "$OUT" in /*) ;; *) OUT="$here/$OUT" ;; esac
measured=() failed=() absent=()
for benchmark in OTB: LaSOT:test TrackingNet:test GOT-10k:test; do
  name="${benchmark%%:*}" split="${benchmark##*:}"
  [ -d "$DATA/$name" ] || { absent+=("$name"); continue; }
  if (set -x; "$PYTHON" -m "papers.$PAPER.evaluate" "$CHECKPOINT" --data "$DATA/$name" --out "$OUT/$name" \
    ${split:+--split "$split"} ${RECIPE:+--recipe "$RECIPE"} "$@"); then measured+=("$name"); else failed+=("$name"); fi
done
list() { [ $# -gt 0 ] && echo "$*" || echo none; }
echo "measured: $(list ${measured[@]+"${measured[@]}"}); failed: $(list ${failed[@]+"${failed[@]}"});" \
  "not in $DATA: $(list ${absent[@]+"${absent[@]}"})"
[ ${#measured[@]} -gt 0 ] || exit 2
[ ${#failed[@]} -eq 0 ] || exit 1
