"""Tables and charts as one document in markdown, HTML and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from tools.flow.files import write_text

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #767676; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --faint: #9a9a9a; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--faint);
  font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A standalone SVG; `name` becomes plots/NAME.svg."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, tables, charts."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


def write_all(folder: Path, stem: str, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write STEM.md, STEM.html, STEM.tex and plots/*.svg; returns the first three."""
    for section in sections:
        for chart in section.charts:
            write_text(folder / "plots" / f"{chart.name}.svg", str(chart.svg) + "\n")
    paths = [folder / f"{stem}.{suffix}" for suffix in ("md", "html", "tex")]
    for path, render in zip(paths, (to_markdown, to_html, to_latex), strict=True):
        write_text(path, render(title, sections))
    return paths


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The document for people and repositories."""
    lines = [f"# {_markdown(title)}", ""]
    for section in sections:
        lines += [f"## {_markdown(section.title)}", ""]
        for paragraph in section.paragraphs:
            lines += [_markdown(paragraph), ""]
        for table in section.tables:
            lines += [f"{_markdown(table.caption)}:", ""]
            lines.append(_markdown_row(table.head))
            lines.append("|" + "---|" * len(table.head))
            lines += [_markdown_row(row) for row in table.rows]
            lines.append("")
        for chart in section.charts:
            lines += [f"![{_markdown(section.title)}](plots/{chart.name}.svg)", ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(cell).replace("|", r"\|") for cell in cells) + " |"


def _markdown(text: str) -> str:
    return re.sub(r"([*_`<>])", r"\\\1", " ".join(text.split()))


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page without anything from outside, light and dark."""
    parts = [
        Markup("<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"),
        Markup("<meta name='viewport' content='width=device-width, initial-scale=1'>"),
        Markup("<title>{}</title><style>{}</style></head><body><main>").format(
            title, Markup(_STYLE)
        ),
        Markup("<h1>{}</h1>").format(title),
    ]
    for section in sections:
        parts.append(Markup("\n<section><h2>{}</h2>").format(section.title))
        parts += [Markup("<p>{}</p>").format(text) for text in section.paragraphs]
        parts += [_html_table(table) for table in section.tables]
        parts += [Markup("<figure>{}</figure>").format(chart.svg) for chart in section.charts]
        parts.append(Markup("</section>"))
    return str(Markup("").join([*parts, Markup("\n</main></body></html>\n")]))


def _html_table(table: Table) -> Markup:
    head = Markup("").join(Markup("<th scope='col'>{}</th>").format(cell) for cell in table.head)
    rows = [
        Markup("<tr><th scope='row'>{}</th>{}</tr>").format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in table.rows
    ]
    return Markup(
        "\n<div class='scroll' tabindex='0'><table><caption>{}</caption>"
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(table.caption, head, Markup("\n").join(rows))


def to_latex(title: str, sections: Sequence[Section]) -> str:
    """Tables for a paper; they need no package."""
    lines = [f"% {' '.join(title.split())}"]
    for section in sections:
        for table in section.tables:
            caption = f"{section.title}: {table.caption}"
            lines += [
                r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\hline",
                " & ".join(map(latex, table.head)) + r" \\", r"\hline",
                *(" & ".join(map(latex, row)) + r" \\" for row in table.rows),
                r"\hline", r"\end{tabular}", r"\end{table}", "",
            ]  # fmt: skip
    return "\n".join(lines)


def latex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def plain(text: str) -> str:
    """Text for SVG."""
    return str(escape(text))
