#!/usr/bin/env bash
# Reproduce the DeepBlueAI report: seven models in two stages, evaluated with the report's 16 views, their ensemble and
# the challenge's submission. The same command resumes an interrupted reproduction.
# usage: bash scripts/report.sh [--smoke] [--merge] DATA OUT
#   DATA     contains train/ and val/ and, for a submission, test/imgs/ (and test/labels.csv to score it offline), as
#            written by `fasttrain data vipriors`
#   --merge  train on train and val together, like the challenge's final models; there are no validation images then
#   --smoke  test every step within minutes, also on a CPU: a tiny network, small images and one epoch
# GPUS is the number of processes (default: the GPUs of this machine). FASTTRAIN is the command (default: fasttrain).
set -euo pipefail
smoke=() merge=
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --smoke) smoke=(--set arch=test_resnet --image-size 32 --batch-size 16 --epochs 1) ;;
        --merge) merge=yes ;;
        *) echo "report.sh: unknown option $1; the options are --smoke and --merge" >&2; exit 2 ;;
    esac
    shift
done
[ $# -eq 2 ] || { echo "usage: bash scripts/report.sh [--smoke] [--merge] DATA OUT" >&2; exit 2; }
data=$1 out=$2
for split in train val; do
    [ -d "$data/$split" ] || { echo "report.sh: folder $data/$split does not exist" >&2; exit 2; }
done
fasttrain=${FASTTRAIN:-fasttrain}
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
run=("$fasttrain" run)
[ "$gpus" -le 1 ] || run=(torchrun --standalone --nproc-per-node "$gpus" -m fasttrain run)
images=(--data "$data/train" --val "$data/val")
[ -z "$merge" ] || images=(--data "$data/train" --data "$data/val")

# One line per model: its recipe, and the run that provides its initial weights ("-": none).
models="
deepblueai/resnest101e-ce                 -
deepblueai/tresnet_xl-ce                  -
deepblueai/seresnext101_32x4d-ce          -
deepblueai/resnest101e-ce+triplet         deepblueai/resnest101e-ce
deepblueai/resnest101e-ce+arcface         deepblueai/resnest101e-ce
deepblueai/tresnet_xl-ce+triplet          deepblueai/tresnet_xl-ce
deepblueai/seresnext101_32x4d-ce+arcface  deepblueai/seresnext101_32x4d-ce"

val_files=() test_files=()
while read -r recipe from; do
    [ -n "$recipe" ] || continue
    folder="$out/$recipe"
    echo "== $recipe"
    init=()
    [ "$from" = - ] || init=(--init "$out/$from")
    tail -n1 "$folder/log.jsonl" 2>/dev/null | grep -q '"event": "end"' ||
        "${run[@]}" --recipe "$recipe" "${images[@]}" "${init[@]}" --out "$folder" "${smoke[@]}"
    if [ -z "$merge" ]; then
        val_files+=("$folder/val.npz")
        [ -e "$folder/val.npz" ] || "$fasttrain" eval "$folder" --data "$data/val" --views report --out "$folder/val.npz"
    fi
    if [ -d "$data/test/imgs" ]; then
        test_files+=("$folder/test.npz")
        [ -e "$folder/test.npz" ] ||
            "$fasttrain" predict "$folder" --images "$data/test/imgs" --views report --out "$folder/test.npz"
    fi
done <<<"$models"

if [ ${#val_files[@]} -gt 0 ]; then
    echo "== the ensemble on $data/val"
    "$fasttrain" ensemble "${val_files[@]}" --out "$out/val.npz"
fi
if [ ${#test_files[@]} -gt 0 ]; then
    echo "== the ensemble on $data/test"
    "$fasttrain" ensemble "${test_files[@]}" --out "$out/test.npz" --submission "$out/submission.csv"
    [ ! -e "$data/test/labels.csv" ] || "$fasttrain" score "$out/submission.csv" --labels "$data/test/labels.csv"
else
    echo "no submission: $data/test/imgs does not exist"
fi
