import base64
import hashlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report import charts, report
from tests.pipeline.report.run_fixture import (
    CLASSES,
    dump,
    dump_lines,
    evaluate_elsewhere,
    make_run,
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
    out = make_run(tmp_path_factory.mktemp("run"))
    evaluate_elsewhere(out, "scenes", tmp_path_factory.mktemp("scenes"))
    return out


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
        "The first 6 pictures of scenes",
        *CLASSES,
    ):
        assert words in page.text


def test_the_result_and_pictures_come_first(page):
    """Verdicts, AP of both arms and the difference, then pictures with boxes."""
    top = page.text[: page.text.index("Detections against ground truth")]
    for words in ("95 % interval", "AP50, random initialisation 28.7", "AP50, pretrained 39.8"):
        assert words in top
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == [
        "detections", "ap", "errors", "other-sets", "pretraining", "pictures", "conversion",
        "skipped", "ran",
    ]  # fmt: skip
    assert [a["href"] for a in page.all("a")][1:] == [f"#{name}" for name in sections]


def cells(text: str, caption: str) -> list[list[str]]:
    """The cells of the body of the table after a caption, row by row."""
    table = text[text.index(caption) :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:])
    return [[re.sub("<[^>]*>", "", cell) for cell in row] for row in rows]


def test_tables_hold_the_figures(run_folder):
    text = report.render(run_folder)
    values = {
        arm: [
            json.loads(path.read_text())
            for path in sorted(run_folder.glob(f"detection/{arm}/seed-*/result.json"))
        ]
        for arm in ("random", "pretrained")
    }
    (name, *row), treated = cells(text, "Test set: mean")[:2]
    assert (name, treated[0], len(row)) == ("Random initialisation", "Pretrained", 7)
    found = [result["coco"]["AP75"] for result in values["random"]]
    assert row[5] == f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
    gains = [b["AP"] - a["AP"] for a, b in zip(values["random"], values["pretrained"], strict=True)]
    difference = cells(text, "Test set: pretrained minus random")[0]
    assert difference[:2] == ["Fine-tuned, AP", f"{statistics.mean(gains):+.1f}"]
    own = statistics.mean(result["AP"] for result in values["pretrained"])
    assert cells(text, "scenes: mean")[1][1].startswith(f"{own - 10:.1f} ±")
    mammal = cells(text, "AP per class, fine-tuned, mean")[2]
    random, pretrained = (
        statistics.mean(result["per_class"]["mammal"] for result in values[arm]) for arm in values
    )
    assert mammal[:3] == ["mammal", f"{random:.1f}", f"{pretrained:.1f}"]


def test_page_is_accessible(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(picture.get("alt") for picture in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    drawn = [svg for svg in page.all("svg") if svg.get("class") == "chart"]
    labels = [svg["aria-label"] for svg in drawn]
    assert all(svg["role"] == "img" for svg in drawn)
    assert len(set(labels)) == len(labels) >= 18
    for start in ("Loss. ", "Self-hits. ", "Cosine of pairs of views. positives: from 0.504 to"):
        assert [label for label in labels if label.startswith(start)], start
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert {link["href"][1:] for link in page.all("a") if link["href"]} <= set(ids)


def test_boxes_do_not_rely_on_colour(run_folder):
    part = report.render(run_folder).split('<section id="ap"')[0]
    wrong = re.findall(r'<rect class="bad"[^>]*>', part)
    right = re.findall(r'<rect class="good"[^>]*>', part)
    assert wrong
    assert right
    assert all("stroke-dasharray" in box for box in wrong)
    assert not any("stroke-dasharray" in box for box in right)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", part)
    assert sum(label.startswith("✓ ") for label in labels) == len(right)
    assert sum(label.startswith("✗ ") for label in labels) == len(wrong)
    assert "0.91 localisation" in part  # in the text for those who do not see the picture


def test_a_browser_may_run_our_script_and_nothing_else(run_folder):
    text = report.render(run_folder)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert text.index("Content-Security-Policy") < text.index("<script>")


def test_every_colour_that_is_used_is_defined(run_folder):
    used = set(re.findall(r"var\(--([\w-]+)\)", report.render(run_folder))) - {"n"}
    assert used <= charts.LIGHT.keys()
    style = (report.HERE / "report.css").read_text()
    assert not re.search(r"url\(|@import|@font-face", style)


@pytest.mark.parametrize(
    ("value", "number", "signed"),
    [(1.25, "1.2", "+1.2"), (-3, "-3.0", "\u22123.0"), (None, "\u2013", "\u2013"),
     (float("nan"), "\u2013", "\u2013"), (True, "\u2013", "\u2013")],
)  # fmt: skip
def test_numbers_of_tables(value, number, signed):
    assert report.number(value) == number
    assert report.signed(value) == signed


def test_the_picture_of_the_features_is_embedded(tmp_path):
    out = make_run(tmp_path, seeds=1)
    assert "No picture of the features" in report.render(out)
    Image.new("RGB", (90, 60)).save(out / "pretrain/pictures/feature_map.png")
    assert "No picture of the features" not in report.render(out)


def test_what_was_skipped_is_listed_and_counted(tmp_path):
    out = make_run(tmp_path, seeds=1)
    entries = [{"file": f"{i}.jpg", "reason": "does <not> decode"} for i in range(70)]
    dump(out / "shards/index.json", {"skipped": entries})
    rows = cells(report.render(out), "Everything that did not go as planned")
    assert rows[0][2] == "1 samples"  # of the summary
    assert len(rows) == 1 + 50 + 1
    assert rows[1] == ["left out", "shards", "0.jpg", "does &lt;not&gt; decode"]
    assert rows[-1][2] == "20 more"
    assert "left out: 70." in page_of(out).text
    dump(out / "shards/index.json", {"skipped": []})
    dump(out / "pretrain/summary.json", {"num_skipped_samples": 0})
    assert "Nothing: no stage or run failed" in page_of(out).text


def test_text_from_files_is_escaped(page, run_folder):
    assert "x=<script>alert(1)</script>" in page.text
    assert len(page.all("script")) == 1


NEW_KEYS = ("positive_cosine", "negative_cosine", "neighbour_", "self_hit_rate")


def rewrite_metrics(out: Path, change) -> None:
    path = out / "pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    dump_lines(path, change(rows))


def test_metrics_of_older_runs_leave_their_charts_out(tmp_path):
    out = make_run(tmp_path, seeds=1)
    rewrite_metrics(out, lambda rows: [
        {k: v for k, v in row.items() if not k.startswith(NEW_KEYS)}
        for row in rows if row["kind"] != "similarity"
    ])  # fmt: skip
    page = page_of(out)
    assert "Effective rank" in page.text
    for words in ("Cosine of pairs", "Cosines at the end", "Self-hits", "Alarm:"):
        assert words not in page.text


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


def test_one_seed_says_that_there_is_no_interval(tmp_path):
    page = page_of(make_run(tmp_path, seeds=1))
    assert "One seed: no interval, so it may be chance." in page.text
    assert "one seed: no interval" in page.text


def test_nothing_ran(tmp_path):
    dump(tmp_path / "experiment.json", {"format": "fa-stage-2", "plan": ["data", "pretrain"]})
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


def test_writing_the_page_imports_no_library_of_the_stages():
    """A report is also written where they are not installed, and quickly."""
    heavy = {
        "matplotlib",
        "torch",
        "detectron2",
        "webdataset",
        "submitit",
        "zstandard",
        "pretrain",
        "detection",
    }
    code = (
        "import sys, pipeline.report.report; print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not heavy & set(done.stdout.split())
