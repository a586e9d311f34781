#!/usr/bin/env bash
# From nothing to a trained TResNet-XL: makes .venv, installs, draws the demo set, trains on it (small images, few
# epochs), evaluates. Uses a GPU where there is one. Again: goes on, or evaluates what is already trained.
# usage: bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

environment ""
"$VENV/bin/fasttrain" run --arch tresnet_xl
