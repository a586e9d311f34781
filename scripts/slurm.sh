#!/usr/bin/env bash
# Train on several nodes under SLURM, across several time limits: five minutes before the limit the run gets a signal
# and saves, the job is queued again, and it resumes. Adapt the lines below to the cluster.
# usage: sbatch scripts/slurm.sh --arch tresnet_xl --data DIR --out DIR
# Submit it from the project's root. Both DIRs are on storage that all nodes share. The options are those of
# `fasttrain run`.
# In a container of scripts/Dockerfile's image, with absolute DIRs that MOUNTS makes visible there:
#   IMAGE=registry.example.com#fasttrain:latest MOUNTS=/data:/data,/out:/out sbatch scripts/slurm.sh …    (pyxis)
#   IMAGE=/images/fasttrain.sif MOUNTS=/data:/data,/out:/out sbatch scripts/slurm.sh …                    (Apptainer)
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# B: only this script gets the signal, and sends it to the tasks through srun. The time is for the current steps and for
# writing a checkpoint. SLURM may send it up to a minute early.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${SLURM_JOB_ID:?submit this script with sbatch; see its first lines}"
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240               # seconds that ranks have to save; less than --signal's

command=(bash scripts/torchrun_status.sh bash scripts/torchrun_nodes.sh "$@")
container=()
if [ -n "${IMAGE:-}" ]; then
    MASTER=${MASTER:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)} # the image has no scontrol
    cache=${XDG_CACHE_HOME:-$HOME/.cache}
    mkdir -p "$cache"
    mounts="$cache:/cache${MOUNTS:+,$MOUNTS}"
    export MASTER XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor
    unset PYTHONPATH PYTHONHOME # of the host's Python
    case "$IMAGE" in
        *.sif) command=(apptainer exec --nv --pwd=/fasttrain --bind="$mounts" "$IMAGE" "${command[@]}") ;;
        *)
            container=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir=/fasttrain)
            container+=(--no-container-entrypoint)
            ;;
    esac
elif [ ! -f scripts/torchrun_nodes.sh ]; then
    echo "slurm.sh: submit it from the project's root" >&2
    exit 2
fi

# The nodes do not exit at the same time. The first one to exit must not end the others while they save.
srun --kill-on-bad-exit=0 --wait=300 "${container[@]}" "${command[@]}" &
step=$!
signal='' requeue=''
trap 'signal=yes requeue=yes; kill -USR1 "$step" 2>/dev/null || true' USR1
status=0
while # a trap interrupts `wait`
    signal=''
    wait "$step" && status=0 || status=$?
    [ -n "$signal" ]
do :; done
# Requeue only for the time limit: SLURM requeues a preempted job itself, and a canceled job must stay canceled.
if [ "$status" -eq 75 ] && [ -n "$requeue" ]; then
    echo "slurm.sh: the run saved before the time limit; the job is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
