#!/usr/bin/env bash
# The ablations in small, on the built-in sequences: number and place of the CABs, LABs against GABs, position bias,
# reference points, and, with a folder of images (Imagenette), pre-training: [DATA=/data/imagenette] ablation.sh
# What is finished stays finished when it is started again. It takes about an hour and a half of a CPU core.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
: "${OUT:=runs}"
[ -n "${DATA:-}" ] || { set -x; exec "$PYTHON" -m papers.dualtfr ablation --out "$OUT" --resume auto "$@"; }
need_folder DATA "a folder of images with train/ and val/"
finished() { find "$OUT/dualtfr/pretrain_small" -mindepth 2 -maxdepth 2 -name results.json 2>/dev/null | sort | tail -1 || true; }
[ -n "$(finished)" ] || "$PYTHON" -m papers.dualtfr pretrain_small --data "$DATA" --out "$OUT" --resume auto
set -x
exec "$PYTHON" -m papers.dualtfr ablation --out "$OUT" --resume auto --compare-init "$(dirname "$(finished)")" "$@"
