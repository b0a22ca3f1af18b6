#!/usr/bin/env bash
# The ablations in small, on the built-in sequences: number and place of the CABs, LABs against GABs, position bias,
# reference points, and, with a folder of images (Imagenette), pre-training: [DATA=/data/imagenette] ablation.sh
# What is finished stays finished when it is started again. It takes about an hour and a half of a CPU core.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${OUT:=runs}" "${PYTHON:=.venv/bin/python}"
set -x
if [ -z "${DATA:-}" ]; then
  exec "$PYTHON" -m papers.dualtfr.train ablation --out "$OUT" --resume auto
fi
found="$(ls -d "$OUT"/dualtfr/pretrain_small/*/results.json 2>/dev/null | tail -1 || true)"
[ -n "$found" ] || "$PYTHON" -m papers.dualtfr.train pretrain_small --data "$DATA" --out "$OUT" --resume auto
run="$(dirname "$(ls -d "$OUT"/dualtfr/pretrain_small/*/results.json | tail -1)")"
exec "$PYTHON" -m papers.dualtfr.train ablation --out "$OUT" --resume auto --compare-init "$run"
