#!/usr/bin/env bash
# The pipeline's figures in README.md: every loader, two policies, and the time in each of the project's own stages.
# usage: bash scripts/bench_pipeline.sh DATA [NAME]
#   DATA  a folder of class folders of photographs (README.md's are 320 of ImageNet)
#   NAME  of the results, scripts/results/pipeline-NAME.json (default: cpu, or gpu where nvidia-smi finds one)
# FASTTRAIN is the command (default: fasttrain); what else `fasttrain bench pipeline` takes goes into OPTIONS.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash scripts/bench_pipeline.sh DATA [NAME]" >&2; exit 2; }
if nvidia-smi --list-gpus >/dev/null 2>&1; then device=gpu batches=(--batch-size 128 --batch-size 256); else
    device=cpu batches=(--batch-size 64 --batch-size 256 --steps 8)
fi
results=$(dirname "$0")/results/pipeline-${2:-$device}
# shellcheck disable=SC2086  # OPTIONS are several words
"${FASTTRAIN:-fasttrain}" bench pipeline --data "$1" "${batches[@]}" --profile --rounds 3 \
    --json "$results.json" --plot "$results.png" ${OPTIONS:-}
