"""Tables and charts as one document in markdown, HTML and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from common.files import write_text
from tools.flow import page

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip
_SVG_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
_VERDICTS = ("better", "worse", "inconclusive", "shown", "contradicted")
_NUMBER = re.compile(
    r"(-|\u2013|[<>]?\s*\[?[+\u2212-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*%?(\s*(±|,).*)?\]?)?",
    re.IGNORECASE,
)


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
    """A heading, paragraphs, tables, charts; `is_preliminary` marks what is no result yet."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    is_preliminary: bool = False


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
        mark = " (PRELIMINARY)" * section.is_preliminary
        lines += [f"## {_markdown(section.title)}{mark}", ""]
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
    """One page without anything from outside; its tables can be sorted."""
    header = Markup("<h1>{}</h1>").format(title)
    return page.render(page.Page(title, header, sections_html(sections)))


def sections_html(
    sections: Sequence[Section], prefix: str = "part", *, is_nested: bool = False
) -> Markup:
    """The sections as a part of a page.

    Args:
        sections: What is shown.
        prefix: Their ids are PREFIX-1, PREFIX-2 ..
        is_nested: Whether they stand within another section; then all tables and plots but those
            of the first are folded away.
    """
    parts = [
        {
            "id": f"{prefix}-{number}",
            "title": section.title,
            "is_preliminary": section.is_preliminary,
            "paragraphs": section.paragraphs,
            "tables": [_table_values(table, section.title) for table in section.tables],
            "charts": [inline_svg(chart.svg) for chart in section.charts],
        }
        for number, section in enumerate(sections, 1)
    ]
    values = {"parts": parts, "is_nested": is_nested, "verdicts": _VERDICTS}
    return page.fragment("document.html.j2", values)


def inline_svg(svg: Markup) -> Markup:
    """A standalone SVG as a part of a page, whose style sheet it then follows."""
    return Markup(_SVG_STYLE.sub("", str(svg)).replace("<svg ", '<svg class="plot" ', 1))


def _table_values(table: Table, title: str) -> dict[str, Any]:
    """A table for the template, and which of its columns hold words rather than numbers."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.head)
    return {
        "label": f"{title}: {table.caption}",
        "caption": table.caption,
        "head": table.head,
        "rows": table.rows,
        "is_words": [not all(_NUMBER.fullmatch(cell.strip()) for cell in c) for c in columns],
    }


def to_latex(title: str, sections: Sequence[Section]) -> str:
    """Tables for a paper; they need no package."""
    lines = [f"% {' '.join(title.split())}"]
    for section in sections:
        for table in section.tables:
            mark = "PRELIMINARY. " * section.is_preliminary
            caption = f"{mark}{section.title}: {table.caption}"
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
