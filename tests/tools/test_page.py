"""The shell of all pages: colours that can be read, what a browser may do, contents."""

import base64
import hashlib
import re

import pytest
from markupsafe import Markup

from tools.flow import page

TEXTS = ("ink", "muted", "good", "bad", "open", "pretrained")
GROUNDS = ("card", "page", "soft")
DRAWN = ("random", "border", *(f"run-{number}" for number in range(page.NUM_COLOURS)))
THEMES = {"light": page.LIGHT, "dark": page.DARK}


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


def test_contrast_is_that_of_the_definition():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_in_both_themes(theme):
    colours = THEMES[theme]
    for text in TEXTS:
        for ground in GROUNDS:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["card"], colours["ink"]) >= 4.5  # the chosen theme, tips
    for name in DRAWN:  # lines and edges of controls
        assert contrast(colours[name], colours["card"]) >= 3, name


def test_lines_of_runs_differ_in_colour_or_dashes():
    tones = {page.tone(index) for index in range(page.NUM_COLOURS * page.NUM_DASHES)}
    assert len(tones) == 32
    assert page.tone(0) == page.tone(32)
    assert page.tone(0).split()[2] != page.tone(1).split()[2]  # neighbours: not by colour alone


def test_every_colour_that_is_used_is_defined():
    assert page.LIGHT.keys() == page.DARK.keys()
    style = (page.HERE / "report.css").read_text()
    used = set(re.findall(r"var\(--([\w-]+)\)", style)) - {"n", "line"}
    assert used <= page.LIGHT.keys()
    assert not re.search(r"url\(|@import|@font-face", style)


def rendered(main: str = "") -> str:
    return page.render(page.Page("t <i>", Markup("<h1>t</h1>"), Markup(main)))


def test_a_browser_may_run_our_scripts_and_nothing_else():
    text = rendered()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert (rules.pop("img-src"), rules.pop("style-src")) == ("data:", "'unsafe-inline'")
    allowed = rules.pop("script-src").split()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed
    assert all(word.startswith("'sha256-") for word in allowed)
    assert rules == {"base-uri": "'none'", "form-action": "'none'"}
    assert text.index("Content-Security-Policy") < text.index("<script>")
    assert "<title>t &lt;i&gt;</title>" in text


def test_contents_are_the_sections():
    first = '<section id="a"><h2>A &amp; <small>b</small></h2><h3>no</h3></section>'
    second = '<section id="c"><h2>C</h2><section><h2>unnamed</h2></section></section>'
    assert page.contents(first + second) == [("a", "A &"), ("c", "C")]
    assert '<a href="#c">C</a>' in rendered(first + second)
    assert "<nav" not in rendered(first)


@pytest.mark.parametrize(
    ("value", "number", "signed"),
    [(1.25, "1.2", "+1.2"), (-3, "-3.0", "\u22123.0"), (None, "\u2013", "\u2013"),
     (float("nan"), "\u2013", "\u2013"), (True, "\u2013", "\u2013")],
)  # fmt: skip
def test_numbers_of_tables(value, number, signed):
    assert page.number(value) == number
    assert page.signed(value) == signed
