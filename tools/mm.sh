#!/usr/bin/env bash
# Adds mmcv, mmengine, mmdetection and mmsegmentation (the maintained "onedl" forks) to .venv: tools/mm.sh
# Only the detection and segmentation recipes need them. mmcv is installed without its compiled operators: torchvision
# has those that the recipes use (common/run/mm_ops.py). MMCV_WITH_OPS=1 tools/mm.sh compiles all of them instead, for
# this Python, PyTorch, processor and GPU, once: the wheel stays in the cache.
set -euo pipefail
cd -- "$(dirname -- "$0")/.." > /dev/null
fail() { echo "mm: $*" >&2; exit 1; }
tools/setup.sh
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

version="$(sed -n 's/^onedl-mmcv==//p' constraints.txt)"
key=pure
[ "${MMCV_WITH_OPS:-0}" = 0 ] || key="$(.venv/bin/python -c "
import platform, sys, torch
gpu = f'cu{torch.version.cuda}-sm{\"{}{}\".format(*torch.cuda.get_device_capability())}' if torch.cuda.is_available() else 'cpu'
print(f'cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__.split(\"+\")[0]}-{platform.machine()}-{gpu}')")"
stamp=".venv/.installed-mm-$key-$(cat constraints.txt "$0" common/run/mm_ops.py | cksum | cut -d' ' -f1)"
[ -e "$stamp" ] && exit 0

# opencv-python is left out on purpose: opencv-contrib-python-headless, which the environment has, is the same module.
pip install -q -c constraints.txt addict ftfy packaging prettytable psutil pycocotools pyyaml regex rich scipy \
  shapely six termcolor terminaltables tqdm yapf || fail "what the mm packages need could not be installed; the lines above say why"

wheels="$(.venv/bin/python -c 'from common.run import cache_dir; print(cache_dir("wheels"))')/$key"
mkdir -p "$wheels"
exec 9>> "$wheels/.lock"
! command -v flock > /dev/null || flock 9  # two at once: the second waits and finds the wheel
shopt -s nullglob
built() { wheel=("$wheels/onedl_mmcv-$version-"*.whl); [ -n "${wheel[*]}" ]; }
if ! built && [ "$key" = pure ]; then
  # built in isolation it sees no PyTorch, and so leaves its operators out
  env -u PIP_NO_BUILD_ISOLATION -u PYTHONPATH .venv/bin/python -m pip --disable-pip-version-check wheel -q --no-deps --no-cache-dir \
    -c constraints.txt -w "$wheels" onedl-mmcv || fail "mmcv could not be built; the lines above say why"
elif ! built; then
  command -v c++ > /dev/null || fail "compiling mmcv's operators needs a C++ compiler (on Debian: apt-get install g++)"
  case "$key" in *-cpu) ;; *)
    command -v nvcc > /dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
      fail "compiling mmcv's operators for $key needs CUDA's nvcc; without MMCV_WITH_OPS nothing is compiled" ;;
  esac
  jobs="${MAX_JOBS:-$(nproc)}"
  echo "mm: compiling mmcv $version for $key with $jobs jobs: 78 C++ files, about a quarter of an hour of one idle core"
  echo "mm: done once, and taken up again where it was interrupted; the wheel stays in $wheels"
  source="$wheels/source"
  pip install -q -c constraints.txt ninja || fail "ninja could not be installed; the lines above say why"
  if [ ! -e "$source/setup.py" ]; then
    rm -rf "$source" && mkdir -p "$source"
    pip download -q --no-deps --no-binary :all: --no-build-isolation -c constraints.txt -d "$wheels" onedl-mmcv ||
      fail "mmcv's source could not be downloaded; the lines above say why"
    tar xf "$wheels/onedl_mmcv-$version.tar.gz" -C "$source" --strip-components 1
  fi
  # Debug symbols would take two thirds of the time.
  CFLAGS="-g0 -O2" MMCV_WITH_OPS=1 MAX_JOBS="$jobs" pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$source" ||
    fail "mmcv could not be compiled; the lines above say why"
  rm -rf "$source" "$wheels"/*.tar.gz
fi
built || fail "no wheel of mmcv $version in $wheels"
pip install -q --no-deps --force-reinstall "${wheel[0]}" &&
  pip install -q --no-deps --no-build-isolation -c constraints.txt onedl-mmengine onedl-mmdetection onedl-mmsegmentation \
    imaug || fail "the mm packages could not be installed; the lines above say why"
mmcv="$(.venv/bin/python -c 'import importlib.util as u; print(u.find_spec("mmcv").submodule_search_locations[0])')"
if [ "$key" = pure ]; then cp common/run/mm_ops.py "$mmcv/_ext.py"; else rm -f "$mmcv/_ext.py"; fi
.venv/bin/python -c 'import mmcv.ops, mmdet.apis, mmseg.apis' || fail "the mm packages do not import; the lines above say why"
rm -f .venv/.installed-mm-*
touch "$stamp"
echo "mm: mmcv ($key), mmengine, mmdetection and mmsegmentation are in .venv"
