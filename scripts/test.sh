#!/usr/bin/env bash
# Run the tests in the project's virtual environment, which is created if it is missing.
# usage: bash scripts/test.sh [--all] [PYTEST ARGUMENT...]
#   --all   include the tests marked `slow`. Tests marked `gpu` run only with -m gpu.
# VENV is the environment's folder (default .venv). PYTHON is the interpreter that creates it (default python3).
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
# One process per core with one thread each, because waiting threads would take CPU time from other processes.
exec env OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -n "$workers" --dist loadfile -m "$marks" "$@"
