"""Tables and the picture of a study; whatever a name holds, they stay whole."""

import re

import pytest

from pipeline.grid.documents import Section, Table, comparison_table, to_markdown, write

NASTY = "a|b <i>x</i> & 5 % of $x_1^2$ {y} \\z #1 ~"
SECTION = Section(
    NASTY,
    [NASTY],
    [Table(NASTY, ("name", "mean"), [(NASTY, "1.00 ± 0.10"), ("b", "-")])],
)
COMPARISON = {
    "name": NASTY, "n": 3, "differences": [1.0, 2.0, 3.0], "mean": 2.0, "bootstrap": [1.2, 2.8],
    "student_t": None, "p": 0.0004, "p_permutation": 0.25, "p_holm": None, "verdict": "better",
}  # fmt: skip


def test_markdown_keeps_its_columns() -> None:
    text = to_markdown("t", [SECTION])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert r"\<i\>" in text


def test_what_is_no_result_yet_is_marked() -> None:
    assert "## s (PRELIMINARY)" in to_markdown("t", [Section("s")], is_preliminary=True)


def test_the_picture_shows_the_differences(tmp_path) -> None:
    paths = write(tmp_path, "t", {"is_complete": True}, [SECTION], [COMPARISON])
    assert [path.name for path in paths] == ["results.json", "tables.md", "differences.svg"]
    assert paths[1].read_text().endswith("![Paired differences](differences.svg)\n")
    assert "2 (1.2 to 2.8)" in paths[2].read_text()


@pytest.mark.parametrize("values", [None, {"differences": [], "mean": None, "bootstrap": None}])
def test_without_differences_there_is_no_picture(tmp_path, values) -> None:
    compared = [] if values is None else [COMPARISON | values]
    paths = write(tmp_path, "t", {"is_complete": True}, [SECTION], compared)
    assert [path.name for path in paths] == ["results.json", "tables.md"]
    assert "svg" not in paths[1].read_text()


def test_cells_of_a_comparison() -> None:
    (row,) = comparison_table("c", [COMPARISON]).rows
    assert row[1:] == (
        "3", "+2.00", "[+1.20, +2.80]", "-", "< 0.001", "0.250", "-", "better",
    )  # fmt: skip
