# Sourced by the papers' scripts: they may be called from anywhere, paths mean the caller's folder, and what is missing
# is one line and status 2.
set -euo pipefail
unset CDPATH
here="$PWD"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." > /dev/null
fail() { echo "error: $*" >&2; exit 2; }
: "${PYTHON:=.venv/bin/python}" "${GPUS:=8}"
command -v "$PYTHON" > /dev/null || fail "no $PYTHON: make setup PAPER=... makes the environment, PYTHON=python takes yours"

absolute() {  # PATH: as seen from where the script was called; what is no path there (a name on a hub) stays
  [ -e "$here/$1" ] && case "$1" in /*) printf %s "$1" ;; *) printf %s "$here/$1" ;; esac || printf %s "$1"
}
need_folder() {  # VARIABLE, what it is
  [ -n "${!1:-}" ] || fail "$1=... is needed: $2"
  printf -v "$1" %s "$(absolute "${!1}")"
  [ -d "${!1}" ] || fail "no folder $1=${!1}: expected $2"
}
need_path() {  # VARIABLE, what it is
  [ -n "${!1:-}" ] || fail "$1=... is needed: $2"
  printf -v "$1" %s "$(absolute "${!1}")"
}
launch() { (set -x; exec "$PYTHON" -m common.run.launch "$GPUS" "$@"); }
look() {  # MODULE FOLDER...: what is there and what is missing
  local module="$1"; shift
  [ $# -gt 0 ] || fail "usage: $(basename "$0") FOLDER..."
  for folder; do (set -x; exec "$PYTHON" -m "$module" "$(absolute "$folder")"); done
}
