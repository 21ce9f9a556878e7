"""Accuracies of a linear evaluation as a standalone SVG: over rates, epochs, or k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from tools.flow import page
from tools.flow.charts import nice_ticks, short_number

NAME = "linear.svg"
_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT, _BOTTOM, _ROW = 800, 64, 300, 52, 230, 52, 20
_DASHES = ("", "6 4", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Line:
    """Accuracies in percent.

    Attributes:
        label: For the legend.
        points: (x, percent), ordered by x.
    """

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: Above it.
        x_label: Below the axis.
        lines: Those without a point are left out.
        is_log: Whether the axis is spaced by logarithm.
        ticks: Values that the axis names; None: round ones.
        marked: (x, what it is): drawn as an upright line.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    is_log: bool = False
    ticks: Sequence[float] | None = None
    marked: tuple[float, str] | None = None


def plot(result: Mapping[str, Any]) -> Markup | None:
    """The picture of a ``linear.json``; None where it holds no accuracy to draw."""
    panels = [panel for panel in panels_of(result) if any(line.points for line in panel.lines)]
    if not panels:
        return None
    parts, top = [], 0
    for panel in panels:
        body, height = _drawn(panel)
        parts.append(f'<g transform="translate(0 {top})">{body}</g>')
        top += height
    words = escape(" ".join(map(_words, panels)))
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" '
        f'height="{top}" role="img" aria-label="{words}"><style>{_style()}</style>'
        f'<rect class="card" width="{_WIDTH}" height="{top}"/>{"".join(parts)}</svg>'
    )


def panels_of(result: Mapping[str, Any]) -> list[Panel]:
    """Neighbours: k with every temperature. Otherwise rates, and epochs where they were counted."""
    name = str(result["checkpoint"]["name"])
    if result["knn"]:
        knn = result["knn"]
        grid = list(zip(knn["ks"], knn["top1"], strict=True))
        lines = [
            Line(f"temperature {temperature:g}", [(k, 100 * row[i]) for k, row in grid])
            for i, temperature in enumerate(knn["temperatures"])
        ]
        title = f"kNN top-1 of {name}"
        return [Panel(title, "k nearest pictures", lines, is_log=True, ticks=knn["ks"])]
    rates = result["rates"]
    lines = [
        Line(label, [(row["base_lr"], 100 * row[key]) for row in rates if row[key] is not None])
        for label, key in (
            ("validation top-1", "val_top1"), ("validation top-5", "val_top5"),
            ("held-out top-1", "held_out_top1"),
        )
    ]  # fmt: skip
    chosen = None if result["selection"] is None else (result["chosen_base_lr"], "chosen")
    panels = [
        Panel(f"Linear accuracy of {name}", "base learning rate", lines, is_log=True, marked=chosen)
    ]
    curve = result.get("training_top1") or []
    lines = [
        Line(f"rate {row['base_lr']:.4g}",
             [(epoch + 1, 100 * top1[i]) for epoch, top1 in enumerate(curve) if top1 is not None])
        for i, row in enumerate(rates)
    ]  # fmt: skip
    panels.append(Panel("Top-1 on the training batches", "epoch", lines))
    return panels


def _drawn(panel: Panel) -> tuple[str, int]:
    """A panel's elements and its height."""
    lines = [line for line in panel.lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    at = _scale(xs, panel.is_log)
    bottom = _TOP + _PLOT

    def down(y: float) -> float:
        return bottom - _PLOT * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [_text(_LEFT, 24, panel.title, "title")]
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {down(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, down(tick) + 4, f"{short_number(tick)} %", "row"))
    for tick in panel.ticks or _ticks(xs, panel.is_log):
        parts.append(_text(at(tick), bottom + 19, short_number(tick), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 40, panel.x_label, "middle"))
    if panel.marked is not None:
        x = at(panel.marked[0])
        parts.append(f'<path class="marked" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(x, _TOP - 6, panel.marked[1], "middle"))
    for number, line in enumerate(lines):
        places = [(at(x), down(y)) for x, y in line.points]
        parts += _line(number, line, places)
    return "".join(parts), max(bottom + _BOTTOM, _TOP + _ROW * len(lines) + 10)


def _line(number: int, line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    """The line with a dot at each value, and its entry in the legend with the highest value."""
    tone = f"tone-{number % page.NUM_COLOURS}"
    dash = _DASHES[number % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    radius = 3 if len(places) <= 30 else 1.5
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(line.label)}: '
        f"{value:.2f} % at {short_number(given)}</title></circle>"
        for (x, y), (given, value) in zip(places, line.points, strict=True)
    )
    best_x, best = max(line.points, key=lambda point: point[1])
    left, y = _WIDTH - _RIGHT + 16, _TOP + _ROW * number + 8
    entry = f"{line.label}: highest {best:.2f} % at {short_number(best_x)}"
    return [
        f'<g class="{tone}"><path class="line"{dashed} d="M{path}"/>{dots}',
        f'<path class="line"{dashed} d="M{left} {y}h22"/></g>',
        _text(left + 28, y + 4, entry, "legend"),
    ]


def _scale(xs: Sequence[float], is_log: bool):
    """From a value to a place; a single value stands in the middle."""
    turn = math.log10 if is_log else float
    low, high = turn(min(xs)), turn(max(xs))
    width = _WIDTH - _LEFT - _RIGHT - 20

    def at(x: float) -> float:
        return _LEFT + 10 + width * ((turn(x) - low) / (high - low) if high > low else 0.5)

    return at


def _ticks(xs: Sequence[float], is_log: bool) -> list[float]:
    """Round values within the range: powers of ten, the values themselves where there are few."""
    if not is_log:
        ticks = [t for t in nice_ticks(min(xs), max(xs), 6) if min(xs) <= t <= max(xs)]
        return [t for t in ticks if t == round(t)] or sorted(set(xs))
    low, high = math.ceil(math.log10(min(xs)) - 1e-9), math.floor(math.log10(max(xs)) + 1e-9)
    powers = [10.0**power for power in range(low, high + 1)]
    return powers if len(powers) > 1 else sorted(set(xs))


def _words(panel: Panel) -> str:
    """A panel for those who do not see it."""
    told = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{y:.2f} % at {short_number(x)}" for x, y in line.points)
        for line in panel.lines
        if line.points
    )  # fmt: skip
    return f"{panel.title} over {panel.x_label}. {told}."


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _style() -> str:
    """Colours of the report's palette, by the theme of the system."""

    def rules(colours: Mapping[str, str]) -> str:
        tones = "".join(
            f".tone-{i} .line{{stroke:{colours[f'run-{i}']}}}"
            f".tone-{i} circle{{fill:{colours[f'run-{i}']}}}"
            for i in range(page.NUM_COLOURS)
        )
        return (
            f"{tones}.card{{fill:{colours['card']}}}text{{fill:{colours['ink']}}}"
            f".grid{{stroke:{colours['rule']}}}.marked{{stroke:{colours['muted']}}}"
        )

    return (
        "text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}"
        ".legend{font-size:11px}.row{text-anchor:end}.middle{text-anchor:middle}"
        ".line{fill:none;stroke-width:2}.marked{stroke-dasharray:3 3}"
        f"{rules(page.LIGHT)}@media(prefers-color-scheme:dark){{{rules(page.DARK)}}}"
    )
