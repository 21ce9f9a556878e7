"""Detection in the report: curves, kinds of errors, pictures side by side."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.tools.run_fixture import ARM_LEVELS, CLASSES, dump, make_run
from tests.tools.test_report import Page
from tools.flow import detection_section, gallery, report
from tools.flow.detection_charts import stacked_bars
from tools.flow.report_data import Run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run_folder) -> str:
    return report.render(run_folder)


def section(page: str, name: str) -> str:
    return page[page.index(f'<section id="{name}"') :].split("</section>")[0]


def stored(out: Path, arm: str, file: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"detection/{arm}/*/{file}"))]


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table's body, row by row."""
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:]]


def table_after(page: str, caption: str) -> list[list[str]]:
    return rows_of(page[page.index(caption) :])


def test_curves_are_means_over_the_seeds(run_folder):
    for arm in ARM_LEVELS:
        curves, seeds = detection_section.mean_curves(Run.load(run_folder), arm)
        assert seeds == 3
        assert set(curves) == set(CLASSES)
        for name, curve in curves.items():
            files = stored(run_folder, arm, "pr.json")
            values = [file["classes"][name]["0.50"]["precision"] for file in files]
            assert curve == pytest.approx(np.mean(values, axis=0).tolist())


def test_a_chart_for_each_class_and_a_table_with_the_figures(run_folder, text):
    part = section(text, "curves")
    assert part.count("<svg class=") == 2 * (len(CLASSES) + 1)
    names = re.findall(r'aria-label="Precision over recall, ([^.]+)\.', part)
    assert names[: len(CLASSES) + 1] == ["mean over the classes", *CLASSES]
    curves, _ = detection_section.mean_curves(Run.load(run_folder), "pretrained")
    row = next(row for row in table_after(part, "Precision at three levels") if row[0] == "fish")
    expected = [curves["fish"][level] for level in (25, 50, 75)]
    assert row[5:] == [*(f"{value:.2f}" for value in expected), "0.79"]


def test_lines_end_where_precision_is_zero():
    assert detection_section.reached([1.0, 0.5, 0.0, 0.0]) == [(0, 1.0), (0.01, 0.5), (0.02, 0.0)]
    assert detection_section.reached([0.5] * 101)[-1] == (1.0, 0.5)
    assert detection_section.reached([]) == []
    assert detection_section.curve_figures(None) == [None] * 4


def test_many_classes_are_folded_away(tmp_path):
    out = make_run(tmp_path, seeds=1)
    for path in out.glob("detection/*/*/pr.json"):
        raw = json.loads(path.read_text())
        curve = raw["classes"]["bird"]
        dump(path, raw | {"classes": {f"class {i:02d}": curve for i in range(20)}})
    part = section(report.render(out), "curves")
    assert "A chart for each of 20 classes" in part
    before = part[: part.index("<details>")]
    assert before.count("<svg class=") == 1


def test_errors_in_bars_and_tables_are_means_over_the_seeds(run_folder, text):
    part = section(text, "errors")
    rows = table_after(part, "Best-scored detections by kind")
    kinds = [*detection_section.KINDS, "missed"]
    assert [row[0] for row in rows] == [
        *("Random initialisation", "Pretrained"),
        *("Random, backbone frozen", "Pretrained, backbone frozen"),
    ]
    for arm, row in zip(ARM_LEVELS, rows, strict=True):
        files = stored(run_folder, arm, "errors.json")
        means = [np.mean([file["best_scored"][kind] for file in files]) for kind in kinds]
        assert row[1:] == [*(f"{mean:.1f}" for mean in means), "100", "3"]
        shown = re.search(rf"{row[0]}, localisation: ([\d.]+)", part)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(means[1], abs=0.051)
    assert table_after(part, "The most frequent confusions")[0][:2] == ["bird", "fish"]
    by_class = table_after(part, "Best-scored detections of each class")
    assert len(by_class) == len(CLASSES) * len(ARM_LEVELS)


