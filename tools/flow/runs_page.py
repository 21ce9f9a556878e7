"""One page that compares runs: figures, config keys that differ, curves; it needs only itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tools.flow.charts import Series, line_chart, short_number
from tools.flow.runs import CURVES, FIGURES, RunInfo

HERE = Path(__file__).resolve().parent
COLOURS = (
    "#1667c7", "#c2410c", "#137a43", "#8b3fb8", "#a16207", "#0e7490", "#be185d", "#5b6470",
)  # fmt: skip
TITLES = {
    "loss": "Loss", "knn_top1": "kNN top-1", "online_top1": "Online linear probe, top-1",
    "lr": "Learning rate", "images_per_second": "Images per second",
    "data_wait_share": "Share of the time spent waiting for data",
}  # fmt: skip


def names(found: Sequence[RunInfo]) -> list[str]:
    """The last part of each folder, or the whole where two would be called the same."""
    short = [run.folder.resolve().name for run in found]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in found]


def render(found: Sequence[RunInfo], differing: dict[str, list[Any]]) -> str:
    """Return the page."""
    labels = names(found)
    heads = ["", *labels]
    figures = [["state", *(run.state for run in found)]]
    figures += [[key, *(_number(run.figures[key]) for run in found)] for key in FIGURES]
    figures.append(["commit", *((run.commit or "")[:10] for run in found)])
    config = [[key, *map(str, values)] for key, values in differing.items()]
    problems = [
        f"{label}: {problem}"
        for run, label in zip(found, labels, strict=True)
        for problem in run.problems
    ]
    body = [
        Markup("<section><h2>Figures</h2>{}{}</section>").format(
            _table(heads, figures), _list(problems)
        ),
        Markup("<section><h2>Config keys that differ</h2>{}</section>").format(
            _table(heads, config) if config else Markup("<p>None.</p>")
        ),
        Markup('<section><h2>Curves over epochs</h2>{}<div class="grid">{}</div></section>').format(
            _legend(labels), _charts(found, labels)
        ),
    ]
    style = (HERE / "report.css").read_text(encoding="utf-8") + _colours(len(found))
    script = (HERE / "report.js").read_text(encoding="utf-8")
    return str(
        Markup(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<title>Runs compared</title><link rel="icon" href="data:,"><style>{}</style></head>'
            '<body><header class="top"><h1>Runs compared</h1></header><main>{}</main>'
            "<script>{}</script></body></html>\n"
        ).format(Markup(style), Markup("").join(body), Markup(script))
    )


def _number(value: float | None) -> str:
    return "\u2013" if value is None else short_number(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    head = Markup("").join(Markup("<th>{}</th>").format(text) for text in heads)
    lines = Markup("").join(
        Markup("<tr><th>{}</th>{}</tr>").format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(text) for text in row[1:])
        )
        for row in rows
    )
    return Markup(
        '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, lines)


def _list(lines: Sequence[str]) -> Markup:
    items = Markup("").join(Markup("<li>{}</li>").format(line) for line in lines)
    return Markup("<ul>{}</ul>").format(items) if lines else Markup("")


def _charts(found: Sequence[RunInfo], labels: Sequence[str]) -> Markup:
    parts = []
    for key in CURVES:
        series = [
            Series(label, run.curves.get(key, []), f"run-{number % len(COLOURS)}")
            for number, (run, label) in enumerate(zip(found, labels, strict=True))
        ]
        drawn = line_chart(TITLES[key], series, "epoch")
        if drawn is not None:
            figure = '<figure><h3>{}</h3><div class="chartbox">{}</div></figure>'
            parts.append(Markup(figure).format(TITLES[key], drawn))
    return Markup("").join(parts)


def _legend(labels: Sequence[str]) -> Markup:
    items = Markup("").join(
        Markup('<li class="run-{}">{}</li>').format(number % len(COLOURS), label)
        for number, label in enumerate(labels)
    )
    return Markup('<ul class="legend">{}</ul>').format(items)


def _colours(num_runs: int) -> str:
    rules = ["main { overflow-wrap: anywhere; }"]
    for number, colour in enumerate(COLOURS[:num_runs]):
        rules.append(f".chart .line.run-{number} {{ stroke: {colour}; }}")
        rules.append(f".chart .dot.run-{number} {{ fill: {colour}; }}")
        rules.append(f".legend .run-{number}::before {{ background: {colour}; }}")
    return "\n".join(rules)
