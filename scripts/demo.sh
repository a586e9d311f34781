#!/usr/bin/env bash
# Install and train a TResNet-XL: creates .venv, installs fasttrain, generates the demo set, trains on it (small images,
# few epochs) and evaluates. Uses a GPU if there is one. The same command resumes an interrupted run, or evaluates a
# finished one.
# usage: bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

environment ""
"$VENV/bin/fasttrain" run --arch tresnet_xl
