"""Charts as SVG, drawn by matplotlib; text stays text, colours are variables of the style sheet.

matplotlib draws in the colours of `LIGHT`; each is then replaced by its CSS variable, so that a
chart follows the theme of its page. `standalone` adds the variables to a chart that is a file.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
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
    "random": ("#6f7a87", "#98a3b0"),
    "pretrained": ("#1667c7", "#62aaff"),
    "good": ("#137a43", "#55c98a"),
    "bad": ("#b3261e", "#ff8a80"),
    "open": ("#8a5a00", "#e5b454"),
    "run-1": ("#c2410c", "#ff9a5c"),
    "run-3": ("#8b3fb8", "#cf9bf5"),
    "run-4": ("#8f6a00", "#e0bc4a"),
    "run-5": ("#0e7490", "#4fc9dd"),
}
"""Name -> colour in the light and in the dark theme."""
LIGHT, DARK = ({name: pair[i] for name, pair in COLOURS.items()} for i in (0, 1))
RUNS = ("pretrained", "run-1", "good", "run-3", "run-4", "run-5")
DASHES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "\\\\", "xx", "--", "||")
WIDTH, HEIGHT = 440, 280
_MAX_POINTS = 300  # of a line
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"], "axes.edgecolor": LIGHT["rule"], "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": LIGHT["rule"], "grid.linewidth": 1, "lines.linewidth": 2.2,
    "xtick.color": LIGHT["rule"], "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["rule"], "ytick.labelcolor": LIGHT["muted"], "hatch.linewidth": 1.2,
    "legend.frameon": False, "legend.fontsize": 11, "figure.facecolor": "none",
}  # fmt: skip

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: In the legend; lines without one are not named.
        points: (x, y), ordered by x.
        tone: Name of its colour.
        thin: One of several runs, drawn faintly behind their mean.
        dash: Of `DASHES`.
        band: (x, low, high): how far values spread around the line.
        has_dots: Whether each value has a dot.
    """

    label: str
    points: Sequence[Point]
    tone: str = "pretrained"
    thin: bool = False
    dash: str = "-"
    band: Sequence[tuple[float, float, float]] = ()
    has_dots: bool = False


def of_run(label: str, points: Sequence[Point], number: int, **values: Any) -> Series:
    """A line of one of several runs: 24 pairs of a colour and a dash pattern."""
    dash = DASHES[(number + number // len(RUNS)) % len(DASHES)]
    return Series(label, points, RUNS[number % len(RUNS)], dash=dash, **values)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    from_zero: bool = False,
    is_log: bool = False,
    chosen: float | None = None,
) -> Markup | None:
    """A line chart, or None where there is nothing to draw.

    Args:
        title: For screen readers; the page prints its own heading.
        series: The lines; values that are not finite are left out.
        x_label: Name of the horizontal axis.
        from_zero: Whether the vertical axis has to start at 0.
        is_log: Whether the horizontal axis is spaced by logarithm.
        chosen: Marked by an upright line.
    """
    lines = []
    for line in series:
        points, band = (
            thin_out([values for values in rows if all(map(math.isfinite, values))])
            for rows in (line.points, line.band)
        )
        if points:
            lines.append(replace(line, points=points, band=band))
    if not lines:
        return None
    with _axes(WIDTH, HEIGHT) as axes:
        for line in sorted(lines, key=lambda line: not line.thin):
            colour = LIGHT[line.tone]
            if line.band:
                xs, low, high = zip(*line.band, strict=True)
                axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                *zip(*line.points, strict=True), line.dash, color=colour,
                label=None if line.thin else line.label,
                alpha=0.5 if line.thin else 1, linewidth=1 if line.thin else 2.2,
                marker="o" if line.has_dots or len(line.points) == 1 else None, markersize=4,
            )  # fmt: skip
        if chosen is not None:
            axes.axvline(chosen, color=LIGHT["muted"], linestyle=":", label="chosen")
        axes.set_xlabel(x_label)
        if is_log:
            axes.set_xscale("log")
        if len(lines) > 1:
            axes.legend()
        if from_zero:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        ends = [(line.label, line.points[0][1], line.points[-1][1])
                for line in lines if not line.thin]  # fmt: skip
        texts = [f"{name}: from {short_number(a)} to {short_number(b)}" for name, a, b in ends]
        return _svg(axes.figure, title, "; ".join(texts))


def slope_chart(title: str, pairs: Sequence[tuple[int, float, float]]) -> Markup | None:
    """A line a seed from random (left) to pretrained (right), and their mean.

    Args:
        title: For screen readers.
        pairs: (seed, random, pretrained).
    """
    if not pairs:
        return None
    with _axes(WIDTH, HEIGHT) as axes:
        for _, random, pretrained in pairs:
            axes.plot([0, 1], [random, pretrained], color=LIGHT["border"], linewidth=1.2)
            axes.plot([0], [random], "o", color=LIGHT["random"], fillstyle="none")
            axes.plot([1], [pretrained], "o", color=LIGHT["pretrained"])
        if len(pairs) > 1:
            _, *columns = zip(*pairs, strict=True)
            means = list(map(fmean, columns))
            axes.plot([0, 1], means, color=LIGHT["pretrained"], linewidth=3)
        axes.set_xticks([0, 1], ["random", "pretrained"])
        axes.set_xlim(-0.3, 1.3)
        text = "; ".join(f"seed {seed}: {low:.1f} to {high:.1f}" for seed, low, high in pairs)
        return _svg(axes.figure, title, text)


