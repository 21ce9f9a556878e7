"""Tables as markdown, and one picture of all paired differences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_json, write_text
from pipeline.report.charts import interval_chart, standalone

DASH = "-"
COMPARISON_HEAD = (
    "comparison", "n", "difference", "95 % bootstrap", "95 % Student t", "p (t)", "p (sign)",
    "p (Holm)", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, tables."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()


def write(
    folder: Path,
    title: str,
    results: Mapping[str, Any],
    sections: Sequence[Section],
    comparisons: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Write results.json, tables.md, and differences.svg where something was compared.

    All tables are marked while `results["is_complete"]` is false. Returns the files.
    """
    write_json(folder / "results.json", results)
    text = to_markdown(title, sections, is_preliminary=not results["is_complete"])
    paths = [folder / "results.json", folder / "tables.md"]
    rows = [(row["name"], row["differences"], row["mean"], row["bootstrap"]) for row in comparisons]
    picture = interval_chart(title, rows, "difference, points (bar: bootstrap 95 %)")
    if picture is not None:
        paths.append(folder / "differences.svg")
        write_text(paths[-1], standalone(picture) + "\n")
        text += "![Paired differences](differences.svg)\n"
    write_text(folder / "tables.md", text)
    return paths


def to_markdown(title: str, sections: Sequence[Section], *, is_preliminary: bool = False) -> str:
    """The tables for people and repositories."""

    def plain(text: str) -> str:
        return re.sub(r"([*_`<>])", r"\\\1", " ".join(text.split()))

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(plain(cell).replace("|", r"\|") for cell in cells) + " |"

    lines = [f"# {plain(title)}", ""]
    for section in sections:
        lines += [f"## {plain(section.title)}{' (PRELIMINARY)' * is_preliminary}", ""]
        for paragraph in section.paragraphs:
            lines += [plain(paragraph), ""]
        for table in section.tables:
            lines += [f"{plain(table.caption)}:", "", row(table.head)]
            lines += ["|" + "---|" * len(table.head), *map(row, table.rows), ""]
    return "\n".join(lines) + "\n"


def overview(
    results: Mapping[str, Any], state: str, table: Table, further: Sequence[str] = ()
) -> Section:
    """The first section: what ran, the rule of the verdicts, the main table, runs that failed."""
    lines = [state, results["rule"], *further]
    if not results["is_complete"]:
        lines.insert(0, "PRELIMINARY: not all runs are finished; nothing here is a result yet.")
    tables = [table]
    if results["failures"]:
        rows = [[str(value or DASH) for value in entry.values()] for entry in results["failures"]]
        tables.append(Table("Failed runs", list(results["failures"][0]), rows))
    return Section("Overview", lines, tables)


def comparison_table(caption: str, comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """A row a comparison."""
    rows = [
        (
            row["name"],
            str(row["n"]),
            DASH if row["mean"] is None else f"{row['mean']:+.2f}",
            *(interval_text(row[key]) for key in ("bootstrap", "student_t")),
            *(p_text(row[key]) for key in ("p", "p_permutation", "p_holm")),
            row["verdict"],
        )
        for row in comparisons
    ]
    return Table(caption, COMPARISON_HEAD, rows)


def mean_text(row: Mapping[str, Any] | None) -> str:
    """`50.3 ± 2.0`; a dash where there is nothing."""
    if row is None or row["mean"] is None:
        return DASH
    return f"{row['mean']:.2f}" + ("" if row["std"] is None else f" ± {row['std']:.2f}")


def interval_text(interval: Sequence[float] | None) -> str:
    """`[+1.20, +2.30]`."""
    return DASH if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def p_text(p: float | None) -> str:
    """Three digits after the point."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
