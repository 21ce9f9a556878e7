"""What an evaluation leaves: ``linear.json`` and a table for people."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FORMAT = "fa-linear-1"
NAME = "linear.json"
_NUM_SHOWN = 3  # classes at either end


class Clock:
    """Time by part of the work.

    Attributes:
        seconds: Wall time of each part.
        processor_seconds: Of this process and of its workers that ended in that part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what is done within."""
        wall, processor = time.perf_counter(), _processor_seconds()
        try:
            yield
        finally:
            for table, value in (
                (self.seconds, time.perf_counter() - wall),
                (self.processor_seconds, _processor_seconds() - processor),
            ):
                table[name] = table.get(name, 0.0) + value


def _processor_seconds() -> float:
    """Of this process and its ended children, user and system."""
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def gpu_bytes(device: torch.device) -> int | None:
    """Peak memory of the GPU; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def table(result: dict[str, Any]) -> str:
    """The figures for people, in percent."""
    checkpoint, data = result["checkpoint"], result["data"]
    lines = [
        f"{result['protocol']} evaluation of {checkpoint['name']}"
        + (f" ({checkpoint['branch']})" if checkpoint["branch"] else ""),
        f"{data['train']['num_used']:,} of {data['train']['num_samples']:,} labels, "
        f"{data['val']['num_samples']:,} validation pictures, {data['num_classes']} classes",
        "",
    ]
    lines += _knn_lines(result["knn"]) if result["knn"] else _linear_lines(result)
    total = sum(result["seconds"].values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    lines.append(f"{total:.1f} s ({parts}); peak {result['peak_memory_bytes'] / 1e6:,.0f} MB")
    return "\n".join(lines)


def _knn_lines(knn: dict[str, Any]) -> list[str]:
    title = "k, temperature"
    head = f"{title:>16}" + "".join(f"{t:>9g}" for t in knn["temperatures"])
    rows = [
        f"{k:>16}" + "".join(f"{_percent(value):>9}" for value in row)
        for k, row in zip(knn["ks"], knn["top1"], strict=True)
    ]
    return [head, *rows, ""]


def _linear_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'base rate':>12}{'held out':>10}{'val top-1':>11}{'val top-5':>11}"]
    for number, row in enumerate(result["rates"]):
        is_chosen = result["selection"] is not None and number == result["chosen"]
        lines.append(
            f"{row['base_lr']:>12.4g}{_percent(row['held_out_top1']):>10}"
            f"{_percent(row['val_top1']):>11}{_percent(row['val_top5']):>11}"
            f"{'  chosen by the held-out part' if is_chosen else ''}"
        )
    if result["selection"] is not None:
        lines += _edge(result)
    again = ", trained again with the held-out part" if result["refitted"] else ""
    lines.append(
        f"\ntop-1 {_percent(result['top1'])} %, top-5 {_percent(result['top5'])} % of "
        f"{result['n']:,}{again}"
    )
    known = {name: x for name, x in result["per_class"].items() if x is not None}
    order = sorted(known, key=lambda name: known[name])
    worst, best = order[:_NUM_SHOWN], order[::-1][:_NUM_SHOWN]
    for title, names in (("worst", worst), ("best", best)):
        cells = ", ".join(f"{name} {_percent(known[name])}" for name in names)
        lines.append(f"{title} classes: {cells}")
    return lines


def _edge(result: dict[str, Any]) -> list[str]:
    """A note where the best rate may lie outside the sweep."""
    rates = [row["base_lr"] for row in result["rates"]]
    ends = {min(rates): "lowest of the sweep: lower lr_min",
            max(rates): "highest of the sweep: raise lr_max"}  # fmt: skip
    advice = ends.get(result["chosen_base_lr"])
    return [f"note: the chosen rate is the {advice}, there may be a better one"] if advice else []


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