def test_confusions_are_means_over_the_seeds(tmp_path):
    out = make_run(tmp_path, seeds=3)
    counts = {0: [("cat", "dog", 2)], 1: [("cat", "dog", 7), ("dog", "cat", 3)], 2: []}
    for seed, rows in counts.items():
        path = out / f"detection/random/seed-{seed}/errors.json"
        confusions = [{"object": o, "taken_for": t, "count": n} for o, t, n in rows]
        dump(path, json.loads(path.read_text()) | {"confusions": confusions})
    found = detection_section.arm_errors(Run.load(out), "random")
    assert found["n"] == 3
    assert found["confusions"] == pytest.approx({("cat", "dog"): 3.0, ("dog", "cat"): 1.0})


def test_gains_stand_beside_each_other(run_folder, text):
    part = section(text, "errors")
    rows = table_after(part, "AP50 gained by mending one kind, backbone frozen")
    assert [row[0] for row in rows] == list(detection_section.MENDS)
    for arm, column in (("random_frozen", 1), ("pretrained_frozen", 2)):
        files = stored(run_folder, arm, "errors.json")
        for row in rows:
            mean = np.mean([file["AP50_gained"][row[0]] for file in files])
            assert row[column] == f"{mean:+.1f}"


def test_bars_have_the_lengths_of_their_parts():
    rows = [("a", {"one": 10.0, "two": 30.0}), ("b", {"one": 20.0, "two": 0.0})]
    chart = str(stacked_bars("Title", rows, "things"))
    found = re.findall(r'url\(#fill-(\w+)\)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', chart)
    bars = [(part, *map(float, figures)) for part, *figures in found]
    (one, x, y, width), (two, next_x, same_y, next_width), (other, first_x, below, length) = bars
    assert (one, two, other) == ("one", "two", "one")
    assert next_width == pytest.approx(3 * width, abs=0.2)
    assert length == pytest.approx(2 * width, abs=0.2)
    assert next_x == pytest.approx(x + width, abs=0.2)
    assert (same_y, first_x) == (y, x)
    assert below > y
    ticks = dict(re.findall(r'x="([\d.]+)" y="[\d.]+" class="tick">(\d+)', chart))
    places = {int(label): float(place) for place, label in ticks.items()}
    assert next_x + next_width == pytest.approx(places[40], abs=0.3)
    assert stacked_bars("Title", [], "things") is None
    assert stacked_bars("Title", [("a", {"one": 0.0})], "things") is None


def test_every_kind_has_a_pattern_of_its_own(text):
    part = section(text, "errors")
    patterns = dict(re.findall(r'<pattern id="fill-(\w+)"[^>]*>(.*?)</pattern>', part))
    assert set(patterns) == set(detection_section.KINDS)
    turns = re.findall(r'<pattern id="fill-(?:\w+)".*?(patternTransform="[^"]*")?>', part)
    assert len(set(zip(patterns.values(), turns, strict=True))) == len(patterns)


def leads(out: Path, changes: dict[int, str]) -> None:
    """Give the first box of some of the random arm's pictures another kind."""
    path = out / "detection/random/seed-0/detections.json"
    found = json.loads(path.read_text())
    for number, kind in changes.items():
        for detection in found[number]["detections"][:2]:
            detection["kind"] = kind
    dump(path, found)


def test_first_pictures_and_those_with_the_largest_difference(tmp_path):
    """Pretrained finds one object in each; random none, but two in 9 and 1, and one in 7."""
    out = make_run(tmp_path, seeds=2)
    leads(out, {1: "correct", 9: "correct"})
    path = out / "detection/random/seed-0/detections.json"
    found = json.loads(path.read_text())
    found[7]["detections"][1]["kind"] = "correct"
    dump(path, found)
    shots = detection_section.shots(Run.load(out))
    assert (shots["seed"], shots["arms"]) == (0, ["random", "pretrained"])
    assert [row["name"] for row in shots["first"]] == [f"{i:06d}.jpg" for i in range(6)]
    shown = [(row["name"], row["lead"]) for row in shots["different"]]
    assert shown == [("000006.jpg", 1), ("000008.jpg", 1), ("000009.jpg", -1)]
    leads(out, {8: "background"})
    pretrained = out / "detection/pretrained/seed-0/detections.json"
    found = json.loads(pretrained.read_text())
    found[8]["detections"][1]["kind"] = "correct"
    dump(pretrained, found)
    shots = detection_section.shots(Run.load(out))
    shown = [(row["name"], row["lead"]) for row in shots["different"]]
    assert shown == [("000008.jpg", 2), ("000006.jpg", 1), ("000009.jpg", -1)]
    part = section(report.render(out), "detections")
    assert "Pretrained finds 2 more." in part
    assert "Pretrained finds 1 fewer." in part
    assert "of the other 4 saved pictures" in part


