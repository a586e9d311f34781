# Sourced by the scripts beside it, which stand in the project's root. Sets VENV, and defines `environment EXTRA`,
# which makes that virtual environment and installs the project with an extra ("" for none) where that is not done.
# FASTTRAIN_CUDA=12 installs the builds for CUDA 12, for NVIDIA drivers from 525 to 575; the default is 13.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

environment() {
    local wanted=".${1:+[$1]}" log mark="$VENV/installed${1:+-$1}" cuda=${FASTTRAIN_CUDA:-13} index=()
    case "$(uname -sm)" in
        "Linux x86_64") ;;
        # PyPI has no torch for CUDA 12 on aarch64.
        "Linux aarch64") [ "$cuda" != 12 ] || index=(--extra-index-url https://download.pytorch.org/whl/cu128) ;;
        *) fail "needs Linux on x86-64 or aarch64; this is $(uname -sm)" ;;
    esac
    case "$cuda" in 12 | 13) ;; *) fail "FASTTRAIN_CUDA must be 12 or 13, not $cuda" ;; esac
    command -v "$PYTHON" >/dev/null || fail "no $PYTHON; install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version) is too old; install Python 3.11 or newer, or set PYTHON to it"
    if [ ! -x "$VENV/bin/python" ]; then
        echo "making $VENV" >&2
        "$PYTHON" -m venv "$VENV" || fail "cannot make $VENV; install Python's venv (Debian: apt install python3-venv)"
    fi
    # The builds of DALI and its companions for the two CUDA versions overwrite each other's files, so all are removed.
    if [ "$(cat "$VENV/cuda" 2>/dev/null || echo 13)" != "$cuda" ]; then
        "$VENV/bin/python" -m pip --disable-pip-version-check uninstall -qy \
            nvidia-{dali-cuda120,dali-cuda130,{nvimgcodec,nvjpeg2k,nvtiff,libnvcomp}-cu{12,13}} 2>/dev/null || fail "cannot remove another DALI; remove $VENV"
        rm -f "$VENV"/installed*
    fi
    echo "$cuda" >"$VENV/cuda"
    if [ ! -e "$mark" ] || [ setup.py -nt "$mark" ]; then
        echo "installing fasttrain and what it needs (some 6 GB the first time)" >&2
        log="$VENV/install.log"
        if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "${index[@]}" --editable "$wanted" \
            >"$log" 2>&1; then
            fail "installing failed ($(grep -m1 -iE '^ERROR' "$log" | cut -c1-120)); is there a network? All of it: $log"
        fi
        touch "$mark"
    fi
    "$VENV/bin/python" -c 'import torch, torchvision, timm, nvidia.dali' 2>"$VENV/import.log" ||
        fail "$(tail -n1 "$VENV/import.log" | cut -c1-120); $VENV/bin/fasttrain doctor says more, removing $VENV starts over"
}
