#!/usr/bin/env bash
# Run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    --help | -h)
        cat <<'HELP'
usage: bash tools/test.sh [pytest arguments]

Runs the tests, setting up .venv/ first if it is missing. Tests marked `slow` are left out unless asked for.
All tests, or all slow ones, are shared out among all cores, at most 4, file by file.

example:
  bash tools/test.sh                       # everything that is quick
  bash tools/test.sh -m slow               # the rest
  bash tools/test.sh tests/detection -k compat

exit status: pytest's own (0 all passed, 1 some failed, 2 interrupted, 4 wrong arguments, 5 none found)
HELP
        exit 0
        ;;
esac

bash tools/setup.sh --quiet
unset PYTHONDONTWRITEBYTECODE  # else each of many processes compiles all modules anew
case " $* " in
    "  " | " -m slow ")
        [[ $# -eq 0 ]] && dist=worksteal || dist=loadfile  # slow tests of a file share what they made
        set -- "$@" --numprocesses auto --maxprocesses 4 --dist "$dist"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the processes share the cores
        ;;
esac
exec .venv/bin/python -m pytest "$@"
