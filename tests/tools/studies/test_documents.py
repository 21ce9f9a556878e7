"""Tables and charts in three forms; whatever a name holds, the form stays whole."""

import re
import xml.etree.ElementTree as ET

import pytest
from markupsafe import Markup, escape

from tools.studies.documents import Chart, Section, Table, to_html, to_latex, to_markdown, write_all
from tools.studies.plots import Line, interval_chart

NASTY = "a|b <i>x</i> & 5 % of $x_1^2$ {y} \\z #1 ~"
SECTION = Section(
    NASTY,
    [NASTY],
    [Table(NASTY, ("name", "mean"), [(NASTY, "1.00 ± 0.10"), ("b", "-")])],
)


def test_markdown_keeps_its_columns() -> None:
    text = to_markdown("t", [SECTION])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert r"\<i\>" in text


def test_html_is_well_formed_and_escaped() -> None:
    page = to_html(NASTY, [SECTION])
    body = re.search(r"<main[^>]*>(.*)</main>", page, re.DOTALL)[1]
    tree = ET.fromstring(f"<main>{body}</main>")
    assert tree.findtext("section/h2") == NASTY
    assert f"<h1>{escape(NASTY)}</h1>" in page
    cells = [cell.text for cell in tree.iter() if cell.tag in ("th", "td")]
    assert cells == ["name", "mean", NASTY, "1.00 ± 0.10", "b", "-"]
    assert "://" not in page  # nothing from outside


def test_latex_escapes_every_special_character() -> None:
    text = to_latex("t", [SECTION])
    body = re.search(r"\\hline\n(.*)\\hline\n\\end", text, re.DOTALL)[1]
    plain = re.sub(
        r"\\textbackslash\{\}|\\textascii\w+\{\}|\$\\?[\w<>-]+\$|\\[{}$&#_%\\]", "", body
    )
    assert not re.search(r"[{}$#_%^~]", plain), plain
    assert plain.count("&") == 3  # one column separator in the head and in each row
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_all_files_are_written(tmp_path) -> None:
    chart = Chart("c", Markup("<svg/>"))
    paths = write_all(tmp_path, "tables", "t", [Section("s", charts=[chart])])
    assert [path.name for path in paths] == ["tables.md", "tables.html", "tables.tex"]
    assert "](plots/c.svg)" in paths[0].read_text()
    assert (tmp_path / "plots/c.svg").read_text() == "<svg/>\n"


def test_places_in_a_chart_are_in_proportion() -> None:
    lines = [Line("a", [1.0], 2.0, (1.0, 3.0)), Line("<b>", [], None, None)]
    svg = interval_chart("t", lines, "points", zero=True)
    assert svg is not None
    tree = ET.fromstring(str(svg))
    space = "{http://www.w3.org/2000/svg}"
    ring, dot = (float(str(c.get("cx"))) for c in tree.iter(f"{space}circle"))
    bar = next(str(p.get("d")) for p in tree.iter(f"{space}path") if p.get("class") == "b")
    low, high = (float(x) for x in re.findall(r"[MH]([\d.]+)", bar))
    zero = next(str(p.get("d")) for p in tree.iter(f"{space}path") if p.get("class") == "z")
    origin = float(re.match(r"M([\d.]+)", zero)[1])
    assert (ring, dot) == (pytest.approx(low), pytest.approx((low + high) / 2, abs=0.11))
    assert (high - origin) / (low - origin) == pytest.approx(3, rel=0.01)
    assert "<b>: no value" in str(tree.get("aria-label"))


def test_nothing_to_draw() -> None:
    assert interval_chart("t", [Line("a", [float("nan")], None, None)], "x", zero=False) is None
