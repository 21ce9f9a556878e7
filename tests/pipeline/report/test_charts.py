"""Charts: text stays text, colours follow the theme, values stand where they should."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from pipeline.report import charts
from pipeline.report.charts import Series

SVG = "{http://www.w3.org/2000/svg}"
TEXTS = ("ink", "muted", "good", "bad", "open", "pretrained")
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
    for name in ("random", "border", *charts.RUNS):  # lines and edges of controls
        assert contrast(theme[name], theme["card"]) >= 3, name


def test_lines_differ_in_colour_or_dashes():
    lines = [charts.of_run("", [], number) for number in range(25)]
    assert len({(line.tone, line.dash) for line in lines}) == 24
    assert all(a.dash != b.dash for a, b in itertools.pairwise(lines))


def drawn() -> dict[str, str]:
    """A chart of each kind, with names that would be markup or formulas."""
    band = [(0.0, 0.5, 1.5), (1.0, 1.0, 3.0)]
    made = {
        "line": charts.line_chart(
            NASTY,
            [Series(NASTY, [(0.0, 1.0), (1.0, 2.0)], band=band), Series("b", [(0.0, 3.0)])],
            NASTY,
        ),
        "slope": charts.slope_chart(NASTY, [(0, 1.0, 2.0), (1, 2.0, 4.0)]),
        "intervals": charts.interval_chart(NASTY, [(NASTY, [1.0, 3.0], 2.0, (1.0, 3.0))], NASTY),
        "bars": charts.stacked_bars(NASTY, [(NASTY, {"one": 1.0, "two": 3.0})], NASTY),
    }
    return {kind: svg for kind, svg in made.items() if svg is not None}


@pytest.mark.parametrize("kind", ["line", "slope", "intervals", "bars"])
def test_charts_are_whole_and_follow_the_theme(kind):
    svg = drawn()[kind]
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["class"]) == ("img", "chart")
    assert root.attrib["aria-label"].startswith(NASTY)
    assert "var(--" in svg
    assert not re.search(r"#[0-9a-f]{6}\b|<style|<script|<i>", svg)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert texts
    assert all("fill: var(--" in text.attrib["style"] for text in root.iter(f"{SVG}text"))
    if kind != "slope":  # it has no names
        assert NASTY in texts
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    assert used <= set(ids)


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


def test_slopes_lead_from_random_to_pretrained():
    svg = charts.slope_chart("t", [(0, 10.0, 30.0), (1, 20.0, 30.0)])
    assert svg is not None
    first, after, second, same = clipped_marks(svg)
    assert first[0] == second[0] < after[0] == same[0]
    assert after[1] == same[1] < second[1] < first[1]  # upwards
    assert first[1] - after[1] == pytest.approx(2 * (second[1] - after[1]), rel=1e-3)
    assert "seed 0: 10.0 to 30.0" in svg


def test_rings_dots_and_bars_stand_in_proportion():
    rows = [("a", [1.0], 2.0, (1.0, 3.0)), ("b", [], None, None), ("c", [4.0], None, None)]
    svg = charts.interval_chart("t", rows, "points", ("random", "pretrained"))
    assert svg is not None
    (ring_x, ring_y), (dot_x, dot_y), (last_x, last_y) = clipped_marks(svg)
    assert last_x - ring_x == pytest.approx(3 * (dot_x - ring_x), rel=1e-3)
    assert ring_y == dot_y < last_y
    assert "a: 2 (1 to 3); b: no value" in svg
    assert ">random<" in svg


def test_lines_end_in_the_words_of_the_label():
    svg = charts.line_chart("Loss", [Series("a", [(0.0, 4.0), (9.0, 1.5)])], "epoch")
    assert svg is not None
    assert 'aria-label="Loss. a: from 4 to 1.5"' in svg


def test_what_is_not_finite_is_left_out_and_nothing_is_drawn_from_nothing():
    nan, inf = float("nan"), float("inf")
    assert charts.line_chart("t", [Series("a", [(0.0, nan)])], "x") is None
    assert charts.slope_chart("t", []) is None
    assert charts.interval_chart("t", [("cat", [], None, None)], "x") is None
    assert charts.interval_chart("t", [], "x") is None
    assert charts.stacked_bars("t", [], "x") is None
    assert charts.stacked_bars("t", [("a", {"one": 0.0})], "x") is None
    svg = charts.line_chart("t", [Series("a", [(0.0, 1.0), (1.0, inf), (2.0, 3.0)])], "x")
    assert svg is not None
    assert "inf" not in svg


def test_long_curves_are_thinned_out_but_keep_their_end():
    points = [(float(i), float(i % 7)) for i in range(10_001)]
    thin = charts.thin_out(points, 300)
    assert len(thin) <= 300
    assert thin[-1] == points[-1]
    assert thin[0] == (pytest.approx(16.5), pytest.approx(3, abs=0.1))  # 34 points


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00001234, "1.2e-5"), (12.3456, "12.35"), (12345.6, "12\u2009346"), (-2, "-2")],
)
def test_short_numbers(value, text):
    assert charts.short_number(value) == text


# The picture of a linear evaluation


def linear(**values) -> dict:
    rates = [
        {"base_lr": 10.0**i, "val_top1": 0.3 + 0.1 * i, "val_top5": None,
         "held_out_top1": 0.35 - 0.05 * i}
        for i in range(-2, 3)
    ]  # fmt: skip
    return {
        "checkpoint": {"name": "a<b>.pth"},
        "knn": None,
        "rates": rates,
        "selection": {"by": "held-out part of the training set", "n": 10},
        "chosen_base_lr": 0.01,
    } | values


def test_every_accuracy_over_its_rate():
    lines = charts.linear_lines(linear())
    assert lines["validation top-1"] == [
        (10.0**i, pytest.approx(30 + 10 * i)) for i in range(-2, 3)
    ]
    assert lines["held-out top-1"][0] == (0.01, pytest.approx(45))
    assert lines["validation top-5"] == []
    svg = charts.linear_chart(linear())
    assert svg is not None
    places = clipped_marks(svg)
    assert len(places) == 10
    steps = [b[0] - a[0] for a, b in itertools.pairwise(places[:5])]
    assert steps == pytest.approx([steps[0]] * 4, rel=1e-3)  # rates by their logarithm


def test_the_chosen_rate_is_marked():
    assert ">chosen<" in str(charts.linear_chart(linear()))
    assert ">chosen<" not in str(charts.linear_chart(linear(selection=None)))


def test_every_k_with_every_temperature():
    knn = {"ks": [1, 20], "temperatures": [0.07, 1.0], "top1": [[0.5, 0.4], [0.7, 0.2]]}
    lines = charts.linear_lines(linear(knn=knn))
    assert lines == {
        "temperature 0.07": [(1, 50), (20, 70)],
        "temperature 1": [(1, 40), (20, 20)],
    }


def test_a_file_has_the_colours_of_both_themes():
    svg = charts.linear_chart(linear())
    assert svg is not None
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"].startswith("Top-1 and top-5 in percent, a<b>.pth.")
    style = root.findtext(f"{SVG}style", "")
    assert f"--ink:{charts.LIGHT['ink']}" in style
    assert f"--ink:{charts.DARK['ink']}" in style.partition("prefers-color-scheme:dark")[2]
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert used <= set(charts.COLOURS)
    assert charts.linear_chart(linear(rates=[])) is None
