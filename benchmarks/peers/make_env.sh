#!/usr/bin/env bash
# Make the environment of the libraries that benchmarks/loader.py compares with.
set -euo pipefail

case "${1:-}" in
    "" | -*)
        cat <<'HELP'
usage: bash benchmarks/peers/make_env.sh DIR

Makes a throw-away virtual environment in DIR (0.8 GB) with lightly, MosaicML Streaming, NVIDIA DALI and, where it can
be built, FFCV, in the versions that benchmarks/peers is written for. It sees the packages of .venv/ (torch above all),
which stays as it is: nothing is installed there. FFCV has no wheel: it is compiled where g++ and pkg-config find
OpenCV 4 and TurboJPEG (Debian: libopencv-dev, libturbojpeg0-dev), and left out otherwise. Delete DIR when done.

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
# Of what Streaming asks for: the packages that it imports, without the clients of clouds.
install "$1" --only-binary :all: <<'PINNED' || echo "MosaicML Streaming left out: no wheel for this system or Python"
mosaicml-streaming==0.13.0 --hash=sha256:ebd5cf830c6603157bb0c15f76370328d862aa5412ef96cd75e3de56af69b72f
transformers==4.57.6 --hash=sha256:4c9e9de11333ddfe5114bc872c9f370509198acf0b87a832a0ab9458e2bd0550
huggingface-hub==0.36.2 --hash=sha256:48f0c8eac16145dfce371e9d2d7772854a4f591bcb56c9cf548accf531d54270
tokenizers==0.22.2 --hash=sha256:369cc9fc8cc10cb24143873a0d95438bb8ee257bb80c71989e3ee290e8d72c67
safetensors==0.8.0 --hash=sha256:fd6f3f93c9a0a7cc2788ee63fb763353d4bd2e89b0751bc78fcf7dda00bea774
brotli==1.2.1 --hash=sha256:6b3c3d5794212a54434b4856f808f7bdf7ad48eacadaadb5b2346fc9a639365a --hash=sha256:4b9dd0173ca5e01d1eb307d3c184fe8c09bdc168ede560889b1018d216d38c61 --hash=sha256:264fd5b200f6f6170cb551a4b9fcaabf8aa846ddaefe72db4d5f49f9d3743df9
catalogue==2.0.10 --hash=sha256:58c2de0020aa90f4a2da7dfad161bf7b3b054c86a5f09fcedc0b2b740c109a9f
cramjam==2.14.0 --hash=sha256:401bf7e11cf3775ee4af0fb487027adcbee61f68bbd1944ae9f6fcafb8b160fc --hash=sha256:d42ed4ab609a46f407fa647c9f3b73473113c848ec007825b6ee25183033323b --hash=sha256:e1d752b565818735410b577c219be003d6a5b8ac9a2b7989010940d294a2333e
python-snappy==0.7.3 --hash=sha256:074c0636cfcd97e7251330f428064050ac81a52c62ed884fc2ddebbb60ed7f50
xxhash==3.8.2 --hash=sha256:13f4b0f10e6c79d6cafecab8cc9b79a87ca95ada5029b0129bcb64db2ec7c169 --hash=sha256:a396b952f4712ea342a885195cbecf6d1f216abd68f198c4590ea779720da499 --hash=sha256:7618b7b39dd5360c713b0b838fe1c8c869fa00d4a86851a19f5aa88966eee6aa
zstd==1.5.7.2; python_version < "3.12" --hash=sha256:2cec2472760d48a7a3445beaba509d3f7850e200fed65db15a1a66e315baec6a
zstd==1.5.7.3; python_version >= "3.12" --hash=sha256:f1538db419afa62773cf534fc7f3009ff59ecf55ecee4e889587ac2ef0010ed8 --hash=sha256:c19127ca2c79855376a34a2d7a6969408094b25c1f44485b0373eba4be851b98
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
"$1/bin/python" -c 'import streaming; print(f"MosaicML Streaming {streaming.__version__} is ready")' 2>/dev/null ||
    echo "MosaicML Streaming cannot be imported: it will be left out"
"$1/bin/python" -c 'import nvidia.dali; print(f"DALI {nvidia.dali.__version__} is ready")' 2>/dev/null ||
    echo "DALI cannot be imported: it will be left out"
