"""The picture of a linear evaluation: every figure of linear.json stands where it should."""

import re
from xml.etree import ElementTree

import pytest

from tools.flow.linear_plot import plot

SVG = "{http://www.w3.org/2000/svg}"


def result(**values) -> dict:
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
        "training_top1": None,
    } | values


def drawn(**values) -> str:
    picture = plot(result(**values))
    assert picture is not None
    return picture


def dots(picture: str) -> list[tuple[str, float, float, float, float]]:
    """(line, x, y, given x, percent) of every dot, as its title says."""
    found = []
    for circle in ElementTree.fromstring(picture).iter(f"{SVG}circle"):
        title = circle.findtext(f"{SVG}title", "")
        ((label, percent, given),) = re.findall(r"^(.*): ([\d.]+) % at (\S+)$", title)
        place = float(circle.attrib["cx"]), float(circle.attrib["cy"])
        found.append((label, *place, float(given), float(percent)))
    return found


def assert_linear(pairs) -> None:
    """Places are a rising or falling straight function of values."""
    (a, fa), *_, (b, fb) = sorted(pairs)
    for value, place in pairs:
        assert place == pytest.approx(fa + (fb - fa) * (value - a) / (b - a), abs=0.11)


def test_every_accuracy_over_its_rate():
    found = dots(drawn())
    own = [(line, x, y) for line, _, _, x, y in found]
    for row in result()["rates"]:
        x = row["base_lr"]
        assert ("validation top-1", x, pytest.approx(100 * row["val_top1"])) in own
        assert ("held-out top-1", x, pytest.approx(100 * row["held_out_top1"])) in own
    assert len(own) == 10  # no top-5
    assert_linear([({0.01: 0, 0.1: 1, 1: 2, 10: 3, 100: 4}[x], px) for _, px, _, x, _ in found])
    assert_linear([(y, py) for _, _, py, _, y in found])
    heights = {y: py for _, _, py, _, y in found}
    assert heights[50.0] < heights[10.0]  # upwards


def test_the_chosen_rate_is_marked():
    picture = drawn()
    left = min(x for _, x, *_ in dots(picture))
    assert f'class="marked" d="M{left:.1f} ' in picture
    assert 'class="marked"' not in drawn(selection=None)


def test_every_epoch_of_every_rate():
    curve = [None, [0.1, 0.2], [0.3, 0.45]]
    rates = [r | {"held_out_top1": None} for r in result()["rates"][:2]]
    found = dots(drawn(rates=rates, training_top1=curve))
    epochs = [(line, x, y) for line, _, _, x, y in found if line.startswith("rate ")]
    assert epochs == [
        ("rate 0.01", 2, 10.0), ("rate 0.01", 3, 30.0),
        ("rate 0.1", 2, 20.0), ("rate 0.1", 3, 45.0),
    ]  # fmt: skip


def test_every_k_with_every_temperature():
    knn = {
        "ks": [1, 5, 20],
        "temperatures": [0.07, 1.0],
        "top1": [[0.5, 0.4], [0.6, 0.3], [0.7, 0.2]],
    }
    picture = drawn(knn=knn, rates=[], selection=None)
    found = [(line, x, y) for line, _, _, x, y in dots(picture)]
    assert found == [
        ("temperature 0.07", 1, 50), ("temperature 0.07", 5, 60), ("temperature 0.07", 20, 70),
        ("temperature 1", 1, 40), ("temperature 1", 5, 30), ("temperature 1", 20, 20),
    ]  # fmt: skip
    assert "temperature 0.07: highest 70.00 % at 20" in picture


def test_a_single_value_is_drawn():
    rates = [{"base_lr": 0.3, "val_top1": 0.5, "val_top5": 0.9, "held_out_top1": None}]
    found = dots(drawn(rates=rates, selection=None))
    assert [(line, x, y) for line, _, _, x, y in found] == [
        ("validation top-1", 0.3, 50), ("validation top-5", 0.3, 90),
    ]  # fmt: skip


def test_names_are_no_markup_and_figures_are_told_in_words():
    root = ElementTree.fromstring(drawn())
    told = root.attrib["aria-label"]
    assert told.startswith("Linear accuracy of a<b>.pth over base learning rate. validation top-1")
    assert "40.00 % at 10" in told
    title = root.findtext(f".//{SVG}text[@class='title']")
    assert title == "Linear accuracy of a<b>.pth"


def test_nothing_to_draw():
    assert plot(result(rates=[])) is None
