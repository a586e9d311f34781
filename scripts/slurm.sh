#!/usr/bin/env bash
# Train on several nodes under SLURM, in as many jobs' time as it takes: five minutes before the time limit the run is
# told, saves, and the job is queued again; it then goes on where it was. Change the lines below to fit the cluster.
# usage: sbatch scripts/slurm.sh --arch tresnet_xl --data DIR --out DIR
# Submit it from the project's root. DIR is on storage that all nodes see; the options are those of `fasttrain run`.
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# B: to this script alone, which sends it to the tasks through srun. The time is for the steps under way and for writing
# a checkpoint. SLURM may be up to a minute early.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${SLURM_JOB_ID:?this is for sbatch; see the first lines of the script}"
[ -f scripts/torchrun_nodes.sh ] || { echo "slurm.sh: submit it from the project's root" >&2; exit 2; }
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240               # ranks may take so long to save; less than --signal's time

# The nodes do not end at the same moment: the first one to end must not take the others with it while they save.
srun --kill-on-bad-exit=0 --wait=300 bash scripts/torchrun_status.sh bash scripts/torchrun_nodes.sh "$@" &
step=$!
signal='' asked=''
trap 'signal=yes asked=yes; kill -USR1 "$step" 2>/dev/null || true' USR1
status=0
while # a trap interrupts `wait`
    signal=''
    wait "$step" && status=0 || status=$?
    [ -n "$signal" ]
do :; done
# Not where something else stopped the run: SLURM queues a preempted job by itself, and a cancelled one is to stay so.
if [ "$status" -eq 75 ] && [ -n "$asked" ]; then
    echo "slurm.sh: stopped and saved before the time limit; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
