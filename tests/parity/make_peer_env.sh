#!/usr/bin/env bash
# Make the environment of the libraries that tests/parity compares with.
set -euo pipefail

case "${1:-}" in
    "" | -*)
        cat <<'HELP'
usage: bash tests/parity/make_peer_env.sh DIR [CHECKOUT]

Makes a throw-away virtual environment in DIR with lightly in the version that tests/parity is written for. It
sees the packages of .venv/ (torch above all), which stays as it is: nothing is installed there. With CHECKOUT, a
folder with solo-learn (github.com/vturrisi/solo-learn, commit 9187ea3), it can import that too.

example:
  bash tests/parity/make_peer_env.sh /tmp/peer
  FA_PEER_PYTHON=/tmp/peer/bin/python bash tools/test.sh tests/parity -m slow
  bash tests/parity/make_peer_env.sh /tmp/peer ../solo-learn
  FA_SOLO_LEARN_PYTHON=/tmp/peer/bin/python bash tools/test.sh tests/parity -m slow
HELP
        [ "${1:-}" = --help ] || [ "${1:-}" = -h ] && exit 0
        exit 2
        ;;
esac

main=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python
[ -x "$main" ] || { echo "error: no .venv/; run bash tools/setup.sh first" >&2; exit 1; }
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
pinned='lightly==1.6.0 --hash=sha256:f1564244cec0a4d2a5206f818e9de90d5869becbcfcb4a8ef0d78ba61c5b9071'
if [ -n "${2:-}" ]; then
    [ -d "$2/solo/methods" ] || { echo "error: $2: no checkout of solo-learn, solo/methods is missing" >&2; exit 1; }
    pinned+='
einops==0.8.2 --hash=sha256:54058201ac7087911181bfec4af6091bb59380360f069276601256a76af08193
lightning==2.5.5 --hash=sha256:69eb248beadd7b600bf48eff00a0ec8af171ec7a678d23787c4aedf12e225e8f
lightning-utilities==0.15.3 --hash=sha256:6c55f1bee70084a1cbeaa41ada96e4b3a0fea5909e844dd335bd80f5a73c5f91
setuptools==80.10.2 --hash=sha256:95b30ddfb717250edb492926c92b5221f7ef3fbcc2b07579bcd4a27da21d0173
timm==1.0.31 --hash=sha256:5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7
torchmetrics==0.11.4 --hash=sha256:45f892f3534e91f3ad9e2488d1b05a93b7cb76b7d037969435a41a1f24750d9a'
fi

"$main" -m venv --without-pip "$1"
site=$("$1/bin/python" -c "$packages")
"$main" -c "$packages" > "$site/packages_of_the_main_environment.pth"
"$main" -m pip --python "$1/bin/python" install --quiet --disable-pip-version-check \
    --no-deps --require-hashes --requirement /dev/stdin <<< "$pinned"
"$1/bin/python" -c 'import lightly.loss, lightly.models.modules; print(f"lightly {lightly.__version__} is ready")'
if [ -n "${2:-}" ]; then
    (cd "$2" && pwd) > "$site/solo_learn.pth"
    "$1/bin/python" -W ignore -c 'import solo.methods; print("solo-learn is ready")'
fi
