# Sourced by the scripts beside it, which stand in the project's root. Sets VENV, and defines `environment EXTRA`,
# which makes that virtual environment and installs the project with an extra ("" for none) where that is not done.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

environment() {
    local wanted=".${1:+[$1]}" log mark="$VENV/installed${1:+-$1}"
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "needs Linux on x86-64; this is $(uname -sm)"
    command -v "$PYTHON" >/dev/null || fail "no $PYTHON; install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version) is too old; install Python 3.11 or newer, or set PYTHON to it"
    if [ ! -x "$VENV/bin/python" ]; then
        echo "making $VENV" >&2
        "$PYTHON" -m venv "$VENV" || fail "cannot make $VENV; install Python's venv (Debian: apt install python3-venv)"
    fi
    if [ ! -e "$mark" ] || [ setup.py -nt "$mark" ]; then
        echo "installing fasttrain and what it needs (some 6 GB the first time)" >&2
        log="$VENV/install.log"
        if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --editable "$wanted" >"$log" 2>&1; then
            fail "installing failed ($(grep -m1 -iE '^ERROR' "$log" | cut -c1-120)); is there a network? All of it: $log"
        fi
        touch "$mark"
    fi
    "$VENV/bin/python" -c 'import torch, torchvision, timm, nvidia.dali' 2>"$VENV/import.log" ||
        fail "$(tail -n1 "$VENV/import.log" | cut -c1-120); $VENV/bin/fasttrain doctor says more, removing $VENV starts over"
}
