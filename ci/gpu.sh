#!/usr/bin/env bash
# What a GPU shows, in at most ten minutes on one of the H200's class: ci/gpu.sh [PART ...], without a name all of them,
# in this order. A part that fails does not stop the others. What they print goes to OUT/<part>.log; benchmarks write
# their records into the repository, and a training's results.json goes where `make tables` finds it.
#
#   tests      what is marked gpu, kernels first: nothing falls back
#   kernels    shift and sparse MLP, CUDA graphs                      networks   ShiftViT and sMLPNet with them, likewise
#   tiny       every paper's tiny recipe, bf16                        frames     the trackers' frames per second
#   prefill    VLoRA beside visual tokens at 7B's shapes              evidence   with DATA: ShiftViT and Swin at equal time
#
# PYTHON: .venv/bin/python. OUT: runs/gpu. MINUTES: 10, what all parts together may take. CUT=1: everything at its
# smallest, which proves nothing but that it runs. Without a GPU, rehearsed:
#   CUT=1 PRETEND_GPU=1 KERNEL_BACKEND=reference PYTHONPATH=ci/pretend_gpu/site ci/gpu.sh
set -uo pipefail
unset CDPATH
cd -- "$(dirname -- "$0")/.." > /dev/null
python="${PYTHON:-.venv/bin/python}" out="${OUT:-runs/gpu}" cut="${CUT:-}" data="${DATA:-}"
end=$((SECONDS + 60 * ${MINUTES:-10}))
papers="${PAPERS:-$(cd papers && ls -d -- */recipes.py | xargs -n1 dirname | xargs)}"
mkdir -p "$out"
failed=() passed=() part=""

run() {  # run NAME COMMAND ...: never longer than there is time left
  local name="$1" left=$((end - SECONDS)) began=$SECONDS
  shift
  if [ "$left" -le 0 ]; then
    echo "$name: no time left"
    failed+=("$name")
    return
  fi
  echo "$name: $*"
  timeout -k 10 "$left" "$@" > "$out/$name.log" 2>&1
  local status=$?
  if [ "$status" -eq 0 ]; then
    passed+=("$name")
    echo "$name: $((SECONDS - began)) s"
  else
    failed+=("$name")
    echo "$name: FAILED with status $status after $((SECONDS - began)) s; $(tail -n 1 "$out/$name.log")"
  fi
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

training() {  # training PAPER RECIPE ...: and its record among the paper's
  local paper="$1" recipe="$2" record
  shift 2
  if ! "$python" tools/needs.py "$paper" > "$out/$paper.needs" 2>&1; then
    echo "$paper: left out, $(tail -n 1 "$out/$paper.needs")"
    return
  fi
  run "$paper-$recipe" "$python" -m "papers.$paper" "$recipe" --device cuda --out "$out/runs" "$@"
  record="$(ls -t "$out/runs/$paper/$recipe"/*/results.json 2> "$out/none" | head -n 1)"
  [ -n "$cut" ] || [ -z "$record" ] || cp "$record" "papers/$paper/results/$recipe-gpu.json"
}

tests() {
  has pytest || { echo "tests: left out, pytest is missing"; return; }
  run tests-kernels "$python" -m pytest -q -m gpu common/kernels ${cut:+-k gradients}
  run tests-papers "$python" -m pytest -q -m gpu papers ${cut:+-k layout}
}

benchmark() {  # benchmark NAME MODULE ...
  local name="$1"
  shift
  run "bench-$name" "$python" -m "$@"
}

kernels() {
  [ -n "$cut" ] && set -- --only "1x12x1x1" --batch 2 --seconds 0.01 || set -- --graphs --seconds 0.1
  benchmark shift common.kernels.bench shift "$@"
  [ -n "$cut" ] || benchmark sparse_mlp common.kernels.bench sparse_mlp "$@"
}

networks() {
  [ -n "$cut" ] && set -- --only none || set -- --graphs --seconds 0.1
  benchmark shiftvit papers.shiftvit.bench "$@"
  benchmark smlpnet papers.smlpnet.bench "$@"
}

tiny() {
  local paper recipe=tiny
  [ -z "$cut" ] || recipe=smoke
  for paper in $papers; do training "$paper" "$recipe" ${cut:+--stop-at 3}; done
}

frames() {
  benchmark sbt papers.sbt.bench ${cut:+--help}
  benchmark dualtfr papers.dualtfr.bench ${cut:+--help}
  benchmark maml_tracker papers.maml_tracker.bench compiled ${cut:+--help}
}

prefill() {
  benchmark vlora papers.vlora.bench --size 7b --batch 1 8 --graphs ${cut:+--help}
}

evidence() {
  [ -n "$data" ] || { echo "evidence: left out, DATA names no folder of Tiny-ImageNet-100"; return; }
  training shiftvit "${EVIDENCE:-tiny_imagenet100}" --data "$data"
}

every=(tests kernels networks tiny frames prefill evidence)
"$python" -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.cuda.get_device_name())" ||
  exit 2
for part in "${@:-${every[@]}}"; do
  case " ${every[*]} " in
    *" $part "*) "$part" ;;
    *) echo "no part '$part'; there are ${every[*]}" >&2; exit 2 ;;
  esac
done
echo "passed: ${passed[*]:-nothing}"
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
