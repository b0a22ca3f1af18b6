#!/usr/bin/env bash
# Makes .venv with the pinned packages, and adds what a paper needs: tools/setup.sh [PAPER].
# Remembers what it has installed and returns at once when there is nothing to do.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "$0")/.." > /dev/null
paper="${1:-}"
fail() { echo "setup: $*" >&2; exit 1; }

extra=""
if [ -n "$paper" ]; then
  [ -d "papers/$paper" ] || fail "no paper '$paper'; there are: $(ls -d papers/*/ | xargs -n1 basename | grep -v __ | xargs)"
  extra="papers/$paper/requirements.txt"
fi
stamp() { cat "$@" | cksum | cut -d' ' -f1; }
base=".venv/.installed-base-$(stamp pyproject.toml constraints.txt)"
added="${extra:+.venv/.installed-$paper-$(stamp constraints.txt "$extra")}"
[ -e "$base" ] && { [ -z "$added" ] || [ -e "$added" ]; } && exit 0

if command -v flock > /dev/null; then  # two makes at once: the second waits
  exec 9>> .setup.lock
  flock -n 9 || { echo "setup: waiting for another setup in this folder"; flock 9; }
fi

if [ ! -x .venv/bin/python ]; then
  candidates=(python3.11 python3.12 python3.13 python3)
  [ -z "${PYTHON3:-}" ] || candidates=("$PYTHON3")
  seen=""
  for python in "${candidates[@]}"; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && break
    seen="$seen, $python: $("$python" --version 2> /dev/null || echo none)"
    python=""
  done
  [ -n "$python" ] || fail "needs Python 3.11, 3.12 or 3.13 with its venv module (on Debian: apt-get install python3-venv;" \
    "or PYTHON3=/path/to/python3.12); found ${seen#, }"
  free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free_gb" -ge 10 ] || fail "PyTorch and its CUDA libraries take about 10 GB here; only $free_gb GB are free in $PWD"
  command -v cc > /dev/null || echo "setup: no C compiler (cc): all runs, but --compile and DeepSpeed will not; install gcc and g++"
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

quiet="$([ -t 1 ] || echo -q)"
pip() {  # without its warnings of package folders that are configured and not there, which bury the lines that matter
  {
    .venv/bin/python -m pip --disable-pip-version-check "$@" 2>&1 >&3 |
      { grep --line-buffered -v "^WARNING: Location .* is ignored" >&2 || true; }
  } 3>&1
}
if [ ! -e "$base" ]; then
  echo "setup: installing PyTorch and the other common packages (5 GB on disk, some minutes)"
  pip install $quiet -c constraints.txt -e '.[dev]' || fail "the packages could not be installed; the lines above say why"
  rm -f .venv/.installed-base-*
  touch "$base"
fi
if [ -n "$added" ] && [ ! -e "$added" ]; then
  if grep -qE '^[^#]' "$extra"; then
    echo "setup: installing what $paper needs besides: $(grep -E '^[^#]' "$extra" | xargs)"
    pip install $quiet --no-build-isolation -c constraints.txt -r "$extra" || fail "what $paper needs could not be installed; the lines above say why"
  fi
  rm -f ".venv/.installed-$paper-"*
  touch "$added"
fi
