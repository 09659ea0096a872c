#!/usr/bin/env bash
# Creates .venv with everything this project needs. Run by every make target; at once done when nothing changed.
#
#   DEVICE=cpu|cuda   which list of pins to install; default: cuda where nvidia-smi works
#   PYTHON=...        the interpreter to build .venv from; default: the first of python3.11, 3.12, 3.13
set -euo pipefail
cd "$(dirname "$0")/.."

hash=$(cat requirements/*.txt pyproject.toml scripts/install.sh | sha256sum | cut -c1-12)
stamp=.venv/.installed-$hash  # holds the device
version_of() { "$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null; }
# A .venv of another Python than the one asked for is no .venv of ours.
has_python() { [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of .venv/bin/python)" ]]; }
if [[ -f $stamp && ${DEVICE:-$(<"$stamp")} == "$(<"$stamp")" ]] && has_python; then exit 0; fi

say() { echo "install: $*" >&2; }
die() { say "$*"; exit 1; }

if [[ -z ${DEVICE:-} ]]; then
    if nvidia-smi >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi
fi
[[ $DEVICE == cpu || $DEVICE == cuda ]] || die "DEVICE=$DEVICE must be cpu or cuda"

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11, 3.12 or 3.13 is needed, and none of these is one: ${candidates[*]}; install python3.11 or set PYTHON"
}
python=$(find_python)
if ! "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then
    say "$("$python" --version) is newer than this was tried on (3.11 to 3.13); going on; set PYTHON for another"
fi

# DeepSpeed and torch.compile build small C++ extensions when they first run: a compiler and Python's own headers.
has_toolchain() {
    command -v g++ >/dev/null && "$python" -c \
        'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null
}
if ! has_toolchain; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        say "installing g++ and Python's headers with apt-get"
        { apt-get update -q && apt-get install -qy g++ make python3-venv python3-dev; } >&2 || true
    fi
    has_toolchain || die "g++, Python.h and ensurepip are needed for $python: apt-get install g++ python3-venv python3-dev"
fi

# A virtual environment that an earlier run left half-filled, or filled for another device or Python, is made anew.
# One without this script's marks is somebody's own work and is completed as it is.
if [[ -f .venv/.incomplete ]] || ! has_python || ! .venv/bin/python -m pip --version >/dev/null 2>&1 \
    || ! { cat .venv/.installed-* 2>/dev/null || echo "$DEVICE"; } | grep -qx "$DEVICE"; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
rm -f .venv/.installed-*
touch .venv/.incomplete
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" --quiet; }

say "installing for $DEVICE; this takes a few minutes the first time"
if [[ $DEVICE == cpu ]]; then
    # The +cpu build is not in every index; PyTorch's own index for it is asked for torch and nothing else. Where neither
    # has it the usual build serves, which does not load without CUDA's libraries.
    torch=$(grep '^torch==' requirements/cpu.txt)
    pip install --no-deps "$torch" 2>/dev/null \
        || pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null \
        || { say "no index has ${torch#torch==} of torch; taking the larger ${torch%+cpu}"; pip install "${torch%+cpu}"; }
    grep -v '^torch==' requirements/cpu.txt >.venv/others.txt
    pip install --no-deps -r .venv/others.txt
else
    pip install -r requirements/gpu.txt
fi
pip install --no-deps -r requirements/dev.txt
pip install --no-deps --no-build-isolation --editable .

echo "$DEVICE" >"$stamp"
rm .venv/.incomplete
say "done"
