#!/usr/bin/env bash
# Run the tests in a virtual environment of the project's own, which is made where it is missing.
# usage: bash scripts/test.sh [--all] [PYTEST ARGUMENT...]
#   --all   the tests marked `slow` as well; those marked `gpu` run only when asked for: -m gpu
# VENV names the environment's folder (default .venv), PYTHON the interpreter that makes it (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

marks="not slow and not gpu"
if [ "${1:-}" = --all ]; then
    marks="not gpu"
    shift
fi
environment test
workers=$(nproc)
[ "$workers" -le 8 ] || workers=8
# A process a core; each keeps to one thread, since threads that wait for work would take the others' time.
exec env OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -n "$workers" --dist loadfile -m "$marks" "$@"
