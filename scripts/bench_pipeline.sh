#!/usr/bin/env bash
# Measure the pipeline for README.md: every loader, two policies, and the time of each of fasttrain's stages.
# usage: bash scripts/bench_pipeline.sh DATA [NAME]
#   DATA  photographs in class folders (README.md uses 320 of ImageNet)
#   NAME  the results go to scripts/results/pipeline-NAME.json (default: gpu if nvidia-smi finds one, else cpu)
# FASTTRAIN is the command (default: fasttrain). OPTIONS are more options for `fasttrain bench pipeline`.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash scripts/bench_pipeline.sh DATA [NAME]" >&2; exit 2; }
if nvidia-smi --list-gpus >/dev/null 2>&1; then device=gpu batches=(--batch-size 128 --batch-size 256); else
    device=cpu batches=(--batch-size 64 --batch-size 256 --steps 8)
fi
results=$(dirname "$0")/results/pipeline-${2:-$device}
# shellcheck disable=SC2086  # OPTIONS may be several words
"${FASTTRAIN:-fasttrain}" bench pipeline --data "$1" "${batches[@]}" --profile --rounds 3 \
    --json "$results.json" --plot "$results.png" ${OPTIONS:-}
