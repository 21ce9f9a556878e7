"""Features before and after: what the maps show and say, what is missing, pointer and keys."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from tests.tools.run_fixture import dump, make_run, picture
from tools.flow import features_section, page
from tools.flow.report_data import Run

CLASSES = ("bird", "fish", "tool")
NUM_POINTS = 60


def make_map(num_classes: int = 3, num_points: int = NUM_POINTS) -> dict:
    """A made-up stage file; after training each class is a clump of its own."""
    generator = np.random.default_rng(0)
    labels = [i % num_classes for i in range(num_points)]
    names = list(CLASSES) if num_classes == 3 else [f"class {i}" for i in range(num_classes)]

    def drawn(clump: float, same: float) -> dict:
        places = generator.normal(size=(num_points, 2))
        places[:, 0] += clump * np.array(labels)
        return {
            "x": places[:, 0].round(3).tolist(),
            "y": places[:, 1].round(3).tolist(),
            "note": None,
            "trustworthiness": 0.9 + same / 20,
            "neighbours_kept": 0.55,
            "same_class_features": same,
            "same_class_map": same - 0.01,
            "same_class_by_label": {str(c): same + c / 1000 for c in range(num_classes)},
            "processor_seconds": 1.5,
        }

    return {
        "format": "fa-feature-map-1",
        "method": "t-SNE",
        "library": "scikit-learn 1.9.1",
        "note": None,
        "seed": 3,
        "num_neighbours": 10,
        "classes": names,
        "labels": labels,
        "keys": [f"picture-{i}" for i in range(num_points)],
        "same_class_by_chance": 0.322,
        "thumbnails": {"file": "pictures/feature_map.jpg", "side": 32, "columns": 8},
        "missing": None,
        "before": drawn(0, 0.4),
        "after": drawn(8, 0.75),
    }


def make_gallery(folder: Path, name: str, num_same: int, num_rows: int = 4) -> None:
    """Rows of a query and six neighbours, `num_same` of its class."""
    rows = [
        {
            "query": f"q{i}",
            "query_label": CLASSES[i % 3],
            "neighbours": [f"n{j}" for j in range(6)],
            "neighbour_labels": [CLASSES[i % 3]] * num_same
            + [CLASSES[(i + 1) % 3]] * (6 - num_same),
        }
        for i in range(num_rows)
    ]
    picture(folder / f"{name}.jpg", 7 * 100 - 4, num_rows * 100 - 4, 1)
    dump(folder / f"{name}.json", {"num_bank": 321, "rows": rows})


@pytest.fixture
def out(tmp_path) -> Path:
    """A finished run with a map and both galleries."""
    folder = make_run(tmp_path / "run", seeds=1)
    dump(folder / "pretrain/feature_map.json", make_map())
    sprite = np.zeros((256, 256, 3), np.uint8)
    for i in range(NUM_POINTS):  # each thumbnail has a grey of its own
        sprite[32 * (i // 8) : 32 * (i // 8) + 32, 32 * (i % 8) : 32 * (i % 8) + 32] = 4 * i
    Image.fromarray(sprite).save(folder / "pretrain/pictures/feature_map.jpg", quality=95)
    make_gallery(folder / "pretrain/pictures", "neighbours_before", 2)
    make_gallery(folder / "pretrain/pictures", "neighbours", 5)
    return folder


def shown(folder: Path) -> dict:
    return features_section.context(Run.load(folder))["features"]


def fragment(folder: Path) -> str:
    return str(
        page.fragment("features_section.html.j2", features_section.context(Run.load(folder)))
    )


def words(text: str) -> str:
    body = re.sub(r"<(script|style|title)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def change(folder: Path, **values) -> None:
    path = folder / "pretrain/feature_map.json"
    dump(path, json.loads(path.read_text()) | values)


def places_of(svg: str) -> dict[int, tuple[float, float]]:
    found = re.findall(r'data-i="(\d+)" d="M([-\d.]+) ([-\d.]+)', svg)
    return {int(i): (float(x), float(y)) for i, x, y in found}


# --- maps


def test_every_point_stands_where_the_file_says(out):
    content = make_map()
    for panel in shown(out)["map"]["panels"]:
        places = places_of(str(panel["svg"]))
        assert sorted(places) == list(range(NUM_POINTS))
        drawn = content[panel["state"]]
        x, y = (np.array([places[i][axis] for i in range(NUM_POINTS)]) for axis in (0, 1))
        given_x, given_y = np.array(drawn["x"]), np.array(drawn["y"])
        scale = (x.max() - x.min()) / (given_x.max() - given_x.min())
        np.testing.assert_allclose(x - x.mean(), scale * (given_x - given_x.mean()), atol=0.11)
        np.testing.assert_allclose(y - y.mean(), -scale * (given_y - given_y.mean()), atol=0.11)
        height = float(re.search(r'viewBox="0 0 480 (\d+)"', panel["svg"])[1])
        for values, size in ((x, 480), (y, height)):
            assert values.min() > 0
            assert values.max() < size


def test_points_have_the_mark_of_their_class_and_its_name(out):
    found = shown(out)["map"]
    assert [(item["name"], item["count"]) for item in found["legend"]] == [
        ("bird", 20), ("fish", 20), ("tool", 20),
    ]  # fmt: skip
    for panel in found["panels"]:
        groups = re.findall(r'<g class="([\w-]+)" data-series="class-(\d)">(.*?)</g>', panel["svg"])
        assert [number for _, number, _ in groups] == ["0", "1", "2"]
        for tone, number, body in groups:
            assert set(re.findall("<title>(.*?)</title>", body)) == {CLASSES[int(number)]}
            assert {i % 3 for i in places_of(body)} == {int(number)}
            (shape,) = set(re.findall(r'd="M[-\d.]+ [-\d.]+(m[^"]*)"', body))
            sample = str(found["legend"][int(number)]["sample"])
            assert tone in sample
            assert shape in sample


def test_marks_of_sixteen_classes_differ_and_others_are_told(out):
    content = make_map(num_classes=20, num_points=100)
    content["labels"][:4] = [0, 1, 2, 3]
    dump(out / "pretrain/feature_map.json", content)
    found = shown(out)["map"]
    assert len(found["legend"]) == 17
    assert found["legend"][-1]["name"] == "4 other classes"
    assert sum(item["count"] for item in found["legend"]) == 100
    marks = [
        re.search(r'<g class="([\w-]+)"><path d="M7 7([^"]*)"', item["sample"]).groups()
        for item in found["legend"]
    ]
    assert len(set(marks)) == 17
    for start in (0, 8):  # within a round of the colours no two shapes are equal
        assert len({shape for _, shape in marks[start : start + 8]}) == 8
    assert len(places_of(str(found["panels"][0]["svg"]))) == 100
    assert len(found["classes"]) == 20


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_stand_out_from_the_card(theme):
    """At least 3 to 1, as WCAG asks of graphics."""
    colours = {"light": features_section.LIGHT, "dark": features_section.DARK}[theme]
    card = luminance({"light": page.LIGHT, "dark": page.DARK}[theme]["card"])
    assert len(set(colours)) == features_section.NUM_COLOURS
    for colour in colours:
        low, high = sorted((card, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_figures_stand_in_words_and_in_the_table(out):
    text = words(fragment(out))
    assert "60 validation pictures of the probe" in text
    assert "the share of its class went from 40 % to 75 %; neighbours drawn by lot: 32 %" in text
    assert "Same class among the 10 nearest, features 40.0 75.0 32.2" in text
    assert "Same class among the 10 nearest, map 39.0 74.0 32.2" in text
    assert f"also nearest on the map 55.0 55.0 {1000 / 59:.1f}" in text
    assert "Trustworthiness of the map 92.0 93.8" in text
    assert "t-SNE by scikit-learn 1.9.1, seed 3" in text
    assert "fish 20 40.1 75.1" in text  # of the table of classes


@pytest.mark.parametrize("text", ["<b>&amp;", '"/><script>alert(1)</script>'])
def test_names_of_classes_are_no_markup(out, text):
    change(out, classes=[text, "fish", "tool"])
    body = fragment(out)
    assert text not in body
    assert body.count("<script>") == 1  # ours


def test_notes_and_missing_parts_are_told(out):
    change(out, before=None, missing="the features of the start are gone", note="only a PCA")
    text = words(fragment(out))
    assert "Note: only a PCA." in text
    assert "Note: the features of the start are gone." in text
    assert "the share of its class is 75 %" in text
    assert [p["state"] for p in shown(out)["map"]["panels"]] == ["after"]
    collapsed = {"x": None, "y": None, "note": "all pictures have the same features: no map"}
    change(out, before=make_map()["before"], after=collapsed)
    assert "all pictures have the same features: no map." in words(fragment(out))


@pytest.mark.parametrize(
    "values",
    [
        {"format": "other"},
        {"labels": []},
        {"labels": [0, 1]},
        {"labels": [-1] * NUM_POINTS},
        {"after": None},
        {"after": {"x": ["nan"] * NUM_POINTS, "y": [0.0] * NUM_POINTS}},
    ],
)
def test_a_file_of_another_form_is_refused_in_words(out, values):
    change(out, **values)
    assert "feature_map.json is not of a form that this page knows" in words(fragment(out))


def test_without_a_map_the_reason_is_told(out):
    (out / "pretrain/feature_map.json").unlink()
    assert "Pretraining left no map: it had no labelled probe set" in words(fragment(out))
    stages = json.loads((out / "stages.json").read_text())
    stages["stages"].pop("pretrain")
    dump(out / "stages.json", stages)
    text = words(fragment(out))
    assert "No map of the features: pretraining has not run." in text
    assert "No neighbour gallery: pretraining has not run" in text


# --- neighbours


def test_galleries_stand_above_each_other_with_their_counts(out):
    gallery = shown(out)["gallery"]
    assert len(gallery["rows"]) == 4
    for i, row in enumerate(gallery["rows"]):
        assert row["query"] == CLASSES[i % 3]
        assert [(s["state"], s["num_same"], s["k"]) for s in row["states"]] == [
            ("before", 2, 6), ("after", 5, 6),
        ]  # fmt: skip
        labels = [label for _, label in row["states"][1]["tiles"]]
        assert labels == [CLASSES[i % 3]] * 6 + [CLASSES[(i + 1) % 3]]
    text = words(fragment(out))
    assert "Before pretraining : 8 of 24 neighbours shown have the query's class" in text
    assert "After pretraining : 20 of 24 neighbours shown have the query's class" in text
    assert "Before pretraining: 2 of 6" in text
    assert "best first, among 321" in text
    alts = re.findall(r'alt="([^"]*)"', fragment(out))
    assert alts.count("Before pretraining, query: bird") == 2
    assert "After pretraining, neighbour 6: fish" in alts


def test_missing_or_other_queries_before_are_told(out):
    pictures = out / "pretrain/pictures"
    make_gallery(pictures, "neighbours_before", 2, num_rows=3)
    gallery = shown(out)["gallery"]
    assert gallery["note"] == (
        "The neighbours before pretraining are of other queries and are not shown."
    )
    assert [len(row["states"]) for row in gallery["rows"]] == [1] * 4
    (pictures / "neighbours_before.jpg").unlink()
    assert "before pretraining are missing" in words(fragment(out))
    assert "5 of 6" in words(fragment(out))


def test_without_labels_nothing_is_counted(out):
    for name in ("neighbours_before", "neighbours"):
        path = out / f"pretrain/pictures/{name}.json"
        found = json.loads(path.read_text())
        for row in found["rows"]:
            row["query_label"], row["neighbour_labels"] = None, [None] * 6
        dump(path, found)
    gallery = shown(out)["gallery"]
    assert gallery["totals"] == []
    assert gallery["rows"][0]["states"][0]["num_same"] is None
    assert "of 6" not in words(fragment(out))


# --- in a browser


@pytest.fixture
def address(out) -> str:
    """A page of the section alone."""
    body = page.fragment("features_section.html.j2", features_section.context(Run.load(out)))
    path = out / "features.html"
    path.write_text(page.render(page.Page("features", Markup("<h1>Features</h1>"), body)))
    return path.as_uri()


TIP = "document.querySelectorAll('.mapbox')[{0}].querySelector('.tip')"
RINGS = "document.querySelectorAll('.mapbox .ring').length"


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_loads_without_complaint(browser, address, dark, width):
    browser.open(address, dark=dark, width=width)
    assert browser.complaints() == []
    assert browser.requests() == [address]
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    fill = browser.value("getComputedStyle(document.querySelector('.map .tone-0 path')).fill")
    colour = (features_section.DARK if dark else features_section.LIGHT)[0]
    assert fill == f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.browser
def test_the_chosen_theme_reaches_the_marks(browser, address):
    browser.open(address, dark=False, width=1280)
    browser.value("document.documentElement.dataset.theme = 'dark'")
    fill = browser.value("getComputedStyle(document.querySelector('.map .tone-0 path')).fill")
    assert fill == "rgb(79, 159, 224)"


@pytest.mark.browser
def test_pointer_shows_thumbnail_and_class_and_rings_both_maps(browser, address):
    browser.open(address, dark=False, width=1280)
    box = browser.value(
        "(p => (p.scrollIntoView({block: 'center', behavior: 'instant'}), "
        "(r => [r.x + r.width / 2, r.y + r.height / 2])(p.getBoundingClientRect())))"
        "(document.querySelectorAll('.mapbox')[1].querySelector('path[data-i=\"13\"]'))"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    told = browser.value(f"{TIP.format(1)}.textContent")
    assert browser.value(f"{TIP.format(1)}.hidden") is False
    assert browser.value(RINGS) == 2
    label, number = re.fullmatch(r"(\w+), picture (\d+)", told).groups()
    point = int(number) - 1  # 13, or one that lies above it
    assert label == CLASSES[point % 3]
    place = browser.value(
        f"(s => [s.backgroundImage.slice(0, 15), s.backgroundPosition, s.backgroundSize])"
        f"(getComputedStyle({TIP.format(1)}.querySelector('.thumbnail')))"
    )
    at = f"{-64 * (point % 8)}px {-64 * (point // 8)}px"
    assert place == ['url("data:image', at, "512px auto"]
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.value(f"{TIP.format(1)}.hidden") is True
    assert browser.value(RINGS) == 0


@pytest.mark.browser
def test_arrow_keys_go_from_point_to_point(browser, address):
    browser.open(address, dark=False, width=1280)
    browser.value("document.querySelector('.mapbox').focus(), 0")
    xs = []
    for _ in range(4):
        browser.press("ArrowRight")
        xs.append(
            browser.value("Number(document.querySelector('.mapbox .ring').getAttribute('cx'))")
        )
    assert xs == sorted(set(xs))  # further to the right each time
    assert ", picture " in browser.value(f"{TIP.format(0)}.textContent")
    assert browser.value(f"{TIP.format(0)}.getAttribute('role')") == "status"
    browser.press("Escape")
    assert browser.value(f"{TIP.format(0)}.hidden") is True
    label = "document.querySelector('.mapbox').getAttribute('aria-label')"
    assert browser.value(label) == "Before pretraining: points by the arrow keys"


@pytest.mark.browser
def test_hidden_classes_are_not_pointed_at(browser, address):
    browser.open(address, dark=False, width=1280)
    browser.value("document.querySelectorAll('#features .legend button')[0].click(), 0")
    assert browser.value("document.querySelectorAll('.map .off path').length") == 40  # both maps
    browser.value("document.querySelector('.mapbox').focus(), 0")
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp"):
        browser.press(key)
        assert not browser.value(f"{TIP.format(0)}.textContent").startswith("bird")


@pytest.mark.browser
def test_all_is_there_without_scripts(browser, address):
    """Marks, names, figures and thumbnails are in the page itself."""
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(address, dark=False, width=1280)
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.value("document.querySelectorAll('.map path[data-i]').length") == 120
    assert browser.value("document.querySelectorAll('.map title').length") == 120
    assert browser.value("document.querySelector('#feature-thumbnails').naturalWidth") == 256
    assert browser.value(RINGS) == 0
