#!/usr/bin/env bash
# A paper's `smoke` recipe, stopped in the middle and resumed: ci/smoke.sh PAPER [PYTHON]
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "$0")/.." > /dev/null
paper="$1" python="${2:-.venv/bin/python}"
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT
"$python" -m "papers.$paper" smoke --out "$runs" --stop-at 5
"$python" -m "papers.$paper" smoke --out "$runs" --resume auto
results="$(ls "$runs/$paper"/smoke/*/results.json)"  # exactly one: the interrupted run, finished
grep -q '"comparable": true' "$results" && { echo "smoke: a smoke run must not claim to be comparable" >&2; exit 1; }
echo "smoke: $paper passed"
