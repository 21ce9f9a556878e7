#!/usr/bin/env bash
# Data -> shards -> pretraining -> conversion -> detection -> report, with one command; see --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ ! -x "$root/.venv/bin/python" ] || [ -e "$root/.venv/setup.running" ]; then
    bash "$root/tools/setup.sh"
fi
exec "$root/.venv/bin/python" "$root/tools/run_pipeline.py" "$@"
