#!/usr/bin/env bash
# MaskCo, MoCo v2 and MaskCo without its head, pre-trained on each of several sets of pictures and probed on one:
#   DATA="data/many_objects data/one_object" PROBE=data/imagenette [SEEDS="0 1 2"] compare.sh [--field value ...]
# What is finished stays, and what was killed goes on, when it is started again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${DATA:?DATA=folders of pictures}" "${PROBE:?PROBE=folder with classes}"
for seed in ${SEEDS:-0 1 2}; do
  for data in $DATA; do
    for recipe in ${RECIPES:-mini mini_moco_v2 mini_no_mph}; do
      out="${OUT:-runs}/compare/$(basename "$data")-seed$seed"
      ! compgen -G "$out/maskco/$recipe/*/results.json" > /dev/null || continue
      (set -x; "${PYTHON:-.venv/bin/python}" -m papers.maskco.train "$recipe" --data "$data" --probe "$PROBE" \
        --seed "$seed" --out "$out" --resume auto "$@")
    done
  done
done
