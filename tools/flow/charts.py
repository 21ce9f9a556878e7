"""Small line, slope and dumbbell charts as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 46
_MAX_POINTS = 300  # of a line
_ALL_POINTS, _FEWEST_POINTS = 3000, 40  # of all lines of a chart; of one of many

Point = tuple[float, float]
Span = tuple[float, float, float]
"""x, low, high."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: What it is called where a value is shown.
        points: (x, y), ordered by x.
        tone: `random`, `pretrained`, `negative`, `plain` or what `page.tone` gives: classes.
        thin: One of several runs, drawn faintly behind their mean.
        band: How far values spread around the line, ordered by x; drawn behind it.
        key: By what a legend hides the line; its tone if left out.
    """

    label: str
    points: Sequence[Point]
    tone: str = "plain"
    thin: bool = False
    band: Sequence[Span] = ()
    key: str = ""

    @property
    def series(self) -> str:
        """What a legend calls the line."""
        return self.key or self.tone


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover [low, high]."""
    if not high > low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def short_number(value: float) -> str:
    """Return a number for an axis or a tooltip: three or four digits that matter."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def thin_out(points: Sequence[Point], most: int = _MAX_POINTS) -> list[Point]:
    """Return at most `most` points: means of neighbouring ones; the last stays as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [*means, points[-1]]


def drawable(line: Series, most: int = _MAX_POINTS) -> Series:
    """Return the line without what is not finite, thinned out to what a chart can show."""
    points = [point for point in line.points if all(map(math.isfinite, point))]
    spans = [span for span in line.band if all(map(math.isfinite, span))]
    lows, highs = (thin_out([(span[0], span[i]) for span in spans], most) for i in (1, 2))
    band = [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)]
    return replace(line, points=thin_out(points, most), band=band)


def spot(x: float, y: float, text: str, series: str = "") -> list[Any]:
    """Return a place in the drawing, what is shown when it is pointed at, and whose it is."""
    return [round(x, 1), round(y, 1), text, series]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    from_zero: bool = False,
    corner: Point | None = None,
) -> Markup | None:
    """Return a line chart, or None where there is nothing to draw.

    Args:
        title: For screen readers; the page prints its own heading.
        series: The lines; points that are not finite are left out.
        x_label: Name of the horizontal axis.
        from_zero: Whether the vertical axis has to start at 0.
        corner: A point that the axes have to reach, such as (1, 1) for shares.
    """
    most = min(_MAX_POINTS, max(_FEWEST_POINTS, _ALL_POINTS // max(len(series), 1)))
    lines = [line for line in (drawable(line, most) for line in series) if line.points]
    if not lines:
        return None
    xs = [x for s in lines for x, _ in s.points]
    ys = [y for s in lines for _, y in s.points]
    ys += [y for s in lines for _, *ends in s.band for y in ends]
    if corner is not None:
        xs.append(corner[0])
        ys.append(corner[1])
    x_ticks = nice_ticks(min(xs), max(xs), 5)
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(*ys, 1e-9) if from_zero else max(ys), 5)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_ticks[0], x_ticks[-1]
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1])
    parts = [frame.grid([t for t in x_ticks if x_low <= t <= x_high], y_ticks, x_label)]
    hover = []
    parts += [_band(frame, line) for line in lines if len(line.band) > 1]
    for line in sorted(lines, key=lambda s: not s.thin):
        places = [(frame.x(x), frame.y(y)) for x, y in line.points]
        parts.append(_path(places, line))
        if not line.thin:
            hover += [
                spot(px, py, f"{line.label}: {short_number(y)} at {short_number(x)}", line.series)
                for (px, py), (x, y) in zip(places, line.points, strict=True)
            ]
    description = "; ".join(
        f"{s.label}: from {short_number(s.points[0][1])} to {short_number(s.points[-1][1])}"
        for s in lines
        if not s.thin
    )
    return drawing(title, description, "".join(parts), HEIGHT, hover)


