#!/usr/bin/env bash
# Run a command that ends in `torchrun … -m fasttrain run …`, and tell by the exit status how the run ended. torchrun
# ends with 1 whatever its ranks ended with; this ends with 75 where the run was stopped by a signal and has saved (the
# same command goes on), and with the command's own status otherwise. SIGTERM, SIGUSR1, SIGINT and SIGHUP are sent on
# to the command, once each. Run it on every node; OUT must be on storage that all of them see.
# usage: bash scripts/torchrun_status.sh COMMAND… --out OUT …
# PATIENCE is for how many seconds OUT/log.jsonl may lag behind, as it does on network disks (default 30).
set -euo pipefail
out=
arguments=("$@")
for ((at = 0; at < $#; at++)); do
    case "${arguments[at]}" in
        --out) out=${arguments[at + 1]:-} ;;
        --out=*) out=${arguments[at]#--out=} ;;
        --resume | --resume=*)
            echo "torchrun_status.sh: leave out --resume: what is started again has to go on where it was" >&2
            exit 2
            ;;
    esac
done
[ -n "$out" ] || { echo "usage: bash scripts/torchrun_status.sh COMMAND… --out OUT …" >&2; exit 2; }
log="$out/log.jsonl"
before=0
[ ! -f "$log" ] || before=$(wc -c <"$log")

stopped() { # the last event that this run has written says so; one of an earlier run does not count
    tail -c "+$((before + 1))" "$log" 2>/dev/null | tail -n1 | grep -q '^{"event": "stopped"'
}

# torchrun sends these on to its ranks, and then waits for so long before it kills them. Without SIGUSR1 in the list
# that signal would end torchrun alone.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

signal='' sent='' child=''
# shellcheck disable=SC2329 # the traps call it
pass_on() {
    signal=$1
    case "$sent" in *" $1 "*) return 0 ;; esac
    sent+=" $1 "
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
for each in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # the name is meant now
    trap "pass_on $each" "$each"
done
"$@" &
child=$!
for each in $sent; do # came before there was anyone to send it to
    kill -s "$each" "$child" 2>/dev/null || true
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
