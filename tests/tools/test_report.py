import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.tools.run_fixture import CLASSES, dump, dump_lines, make_run
from tools.flow import charts, gallery, report
from tools.flow.charts import Series
from tools.flow.report_data import (
    Run,
    last_histogram,
    mean_curve,
    picture_rows,
)


class Page(HTMLParser):
    """Collects what the tests look at."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(out: Path) -> Page:
    return Page(report.render(out))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run_folder) -> Page:
    return page_of(run_folder)


def test_report_is_written_small_and_self_contained(run_folder, capsys):
    assert report.main([str(run_folder)]) == 0
    text = (run_folder / "report.html").read_text()
    assert len(text) < 6e6
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "report.html" in capsys.readouterr().out


def test_report_says_what_happened(page):
    for words in (
        "Pretraining helps (fine-tuned): AP50",
        "3 paired seeds",
        "Random, backbone frozen",
        "Effective rank",
        "Nearest neighbours in feature space",
        "Detections against ground truth",
        "4.5e-07",
        "265 kept, 1 dropped",
        "broken.jpg",
        "Samples that did not decode: 1.",
        "commit 0123456789",
        "torch 2.15.0",
        "pretrained_frozen/seed-2",
    ):
        assert words in page.text


def test_tables_hold_the_figures(page):
    rows = json.loads(json.dumps(page.text))
    levels = {"random": "28.7", "pretrained": "39.8"}
    assert all(value in rows for value in levels.values())
    for name in CLASSES:
        assert name in page.text


def test_page_is_accessible(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(picture.get("alt") for picture in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    charts_drawn = [svg for svg in page.all("svg") if svg.get("class") == "chart"]
    assert len(charts_drawn) >= 12
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in charts_drawn)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {link["href"][1:] for link in page.all("a") if link["href"]} <= targets


def test_text_from_files_is_escaped(page, run_folder):
    assert "x=<script>alert(1)</script>" in page.text
    assert len(page.all("script")) == 2


NEW_KEYS = ("positive_cosine", "negative_cosine", "neighbour_", "self_hit_rate")


def rewrite_metrics(out: Path, change) -> None:
    path = out / "pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    dump_lines(path, change(rows))


def test_figures_of_the_features_are_drawn(page):
    labels = {svg["aria-label"] for svg in page.all("svg") if svg.get("class") == "chart"}
    for start in ("Age of neighbours. ", "Self-hits. ", "Labels of neighbours. ", "FA cosine. "):
        assert [label for label in labels if label.startswith(start)], start
    over_time = next(label for label in labels if label.startswith("Cosine of pairs of views."))
    assert "positives: from 0.504 to 0.9; negatives: from 0.396 to 0" in over_time
    assert [label for label in labels if label.startswith("Cosines at the end.")]
    bands = [path for path in page.all("path") if (path.get("class") or "").startswith("band")]
    assert {path["class"] for path in bands} == {"band plain", "band negative"}
    assert "Alarm:" not in page.text


def test_metrics_of_older_runs_leave_their_charts_out(tmp_path):
    out = make_run(tmp_path, seeds=1)
    rewrite_metrics(out, lambda rows: [
        {k: v for k, v in row.items() if not k.startswith(NEW_KEYS)}
        for row in rows if row["kind"] != "similarity"
    ])  # fmt: skip
    page = page_of(out)
    assert "Effective rank" in page.text
    for words in ("What the loss compares", "Cosines at the end", "Self-hits", "Alarm:"):
        assert words not in page.text


@pytest.mark.parametrize("shares", [None, [], ["nan", 0.5], 3, [True]])
def test_histograms_that_are_none_are_left_out(tmp_path, shares):
    out = make_run(tmp_path, seeds=1)
    rewrite_metrics(out, lambda rows: [
        row | {"positives": shares, "negatives": shares} if row["kind"] == "similarity" else row
        for row in rows
    ])  # fmt: skip
    assert last_histogram(Run.load(out)) == {}
    assert "Cosine of pairs of views" in page_of(out).text


def test_the_last_histogram_is_drawn_as_its_outline(run_folder):
    outlines = last_histogram(Run.load(run_folder))
    assert set(outlines) == {"positives", "negatives"}
    corners = outlines["positives"]
    assert (corners[0], corners[-1]) == ((-1.0, 0.0), (1.0, 0.0))
    raised = [(round(x, 9), y) for x, y in corners if y > 0]
    assert raised == [(0.8, 0.25), (0.9, 0.25), (0.9, 0.75), (1.0, 0.75)]
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)


@pytest.mark.parametrize("number", [1, 7])
def test_a_collapse_is_shown_where_it_cannot_be_missed(tmp_path, number):
    out = make_run(tmp_path, seeds=1)
    message = "features have collapsed: std <0.0004>"
    event = {"kind": "event", "message": message, "collapse": {"feature_std": 0.004}}
    other = {"kind": "event", "step": 0, "message": "kNN before training", "knn_top1_initial": 0.1}
    alarms = [event | {"step": 100 * i} for i in range(number)]
    rewrite_metrics(out, lambda rows: [other, *rows, *alarms])
    page = page_of(out)
    boxes = [p for p in page.all("p") if p.get("class") == "verdict worse"]
    assert len(boxes) == 1 + min(number, 5)
    assert "Pretraining raised an alarm" in page.text
    assert page.text.count(f"Alarm: {message}.") == min(number, 5)
    assert ("2 more alarms" in page.text) == (number == 7)
    assert "kNN before training" not in page.text


def test_a_band_spreads_around_its_line():
    line = Series("a", [(0.0, 0.5), (1.0, 0.5)], band=[(0.0, 0.0, 1.0), (1.0, 0.4, 0.6)])
    drawn = charts.line_chart("t", [line], "x")
    assert drawn is not None
    outline = re.search(r'class="band plain" data-series="plain" d="M([^"]*)Z"', drawn)
    line_path = re.search(r'class="line plain" data-series="plain" d="M([^"]*)"', drawn)
    assert outline is not None
    assert line_path is not None
    corners = [tuple(map(float, c.split())) for c in outline[1].split(" L")]
    left, right = (tuple(map(float, c.split())) for c in line_path[1].split(" L"))
    assert [x for x, _ in corners] == [left[0], right[0], right[0], left[0]]
    offsets = [y - left[1] for _, y in corners]  # downwards; the axis is linear
    assert offsets[0] == pytest.approx(-offsets[3], abs=0.2)
    assert offsets[1] == pytest.approx(-offsets[2], abs=0.2)
    assert offsets[0] == pytest.approx(5 * offsets[1], rel=0.03)


def test_long_bands_are_thinned_out_with_their_line():
    spans = [(float(i), -1.0, 1.0) for i in range(10_001)]
    drawn = charts.drawable(Series("a", [(x, 0.0) for x, *_ in spans], band=spans))
    assert [x for x, *_ in drawn.band] == [x for x, _ in drawn.points]
    assert {(low, high) for _, low, high in drawn.band} == {(-1.0, 1.0)}


def test_one_seed_says_that_there_is_no_interval(tmp_path):
    page = page_of(make_run(tmp_path, seeds=1))
    assert "One seed: no interval, so it may be chance." in page.text
    assert "one seed: no interval" in page.text


def test_nothing_ran(tmp_path):
    dump(tmp_path / "stages.json", {"format": "fa-stages-1", "plan": ["data", "pretrain"]})
    page = page_of(tmp_path)
    assert page.text.count("has not run") >= 4
    assert "Not compared (fine-tuned): no seed ran in both arms." in page.text
    assert "not run" in page.text


def test_a_folder_without_a_run_exits_2(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def remove(out: Path, pattern: str) -> None:
    found = list(out.glob(pattern))
    assert found
    for path in found:
        path.unlink()


@pytest.mark.parametrize(
    "pattern",
    [
        "pretrain/metrics.jsonl",
        "pretrain/summary.json",
        "pretrain/pictures/*",
        "pretrain/pictures/*.json",
        "convert/backbone.json",
        "data/dataset.json",
        "data/VOC2007/JPEGImages/*",
        "detection/*/*/curve.jsonl",
        "detection/*/*/detections.json",
        "detection/random/*/result.json",
        "detection/pretrained*/*/*.json",
    ],
)
def test_any_missing_file_leaves_a_page(tmp_path, pattern):
    out = make_run(tmp_path, seeds=2)
    remove(out, pattern)
    assert "Average precision" in page_of(out).text


@pytest.mark.parametrize(
    "name", ["pretrain/pictures/views.jpg", "data/VOC2007/JPEGImages/000000.jpg"]
)
def test_damaged_pictures_are_left_out(tmp_path, name):
    out = make_run(tmp_path, seeds=1)
    (out / name).write_bytes(b"not a picture")
    assert "Average precision" in page_of(out).text


def test_detections_are_judged_by_class_and_overlap():
    truth = [
        {"class": "cat", "box": [0, 0, 10, 10]},
        {"class": "dog", "box": [20, 0, 30, 10]},
        {"class": "dog", "box": [50, 0, 60, 10], "difficult": True},
    ]
    found = [
        {"class": "cat", "score": 0.5, "box": [0, 0, 10, 10]},
        {"class": "cat", "score": 0.9, "box": [0, 0, 10, 9]},
        {"class": "dog", "score": 0.1, "box": [20, 0, 30, 10]},
    ]
    shown = gallery.judged({"ground_truth": truth, "detections": found})
    assert [(d["score"], d["correct"]) for d in shown] == [(0.9, True), (0.5, False)]
    assert gallery.judged({}) == []


def test_iou():
    assert gallery.iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert gallery.iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0.0


def test_rows_of_pictures_are_cut_into_tiles(run_folder):
    views = picture_rows(Run.load(run_folder), "views")
    assert [len(row["tiles"]) for row in views] == [3] * 6
    assert {(tile.width, tile.height) for row in views for tile in row["tiles"]} == {(96, 96)}
    assert [len(row["tiles"]) for row in picture_rows(Run.load(run_folder), "neighbours")] == [
        7
    ] * 6


def test_large_pictures_are_made_smaller(tmp_path):
    from PIL import Image

    Image.effect_noise((3000, 2000), 100).save(tmp_path / "big.png")
    picture = gallery.embed(tmp_path / "big.png", 1600, max_bytes=100_000)
    assert picture is not None
    assert len(picture.uri) < 140_000
    assert picture.width > picture.height


def test_bad_samples_of_pretraining_are_listed(tmp_path):
    out = make_run(tmp_path, seeds=1)
    rows = [
        {"sample": i % 23, "reason": f"shard-000001.tar at byte {i}: <cut>", "rank": 1, "step": 900}
        for i in range(25)
    ]
    dump_lines(out / "pretrain/bad_samples.jsonl", rows)
    (out / "pretrain/config.yaml").write_text("data: {max_bad_samples: 31}\n")
    page = page_of(out)
    assert "replaced: 23 different ones, noted 25 times" in page.text
    assert "each process may replace 31 (data.max_bad_samples)" in page.text
    assert "the first 20 rows" in page.text
    assert page.text.count("<cut>") == 20
    assert "at byte 19: <cut>" in page.text
    assert "1 samples" not in page.text
    assert len(page.all("caption")) == len(page.all("table"))


@pytest.mark.parametrize(
    "config", [None, "", "data: 3", "data: {max_bad_samples: {}}", "[", "a: b: c"]
)
def test_one_bad_sample_without_a_known_limit(tmp_path, config):
    out = make_run(tmp_path, seeds=1)
    dump_lines(out / "pretrain/bad_samples.jsonl", [{"sample": 7}])
    if config is not None:
        (out / "pretrain/config.yaml").write_text(config)
    page = page_of(out)
    assert "replaced: 1 different ones." in page.text
    assert "max_bad_samples" not in page.text


def test_without_bad_samples_the_page_says_so(page, tmp_path):
    assert "pretraining could not use" not in page.text
    out = make_run(tmp_path, seeds=1)
    dump(out / "shards/index.json", {"skipped": []})
    dump(out / "pretrain/summary.json", {"num_skipped_samples": 0})
    dump_lines(out / "pretrain/bad_samples.jsonl", [])
    assert "Nothing: no stage or run failed" in page_of(out).text
    dump_lines(out / "pretrain/bad_samples.jsonl", [{"sample": 7}])
    assert "Nothing: no stage" not in page_of(out).text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (3.5, 3.8, [3.5, 3.6, 3.7, 3.8]),
        (5, 5, [2, 4, 6, 8]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    ticks = charts.nice_ticks(low, high)
    assert ticks == pytest.approx(expected)


def test_charts_leave_out_what_is_not_finite_and_draw_nothing_from_nothing():
    assert charts.line_chart("t", [Series("a", [(0.0, float("nan"))])], "x") is None
    assert charts.slope_chart("t", []) is None
    assert charts.dumbbell_chart("t", [("cat", None, None)]) is None
    drawn = charts.line_chart(
        "t", [Series("<a>", [(0.0, 1.0), (1.0, float("inf")), (2.0, 3.0)])], "x"
    )
    assert drawn is not None
    assert "inf" not in drawn
    assert "<a>" not in drawn


def test_long_curves_are_thinned_out_but_keep_their_end():
    points = [(float(i), float(i % 7)) for i in range(10_001)]
    thin = charts.thin_out(points, 300)
    assert len(thin) <= 300
    assert thin[-1] == points[-1]


def test_mean_curve_takes_shared_iterations_only():
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0), (3, 1.0)]]) == [(2, 5.0)]
    assert mean_curve([]) == []


def test_writing_the_page_imports_no_library_of_the_stages():
    """A report is also written where they are not installed, and quickly."""
    heavy = {"torch", "detectron2", "webdataset", "submitit", "zstandard", "pretrain", "detection"}
    code = "import sys, tools.flow.report; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not heavy & set(done.stdout.split())
