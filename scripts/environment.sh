# Other scripts source this file from the project's root. It sets VENV and defines `environment EXTRA`, which creates
# that virtual environment and installs the project with an extra ("" for none), unless that is already done.
# FASTTRAIN_CUDA=12 installs the builds for CUDA 12, for NVIDIA drivers from 525 to 575; the default is 13.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

environment() {
    local package=".${1:+[$1]}" log mark="$VENV/installed${1:+-$1}" cuda=${FASTTRAIN_CUDA:-13} index=()
    case "$(uname -sm)" in
        "Linux x86_64") ;;
        # PyPI has no torch for CUDA 12 on aarch64.
        "Linux aarch64") [ "$cuda" != 12 ] || index=(--extra-index-url https://download.pytorch.org/whl/cu128) ;;
        *) fail "needs Linux on x86-64 or aarch64; this is $(uname -sm)" ;;
    esac
    case "$cuda" in 12 | 13) ;; *) fail "FASTTRAIN_CUDA must be 12 or 13, not $cuda" ;; esac
    command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 or newer, or set PYTHON to it"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version) is too old; install Python 3.11 or newer, or set PYTHON to it"
    if [ ! -x "$VENV/bin/python" ]; then
        echo "creating $VENV" >&2
        "$PYTHON" -m venv "$VENV" || fail "cannot create $VENV; install Python's venv (Debian: apt install python3-venv)"
    fi
    # DALI's packages for the two CUDA versions overwrite each other's files, so all are removed first.
    if [ "$(cat "$VENV/cuda" 2>/dev/null || echo 13)" != "$cuda" ]; then
        "$VENV/bin/python" -m pip --disable-pip-version-check uninstall -qy \
            nvidia-{dali-cuda120,dali-cuda130,{nvimgcodec,nvjpeg2k,nvtiff,libnvcomp}-cu{12,13}} 2>/dev/null || fail "cannot uninstall the other DALI; remove $VENV and try again"
        rm -f "$VENV"/installed*
    fi
    echo "$cuda" >"$VENV/cuda"
    if [ ! -e "$mark" ] || [ setup.py -nt "$mark" ]; then
        echo "installing fasttrain and its dependencies (about 6 GB the first time)" >&2
        log="$VENV/install.log"
        if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "${index[@]}" --editable "$package" \
            >"$log" 2>&1; then
            fail "installation failed ($(grep -m1 -iE '^ERROR' "$log" | cut -c1-120)); check the network. Full log: $log"
        fi
        touch "$mark"
    fi
    "$VENV/bin/python" -c 'import torch, torchvision, timm, nvidia.dali' 2>"$VENV/import.log" ||
        fail "$(tail -n1 "$VENV/import.log" | cut -c1-120); run $VENV/bin/fasttrain doctor, or remove $VENV and retry"
}
