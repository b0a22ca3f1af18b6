#!/usr/bin/env bash
# Adds mmcv, mmengine, mmdetection and mmsegmentation (the maintained "onedl" forks) to .venv: tools/mm.sh
# Only the detection and segmentation recipes need them. mmcv has no ready wheels for this PyTorch: its operators are
# compiled here, once, and the wheel is kept in the cache, so a second environment takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "mm: $*" >&2; exit 1; }
tools/setup.sh
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

version() { sed -n "s/^$1==//p" constraints.txt; }
stamp=".venv/.installed-mm-$(cat constraints.txt "$0" | cksum | cut -d' ' -f1)"
[ -e "$stamp" ] && exit 0

# opencv-python is left out on purpose: opencv-python-headless, which the environment has, is the same module.
pip install -q -c constraints.txt addict ftfy ninja packaging prettytable psutil pycocotools pyyaml regex rich scipy \
  shapely six termcolor terminaltables tqdm yapf || fail "what the mm packages need could not be installed; the lines above say why"

key="$(.venv/bin/python -c "
import sys, torch
cuda = torch.version.cuda if torch.cuda.is_available() else None
print(f'cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__.split(\"+\")[0]}-{\"cu\" + cuda if cuda else \"cpu\"}')")"
wheels="$(.venv/bin/python -c 'from common.run import cache_dir; print(cache_dir("wheels"))')/$key"
mkdir -p "$wheels"
mmcv="$wheels/onedl_mmcv-$(version onedl-mmcv)-*.whl"
if ! compgen -G "$mmcv" > /dev/null; then
  command -v c++ > /dev/null || fail "compiling mmcv's operators needs a C++ compiler (on Debian: apt-get install g++)"
  exec 9> "$wheels/.lock"
  ! command -v flock > /dev/null || flock 9  # two at once: the second waits and finds the wheel
fi
if ! compgen -G "$mmcv" > /dev/null; then
  jobs="${MAX_JOBS:-$(nproc)}"
  echo "mm: compiling mmcv $(version onedl-mmcv) for $key with $jobs jobs: 78 C++ files, about a quarter of an hour of one"
  echo "mm: idle core. Done once, and taken up again where it was interrupted; the wheel stays in $wheels"
  source="$wheels/source"
  if [ ! -e "$source/setup.py" ]; then
    rm -rf "$source" && mkdir -p "$source"
    pip download -q --no-deps --no-binary :all: --no-build-isolation -c constraints.txt -d "$wheels" onedl-mmcv ||
      fail "mmcv's source could not be downloaded; the lines above say why"
    tar xf "$wheels/onedl_mmcv-$(version onedl-mmcv).tar.gz" -C "$source" --strip-components 1
  fi
  # Debug symbols would take two thirds of the time.
  CFLAGS="-g0 -O2" MMCV_WITH_OPS=1 MAX_JOBS="$jobs" pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$source" ||
    fail "mmcv could not be compiled; the lines above say why"
  rm -rf "$source" "$wheels"/*.tar.gz
fi
pip install -q --no-deps --no-build-isolation -c constraints.txt $mmcv onedl-mmengine onedl-mmdetection \
  onedl-mmsegmentation imaug || fail "the mm packages could not be installed; the lines above say why"
.venv/bin/python -c 'import mmcv.ops, mmdet.apis, mmseg.apis' || fail "the mm packages do not import; the lines above say why"
rm -f .venv/.installed-mm-*
touch "$stamp"
echo "mm: mmcv, mmengine, mmdetection and mmsegmentation are in .venv"
