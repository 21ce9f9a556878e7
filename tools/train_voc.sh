#!/usr/bin/env bash
# Fine-tunes and evaluates Detectron2's Faster R-CNN on a VOC-layout set. See --help for an example.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m tools.train_voc "$@"
