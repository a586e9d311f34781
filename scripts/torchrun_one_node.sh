#!/usr/bin/env bash
# Train on all GPUs of this machine, one process per GPU. All arguments are passed to `fasttrain run`.
# usage: bash scripts/torchrun_one_node.sh --arch tresnet_xl --data DIR
# GPUS overrides the number of processes. Without a GPU, it is the number of processes on the CPU.
set -euo pipefail
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$gpus" -gt 0 ] || { echo "torchrun_one_node.sh: no GPU found; set GPUS" >&2; exit 1; }
exec torchrun --standalone --nproc-per-node "$gpus" -m fasttrain run "$@"
