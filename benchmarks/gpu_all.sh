#!/usr/bin/env bash
# Every GPU check and benchmark in one call, on a machine that has PyTorch and no network.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'HELP'
usage: bash benchmarks/gpu_all.sh --pack DIR       # where there is a network: code and wheels into DIR
       bash benchmarks/gpu_all.sh --out FIGURES [--tiny] [--only PART]

--pack puts the committed code and the wheels that a usual PyTorch machine lacks into DIR (below 60 MB), for
Python 3.12 on Linux x86-64. Bring DIR to the other machine and call DIR/benchmarks/gpu_all.sh there: it takes
at most 8 minutes and writes FIGURES/gpu.json and FIGURES/gpu.md. PYTHON names the interpreter that has torch
(default: this checkout's, else python3).

exit status: 0 done, 1 a part failed or pip did, 2 wrong arguments or a package is missing
HELP
}

# Not in the wheels, since a PyTorch machine has them, and they are large.
expected="torch torchvision numpy cv2 PIL scipy tensorboard pytest"
wheels="braceexpand docstring-parser fsspec hypothesis jaxtyping jsonargparse pyyaml simplejpeg sortedcontainers tqdm
typeshed-client wadler-lindig webdataset zstandard"

pack() {
    mkdir -p "$1"
    git -C "$root" archive HEAD | tar -x -C "$1"
    local versions=() name
    for name in $wheels; do
        versions+=("$(grep -iE "^$name==" "$root/requirements.lock" | cut -d' ' -f1)")
    done
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$1/wheels" "${versions[@]}"
    du -sh "$1"
}

case "${1:-}" in
    --help | -h) usage && exit 0 ;;
    --pack)
        [ $# = 2 ] || { usage >&2 && exit 2; }
        pack "$2"
        exit 0
        ;;
    "") usage >&2 && exit 2 ;;
esac

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$root/wheels" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$root"/wheels/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
missing=""
for name in $expected; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$name') is None)" || missing+=" $name"
done
[ -z "$missing" ] || { echo "error: $PYTHON cannot import:$missing; install them there first" >&2 && exit 2; }
"$PYTHON" "$root/benchmarks/gpu_all.py" "$@"
