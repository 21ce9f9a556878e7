"""metrics.jsonl and TensorBoard: one row per logged step, without a seam after a resume."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pretrain.engine.trackers import Trackers


class MetricLog:
    """Appends rows to ``metrics.jsonl``, scalars to ``tensorboard/`` and to the trackers.

    In a context: its end tells the trackers whether the run failed.

    Args:
        folder: The run's folder.
        last_step: Rows after this step are dropped first: a killed run may have logged steps that
            its last checkpoint does not know, and they will be run again. -1 drops all.
        last_probe_step: The same for rows of kind ``knn``.
        trackers: Other services that get the numbers.
    """

    def __init__(
        self, folder: Path, last_step: int, last_probe_step: int, trackers: Trackers | None = None
    ) -> None:
        path = folder / "metrics.jsonl"
        last = {"knn": last_probe_step}
        rows = [r for r in read_rows(path) if r["step"] <= last.get(r["kind"], last_step)]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        self._trackers = trackers

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row: ``{"kind": .., "step": .., ..}``; numbers go to TensorBoard as well."""
        row = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        for note in self._trackers.log(kind, step, values) if self._trackers else []:
            print(f"warning: {note}", file=sys.stderr)
            self.write("event", step, message=note)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Flush all, and let the trackers finish."""
        self._file.close()
        self._board.close()
        for note in self._trackers.close(failed=failed) if self._trackers else []:
            print(f"warning: {note}", file=sys.stderr)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such values become their name as text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a metrics file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file by rename."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
