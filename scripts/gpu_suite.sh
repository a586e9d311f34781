#!/usr/bin/env bash
# Everything that only a GPU can tell, on one GPU, in parts of under nine minutes each, the most telling first.
# usage: DATA=DIR bash scripts/gpu_suite.sh OUT [PART...]
#   OUT   results go here; a part that is done is not done again, so the same command goes on where it was stopped
#   PART  names of parts, in place of all of them: tests kernels step aligned pipeline train memory autoaugment parity
#   DATA  a folder of class folders of photographs (a few hundred suffice)
# TOY=1 runs every part on a CPU at toy size, to see that it works; its figures mean nothing.
# FASTTRAIN is the command (default: fasttrain), PYTHON the interpreter beside it (default: python).
# At the end, or after each stop, `OUT/gpu.json` has all figures and `OUT/gpu.md` their tables.
set -uo pipefail
[ $# -ge 1 ] && [ -d "${DATA:-}" ] || { echo "usage: DATA=DIR bash scripts/gpu_suite.sh OUT [PART...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
mkdir -p "$out"
fasttrain=${FASTTRAIN:-fasttrain} python=${PYTHON:-python}
networks=(tresnet_xl resnest101e seresnext101_32x4d)

if [ -n "${TOY:-}" ]; then
    networks=(test_resnet)
    aligned=tresnet_l
    device=(--device cpu) small=(--image-size 32 --batch-size 8 --rounds 1 --steps 2)
    turns=(--rounds 1) train=("${small[@]}" --warm-up 1) step=("${small[@]}")
    pipeline=(--image-size 32 --batch-size 8 --rounds 1 --steps 2) memory=(8 16)
    tests=(tests/test_kernel_mix.py -k "bit or reference")
else
    aligned=tresnet_xl
    device=(--device cuda) turns=(--rounds 15)
    step=(--rounds 5 --steps 20) train=(--rounds 2 --steps 60 --warm-up 20)
    pipeline=(--batch-size 128 --batch-size 256 --rounds 5) memory=(128 256 384 512 640 768)
    tests=(-m gpu)
fi

archs() { for each in "${networks[@]}"; do printf -- '--arch %s ' "$each"; done; }

tests() { (cd "$here" && "$python" -m pytest -q "${tests[@]}"); }
kernels() { "$fasttrain" bench kernels "${device[@]}" "${turns[@]}" --json "$out/kernels-gpu.json"; }
# shellcheck disable=SC2046  # several words are meant
step() {
    "$fasttrain" bench step "${device[@]}" $(archs) "${step[@]}" --json "$out/step-gpu.json" &&
        "$fasttrain" bench step "${device[@]}" --host "${turns[@]}" --json "$out/host-gpu.json"
}
aligned() {
    "$fasttrain" bench step "${device[@]}" --arch "$aligned" "${step[@]}" --json "$out/step-plain.json" &&
        "$fasttrain" bench step "${device[@]}" --arch "$aligned" "${step[@]}" --set machine.align=true \
            --json "$out/step-aligned.json"
}
pipeline() {
    "$fasttrain" bench pipeline "${device[@]}" --data "$DATA" "${pipeline[@]}" --profile --json "$out/pipeline-gpu.json"
}
# shellcheck disable=SC2046
train() {
    "$fasttrain" bench train "${device[@]}" --data "$DATA" $(archs) "${train[@]}" --json "$out/train-gpu.json"
}
memory() { # batches that grow until the memory does not suffice; the last file is the largest that does
    local arch batch
    for arch in "${networks[@]}"; do
        for batch in "${memory[@]}"; do
            "$fasttrain" bench step "${device[@]}" --arch "$arch" "${step[@]}" --batch-size "$batch" --rounds 1 --steps 3 \
                --json "$out/step-largest-$arch.json" || break
        done
    done
}
autoaugment() {
    "$fasttrain" bench train "${device[@]}" --data "$DATA" --arch "${networks[0]}" "${train[@]}" \
        --set augment.autoaugment=none --json "$out/train-without-autoaugment.json"
}
parity() { "$python" "$here/scripts/parity.py" --data "$DATA" "${device[@]}" --json "$out/parity-gpu.json"; }

failed=()
[ $# -gt 0 ] || set -- tests kernels step aligned pipeline train memory autoaugment parity
for part; do
    case $part in
        tests | kernels | step | aligned | pipeline | train | memory | autoaugment | parity) ;;
        *) echo "gpu_suite.sh: there is no part $part" >&2; exit 2 ;;
    esac
    if [ -e "$out/$part.done" ]; then
        echo "== $part: done before"
        continue
    fi
    echo "== $part"
    began=$SECONDS
    if "$part" >"$out/$part.log" 2>&1; then
        touch "$out/$part.done"
    else
        failed+=("$part")
        tail -n 5 "$out/$part.log"
    fi
    echo "== $part: $((SECONDS - began)) s"
    "$python" "$here/scripts/gpu_suite_report.py" "$out" || exit 1
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu_suite.sh: failed: ${failed[*]}; see OUT/PART.log" >&2; exit 1; }
