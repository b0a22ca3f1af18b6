#!/usr/bin/env bash
# What the Makefiles' verbs run: tools/do.sh VERB, with PAPER, RECIPE, DATA, ... from the environment.
# Paths mean the folder it is called from. An environment of your own: PYTHON=python; else .venv, made on first use.
set -euo pipefail
unset CDPATH
here="$PWD"
cd -- "$(dirname -- "$0")/.." > /dev/null
verb="$1" paper="${PAPER:-}"
absolute() { case "$1" in "" | shipped | shipped:* | /*) printf %s "$1" ;; *) printf %s "$here/$1" ;; esac; }
DATA="$(absolute "${DATA:-}")" CHECKPOINT="$(absolute "${CHECKPOINT:-}")" INPUT="$(absolute "${INPUT:-}")"
export DATA CHECKPOINT INPUT PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mapfile -t more < <(printf %s "${ARGS:-}" | xargs -n1 printf '%s\n')
[ -n "${more[0]:-}" ] || more=()

python3="${PYTHON:-python3}"
"$python3" tools/check.py "$verb"
[ "$verb" != list ] || exec "$python3" tools/list.py "${more[@]}"
papers="$(cd papers && ls -d -- */recipes.py | xargs -n1 dirname | xargs)"
if [ -n "${PYTHON:-}" ]; then
  python="$PYTHON"
  "$python" tools/needs.py ${paper:+"$paper"}
else
  python=.venv/bin/python
  case "$verb" in
    test | test-long | tables | rehearse) for each in ${paper:-$papers}; do tools/setup.sh "$each"; done ;;
    *) tools/setup.sh ${paper:+"$paper"} ;;
  esac
fi

data=() seeds=()
[ -z "$DATA" ] || data=(--data "$DATA")
[ -z "${SEEDS:-}" ] || read -ra seeds <<< "--seeds $SEEDS"
launch=("$python" -m)
[ "${GPUS:-1}" = 1 ] || launch+=(common.run.launch "$GPUS")
case "$verb" in
  setup) ;;
  reproduce | train) exec "${launch[@]}" "papers.$paper" "${RECIPE:-tiny}" "${data[@]}" "${seeds[@]}" "${more[@]}" ;;
  evaluate)
    exec "${launch[@]}" "papers.$paper.evaluate" "$CHECKPOINT" ${RECIPE:+--recipe "$RECIPE"} "${data[@]}" "${more[@]}" ;;
  demo)
    exec "$python" -m "papers.$paper.demo" ${INPUT:+"$INPUT"} ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} "${more[@]}" ;;
  smoke) exec ci/smoke.sh "$paper" "$python" ;;
  test | test-long)
    [ "$verb" = test ] && how=(-n auto --maxprocesses 4 --dist loadfile) || how=(--long)
    exec "$python" -m pytest "${how[@]}" ${paper:+"papers/$paper"} "${more[@]}" ;;
  bench)
    [ -z "$paper" ] || exec "$python" -m "papers.$paper.bench" "${data[@]}" "${more[@]}"
    for module in common.kernels papers.shiftvit papers.smlpnet; do "$python" -m "$module.bench" "${more[@]}"; done ;;
  rehearse) exec "$python" -m tools.rehearse ${paper:+"$paper"} ${RECIPE:+"$RECIPE"} "${more[@]}" ;;
  plan) exec "$python" -m tools.plan "$paper" "$RECIPE" "${more[@]}" ;;
  report | tables) exec "$python" -m "tools.$verb" "${more[@]}" ;;
  new_paper) exec "$python" -m tools.new_paper "${NAME:-}" ;;
  lint) exec "$python" -m ruff check . ;;
  *) echo "error: no verb '$verb'; make help lists them" >&2; exit 2 ;;
esac