def slope_chart(title: str, pairs: Sequence[tuple[str, float, float]]) -> Markup | None:
    """Return one line per seed from random (left) to pretrained (right), and their mean."""
    if not pairs:
        return None
    ys = [value for _, *both in pairs for value in both]
    ticks = nice_ticks(min(ys), max(ys), 5)
    frame = _Frame(-0.35, 1.35, ticks[0], ticks[-1])
    parts = [frame.grid([], ticks, "")]
    ends = (frame.x(0), frame.x(1))
    hover = []
    for label, left, right in pairs:
        places = [(ends[0], frame.y(left)), (ends[1], frame.y(right))]
        parts.append(_path(places, Series(label, [], "plain", thin=len(pairs) > 1)))
        for (px, py), tone, value in zip(
            places, ("random", "pretrained"), (left, right), strict=True
        ):
            parts.append(_dot(px, py, 4.5, tone, tone))
            hover.append(spot(px, py, f"{label}, {tone}: {value:.1f}", tone))
    if len(pairs) > 1:
        columns = ([left for _, left, _ in pairs], [right for _, _, right in pairs])
        means = [math.fsum(column) / len(pairs) for column in columns]
        places = [(x, frame.y(mean)) for x, mean in zip(ends, means, strict=True)]
        parts.append(_path(places, Series("mean", [], "pretrained")))
    for x, word in zip(ends, ("random", "pretrained"), strict=True):
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" class="name">{word}</text>')
    text = "; ".join(f"{label}: {left:.1f} to {right:.1f}" for label, left, right in pairs)
    return drawing(title, text, "".join(parts), HEIGHT, hover)


def dumbbell_chart(
    title: str, rows: Sequence[tuple[str, float | None, float | None]]
) -> Markup | None:
    """Return one row per class with a dot for each arm.

    Args:
        title: For screen readers.
        rows: (class, random, pretrained).
    """
    found = [value for _, *both in rows for value in both if value is not None]
    if not found:
        return None
    left, step, top = 118, 24, 10
    height = top + step * len(rows) + 34
    ticks = nice_ticks(0.0, max(*found, 1e-9), 5)

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - _RIGHT)

    parts, hover = [], []
    bottom = top + step * len(rows)
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        text = escape(short_number(tick))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" class="tick">{text}</text>')
    for index, (name, random, pretrained) in enumerate(rows):
        y = top + step * (index + 0.5)
        shown = name if len(name) <= 15 else name[:14] + "\u2026"
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" class="row">{escape(shown)}</text>')
        if random is not None and pretrained is not None:
            ends = f'x1="{place(random):.1f}" x2="{place(pretrained):.1f}"'
            parts.append(f'<line class="bar" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
        for value, tone in ((random, "random"), (pretrained, "pretrained")):
            if value is not None:
                x = place(value)
                parts.append(_dot(x, y, 5, tone, tone))
                hover.append(spot(x, y, f"{name}, {tone}: {value:.1f}", tone))
    return drawing(title, "Values stand in the table below.", "".join(parts), height, hover)


@dataclass(frozen=True)
class _Frame:
    """Places values in the drawing area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = []
        for tick in y_ticks:
            y, text = self.y(tick), escape(short_number(tick))
            ends = f'x1="{_LEFT}" x2="{right}"'
            parts.append(f'<line class="grid" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="row">{text}</text>')
        for tick in x_ticks:
            x, text = self.x(tick), escape(short_number(tick))
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="tick">{text}</text>')
        if x_label:
            middle = (_LEFT + right) / 2
            parts.append(
                f'<text x="{middle:.0f}" y="{HEIGHT - 6}" class="name">{escape(x_label)}</text>'
            )
        return "".join(parts)


def _path(places: Sequence[Point], line: Series) -> str:
    kind = f"line {line.tone}{' thin' if line.thin else ''}"
    if len(places) == 1:
        x, y = places[0]
        return _dot(x, y, 4, line.tone, line.series)
    outline = " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" data-series="{escape(line.series)}" d="M{outline}"/>'


def _dot(x: float, y: float, radius: float, tone: str, series: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle class="dot {tone}" data-series="{escape(series)}" {place}/>'


def _band(frame: _Frame, line: Series) -> str:
    upper = [(frame.x(x), frame.y(high)) for x, _, high in line.band]
    lower = [(frame.x(x), frame.y(low)) for x, low, _ in reversed(line.band)]
    outline = " L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *lower])
    return f'<path class="band {line.tone}" data-series="{escape(line.series)}" d="M{outline}Z"/>'


def drawing(
    title: str, description: str, body: str, height: int, hover: list[list], width: int = WIDTH
) -> Markup:
    """Return a chart: its parts, what it is called, and what is shown where it is pointed at."""
    points = escape(json.dumps(hover, separators=(",", ":")))
    label = escape(f"{title}. {description}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'data-points="{points}">{body}</svg>'
    )
