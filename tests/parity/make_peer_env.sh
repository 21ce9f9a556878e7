#!/usr/bin/env bash
# Make the environment of the library that tests/parity compares with.
set -euo pipefail

case "${1:-}" in
    "" | -*)
        cat <<'HELP'
usage: bash tests/parity/make_peer_env.sh DIR

Makes a throw-away virtual environment in DIR with lightly in the version that tests/parity is written for. It
sees the packages of .venv/ (torch above all), which stays as it is: nothing is installed there.

example:
  bash tests/parity/make_peer_env.sh /tmp/peer
  FA_PEER_PYTHON=/tmp/peer/bin/python bash tools/test.sh tests/parity -m slow
HELP
        [ "${1:-}" = --help ] || [ "${1:-}" = -h ] && exit 0
        exit 2
        ;;
esac

main=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python
[ -x "$main" ] || { echo "error: no .venv/; run bash tools/setup.sh first" >&2; exit 1; }
packages='import sysconfig; print(sysconfig.get_path("purelib"))'

"$main" -m venv --without-pip "$1"
"$main" -c "$packages" > "$("$1/bin/python" -c "$packages")/packages_of_the_main_environment.pth"
"$main" -m pip --python "$1/bin/python" install --quiet --disable-pip-version-check \
    --no-deps --require-hashes --requirement /dev/stdin <<'PINNED'
lightly==1.6.0 --hash=sha256:f1564244cec0a4d2a5206f818e9de90d5869becbcfcb4a8ef0d78ba61c5b9071
PINNED
"$1/bin/python" -c 'import lightly.loss, lightly.models.modules; print(f"lightly {lightly.__version__} is ready")'
