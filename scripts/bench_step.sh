#!/usr/bin/env bash
# The training step's figures in README.md: the report's networks compared with timm's loop, and the host time of both loops.
# usage: bash scripts/bench_step.sh [NAME]
#   NAME  of the results, scripts/results/step-NAME.json and host-NAME.json (default: cpu, or gpu where there is one)
# On a CPU it takes a small network at small sizes: the report's would take hours. FASTTRAIN is the command (default:
# fasttrain); what else `fasttrain bench step` takes goes into OPTIONS.
set -euo pipefail
[ $# -le 1 ] || { echo "usage: bash scripts/bench_step.sh [NAME]" >&2; exit 2; }
fasttrain=${FASTTRAIN:-fasttrain}
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    device=gpu networks=(--arch tresnet_xl --arch resnest101e --arch seresnext101_32x4d --steps 20)
else
    device=cpu networks=(--arch resnet18 --image-size 128 --batch-size 32 --steps 3)
fi
results=$(dirname "$0")/results name=${1:-$device}
# shellcheck disable=SC2086  # OPTIONS are several words
"$fasttrain" bench step "${networks[@]}" --rounds 5 \
    --json "$results/step-$name.json" --plot "$results/step-$name.png" ${OPTIONS:-}
"$fasttrain" bench step --host --rounds 15 --json "$results/host-$name.json"
