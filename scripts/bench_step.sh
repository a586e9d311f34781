#!/usr/bin/env bash
# Measure the training step for README.md: the report's networks compared with timm's loop, and both loops' host time.
# usage: bash scripts/bench_step.sh [NAME]
#   NAME  the results go to scripts/results/step-NAME.json and host-NAME.json (default: gpu if there is one, else cpu)
# On a CPU it measures a small network at small sizes, because the report's would take hours. FASTTRAIN is the command
# (default: fasttrain). OPTIONS are more options for `fasttrain bench step`.
set -euo pipefail
[ $# -le 1 ] || { echo "usage: bash scripts/bench_step.sh [NAME]" >&2; exit 2; }
fasttrain=${FASTTRAIN:-fasttrain}
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    device=gpu networks=(--arch tresnet_xl --arch resnest101e --arch seresnext101_32x4d --steps 20)
else
    device=cpu networks=(--arch resnet18 --image-size 128 --batch-size 32 --steps 3)
fi
results=$(dirname "$0")/results name=${1:-$device}
# shellcheck disable=SC2086  # OPTIONS may be several words
"$fasttrain" bench step "${networks[@]}" --rounds 5 \
    --json "$results/step-$name.json" --plot "$results/step-$name.png" ${OPTIONS:-}
"$fasttrain" bench step --host --rounds 15 --json "$results/host-$name.json"
