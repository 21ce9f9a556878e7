#!/usr/bin/env bash
# Make .venv/ and install everything, pinned by hash; a second call only looks at a stamp.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'HELP'
usage: bash tools/setup.sh [--quiet] [--force]

Makes .venv/ with the packages of requirements.lock (hashes checked), this project, and Detectron2, then
prints what the doctor finds. Needs Python 3.11 or newer with its venv module, about 7 GB of disk and, the
first time, the network. When nothing changed since the last call it returns at once.

  --quiet   print nothing when there is nothing to do
  --force   throw .venv/ away and start anew
  --help    this text

example:
  bash tools/setup.sh
  PYTHON=python3.12 bash tools/setup.sh --force      # with another interpreter

Behind a mirror or offline: pip's own settings apply, as in
  PIP_NO_INDEX=1 PIP_FIND_LINKS=/media/wheels bash tools/setup.sh      # tools/offline_wheels.sh fills the folder

exit status: 0 ready, 1 something failed or is missing, 2 wrong arguments
HELP
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Prints the first interpreter that is new enough and can make environments.
find_python() {
    local candidate seen="none" check='import sys; sys.exit(sys.version_info < (3, 11))'
    local candidates=(python3.11 python3.12 python3.13 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if ! "$candidate" -c "$check" >/dev/null 2>&1; then
            seen="$candidate is $("$candidate" --version 2>&1)"
            continue
        fi
        if ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            seen="$candidate lacks the venv module"
            continue
        fi
        printf '%s\n' "$candidate"
        return
    done
    fail "no usable Python 3.11 or newer (found: $seen). Debian and Ubuntu: apt-get install python3-venv
       (or python3.11-venv); macOS: brew install python@3.12; else name one: PYTHON=... bash tools/setup.sh"
}

# What the environment must have been made from.
wanted_stamp() {
    cat requirements.lock setup.py tools/install_detectron2.py | cksum
}

pip_install() {
    local noise=(--disable-pip-version-check --no-input)
    [ -t 1 ] || noise+=(--quiet)
    .venv/bin/python -m pip install "${noise[@]}" "$@" || {
        rm -f .venv/setup.running # pip undoes what it began; the next call goes on from here
        fail "pip could not install (see above). No network? Set PIP_INDEX_URL or PIP_FIND_LINKS for a mirror or
       a folder of wheels; disk full? df -h . ; then run bash tools/setup.sh again"
    }
}

# .venv/setup.running holds the process that installs; it stays behind when that process is killed.
refuse_second_setup() {
    local other
    other=$(cat .venv/setup.running 2>/dev/null || true)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
        fail "process $other is setting up .venv/ already; wait for it (or delete .venv/setup.running if that
       process is something else)"
    fi
}

make_environment() {
    local python
    if [ -e .venv ] && { [ "$force" = 1 ] || [ -e .venv/setup.running ] ||
        ! .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        printf '.venv/ is from a set-up that was cut short, or --force was given: starting anew\n'
        rm -rf .venv
    fi
    if [ -e .venv ]; then
        printf '%s\n' "$$" >.venv/setup.running
        return
    fi
    python=$(find_python)
    mkdir .venv
    printf '%s\n' "$$" >.venv/setup.running
    printf 'making .venv/ with %s\n' "$("$python" --version)"
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "$python -m venv failed (see above). Debian and Ubuntu: apt-get install python3-venv"
    }
}

# The lines of requirements.lock for one package: from its name to the last of its hashes.
locked() {
    awk -v name="$1==" 'index($0, name) == 1 { on = 1 } on { print } on && !/\\$/ { exit }' requirements.lock
}

install_packages() {
    printf 'installing the packages of requirements.lock (minutes, and about 5 GB with the CUDA libraries)\n'
    # A few packages come as sources; they are built with the locked setuptools instead of a fetched one.
    locked setuptools >.venv/setuptools.lock
    pip_install --require-hashes --no-deps -r .venv/setuptools.lock
    pip_install --require-hashes --no-deps --no-build-isolation --use-pep517 -r requirements.lock
    pip_install --no-deps --no-build-isolation --editable .
    .venv/bin/python tools/install_detectron2.py || {
        rm -f .venv/setup.running
        fail "Detectron2 is not installed (see above); everything else is. Run bash tools/setup.sh again"
    }
    wanted_stamp >.venv/setup.stamp
    rm -f .venv/setup.running
}

quiet=0 force=0
for argument in "$@"; do
    case "$argument" in
        --help | -h) usage && exit 0 ;;
        --quiet) quiet=1 ;;
        --force) force=1 ;;
        *) usage >&2 && exit 2 ;;
    esac
done

if [ "$force" = 0 ] && [ ! -e .venv/setup.running ] && [ -x .venv/bin/python ] &&
    [ "$(wanted_stamp)" = "$(cat .venv/setup.stamp 2>/dev/null || true)" ]; then
    [ "$quiet" = 1 ] || printf 'set-up is complete; .venv/bin/python tools/doctor.py shows details\n'
    exit 0
fi
refuse_second_setup
make_environment
install_packages
.venv/bin/python tools/doctor.py
