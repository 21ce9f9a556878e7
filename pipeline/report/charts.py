"""Charts as SVG, drawn by matplotlib; text stays text, colours are variables of the style sheet.

matplotlib draws in the colours of `LIGHT`; each is then replaced by its CSS variable, so that a
chart follows the theme of its page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape

COLOURS = {
    "page": ("#f4f5f7", "#0f1318"),
    "card": ("#ffffff", "#181d24"),
    "ink": ("#171b21", "#e8ebef"),
    "muted": ("#56606c", "#a2acb8"),
    "rule": ("#dfe3e8", "#2c343e"),
    "border": ("#7a8592", "#7d8894"),
    "soft": ("#eef3fa", "#1d2733"),
    "accent": ("#1667c7", "#62aaff"),
    "good": ("#137a43", "#55c98a"),
    "bad": ("#b3261e", "#ff8a80"),
    "open": ("#8a5a00", "#e5b454"),
    "line-1": ("#c2410c", "#ff9a5c"),
    "line-3": ("#8b3fb8", "#cf9bf5"),
}
"""Name -> colour in the light and in the dark theme."""
LIGHT, DARK = ({name: pair[i] for name, pair in COLOURS.items()} for i in (0, 1))
LINES = ("accent", "line-1", "good", "line-3")
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 440, 280
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"], "axes.edgecolor": LIGHT["rule"], "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": LIGHT["rule"], "grid.linewidth": 1, "lines.linewidth": 2.2,
    "xtick.color": LIGHT["rule"], "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["rule"], "ytick.labelcolor": LIGHT["muted"],
    "legend.frameon": False, "legend.fontsize": 11, "figure.facecolor": "none",
}  # fmt: skip

Line = Sequence[tuple[float, ...]]
"""Points (x, y), or (x, y, low, high) with the band that is drawn around the line."""


def line_chart(
    title: str, lines: Mapping[str, Line], x_label: str, *, from_zero: bool = False
) -> Markup | None:
    """A line chart, or None where there is nothing to draw.

    Args:
        title: For screen readers; the page prints its own heading.
        lines: By name; values that are not finite are left out.
        x_label: Name of the horizontal axis.
        from_zero: Whether the vertical axis has to start at 0.
    """
    known = {name: [point for point in line if all(map(math.isfinite, point))]
             for name, line in lines.items()}  # fmt: skip
    known = {name: line for name, line in known.items() if line}
    if not known:
        return None
    with _axes(WIDTH, HEIGHT) as axes:
        for number, (name, line) in enumerate(known.items()):
            # 16 pairs of a colour and a dash pattern.
            tone = LINES[number % len(LINES)]
            dash = DASHES[(number + number // len(LINES)) % len(DASHES)]
            xs, ys, *band = zip(*line, strict=True)
            marker = "o" if len(line) == 1 else None
            axes.plot(xs, ys, dash, color=LIGHT[tone], label=name, marker=marker)
            if band:
                axes.fill_between(xs, *band, color=LIGHT[tone], alpha=0.18, linewidth=0)
        axes.set_xlabel(x_label)
        if from_zero:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        if len(known) > 1:
            # The legend has room of its own, above the lines.
            columns = 2 if len(known) > 2 and max(map(len, known)) <= 20 else 1
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.11 * math.ceil(len(known) / columns) * (high - low))
            axes.legend(loc="upper right", ncols=columns)
        texts = [f"{name}: from {short_number(line[0][1])} to {short_number(line[-1][1])}"
                 for name, line in known.items()]  # fmt: skip
        return _svg(axes.figure, title, "; ".join(texts))


def interval_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float], float | None, Sequence[float] | None]],
    x_label: str,
) -> Markup | None:
    """Rings, a diamond and a bar in rows below each other; None where there is nothing to draw.

    Args:
        title: For screen readers, with the figures.
        rows: (name, single values: rings; their mean: diamond; ends of its interval: bar).
        x_label: Below the axis.
    """
    if all(mean is None for _, _, mean, _ in rows):
        return None
    texts = []
    # Names at the left, or above their rows if they are long.
    names = [name for name, *_ in rows]
    is_long = max(map(len, names)) >= 20
    height, labels = (40, [""] * len(rows)) if is_long else (24, names)
    with _axes(WIDTH, 76 + height * len(rows), labels) as axes:
        axes.axvline(0, color=LIGHT["muted"], linestyle="--", linewidth=1)
        for place, (name, values, mean, interval) in enumerate(rows):
            if is_long:
                axes.text(0, place - 0.3, _short(name), transform=axes.get_yaxis_transform())
            texts.append(f"{name}: {short_number(mean) if mean is not None else 'no value'}")
            if interval is not None:
                axes.plot(interval, [place] * 2, color=LIGHT["border"], linewidth=3)
                texts[-1] += f" ({' to '.join(map(short_number, interval))})"
            rings = axes.plot(values, [place] * len(values), "o", color=LIGHT["muted"])
            rings[0].set(markerfacecolor=LIGHT["card"], markersize=7)
            tone = LIGHT["accent" if interval is not None else "border"]  # grey: one seed
            axes.plot([] if mean is None else mean, [] if mean is None else place, "D", color=tone)
        axes.set_xlabel(x_label)
        return _svg(axes.figure, title, "; ".join(texts))


def matrix_chart(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]
) -> Markup:
    """Counts as squares, darker the larger their share of the row.

    Args:
        title: For screen readers, with the largest counts.
        rows: Names at the left.
        columns: Names above.
        values: One row of counts each.
    """
    from matplotlib.patches import Rectangle

    side = 30
    longest = min(40, max(map(len, columns)))
    top = 16 + 7.5 * longest
    width = round(20 + 7.5 * min(40, max(map(len, rows))) + side * len(columns)) + 14
    told = []
    with _axes(width, round(top + side * len(rows)) + 14, rows) as axes:
        axes.figure.subplots_adjust(top=1 - top / (top + side * len(rows) + 14),
                                    bottom=14 / (top + side * len(rows) + 14))  # fmt: skip
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=90)
        for y, (name, row) in enumerate(zip(rows, values, strict=True)):
            total = sum(row)
            for x, value in enumerate(row):
                share = value / total if total else 0.0
                square = Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, linewidth=0)
                square.set(facecolor=LIGHT["accent"], alpha=0.05 + 0.5 * min(1.0, max(0.0, share)))
                axes.add_patch(square)
                if value:
                    text = f"{value:.1f}" if value < 0.95 else f"{value:.0f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=10)
            if any(row):
                most = max(range(len(row)), key=row.__getitem__)
                told.append(f"{name}: most {columns[most]}, {row[most]:.0f} of {total:.0f}")
        return _svg(axes.figure, title, "; ".join(told), is_fixed=True)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "\u2026"


def short_number(value: float) -> str:
    """A number with the digits that matter: four, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@contextmanager
def _axes(width: int, height: int, rows: Sequence[str] = ()) -> Iterator[Any]:
    """Axes of a figure of so many pixels in the style of the page, with margins for labels.

    With `rows` these names stand at the left, the first one at the top.
    """
    import matplotlib
    from matplotlib.figure import Figure

    left = 20 + 7.5 * min(40, max(map(len, rows))) if rows else 60
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72))
        figure.subplots_adjust(left / width, 46 / height, 1 - 14 / width, 1 - 14 / height)
        axes = figure.subplots()
        if rows:
            axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
        yield axes


def _svg(figure: Any, title: str, description: str, *, is_fixed: bool = False) -> Markup:
    """The figure as an element of a page: no ids twice, no style sheet, colours as variables.

    With `is_fixed` it has a width of its own, else that of its place.
    """
    import matplotlib

    label = escape(f"{title}. {description}")
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids of clips and marks
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    body = text[text.index(">", size.end()) + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;]*;", "", body)
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    fixed = f' style="width:{figure.get_figwidth() * 72:.0f}px"' * is_fixed
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="chart"{fixed} {size[0]} role="img" aria-label="{label}">{body}'
    )
