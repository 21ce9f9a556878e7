"""`--check [all|settings] [--json]`: a program checks its whole input and says what it would do."""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

EACH = "--check-each"
"""The only word of a call that checks many: standard input holds a JSON list of argument lists."""


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add both options; `check` is parsed to None, "all" or "settings"."""
    parser.add_argument(
        "--check", nargs="?", const="all", choices=("all", "settings"),
        help="check the input, say what would be done, and stop; settings: not the data, which "
        "may not be there yet",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="with --check: say it as JSON")


def print_check(facts: Mapping[str, Any], *, as_json: bool) -> bool:
    """Print what a check found out, as one line of JSON or a line for each fact; False: no work."""
    if as_json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    return False


def run_or_check_each(main: Callable[[list[str] | None], int]) -> int:
    """Run a program, or its checks for each argument list; returns the exit status.

    The checks print one JSON line each: what `main` printed, or {"error": its message}. One process
    does what many would do, whose imports take longer than the checks.
    """
    if sys.argv[1:] != [EACH]:
        return main(None)
    for words in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        status: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(words)
        except SystemExit as stop:  # argparse
            status = stop.code
        lines = [line for line in err.getvalue().splitlines() if line.strip()] or ["no message"]
        # The last error, with the lines that belong to it.
        first = max((n for n, line in enumerate(lines) if "error: " in line), default=-1)
        message = " ".join(line.strip() for line in lines[first:]).partition("error: ")[2]
        answer = out.getvalue().splitlines()[-1:] or ["{}"]
        print(json.dumps({"error": message or lines[-1]}) if status else answer[0], flush=True)
    return 0
