"""Tables as markdown, and one picture of all paired differences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_text
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


def write(out: Path, results: Mapping[str, Any], further: Sequence[Section] = ()) -> None:
    """Write tables.md, and differences.svg where something was compared.

    Args:
        out: The run's folder.
        results: With the keys of `results.assemble` for a run that compares.
        further: Sections at the end.
    """
    unfinished = [name for name in results["unfinished"] if name != "report"]
    lines = [f"{len(results['stages'])} stages are finished, {len(unfinished)} are not."]
    if unfinished:
        lines.insert(0, "PRELIMINARY: not all is finished; nothing here is a result yet.")
    if len(results["commits"]) > 1:
        lines.append(f"MIXED: stages ran at several commits: {', '.join(results['commits'])}.")
    overview = []
    claims = [(t["claim"], t["metric"], t["verdict"]) for t in results["tables"] if t["claim"]]
    if claims:
        overview.append(Table("Claims", ("claim", "metric", "verdict"), claims))
    if results["failures"]:
        rows = [[str(value or DASH) for value in entry.values()] for entry in results["failures"]]
        overview.append(Table("Failed stages", ("stage", "label", "reason"), rows))
    sections = [Section("Overview", [*lines, results["rule"]], overview)]
    drawn = []
    for table in results["tables"]:
        if not table["title"]:  # all variants: some have no such figure, as random no kNN
            table = {**table, **{key: [row for row in table[key] if row["n"]]
                                 for key in ("rows", "comparisons")}}  # fmt: skip
        paragraphs = []
        if table["claim"]:
            paragraphs.append(f"Claim: {table['claim']}. Verdict: {table['verdict']}.")
        paragraphs += [f"Left out: {row} ({why})." for row, why in table["left_out"].items()]
        rows = [(row["label"], str(row["n"]), mean_text(row)) for row in table["rows"]]
        parts = [Table("Percent", ("", "n", "mean ± std"), rows)]
        if table["comparisons"]:
            parts.append(comparison_table("Paired differences in points", table["comparisons"]))
        title = f"{table['title']}, {table['metric']}" if table["title"] else table["metric"]
        sections.append(Section(title, paragraphs, parts))
        if "coco" not in table["metric"] and "by class" not in table["metric"]:
            name = f"{table['name']}, {table['metric']}"
            drawn += [(f"{name}: {row['name']}", row["differences"], row["mean"], row["bootstrap"])
                      for row in table["comparisons"]]  # fmt: skip
    title = f"Experiment {results['name']}"
    text = to_markdown(title, [*sections, *further], is_preliminary=bool(unfinished))
    picture = interval_chart(title, drawn, "difference, points (bar: bootstrap 95 %)")
    if picture is not None:
        write_text(out / "differences.svg", standalone(picture) + "\n")
        text += "![Paired differences](differences.svg)\n"
    write_text(out / "tables.md", text)


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