def test_boxes_do_not_rely_on_colour(text):
    part = section(text, "detections")
    wrong = re.findall(r'<rect class="bad"[^>]*>', part)
    right = re.findall(r'<rect class="good"[^>]*>', part)
    assert wrong
    assert right
    assert all("stroke-dasharray" in box for box in wrong)
    assert not any("stroke-dasharray" in box for box in right)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", part)
    assert sum(label.startswith("✓ ") for label in labels) == len(right)
    assert sum(label.startswith("✗ ") for label in labels) == len(wrong)
    assert "wrong (localisation)" in part  # in the text for those who do not see the picture


def test_pictures_outside_the_data_set_are_never_read(tmp_path):
    out = make_run(tmp_path / "run", seeds=1)
    (tmp_path / "secret.jpg").write_bytes((out / "data/VOC2007/JPEGImages/000000.jpg").read_bytes())
    for arm in ARM_LEVELS:
        path = out / f"detection/{arm}/seed-0/detections.json"
        found = json.loads(path.read_text())
        found[0]["file_name"] = "../../secret.jpg"
        dump(path, found)
    shots = detection_section.shots(Run.load(out))
    names = [row["name"] for row in (*shots["first"], *shots["different"])]
    assert "secret.jpg" not in names
    assert len(names) == 9


def test_kinds_decide_what_is_shown_as_correct():
    truth = [{"class": "cat", "box": [0, 0, 10, 10]}]
    truth.append({"class": "dog", "box": [50, 0, 60, 10], "difficult": True})
    found = [
        {"class": "dog", "score": 0.9, "box": [50, 0, 60, 10], "kind": "ignored"},
        {"class": "cat", "score": 0.8, "box": [0, 0, 10, 10], "kind": "correct"},
        {"class": "cat", "score": 0.7, "box": [0, 0, 10, 9], "kind": "duplicate"},
    ]
    shown = gallery.judged({"ground_truth": truth, "detections": found})
    assert [(d["score"], d["correct"], d["kind"]) for d in shown] == [(0.8, True, "correct")]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "other"}', None])
def test_results_of_an_older_version_say_what_is_missing(tmp_path, damage):
    out = make_run(tmp_path, seeds=1)
    for name in ("pr.json", "errors.json"):
        for path in out.glob(f"detection/*/*/{name}"):
            path.unlink()
            if damage is not None:
                path.write_text(damage)
    for path in out.glob("detection/*/*/result.json"):
        result = json.loads(path.read_text())
        del result["coco"]
        dump(path, result)
    for path in out.glob("detection/*/*/detections.json"):
        found = json.loads(path.read_text())
        for picture in found:
            for detection in picture["detections"]:
                del detection["kind"]
        dump(path, found)
    page = report.render(out)
    Page(page)  # well formed
    assert "No curves:" in section(page, "curves")
    assert "No kinds of errors:" in section(page, "errors")
    assert "COCO" not in section(page, "ap")
    assert '<rect class="good"' in section(page, "detections")  # judged by overlap


def test_both_metrics_stand_in_the_table_of_ap(run_folder, text):
    part = section(text, "ap")
    head = re.findall(r'<th scope="col">([^<]*)</th>', part[: part.index("</thead>")])
    assert head == [
        "Initialisation",
        "AP",
        "AP50",
        "AP75",
        "COCO AP",
        "COCO AP50",
        "COCO AP75",
        "n",
    ]
    row = table_after(part, "Mean ± standard deviation")[0]
    values = [result["coco"]["AP75"] for result in stored(run_folder, "random", "result.json")]
    assert row[6].startswith(f"{np.mean(values):.1f} <small>± {np.std(values, ddof=1):.1f}")
    assert "Fine-tuned, COCO AP50" in part
