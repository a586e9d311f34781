#!/usr/bin/env bash
# Train on several machines. Run the same command on each, with NODES (their number), NODE_RANK (0 on the first) and
# MASTER (the address of the first). --out and --data must be the same paths on storage that all machines share.
# usage: NODES=4 NODE_RANK=0 MASTER=10.0.0.1 bash scripts/torchrun_nodes.sh --arch tresnet_xl --data DIR --out DIR
# Under SLURM all three are set by `srun --nodes=4 --ntasks-per-node=1 bash scripts/torchrun_nodes.sh …`.
set -euo pipefail
nodes=${NODES:-${SLURM_NNODES:?set NODES, NODE_RANK and MASTER}}
rank=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK}}
master=${MASTER:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?set MASTER}" | head -n1)}
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$gpus" -gt 0 ] || { echo "torchrun_nodes.sh: no GPU found; set GPUS" >&2; exit 1; }
exec torchrun --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$gpus" \
    --master-addr "$master" --master-port "${PORT:-29500}" -m fasttrain run "$@"
