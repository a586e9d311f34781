#!/usr/bin/env bash
# Everything that only a GPU can tell, on one GPU, in parts of at most nine minutes each, the most telling first.
# usage: DATA=DIR bash scripts/gpu_suite.sh OUT [PART...]
#   OUT   results go here; a measurement that is done is not done again: the same command goes on where it was stopped
#   PART  names of parts, in place of all of them: tests kernels step aligned pipeline train memory autoaugment
#         graphs parity
#   DATA  a folder of class folders of photographs (a few hundred suffice)
# LIMIT seconds a part (default: 540): one that runs over is ended, what it has written stays, and the next one begins.
# TOTAL seconds in all (default: no limit): no part runs beyond them.
# TOY=1 runs every part on a CPU at toy size, to see that it works; its figures mean nothing.
# FASTTRAIN is the command (default: fasttrain; it may have several words, as "python3 -m fasttrain" has), PYTHON the
# interpreter beside it (default: python).
# At the end, or after each stop, `OUT/gpu.json` has all figures and `OUT/gpu.md` their tables.
set -uo pipefail
[ $# -ge 1 ] && [ -d "${DATA:-}" ] || { echo "usage: DATA=DIR bash scripts/gpu_suite.sh OUT [PART...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
mkdir -p "$out"
read -ra fasttrain <<<"${FASTTRAIN:-fasttrain}"
python=${PYTHON:-python} limit=${LIMIT:-540} total=${TOTAL:-}
networks=(tresnet_xl resnest101e seresnext101_32x4d)

if [ -n "${TOY:-}" ]; then
    networks=(test_resnet)
    aligned=tresnet_l
    device=(--device cpu) small=(--image-size 32 --batch-size 8 --rounds 1 --steps 2)
    turns=(--rounds 1) train=("${small[@]}" --warm-up 1) step=("${small[@]}")
    batches=(8) pipeline=(--image-size 32 --rounds 1 --steps 2) memory=(8 16)
    tests=(test_kernel_mix.py) marks=(-k "bit or reference") few=()
else
    aligned=tresnet_xl
    device=(--device cuda) turns=(--rounds 15)
    step=(--rounds 5 --steps 20) train=(--rounds 2 --steps 60 --warm-up 20)
    batches=(256 128) pipeline=(--rounds 5) memory=(128 256 384 512 640 768)
    # By name, so that no other test's imports are asked for.
    tests=(test_gpu.py test_kernels_triton.py test_models_aligned.py) marks=(-m gpu) few=(--batch-size 32)
fi

limited() { # a command, ended when the part's time is up, or with this script
    local left=$((deadline - SECONDS))
    [ "$left" -gt 0 ] || return 124
    timeout --kill-after=10 "$left" "$@" &
    trap 'kill "$!" 2>/dev/null; exit 130' INT TERM
    wait "$!"
}
measure() { # NAME COMMAND...: makes OUT/NAME.json, unless it is there
    local name=$1
    shift
    [ ! -e "$out/$name.json" ] || return 0
    limited "$@" "${device[@]}" --json "$out/.unfinished.json" && mv "$out/.unfinished.json" "$out/$name.json"
}

tests() { limited "$python" -m pytest -q -c "$here/pyproject.toml" "${tests[@]/#/$here/tests/}" "${marks[@]}"; }
kernels() { measure kernels-gpu "${fasttrain[@]}" bench kernels "${turns[@]}"; }
step() {
    local arch status=0
    for arch in "${networks[@]}"; do
        measure "step-$arch" "${fasttrain[@]}" bench step --arch "$arch" "${step[@]}" || status=$?
    done
    measure host-gpu "${fasttrain[@]}" bench step --host "${turns[@]}" || status=$?
    return "$status"
}
aligned() {
    local plain=("${fasttrain[@]}" bench step --arch "$aligned" "${step[@]}")
    measure step-plain "${plain[@]}" && measure step-aligned "${plain[@]}" --set machine.align=true
}
pipeline() {
    local batch status=0
    for batch in "${batches[@]}"; do
        measure "pipeline-$batch" "${fasttrain[@]}" bench pipeline --data "$DATA" --batch-size "$batch" "${pipeline[@]}" \
            --profile || status=$?
    done
    return "$status"
}
train() {
    local arch status=0
    for arch in "${networks[@]}"; do
        measure "train-$arch" "${fasttrain[@]}" bench train --data "$DATA" --arch "$arch" "${train[@]}" || status=$?
    done
    return "$status"
}
graphs() { # with a batch so small that the host may not keep up
    measure step-graphs "${fasttrain[@]}" bench step --arch "${networks[-1]}" "${step[@]}" "${few[@]}" \
        --set machine.compile=graphs
}
memory() { # batches that grow until the memory does not suffice; the largest that does is what is told
    local arch batch status=0
    mkdir -p "$out/memory"
    for arch in "${networks[@]}"; do
        for batch in "${memory[@]}"; do
            measure "memory/$arch-$batch" "${fasttrain[@]}" bench step --arch "$arch" "${step[@]}" --batch-size "$batch" \
                --rounds 1 --steps 3 --no-peers
            case $? in
                0) cp "$out/memory/$arch-$batch.json" "$out/step-largest-$arch.json" ;;
                124 | 137) return 124 ;;
                *) break ;;
            esac
        done
        [ -e "$out/step-largest-$arch.json" ] || status=1
    done
    return "$status"
}
autoaugment() {
    measure train-without-autoaugment "${fasttrain[@]}" bench train --data "$DATA" --arch "${networks[0]}" "${train[@]}" \
        --set augment.autoaugment=none
}
parity() { measure parity-gpu "$python" "$here/scripts/parity.py" --data "$DATA"; }

tell() { "$python" "$here/scripts/gpu_suite_report.py" "$out"; }

failed=()
[ $# -gt 0 ] || set -- tests kernels step aligned pipeline train memory autoaugment graphs parity
for part; do
    case $part in
        tests | kernels | step | aligned | pipeline | train | memory | autoaugment | graphs | parity) ;;
        *) echo "gpu_suite.sh: there is no part $part" >&2; exit 2 ;;
    esac
    if [ -e "$out/$part.done" ]; then
        echo "== $part: done before"
        continue
    fi
    if [ -n "$total" ] && [ "$SECONDS" -ge "$total" ]; then
        echo "== $part: not begun, the $total s in all are over"
        failed+=("$part")
        continue
    fi
    echo "== $part"
    began=$SECONDS deadline=$((SECONDS + limit))
    [ -z "$total" ] || [ "$deadline" -le "$total" ] || deadline=$total
    ("$part") >>"$out/$part.log" 2>&1 &
    trap 'kill "$!" 2>/dev/null; wait "$!"; tell; exit 130' INT TERM
    wait "$!"
    case $? in
        0) touch "$out/$part.done" ;;
        124 | 137)
            failed+=("$part")
            echo "== $part: ended, its $((deadline - began)) s were over"
            ;;
        *)
            failed+=("$part")
            tail -n 5 "$out/$part.log"
            ;;
    esac
    echo "== $part: $((SECONDS - began)) s"
    tell || exit 1
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu_suite.sh: not done: ${failed[*]}; see OUT/PART.log" >&2; exit 1; }
