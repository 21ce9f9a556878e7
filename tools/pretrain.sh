#!/usr/bin/env bash
# Pretrain a ResNet on WebDataset shards: tools/pretrain.sh CONFIG [key=value ...] [--resume]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
# Waiting OpenMP threads sleep: spinning ones starve the loader and any neighbour on few cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ "${NPROC:-1}" -gt 1 ]; then
  exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" -m pretrain "$@"
fi
exec "$python" -m pretrain "$@"
