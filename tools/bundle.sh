#!/usr/bin/env bash
# Pack code, wheels and a small data set for a machine without network; see --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup.sh" --quiet # a glance at a stamp, unless the lock file changed
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" "$root/tools/bundle.py" "$@"
