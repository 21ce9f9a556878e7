"""The report in Chromium: themes, keyboard, sorting, what is forbidden."""

import base64
import json
from pathlib import Path

import pytest

from pipeline.report import charts, report
from tests.pipeline.report.run_fixture import evaluate_elsewhere, make_compare, make_run, make_study

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
PHONE, DESK = 360, 1400
WIDTHS = (400, 1280)  # common ones


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report alone in a folder: it must need nothing else."""
    out = make_run(tmp_path_factory.mktemp("made"))
    evaluate_elsewhere(out, "scenes")
    found = tmp_path_factory.mktemp("alone") / "page.html"
    found.write_text(report.render(out))
    return found


@pytest.mark.parametrize(
    ("width", "dark"), [(PHONE, True), (DESK, False)], ids=["phone, dark", "desk, light"]
)
def test_pages_can_be_used_by_all(browser, page, width, dark):
    url = page.as_uri()
    browser.open(url, dark=dark, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; }), 0")
    assert browser.value(CHECKS) == []
    assert browser.complaints() == []
    assert browser.requests() == [url]


CONTROLS = ("button", "link", "radio", "DisclosureTriangle", "region", "navigation", "img")


def test_everything_that_can_be_used_has_a_name(browser, page):
    """By the names that the browser gives to screen readers."""
    browser.open(page.as_uri(), dark=False, width=DESK)
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = [n for n in nodes if not n["ignored"] and n["role"]["value"] in CONTROLS]
    assert {"button", "radio", "region"} <= {node["role"]["value"] for node in named}
    assert [n for n in named if not n.get("name", {}).get("value", "").strip()] == []


def colours(browser) -> tuple[str, str]:
    style = "getComputedStyle(document.body)"
    return browser.value(f"[{style}.backgroundColor, {style}.color]")


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


LIGHT, DARK = ([rgb(theme["page"]), rgb(theme["ink"])] for theme in (charts.LIGHT, charts.DARK))


def test_the_theme_follows_the_system_until_one_is_chosen(browser, page):
    url = page.as_uri()
    for dark, expected in ((False, LIGHT), (True, DARK)):
        browser.open(url, dark=dark, width=DESK)
        assert colours(browser) == expected
    browser.focus("#theme input:checked")
    for key, expected in (("ArrowRight", LIGHT), ("ArrowRight", DARK), ("ArrowLeft", LIGHT)):
        browser.press(key)
        assert colours(browser) == expected
    browser.open(url, dark=True, width=DESK)  # it was remembered
    assert colours(browser) == LIGHT
    assert browser.value("document.querySelector('#theme input:checked').value") == "light"
    browser.open(url, dark=True, width=DESK, paper=True)
    browser.value("document.documentElement.dataset.theme = 'dark'")
    assert colours(browser)[1] == rgb(charts.LIGHT["ink"])  # paper is white
    browser.open(url, dark=False, width=DESK)
    browser.focus("#theme input:checked")
    browser.press("ArrowLeft")
    browser.open(url, dark=True, width=DESK)
    assert colours(browser) == DARK
    assert browser.complaints() == []


ORDER = (  # text, and where it belongs
    ("< 0.001", 0.000999), ("0.001", 0.001), ("\u22121.2", -1.2), ("-3", -3), ("+7", 7),
    ("9.9 \u00b1 0.1", 9.9), ("12 %", 12), ("50.3 \u00b1 2.0", 50.3), ("1\u2009234", 1234),
    ("4.5e-07", 4.5e-7), ("[+1.20, +2.30]", 1.2), ("+2.0 to +4.0", 2), ("-inf", -1e99),
    ("\u2212.5", -0.5), ("10\u2009000.5", 10000.5),
)  # fmt: skip


def column(browser, number: int, table: int = 0) -> list[str]:
    return browser.value(
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows]"
        f".map(row => row.cells[{number}].textContent)"
    )


def sort_states(browser) -> list[str | None]:
    return browser.value(
        "[...document.querySelector('table').tHead.rows[0].cells]"
        ".map(head => head.getAttribute('aria-sort'))"
    )


@pytest.fixture
def table(browser, tmp_path) -> list[str]:
    """A page with numbers and equal keys in disorder; returns the first column."""
    texts = [text for text, _ in ORDER]
    texts = [*texts[::2], "\u2013", *texts[1::2], "-", "", "nan"]
    cells = [(f"row {n}", text.replace("<", "&lt;"), f"seed {n}") for n, text in enumerate(texts)]
    head = "".join(f'<th scope="col">{text}</th>' for text in ("name", "number", "word"))
    body = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in cells)
    script = (report.HERE / "report.js").read_text()
    path = tmp_path / "table.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><script>{script}</script>'
        f'<div id="told"></div><fieldset id="theme"></fieldset><table class="sortable">'
        f"<caption>c</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    browser.open(path.as_uri(), dark=False, width=DESK)
    return [row[0] for row in cells]


def test_numbers_are_sorted_by_their_values(browser, table):
    ascending = [text for text, _ in sorted(ORDER, key=lambda pair: pair[1])]
    missing = ["\u2013", "-", "", "nan"]
    assert sort_states(browser) == [None] * 3
    browser.focus("thead th:nth-child(2) button")
    browser.press("Enter")
    assert column(browser, 1) == [*ascending, *missing]
    assert sort_states(browser) == [None, "ascending", None]
    assert "Sorted by number, ascending" in browser.value(
        "document.getElementById('told').textContent"
    )
    browser.press(" ")
    assert column(browser, 1) == [*ascending[::-1], *missing]
    assert sort_states(browser) == [None, "descending", None]
    browser.press("Enter")
    assert column(browser, 0) == table
    assert sort_states(browser) == [None] * 3
    assert browser.value("document.activeElement.textContent") == "number"
    browser.value("document.querySelectorAll('thead button')[2].click()")
    assert column(browser, 0) == table, "words with numbers: as people sort them"
    assert browser.complaints() == []


def test_every_table_of_figures_can_be_sorted(browser, page):
    browser.open(page.as_uri(), dark=False, width=DESK)
    heads = browser.value(
        "[...document.querySelectorAll('table.sortable')].filter(t => t.tBodies[0].rows.length > 1)"
        ".map(t => [...t.tHead.rows[0].cells].every(head => head.querySelector('button')))"
    )
    assert len(heads) >= 6
    assert all(heads)


def test_detections_are_on_the_first_screen(browser, page):
    box = "(r => [r.top, r.bottom])(document.querySelector('.overlay').getBoundingClientRect())"
    for width in (PHONE, 1280):  # 900 pixels high
        browser.open(page.as_uri(), dark=False, width=width)
        top, bottom = browser.value(box)
        assert 0 < top < bottom < 900


COUNT = "document.querySelectorAll('.shot:not([hidden]) [data-score]:not(.name, [hidden])').length"


def test_boxes_by_score_and_class(browser, page):
    """Six pictures, two arms, three detections each: 0.91, 0.42, 0.2."""
    browser.open(page.as_uri(), dark=False, width=DESK)
    assert browser.value(COUNT) == 24
    set_to = "{0}.value = '{1}'; {0}.dispatchEvent(new Event('input')); {2}"
    score_box, class_box = "document.querySelector('#score')", "document.querySelector('#class')"
    for score, count in ((0.05, 36), (0.95, 0), (0.5, 12)):
        assert browser.value(set_to.format(score_box, score, COUNT)) == count
        assert browser.value("document.querySelector('#controls output').value") == f"{score:.2f}"
    assert browser.value(set_to.format(class_box, "bird", COUNT)) == 4
    shots = "document.querySelectorAll('.shot:not([hidden])').length"
    assert browser.value(shots) == 3, "those with a bird, labelled or detected"
    browser.focus("#score")
    browser.press("ArrowLeft")
    assert browser.value("document.querySelector('#score').value") == "0.49"
    assert browser.complaints() == []


def test_a_picture_is_enlarged_and_closed_again(browser, page):
    open_ = "document.querySelector('dialog').open"
    for width in WIDTHS:
        browser.open(page.as_uri(), dark=True, width=width)
        browser.focus(".overlay button")
        name = browser.value("document.activeElement.getAttribute('aria-label')")
        assert name == "Enlarge 000000.jpg, Random"
        before = browser.value("document.activeElement.parentElement.clientWidth")
        browser.press("Enter")
        assert browser.value(open_)
        assert browser.value("document.querySelector('dialog .overlay').clientWidth") > 1.8 * before
        assert browser.value(CHECKS) == []
        assert browser.value("document.activeElement.textContent") == "Close"
        browser.press("Enter")
        assert not browser.value(open_)
        assert browser.value("document.activeElement.getAttribute('aria-label')") == name
    assert browser.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_drawn_labels_stay_on_their_plates_and_can_be_read(browser, page, width):
    browser.open(page.as_uri(), dark=False, width=width)
    sizes = browser.value("""(() => {
      document.querySelectorAll("[data-score]").forEach((box) => box.removeAttribute("hidden"));
      return [...document.querySelectorAll(".overlay .small text")].map((text) => {
        const [a, b] = [text, text.previousElementSibling].map((e) => e.getBoundingClientRect());
        const letters = parseFloat(text.getAttribute("font-size")) * text.getScreenCTM().a;
        return [a.left - b.left, b.right - a.right, b.width, letters];
      });
    })()""")
    assert len(sizes) == 36 + 8
    for left, right, wide, letters in sizes:
        assert min(left, right) > -0.5
        assert wide > 20
        assert letters >= 9  # pixels


def test_the_focus_is_seen_wherever_the_keyboard_leads(browser, page):
    browser.open(page.as_uri(), dark=False, width=DESK)
    focused = """(() => {
      const a = document.activeElement;
      const drawn = a.matches("#theme input") ? a.nextElementSibling : a;
      const style = getComputedStyle(drawn);
      const name = a.tagName + (a.className || a.textContent);
      return [name, style.outlineStyle, parseFloat(style.outlineWidth)];
    })()"""
    seen = []
    for _ in range(500):
        browser.press("Tab")
        name, style, width = browser.value(focused)
        if name.startswith("BODY"):
            break
        assert (style, width >= 2) == ("solid", True), name
        seen.append(name)
    assert seen[0] == "Askip"
    stops = browser.value(
        '[...document.querySelectorAll(\'a[href], button, summary, select, #score, [tabindex="0"]'
        "')].filter(element => element.checkVisibility()).length"
    )
    assert len(seen) == stops + 1  # and one radio of the group


def test_what_comes_from_outside_is_refused(browser, page):
    """Even if something slipped into the page: no request leaves, no other script runs."""
    browser.open(page.as_uri(), dark=False, width=DESK)
    program = """new Promise(done => {
      const refused = [];
      addEventListener("securitypolicyviolation", event => {
        refused.push(event.effectiveDirective);
        if (refused.length === 5) done(refused.sort());
      });
      const add = (tag, facts) =>
        document.body.append(Object.assign(document.createElement(tag), facts));
      add("img", { src: "http://127.0.0.1:9/a.png" });
      add("script", { textContent: "window.slipped = true" });
      add("script", { src: "http://127.0.0.1:9/a.js" });
      add("link", { rel: "stylesheet", href: "http://127.0.0.1:9/a.css" });
      fetch("http://127.0.0.1:9/").catch(() => 0);
    })"""
    assert browser.value(program) == [
        "connect-src", "img-src", "script-src-elem", "script-src-elem", "style-src-elem",
    ]  # fmt: skip
    assert browser.value("window.slipped") is None


def test_without_scripts_all_content_is_there(browser, page):
    url = page.as_uri()
    browser.open(url, dark=False, width=DESK)
    words = "document.querySelector('main').textContent.replace(/\\s+/g, ' ')"
    note = " Buttons in the column headings sort the rows."
    with_scripts = browser.value(words).replace(note, "")
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(url, dark=True, width=DESK)
        assert browser.value("document.querySelectorAll('th button').length") == 0
        assert browser.value(words).split() == with_scripts.split()
        assert colours(browser) == DARK
        assert browser.value("getComputedStyle(document.getElementById('theme')).display") == "none"
        unseen = (
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('details, form, svg')"
        )
        hidden = browser.value(f"{unseen} && !e.checkVisibility()).map(e => e.outerHTML)")
        assert hidden == []
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_has_everything_and_no_controls(browser, page):
    browser.open(page.as_uri(), dark=True, width=720, paper=True)
    shown = "e => getComputedStyle(e).display"
    for selector in (".contents", "#theme", ".skip"):
        assert browser.value(f"({shown})(document.querySelector('{selector}'))") == "none"
    closed = "document.querySelectorAll('details:not([open])').length"
    before = browser.value(closed)
    assert before > 0
    browser.value("dispatchEvent(new Event('beforeprint'))")
    assert browser.value(closed) == 0
    wide = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.clientWidth + 1"
    wide += " || t.getBoundingClientRect().right > innerWidth).map(t => t.caption.textContent)"
    assert browser.value(wide) == []
    assert browser.value("getComputedStyle(document.body).color") == rgb(charts.LIGHT["ink"])
    browser.value("dispatchEvent(new Event('afterprint'))")
    assert browser.value(closed) == before
    paper = browser.send("Page.printToPDF", printBackground=False)["data"]
    assert base64.b64decode(paper).startswith(b"%PDF")


def test_the_skip_link_leads_to_the_content(browser, page):
    browser.open(page.as_uri(), dark=False, width=PHONE)
    browser.press("Tab")
    box = "(r => [r.x >= 0, r.y >= 0])(document.activeElement.getBoundingClientRect())"
    assert browser.value(box) == [True, True]
    browser.press("Enter")
    assert browser.value("document.activeElement.id") == "main"
    names = json.loads(
        browser.value(
            "JSON.stringify([...document.querySelectorAll('.contents a')].map(a => a.hash))"
        )
    )
    assert names == [
        f"#{s}"
        for s in browser.value("[...document.querySelectorAll('main > section')].map(s => s.id)")
    ]


def test_the_page_of_a_study_a_comparison_and_an_empty_run(browser, tmp_path):
    made = (make_study(tmp_path / "study"), make_compare(tmp_path / "compare"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/experiment.json").write_text('{"format": "fa-stage-2", "plan": ["data"]}')
    for folder in (*made, tmp_path / "empty"):
        assert report.main([str(folder)]) == 0
        for width, dark in ((PHONE, False), (DESK, True)):
            browser.open((folder / "report.html").as_uri(), dark=dark, width=width)
            assert browser.value(CHECKS) == []
            assert browser.complaints() == []
