#!/usr/bin/env bash
# MaskCo, MoCo v2 and MaskCo without its head, pre-trained on each of several sets of pictures and probed on one:
#   DATA="data/many_objects data/one_object" PROBE=data/imagenette [SEEDS="0 1 2"] compare.sh [--field value ...]
# What is finished stays, and what was killed goes on, when it is started again.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
[ -n "${DATA:-}" ] || fail "DATA=... is needed: folders of pictures"
need_folder PROBE "a folder with classes"
for seed in ${SEEDS:-0 1 2}; do
  for data in $DATA; do
    for recipe in ${RECIPES:-mini mini_moco_v2 mini_no_mph}; do
      out="${OUT:-runs}/compare/$(basename "$data")-seed$seed"
      ! compgen -G "$out/maskco/$recipe/*/results.json" > /dev/null || continue
      (set -x; "$PYTHON" -m papers.maskco "$recipe" --data "$(absolute "$data")" --probe "$PROBE" \
        --seed "$seed" --out "$out" --resume auto "$@")
    done
  done
done
