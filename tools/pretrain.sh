#!/usr/bin/env bash
# Pretrain a ResNet on WebDataset shards: tools/pretrain.sh CONFIG [key=value ...] [--resume]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ "${NPROC:-1}" -gt 1 ]; then
  # A mistake in the config is told once and plainly, not by every process and by torchrun.
  "$python" -m pretrain "$@" --print-config >/dev/null
  # A restart meets in a store of its own: in a kept one stand the addresses of dead processes.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # The processes meet at loopback: this machine's own name need not resolve.
  exec "$python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$NPROC" \
    -m pretrain "$@"
fi
exec "$python" -m pretrain "$@"
