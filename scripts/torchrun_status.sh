#!/usr/bin/env bash
# Run a command that ends in `torchrun … -m fasttrain run …`, and report how the run ended by the exit status. torchrun
# itself exits with 1, whatever the status of its ranks. This script exits with 75 if a signal stopped the run and it
# has saved (the same command resumes it), and with the command's status otherwise. It forwards SIGTERM, SIGUSR1, SIGINT
# and SIGHUP to the command, once each. Run it on every node. OUT must be on storage that all nodes share.
# usage: bash scripts/torchrun_status.sh COMMAND… --out OUT …
# PATIENCE is the number of seconds that OUT/log.jsonl may lag behind, for example on network disks (default 30).
set -euo pipefail
out=
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --out) out=${arguments[i + 1]:-} ;;
        --out=*) out=${arguments[i]#--out=} ;;
        --resume | --resume=*)
            echo "torchrun_status.sh: remove --resume: a restarted run must be able to resume" >&2
            exit 2
            ;;
    esac
done
[ -n "$out" ] || { echo "usage: bash scripts/torchrun_status.sh COMMAND… --out OUT …" >&2; exit 2; }
log="$out/log.jsonl"
earlier=0 # bytes that earlier runs have written
[ ! -f "$log" ] || earlier=$(wc -c <"$log")

stopped() { # whether the last event is `stopped`, without events of earlier runs
    tail -c "+$((earlier + 1))" "$log" 2>/dev/null | tail -n1 | grep -q '^{"event": "stopped"'
}

# torchrun forwards these signals to its ranks and kills them after the timeout (in seconds). Without SIGUSR1 in the
# list, that signal would end torchrun but not its ranks.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

signal='' sent='' child=''
# shellcheck disable=SC2329 # called by the traps
forward() {
    signal=$1
    case "$sent" in *" $1 "*) return 0 ;; esac
    sent+=" $1 "
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
for name in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # expand the name now
    trap "forward $name" "$name"
done
"$@" &
child=$!
for name in $sent; do # signals that came before the command started
    kill -s "$name" "$child" 2>/dev/null || true
done
status=0
while # a trap interrupts `wait`
    signal=''
    wait "$child" && status=0 || status=$?
    [ -n "$signal" ]
do :; done
if [ "$status" -ne 0 ]; then
    for ((left = ${PATIENCE:-30}; ; left--)); do
        ! stopped || exit 75
        [ "$left" -gt 0 ] || break
        sleep 1
    done
fi
exit "$status"
