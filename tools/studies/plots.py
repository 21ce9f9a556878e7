"""Intervals side by side, as a standalone SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tools.flow.charts import nice_ticks, short_number
from tools.studies.documents import plain

_WIDTH, _LEFT, _RIGHT, _TOP, _STEP = 720, 250, 24, 16, 26
_STYLE = """
.s { font: 12px system-ui, sans-serif; fill: #1b1b1b; }
.g { stroke: #767676; stroke-opacity: .35; } .z { stroke: #767676; stroke-dasharray: 4 3; }
.b { stroke: #1f6fb2; stroke-width: 2.5; } .m { fill: #1f6fb2; }
.p { fill: none; stroke: #8a5a00; stroke-width: 1.3; }
@media (prefers-color-scheme: dark) {
  .s { fill: #e8e8e8; } .g, .z { stroke: #9a9a9a; } .b { stroke: #6db3f2; } .m { fill: #6db3f2; }
  .p { stroke: #e0a94a; }
}
"""


@dataclass(frozen=True)
class Line:
    """One row of the chart.

    Attributes:
        label: Shown at the left.
        values: Single results, drawn as small rings.
        mean: Drawn as a dot, or None.
        interval: (low, high), drawn as a bar, or None.
    """

    label: str
    values: Sequence[float]
    mean: float | None
    interval: tuple[float, float] | None


def interval_chart(title: str, lines: Sequence[Line], x_label: str, *, zero: bool) -> Markup | None:
    """Draw the rows below each other.

    Args:
        title: For screen readers, with the figures.
        lines: The rows; what is not finite is left out.
        x_label: Below the axis.
        zero: Whether 0 is drawn as a line and lies in the range.
    Returns:
        The SVG, or None where there is nothing to draw.
    """
    shown = [x for line in lines for x in _numbers(line)]
    if not shown:
        return None
    ticks = nice_ticks(
        *((min(*shown, 0.0), max(*shown, 0.0)) if zero else (min(shown), max(shown)))
    )
    bottom = _TOP + _STEP * len(lines)

    def x(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in ticks:
        kind = "z" if zero and tick == 0 else "g"
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} {_TOP}V{bottom}"/>')
        text = plain(short_number(tick))
        parts.append(_text(x(tick), bottom + 17, text, "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 36, plain(x_label), "middle"))
    for number, line in enumerate(lines):
        parts += _row(line, _TOP + _STEP * (number + 0.5), x)
    words = "; ".join(f"{line.label}: {_words(line)}" for line in lines)
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 46}" '
        f'width="{_WIDTH}" height="{bottom + 46}" role="img" '
        f'aria-label="{plain(f"{title}. {words}")}"><style>{_STYLE}</style>{"".join(parts)}</svg>'
    )


def _row(line: Line, y: float, x) -> list[str]:
    label = line.label if len(line.label) <= 38 else line.label[:37] + "\u2026"
    parts = [_text(_LEFT - 10, y + 4, plain(label), "end")]
    if line.interval is not None and all(map(math.isfinite, line.interval)):
        low, high = map(x, line.interval)
        parts.append(f'<path class="b" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
    for value in filter(math.isfinite, line.values):
        parts.append(f'<circle class="p" cx="{x(value):.1f}" cy="{y:.1f}" r="3"/>')
    if line.mean is not None and math.isfinite(line.mean):
        parts.append(f'<circle class="m" cx="{x(line.mean):.1f}" cy="{y:.1f}" r="4.5"/>')
    return parts


def _numbers(line: Line) -> list[float]:
    found = [*line.values, *(line.interval or ()), *([] if line.mean is None else [line.mean])]
    return list(filter(math.isfinite, found))


def _words(line: Line) -> str:
    text = "no value" if line.mean is None else f"mean {line.mean:.2f}"
    if line.interval is not None:
        text += f", interval {line.interval[0]:.2f} to {line.interval[1]:.2f}"
    return text


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="s" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