def stacked_bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], x_label: str
) -> Markup | None:
    """A bar a row, its parts one after another, each with a colour and a hatch of its own.

    Args:
        title: For screen readers; the page prints a table with the figures.
        rows: (name, {part: size}); all have the same parts.
        x_label: Name of the horizontal axis.
    """
    if not any(size > 0 for _, parts in rows for size in parts.values()):
        return None
    with _axes(720, 120 + 40 * len(rows), [name for name, _ in rows]) as axes:
        ends = [0.0] * len(rows)
        tones = ("good", "pretrained", "run-1", "run-3", "run-4", "muted")
        for part, tone, hatch in zip(rows[0][1], tones, HATCHES, strict=False):
            sizes = [parts[part] for _, parts in rows]
            axes.barh(
                range(len(rows)), sizes, left=ends, height=0.6, label=part, hatch=hatch,
                facecolor=LIGHT["soft"], edgecolor=LIGHT[tone],
            )  # fmt: skip
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        axes.set_xlabel(x_label)
        axes.figure.legend(loc="upper left", ncols=6)
        return _svg(axes.figure, title, "Values stand in the table below.")


def interval_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float], float | None, Sequence[float] | None]],
    x_label: str,
    names: tuple[str, str] = ("single results", "mean"),
) -> Markup | None:
    """Rings, a dot and a bar in rows below each other; None where there is nothing to draw.

    Args:
        title: For screen readers, with the figures.
        rows: (name, values of the rings, value of the dot, ends of the bar).
        x_label: Below the axis.
        names: Of the rings and of the dots.
    """
    if not any(values or mean is not None for _, values, mean, _ in rows):
        return None
    texts = []
    labels = [name for name, *_ in rows]
    width = WIDTH if max(map(len, labels)) < 20 else 720
    with _axes(width, 110 + 24 * len(rows), labels) as axes:
        axes.axvline(0, color=LIGHT["muted"], linestyle="--", linewidth=1)
        for place, (name, values, mean, interval) in enumerate(rows):
            texts.append(f"{name}: {short_number(mean) if mean is not None else 'no value'}")
            if interval is not None:
                axes.plot(interval, [place] * 2, color=LIGHT["border"], linewidth=3)
                texts[-1] += f" ({' to '.join(map(short_number, interval))})"
            rings = axes.plot(values, [place] * len(values), "o", color=LIGHT["random"])
            rings[0].set(markerfacecolor=LIGHT["card"], markersize=7)
            known = [] if mean is None else [mean]
            dots = axes.plot(known, [place] * len(known), "D", color=LIGHT["pretrained"])
            if place == 0:
                axes.figure.legend([*rings, *dots], names, loc="upper left", ncols=2)
        axes.set_xlabel(x_label)
        return _svg(axes.figure, title, "; ".join(texts))


def linear_chart(result: Mapping[str, Any]) -> str | None:
    """The file `linear.svg` of a `linear.json`; None where it holds no accuracy to draw."""
    if result["knn"]:
        x_label, chosen = "k nearest pictures", None
    else:
        x_label = "base learning rate"
        chosen = None if result["selection"] is None else result["chosen_base_lr"]
    lines = [
        of_run(label, points, number, has_dots=True)
        for number, (label, points) in enumerate(linear_lines(result).items())
    ]
    title = f"Top-1 and top-5 in percent, {result['checkpoint']['name']}"
    svg = line_chart(title, lines, x_label, is_log=True, chosen=chosen)
    return None if svg is None else standalone(svg)


def linear_lines(result: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Line -> (k or base rate, percent); of neighbours a line for every temperature."""
    if result["knn"]:
        knn = result["knn"]
        return {
            f"temperature {temperature:g}": [
                (k, 100 * row[i]) for k, row in zip(knn["ks"], knn["top1"], strict=True)
            ]
            for i, temperature in enumerate(knn["temperatures"])
        }
    return {
        label: [(row["base_lr"], 100 * row[key]) for row in result["rates"] if row[key] is not None]
        for label, key in (
            ("validation top-1", "val_top1"),
            ("validation top-5", "val_top5"),
            ("held-out top-1", "held_out_top1"),
        )
    }


def short_number(value: float) -> str:
    """A number for an axis or a table: three or four digits that matter."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def thin_out(points: Sequence[tuple[float, ...]], most: int = _MAX_POINTS) -> list:
    """At most `most` points: means of neighbouring ones; the last stays as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [*(tuple(map(fmean, zip(*group, strict=True))) for group in groups), points[-1]]


def css_variables(colours: Mapping[str, str]) -> str:
    """Colours as declarations of a style sheet."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def standalone(svg: Markup) -> str:
    """A chart as a file of its own, in the theme of the system."""
    style = (
        f"svg{{{css_variables(LIGHT)}background:var(--card);font-family:sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}"
    )
    return f"{svg[: svg.index('>') + 1]}<style>{style}</style>{svg[svg.index('>') + 1 :]}"


@contextmanager
def _axes(width: int, height: int, rows: Sequence[str] = ()) -> Iterator[Any]:
    """Axes of a figure of so many pixels in the style of the page, with margins for labels.

    With `rows` these names stand at the left, the first one at the top, and a legend fits above.
    """
    import matplotlib
    from matplotlib.figure import Figure

    left, top = (20 + 7.5 * min(40, max(map(len, rows))), 34) if rows else (60, 14)
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72))
        figure.subplots_adjust(left / width, 46 / height, 1 - 14 / width, 1 - top / height)
        axes = figure.subplots()
        if rows:
            texts = [name if len(name) <= 40 else name[:39] + "\u2026" for name in rows]
            axes.set_yticks(range(len(rows)), texts)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
        yield axes


def _svg(figure: Any, title: str, description: str) -> Markup:
    """The figure as an element of a page: no ids twice, no style sheet, colours as variables."""
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
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="chart" {size[0]} role="img" aria-label="{label}">{body}'
    )
