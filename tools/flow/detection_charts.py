"""Charts of the detection section: bars of kinds of errors, stacked, with patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from tools.flow.charts import drawing, nice_ticks, short_number, spot

WIDTH = 560
_LEFT, _RIGHT, _TOP, _STEP, _BAR, _BOTTOM = 8, 14, 4, 56, 28, 44
_PER_DIGIT = 8.5


def stacked_bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], x_label: str
) -> Markup | None:
    """Return one bar a row, its parts one after another, each filled with a pattern of its own.

    Args:
        title: For screen readers; the page prints its own heading, and a table with the figures.
        rows: (name, {part: size}); all have the same parts.
        x_label: Name of the horizontal axis.
    """
    totals = [math.fsum(parts.values()) for _, parts in rows]
    if not rows or max(totals) <= 0:
        return None
    ticks = nice_ticks(0.0, max(totals), 6)
    scale = (WIDTH - _LEFT - _RIGHT) / ticks[-1]
    bottom = _TOP + _STEP * len(rows)
    drawn, hover = [], []
    for tick in ticks:
        x = _LEFT + scale * tick
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        drawn.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" class="tick">{short_number(tick)}</text>'
        )
    for index, (name, parts) in enumerate(rows):
        top = _TOP + _STEP * (index + 1) - _BAR - 4
        middle = top + _BAR / 2
        drawn.append(f'<text x="{_LEFT}" y="{top - 6:.1f}" class="bar-name">{escape(name)}</text>')
        across = scale * totals[index]
        drawn.append(
            f'<rect class="base" x="{_LEFT}" y="{top:.1f}" width="{across:.1f}" height="{_BAR}"/>'
        )
        x = float(_LEFT)
        for part, size in parts.items():
            width = scale * size
            figure = short_number(round(size, 1))
            if width > 0:
                drawn.append(
                    f'<rect class="part" fill="url(#fill-{escape(part)})" x="{x:.1f}" '
                    f'y="{top:.1f}" width="{width:.1f}" height="{_BAR}"/>'
                )
                hover.append(spot(x + width / 2, middle, f"{name}, {part}: {figure}"))
            if width > _PER_DIGIT * len(figure) + 6:
                place = f'x="{x + width / 2:.1f}" y="{middle + 5:.1f}"'
                drawn.append(f'<text {place} class="name figure">{figure}</text>')
            x += width
    centre = (_LEFT + WIDTH - _RIGHT) / 2
    height = bottom + _BOTTOM
    drawn.append(f'<text x="{centre:.0f}" y="{height - 6}" class="name">{escape(x_label)}</text>')
    text = "Values stand in the table below."
    return drawing(title, text, "".join(drawn), height, hover, WIDTH)
