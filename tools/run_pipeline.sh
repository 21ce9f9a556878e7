#!/usr/bin/env bash
# Data -> shards -> pretraining -> conversion -> detection -> report, with one command; see --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup.sh" --quiet # a glance at a stamp, unless the lock file changed
exec "$root/.venv/bin/python" "$root/tools/run_pipeline.py" "$@"
