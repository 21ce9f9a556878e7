#!/usr/bin/env bash
# Fine-tunes and evaluates Detectron2's Faster R-CNN on a VOC-layout set. See --help for an example.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
# Threads that wait must sleep: two spinning OpenMP threads beside other work made a step 8 times
# slower (measured on two cores); idle machines hardly notice.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m detection.train "$@"
