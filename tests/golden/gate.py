"""Golden values: figures of the code as it was before the redesign, committed with tolerances.

A gate measures something (losses, orders, pixels, metrics) and compares it with
`values/<name>.json`.

- `GOLDEN_RECORD=1` writes the measured values instead of comparing them. Only a commit of its own
  that says why the behaviour changes may do so.
- `GOLDEN_DUMP=DIR` also writes every measured value, unrounded and with its digests, to
  `DIR/<name>.json`. Two worktrees on one machine must write the same bytes:
  `diff -r OLD_DUMP NEW_DUMP`. Digests are not committed: they depend on the processor.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = Path(__file__).parent / "values"
_INNER_LIST = re.compile(r"\[\n([^\[\]{}]*)\n\s*\]")


def digest(*parts: bytes) -> str:
    """SHA-256 of some bytes, in hex."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def check(
    name: str, measured: Any, *, rtol: float = 0.0, atol: float = 0.0, bits: Any = None
) -> None:
    """Compare measured values with the committed ones.

    Args:
        name: The file below `values/`, without its suffix.
        measured: Anything JSON can hold. Floats are compared with the tolerances, the rest exactly.
        rtol: Tolerance of floats, relative to the committed value.
        atol: Absolute tolerance of floats.
        bits: Digests that only `GOLDEN_DUMP` writes.
    Raises:
        AssertionError: If a value differs; the message names its place.
    """
    measured = json.loads(json.dumps(measured))
    dump = os.environ.get("GOLDEN_DUMP")
    if dump:
        Path(dump).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"values": measured, "bits": bits}, indent=1, sort_keys=True)
        (Path(dump) / f"{name}.json").write_text(text + "\n")
    path = VALUES / f"{name}.json"
    if os.environ.get("GOLDEN_RECORD") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(measured, indent=1, sort_keys=True)
        path.write_text(_INNER_LIST.sub(_on_one_line, text) + "\n")
        return
    committed = json.loads(path.read_text())
    differences = list(_differences(name, committed, measured, rtol, atol))
    assert not differences, "\n".join(differences[:20])


def exit_status(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Of a program called in this process."""
    try:
        return main(arguments)
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def _on_one_line(match: re.Match[str]) -> str:
    """A list of plain values on one line, so that a committed table has a line for each row."""
    return "[" + ", ".join(line.strip() for line in match[1].split(",\n")) + "]"


def _differences(place: str, committed: Any, measured: Any, rtol: float, atol: float):
    if isinstance(committed, dict) and isinstance(measured, dict):
        for key in sorted(committed.keys() | measured.keys()):
            if key not in committed or key not in measured:
                yield f"{place}.{key}: only in {'committed' if key in committed else 'measured'}"
            else:
                yield from _differences(f"{place}.{key}", committed[key], measured[key], rtol, atol)
    elif isinstance(committed, list) and isinstance(measured, list):
        if len(committed) != len(measured):
            yield f"{place}: {len(measured)} values instead of {len(committed)}"
        for number, pair in enumerate(zip(committed, measured, strict=False)):
            yield from _differences(f"{place}[{number}]", *pair, rtol, atol)
    elif isinstance(committed, float) and isinstance(measured, int | float):
        if not math.isclose(committed, measured, rel_tol=rtol, abs_tol=atol):
            both_nan = math.isnan(committed) and math.isnan(measured)
            if not both_nan:
                yield f"{place}: {measured!r} instead of {committed!r}"
    elif committed != measured or isinstance(committed, bool) != isinstance(measured, bool):
        yield f"{place}: {measured!r} instead of {committed!r}"
