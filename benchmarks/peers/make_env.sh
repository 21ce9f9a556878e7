#!/usr/bin/env bash
# Make the environment of the libraries that benchmarks/loader.py compares with.
set -euo pipefail

case "${1:-}" in
    "" | -*)
        cat <<'HELP'
usage: bash benchmarks/peers/make_env.sh DIR

Makes a throw-away virtual environment in DIR (0.8 GB) with lightly, NVIDIA DALI and, where it can be built, FFCV,
in the versions that benchmarks/peers is written for. It sees the packages of .venv/ (torch above all), which stays
as it is: nothing is installed there. FFCV has no wheel: it is compiled where g++ and pkg-config find OpenCV 4 and
TurboJPEG (Debian: libopencv-dev, libturbojpeg0-dev), and left out otherwise. Delete DIR when done.

example:
  bash benchmarks/peers/make_env.sh /tmp/peers
  .venv/bin/python benchmarks/loader.py --json loader.json --peers /tmp/peers/bin/python
HELP
        [ "${1:-}" = --help ] || [ "${1:-}" = -h ] && exit 0
        exit 2
        ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bash "$root/tests/parity/make_peer_env.sh" "$1"  # lightly, in the version that tests/parity pins
install() {
    "$root/.venv/bin/python" -m pip --python "$1/bin/python" install --quiet --disable-pip-version-check \
        --no-deps --require-hashes --requirement /dev/stdin "${@:2}"
}

# Several hashes: wheels for Python 3.11, 3.12 and 3.13 on x86-64.
install "$1" --only-binary :all: <<'PINNED'
lightning-utilities==0.15.3 --hash=sha256:6c55f1bee70084a1cbeaa41ada96e4b3a0fea5909e844dd335bd80f5a73c5f91
PINNED
install "$1" --only-binary :all: <<'PINNED' || echo "DALI left out: no wheel for this system or Python"
nvidia-dali-cuda130==2.4.0 --hash=sha256:fbfd3204b55924bfc53354bff766bcf37165f8bca1674c59ad4ffd8096898877
nvidia-nvimgcodec-cu13==0.9.0.20 --hash=sha256:b59bbb223d11065abb7da81e27a2015d15db5d5535639cdc5050e4154a00800a
astunparse==1.6.3 --hash=sha256:c2652417f2c8b5bb325c885ae329bdf3f86424075c4fd1a128674bc6fba4b8e8
gast==0.7.0 --hash=sha256:99cbf1365633a74099f69c59bd650476b96baa5ef196fec88032b00b31ba36f7
makefun==1.16.0 --hash=sha256:43baa4c3e7ae2b17de9ceac20b669e9a67ceeadff31581007cca20a07bbe42c4
six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274
nvtx==0.2.17 --hash=sha256:80fcb6fa62756ab012ddbe2d514757da060363ce6cd52fdfc840dcfe78b01d29 --hash=sha256:0e0cb246479351c333a55edcab10c2b452a018c8ee022d640741154c85121166 --hash=sha256:beb076cef4ec98fde20eb3aef36932c0e9c8f0429719012712d7f4cff99a09c2
optree==0.20.0 --hash=sha256:cd49b5a6066ebb027b37afa19f02d77e33067f33b0d5b7602b537e6892789d00 --hash=sha256:5c4ed341ea1ee7eb04eff01527b88a868cb19aac672a667e0aefadf7d14c0260 --hash=sha256:d1034c2cc02ec12ed413727664f015a681e2eea551e05640951b05b06c07f084
PINNED

if command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
    install "$1" --only-binary :all: <<'PINNED'
numba==0.68.1 --hash=sha256:58fe7a3810261cf13797d8aa94c018cfe91e1e8adf634df60eb60ef834f9367b --hash=sha256:8b33fee239194b9b6cb9b176f3c2563b94e5882fd846748ad0cf960daeee5406 --hash=sha256:4d1b544f37fc237d16698a4266bb3d5b3c40ec8aa4c925a191ff09ec6d115310
llvmlite==0.50.0 --hash=sha256:a6ffde00d4be8772a24e3e8b3af6bf86a79e7cf066d944ef56136b3957d707dc --hash=sha256:d501e5103076b9a14be885d2574dc2f6793171aa54a853d1244e011d476f1399 --hash=sha256:425845f415a06dc50db08db033c6b568e0d85c4937e932c605a4d49e1514b2da
psutil==7.2.2 --hash=sha256:076a2d2f923fd4821644f5ba89f059523da90dc9014e85f8e45a5774ca5bc6f9
terminaltables==3.1.10 --hash=sha256:e4fdc4179c9e4aab5f674d80f09d76fa436b96fdc698a8505e0a36bf0804a874
PINNED
    install "$1" --no-binary ffcv <<'PINNED' || echo "FFCV left out: it does not build here"
ffcv==1.0.2 --hash=sha256:42766a487c8a659b543d070f24732c4b65aab8d96980f5792c63e91e55511f00
PINNED
else
    echo "FFCV left out: it has no wheel, and g++, opencv4 or libturbojpeg is not there for pkg-config"
fi
"$1/bin/python" -c 'import lightly.transforms; print(f"lightly {lightly.__version__} is ready")'
"$1/bin/python" -c 'import nvidia.dali; print(f"DALI {nvidia.dali.__version__} is ready")' 2>/dev/null ||
    echo "DALI cannot be imported: it will be left out"
