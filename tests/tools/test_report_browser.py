import shutil
from pathlib import Path

import pytest

from tests.tools.run_fixture import evaluate_elsewhere, make_run
from tools.flow import report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report alone in a folder: it must need nothing else."""
    out = make_run(tmp_path_factory.mktemp("run"))
    evaluate_elsewhere(out, "scenes", tmp_path_factory.mktemp("scenes"))
    assert report.main([str(out)]) == 0
    alone = tmp_path_factory.mktemp("alone") / "report.html"
    shutil.copy(out / "report.html", alone)
    return alone


def test_pictures_are_whole_and_described(browser, page):
    browser.open(page.as_uri(), dark=False, width=1280)
    pictures = browser.value(
        "Promise.all([...document.images].map(i => i.decode().catch(() => 0)"
        ".then(() => [i.naturalWidth, i.alt.length])))"
    )
    assert len(pictures) > 50
    assert all(natural_width > 0 and alt > 0 for natural_width, alt in pictures)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_charts_answer_to_pointer_and_keyboard(browser, page):
    browser.open(page.as_uri(), dark=False, width=1280)
    browser.value("document.querySelector('.chartbox').scrollIntoView({behavior: 'instant'}), 0")
    box = browser.value(
        "(r => [r.x, r.y, r.width, r.height])"
        "(document.querySelector('.chartbox').getBoundingClientRect())"
    )
    at = {"x": box[0] + box[2] * 0.9, "y": box[1] + box[3] / 2}
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
    tip = "document.querySelector('.chartbox .tip')"
    assert browser.value(f"{tip}.hidden") is False
    assert "at 400" in browser.value(f"{tip}.textContent")
    browser.value("document.querySelectorAll('.chartbox')[1].focus(), 0")
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    browser.send("Input.dispatchKeyEvent", type="keyDown", **key)
    second = "document.querySelectorAll('.chartbox')[1].querySelector('.tip')"
    assert "seed 0" in browser.value(f"{second}.textContent")


def test_page_of_an_empty_run_loads_too(browser, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "stages.json").write_text('{"format": "fa-stages-1", "plan": ["data"], "stages": {}}')
    assert report.main([str(out)]) == 0
    browser.open((out / "report.html").as_uri(), dark=False, width=1280)
    assert browser.complaints() == []
    assert browser.value("document.querySelectorAll('.missing-note').length") >= 5
