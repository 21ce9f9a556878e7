#!/usr/bin/env bash
# Download what tools/setup.sh installs, for a machine without network.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'HELP'
usage: bash tools/offline_wheels.sh DIR

Downloads the packages of requirements.lock (hashes checked) and the wheel that Detectron2 is repacked from
into DIR, several GB. Run it with the Python version, system and processor of the other machine.

example:
  PYTHON=python3.12 bash tools/offline_wheels.sh wheels
  PIP_NO_INDEX=1 PIP_FIND_LINKS="$PWD/wheels" bash tools/setup.sh      # on the other machine

exit status: 0 downloaded, 1 pip failed, 2 wrong arguments
HELP
}

case "${1:-}" in
    --help | -h) usage && exit 0 ;;
    "" | -*) usage >&2 && exit 2 ;;
esac
[ $# = 1 ] || { usage >&2 && exit 2; }
python="${PYTHON:-python3}"
download=("$python" -m pip download --no-deps --require-hashes --dest "$1")
"${download[@]}" --requirement "$root/requirements.lock"
detectron2=$(PYTHONPATH="$root" "$python" -c "from tools.install_detectron2 import *
print(f'{SOURCE_REQUIREMENT} --hash=sha256:{SOURCE_SHA256}')")
# The wheel is tagged for Python 3.10, but tools/install_detectron2.py takes only its Python files.
"${download[@]}" --python-version 3.10 --only-binary=:all: --requirement <(printf '%s\n' "$detectron2")
printf 'done; on the other machine: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/%s bash tools/setup.sh\n' "$(basename "$1")"
