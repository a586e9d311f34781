#!/usr/bin/env bash
# Measure training end to end for README.md: the real run compared with its step alone, its pipeline alone, and timm's
# loader and loop.
# usage: bash scripts/bench_train.sh DATA [NAME]
#   DATA  photographs in class folders (README.md uses 320 of ImageNet)
#   NAME  the results go to scripts/results/train-NAME.json (default: gpu if nvidia-smi finds one, else cpu)
# On a CPU it measures a small network at small sizes. FASTTRAIN is the command (default: fasttrain). OPTIONS are more
# options for `fasttrain bench train`.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: bash scripts/bench_train.sh DATA [NAME]" >&2; exit 2; }
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    device=gpu networks=(--arch tresnet_xl --arch resnest101e --arch seresnext101_32x4d --steps 100 --warm-up 40)
else
    device=cpu networks=(--arch resnet18 --image-size 96 --batch-size 32 --steps 40 --warm-up 10)
fi
results=$(dirname "$0")/results/train-${2:-$device}
# shellcheck disable=SC2086  # OPTIONS may be several words
"${FASTTRAIN:-fasttrain}" bench train --data "$1" "${networks[@]}" --rounds 3 \
    --json "$results.json" --plot "$results.png" ${OPTIONS:-}
