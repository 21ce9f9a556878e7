"""Charts: text stays text, colours follow the theme, values stand where they should."""

import re
from xml.etree import ElementTree

import pytest

from pipeline.report import charts

SVG = "{http://www.w3.org/2000/svg}"
TEXTS = ("ink", "muted", "good", "bad", "open", "accent")
GROUNDS = ("card", "page", "soft")
NASTY = 'a|b <i>x</i> & "5 %" of $x_1^2$ {y} \\z'


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_colours_can_be_read_in_both_themes(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in TEXTS:
        for ground in GROUNDS:
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
    assert contrast(theme["card"], theme["ink"]) >= 4.5  # the chosen theme
    for name in ("border", *charts.LINES):  # lines and edges of controls
        assert contrast(theme[name], theme["card"]) >= 3, name


def drawn() -> dict[str, str]:
    """A chart of each kind, with names that would be markup or formulas."""
    lines = {NASTY: [(0.0, 1.0, 0.5, 1.5), (1.0, 2.0, 1.0, 3.0)], "b": [(0.0, 3.0)]}
    made = {
        "line": charts.line_chart(NASTY, lines, NASTY),
        "intervals": charts.interval_chart(NASTY, [(NASTY, [1.0, 3.0], 2.0, (1.0, 3.0))], NASTY),
    }
    return {kind: svg for kind, svg in made.items() if svg is not None}


@pytest.mark.parametrize("kind", ["line", "intervals"])
def test_charts_are_whole_and_follow_the_theme(kind):
    svg = drawn()[kind]
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["class"]) == ("img", "chart")
    assert root.attrib["aria-label"].startswith(NASTY)
    assert "var(--" in svg
    assert not re.search(r"#[0-9a-f]{6}\b|<style|<script|<i>", svg)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert NASTY in texts
    assert all("fill: var(--" in text.attrib["style"] for text in root.iter(f"{SVG}text"))
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) <= set(ids)


def test_charts_of_one_page_share_no_ids():
    found = [set(re.findall(r' id="([^"]*)"', svg)) for svg in drawn().values()]
    assert sum(map(len, found)) == len(set().union(*found))


def test_the_same_chart_is_the_same_text():
    assert drawn() == drawn()


def clipped_marks(svg: str) -> list[tuple[float, float]]:
    """Places of data, not of ticks and legends."""
    root = ElementTree.fromstring(svg)
    groups = [g for g in root.iter(f"{SVG}g") if "clip-path" in g.attrib]
    return [
        (float(use.attrib["x"]), float(use.attrib["y"]))
        for group in groups
        for use in group.iter(f"{SVG}use")
    ]


def test_rings_dots_and_bars_stand_in_proportion():
    rows = [("a", [1.0], 2.0, (1.0, 3.0)), ("b", [], None, None), ("c", [4.0], 4.0, None)]
    svg = charts.interval_chart("t", rows, "points")
    assert svg is not None
    (ring_x, ring_y), (dot_x, dot_y), (last_x, last_y), _ = clipped_marks(svg)
    assert last_x - ring_x == pytest.approx(3 * (dot_x - ring_x), rel=1e-3)
    assert ring_y == dot_y < last_y
    assert "a: 2 (1 to 3); b: no value" in svg


def test_lines_end_in_the_words_of_the_label():
    svg = charts.line_chart("Loss", {"a": [(0.0, 4.0), (9.0, 1.5)]}, "epoch")
    assert svg is not None
    assert 'aria-label="Loss. a: from 4 to 1.5"' in svg


def test_what_is_not_finite_is_left_out_and_nothing_is_drawn_from_nothing():
    nan, inf = float("nan"), float("inf")
    assert charts.line_chart("t", {"a": [(0.0, nan)]}, "x") is None
    assert charts.interval_chart("t", [("cat", [], None, None)], "x") is None
    assert charts.interval_chart("t", [], "x") is None
    svg = charts.line_chart("t", {"a": [(0.0, 1.0), (1.0, inf), (2.0, 3.0)]}, "x")
    assert svg is not None
    assert "inf" not in svg


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00001234, "1.234e-05"), (12.3456, "12.35"), (12345.6, "12346")]
)
def test_short_numbers(value, text):
    assert charts.short_number(value) == text
