#!/usr/bin/env bash
# The bundle's run.sh: set up without network, then pretrain, convert, detect on the bundle's data.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
case "${1:-}" in
  --help | -h)
    cat <<'HELP'
usage: bash run.sh [--setup-only] [--out DIR] [key=value ...]

Runs in the unpacked folder that tools/bundle.sh made, on a machine without network that brings torch. The
first call checks all files, makes code/.venv and installs the wheels; every call runs the pipeline of
pipeline.yaml (pretraining, conversion, detection, report) and goes on where a stopped one ended.

  --setup-only   only make the environment
  --out DIR      folder of the run (default: runs/<name of the pipeline>)
  key=value      settings of the pipeline to change (code/docs/pipeline.md)

example:
  bash run.sh
  PYTHON=python3.12 bash run.sh --out /tmp/first detection.seeds=3

exit status: 0 done, 1 something went wrong, 2 wrong arguments
HELP
    exit 0
    ;;
esac
if [ ! -f "$here/bundle.json" ]; then
  echo "error: no bundle.json beside this file; it is the run.sh of a bundle: bash tools/bundle.sh OUT" >&2
  exit 2
fi
if [ ! -f "$here/code/.venv/setup.stamp" ]; then
  "${PYTHON:-python3}" "$here/code/tools/offline_setup.py"
fi
[ "${1:-}" = --setup-only ] && exit 0
cd "$here"
exec code/.venv/bin/python code/tools/run_pipeline.py pipeline.yaml "$@"
