#!/usr/bin/env bash
# Train on all GPUs of this machine, one process each. Everything after the script's name goes to `fasttrain run`.
# usage: bash scripts/torchrun_one_node.sh --arch tresnet_xl --data DIR
# GPUS sets another number of processes (on a machine without a GPU: of processes on the CPU).
set -euo pipefail
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$gpus" -gt 0 ] || { echo "torchrun_one_node.sh: no GPU found; set GPUS" >&2; exit 1; }
exec torchrun --standalone --nproc-per-node "$gpus" -m fasttrain run "$@"
