"""The page: its data functions, and what it says of made-up runs."""

import base64
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import results
from pipeline.plan import read_run
from pipeline.report import charts, pictures, report, runs
from pipeline.report.pictures import Album
from tests.pipeline.report.run_fixture import (
    ARM_LEVELS,
    CLASSES,
    GAINS,
    ap50,
    change,
    dump,
    dump_lines,
    evaluate_elsewhere,
    make_compare,
    make_run,
    make_study,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    out = make_run(tmp_path_factory.mktemp("run"))
    evaluate_elsewhere(out, "real_scenes")
    evaluate_elsewhere(out, "typing-errors")  # a name that looks like another file
    return out


@pytest.fixture(scope="module")
def arms(run_folder) -> dict[str, list[Path]]:
    return report.seed_folders(run_folder, results.assemble(run_folder)["detection"])


@pytest.fixture
def _no_charts(monkeypatch) -> None:
    """They take most of a page's time."""
    monkeypatch.setattr(charts, "line_chart", lambda *_, **__: None)
    monkeypatch.setattr(charts, "interval_chart", lambda *_: None)
    monkeypatch.setattr(charts, "matrix_chart", lambda *_: None)


# Data


def test_curves_are_means_over_the_seeds_with_their_deviation(arms):
    assert list(arms) == list(ARM_LEVELS)
    curves = report.ap_curves(arms)
    finals = [ap50("random", seed) for seed in range(2)]
    mean, std = statistics.fmean(finals), statistics.stdev(finals)
    assert [point[0] for point in curves["Random"]] == [100, 200, 400]
    assert curves["Random"][-1] == pytest.approx((400, mean, mean - std, mean + std))
    assert len(curves["Pretrained, backbone frozen"]) == 3
    assert report.mean_curve([{1: 2.0, 2: 4.0}, {2: 6.0, 3: 1.0}])[0][:2] == (2, 5.0)
    assert report.mean_curve([{1: 2.0}]) == [(1, 2.0)], "a single curve has no band"
    assert report.mean_curve([]) == []


def test_precision_is_the_mean_over_classes_and_seeds(arms):
    line = report.precision_curves(arms)["Random"]
    top = statistics.fmean(ap50("random", seed) / 50 for seed in range(2))
    assert line[0] == pytest.approx((0, top))
    assert line[40] == pytest.approx((0.4, top / 2))
    assert line[80:] == [(level / 100, 0) for level in range(80, 101)]


def test_curves_and_figures_of_another_form_are_left_out(tmp_path):
    out = make_run(tmp_path, seeds=1)
    seed = out / "detection/random/seed-0"
    whole = json.loads((seed / "pr.json").read_text())["classes"]["bird"]
    others = [{"0.50": {"precision": [1.0] * 28}}, {"0.50": {}}, {"0.50": 3}, [], None]
    classes = dict(enumerate([*others, whole]))
    change(seed / "pr.json", classes=classes)
    line = report.precision_curves({"random": [seed]})["Random"]
    assert [value for _, value in line] == whole["0.50"]["precision"]
    change(seed / "result.json", iterations=[400])
    change(out / "convert/backbone.json", dropped=3.5)
    assert "Precision over recall" in report.render(out)


def test_figures_per_class_are_means_over_the_seeds():
    detection = {
        "random": [{"per_class": {"cat": 10.0, "ant": 1.0}}, {"per_class": {"cat": 20.0}},
                   {"per_class": {"cat": 60.0, "ant": float("nan")}}, {"per_class": None}],
        "unused": [],
        "pretrained": [{"per_class": {"cat": 50.0, "dog": 7.0}}, {"per_class": {"cat": 60.0}}],
    }  # fmt: skip
    assert report.class_rows(detection) == [
        ("ant", [1.0, None]), ("cat", [30.0, 55.0]), ("dog", [None, 7.0]),
    ]  # fmt: skip


def test_kinds_of_errors_are_means_over_the_seeds(arms):
    rows = report.error_rows(arms)
    assert [row["title"] for row in rows] == [results.arm_title(arm) for arm in ARM_LEVELS]
    mean = statistics.fmean(ap50("pretrained", seed) for seed in range(2))
    assert rows[1]["counts"] == {
        kind: pytest.approx(mean if kind == "correct" else 100 - mean)
        for kind in report.ERROR_KINDS
    }
    assert rows[1]["gained"]["localisation"] == pytest.approx(mean / 20)
    assert rows[1]["gained"]["missed"] == pytest.approx(6 * mean / 20)
    assert (rows[1]["n"], rows[1]["num_objects"]) == (2, 100)


def test_other_sets_and_detectors_that_were_trained_again(run_folder, page):
    first, second = results.assemble(run_folder)["other_sets"]
    assert (first["name"], first["outdated"]) == ("real_scenes", [])
    assert second["name"] == "typing-errors"
    tables = {table["metric"]: table for table in first["tables"]}
    values = {row["variant"]: row["values"] for row in tables["AP50"]["rows"]}
    for arm in ARM_LEVELS:
        assert values[arm] == pytest.approx({seed: ap50(arm, seed) - 10 for seed in range(2)})
    row = tables["AP50"]["rows"][0]
    low, high = row["picture_interval"]
    cell = f"{row['mean']:.1f} ± {row['std']:.1f} [{low:.1f}, {high:.1f}]"
    assert page.cells("real_scenes: mean")[0][2] == cell
    row = tables["AP50"]["comparisons"][0]
    low, high = row["picture_interval"]
    cells = {cells[0]: cells for cells in page.cells("real_scenes: differences")}
    assert cells["pretrained - random, AP50"][4] == f"{low:+.2f} to {high:+.2f}"
    stored = json.loads((run_folder / "results.json").read_text())
    assert [one["name"] for one in stored["other_sets"]] == ["real_scenes", "typing-errors"]

    seed = run_folder / "detection/random/seed-1"
    model, path = seed / "model_final.pth", seed / "eval-on-real_scenes.json"
    before = path.read_text()
    model.write_bytes(b"trained again")
    try:
        for digest, outdated in (("0" * 64, ["random/seed-1"]),
                                 (hashlib.sha256(b"trained again").hexdigest(), [])):  # fmt: skip
            change(path, model_sha256=digest)
            later = path.stat().st_mtime + 10
            os.utime(model, (later, later))
            assert results.assemble(run_folder)["other_sets"][0]["outdated"] == outdated
    finally:
        model.unlink()
        path.write_text(before)


def test_pretraining_of_every_variant(run_folder, tmp_path):
    found = report.pretrainings(run_folder, read_run(run_folder), ["data", "pretrain"])
    assert list(found) == ["pretrained"]
    curve = report.pretraining_curves(found, "knn_top1")["pretrained"]
    assert [x for x, _ in curve] == [0, 5, 10, 15, 20]
    assert len(report.pretraining_curves(found, "fa_cosine")["pretrained"]) == 17, "not the nan"
    shown = {
        title: about
        for title, about, _ in pictures.pretraining_pictures(run_folder / "pretrain", Album())
    }
    assert list(shown) == [
        "Augmented views", "Neighbours before pretraining", "Neighbours after pretraining",
    ]  # fmt: skip
    assert "12 of 18 neighbours" in shown["Neighbours after pretraining"]
    study = make_study(tmp_path)
    stages = [f"pretrain/{variant}/seed-{seed}" for seed in range(4) for variant in ("base", "fa")]
    labels = {"config": {"variants": {"fa": {"label": "with FA"}}}}
    found = report.pretrainings(study, labels, stages)
    assert {label: len(group) for label, group in found.items()} == {"base": 4, "with FA": 4}
    assert report.pretraining_curves(found, "loss")["base"][1][:2] == (20, pytest.approx(51.5 / 20))


@pytest.mark.usefixtures("_no_charts")
def test_what_a_run_left_out_or_alarmed_about(tmp_path):
    out = make_run(tmp_path, seeds=1)
    folder = out / "pretrain"
    assert runs.skipped(runs.read(folder), "pretrain") == []
    events = [
        {"collapse": {"feature_std": 0.1}, "message": "collapsed"},
        {"kind": "train", "num_overflow_steps": 2},
        {"message": "wandb went away"},
        {"message": "kNN before training", "knn_top1_initial": 0.2},
        {"message": "stopped by SIGTERM after step 4"},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
        file.writelines(json.dumps({"kind": "event", "step": 9} | row) + "\n" for row in events)
    rows = [{"sample": i % 3, "reason": f"byte {i}", "rank": 1} for i in range(5)]
    dump_lines(folder / "bad_samples.jsonl", [*rows, {"sample": 99}])
    found = [(i.kind, i.what, i.why) for i in runs.skipped(runs.read(folder), "pretrain")]
    assert found == [
        ("damaged", "metrics.jsonl", found[0][2]),
        ("damaged", "bad_samples.jsonl", "has 1 damaged line, left out: 6"),
        ("alarm", "step 9", "collapsed"),
        ("noted", "step 9", "wandb went away"),
        ("noted", "2 steps, left out", found[4][2]),
        *(("replaced", f"sample {i}", f"byte {i}") for i in range(3)),
    ]

    # With the stages', gravest first; a page says it.
    change(out / "stages/random/seed-0.json", status="failed", error="no <memory>")
    (out / "stages/pretrained/seed-0.json").unlink()
    run = read_run(out)
    items = report.skipped_items(out, run, ["shards"], [runs.read(folder)])
    assert [item.kind for item in items] == [
        *("failed", "damaged", "damaged", "alarm", *["replaced"] * 3, "left out", "not run"),
        *["noted"] * 2,
    ]
    assert (items[0].where, items[0].why) == ("random/seed-0", "no <memory>")
    assert (items[-4].what, items[-3].where) == ("broken.jpg", "pretrained/seed-0")
    entries = [{"file": f"{i}.jpg", "reason": "does not decode"} for i in range(70)]
    dump(out / "shards/index.json", {"skipped": entries})
    text = Page(report.render(out)).text
    assert "left out: 70;" in text
    assert "Alarm: pretrain, step 9: collapsed." in text
    assert ("49.jpg" in text, "50.jpg" in text) == (True, False)
    assert "Preliminary" in text


# The page


class Page(HTMLParser):
    """Collects what the tests look at."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def cells(self, caption: str) -> list[list[str]]:
        """The text of the body cells of the table with this in its caption."""
        table = next(
            t for t in self.source.split("<table")[1:] if caption in t.split("</caption>")[0]
        )
        rows = re.findall(r"<tr.*?</tr>", table.split("<tbody>")[1].split("</tbody>")[0], re.DOTALL)
        found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
        return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in found]


@pytest.fixture(scope="module")
def page(run_folder) -> Page:
    assert report.main([str(run_folder)]) == 0
    return Page((run_folder / "report.html").read_text())


def test_a_pipelines_page(page):
    gain = statistics.fmean(ap50("pretrained", seed) - ap50("random", seed) for seed in range(2))
    assert f"pretrained - random {gain:+.1f} points of AP50" in page.text[: page.text.index(".jpg")]
    assert page.text.index("000000.jpg") < page.text.index("Test set")
    rows = page.cells("Test set: mean")
    random = [ap50("random", seed) for seed in range(2)]
    expected = f"{statistics.fmean(random):.1f} ± {statistics.stdev(random):.1f}"
    assert rows[0][:3] == ["Random", rows[0][1], expected]
    assert [row[0] for row in page.cells("Test set: differences")][:3] == [
        "pretrained - random, AP", "pretrained - random, frozen, AP", "pretrained - random, AP50",
    ]  # fmt: skip
    assert page.cells("Labelled boxes")[0] == [CLASSES[0], "200 on 199", "100 on 99"]
    assert page.text.index("The labelled set") < page.text.index("Average precision")
    assert page.text.count("Hope for") + page.text.count("hope ") >= page.source.count('"chart"')
    words = [
        "What was taken for what",
        "Kinds of errors",
        "real_scenes",
        "Effective rank",
        "4.5e-07",
        "265 tensors",
    ]
    words += ["12 of 18", "broken.jpg", "commit 0123456789", "torch 2.15.0", "random/seed-1"]
    for word in (*words, *CLASSES, "x=<script>alert(1)</script>"):
        assert word in page.text
    assert "Preliminary" not in page.text


def test_a_page_needs_nothing_else_and_lets_nothing_in(page):
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page.source)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert len(page.source) < 6e6
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page.source)
    assert policy.replace("&#39;", "'") == (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert page.source.index("Content-Security-Policy") < page.source.index("<script>")
    used = set(re.findall(r"var\(--([\w-]+)\)", page.source)) - {"n", "box"}
    assert used <= charts.LIGHT.keys()


def test_a_studys_page(tmp_path):
    """The same template: variants, differences with intervals, failures, what is not finished."""
    out = make_study(tmp_path)
    published = {"protocol": "p", "rows": [{"init": "MoCo", "AP50": 81.5, "source": "s"}]}
    results.write(out, published=published)
    page = Page(report.render(out))
    assert re.search(r"Experiment compare Yes: fa helps \(shown\)\. fa - base \+3\.0", page.text)
    assert "Preliminary" in page.text
    assert "Mixed: stages ran at several commits: abc, abd." in page.text
    rows = {row[0]: row[1:] for row in page.cells("compare: mean")}
    assert rows["fa"][0] == "54.5 ± 1.2"
    assert rows["random"][:3] == ["–", "–", "10.0 ± 0.0"]
    rows = {row[0]: row[1:] for row in page.cells("compare: differences")}
    assert rows["fa - base, AP50"][0] == f"+{statistics.fmean(GAINS):.2f}"
    assert rows["fa - base, AP50"][3:] == ["4", "0.000", "better"]
    assert rows["fa - base, linear"][3] == "n = 1, no interval"
    assert "Not shown: fa helps" not in page.text
    assert page.text.index("Yes: fa helps") < page.text.index("Contents")
    assert ["MoCo", "–", "81.50", "–", "s"] in page.cells("as published")
    assert "no <memory>" in page.text
    for section in ("detections", "errors", "other-sets", "conversion"):
        assert f'<section id="{section}"' not in page.source
    assert page.source.count('class="chart"') == 3, "none of a single difference"


@pytest.mark.usefixtures("_no_charts")
@pytest.mark.parametrize("seeds", [4, 1])
def test_the_page_of_a_comparison_begins_with_question_and_answer(tmp_path, seeds):
    out = make_compare(tmp_path, seeds)
    page = Page(report.render(out))
    gain = statistics.fmean(GAINS[:seeds])
    sure = "95 % interval +2.5 to +3.4, n = 4 pretraining seeds."
    answer = "Yes:" if seeds > 1 else "One seed cannot tell:"
    sure = sure if seeds > 1 else "n = 1, no interval: it may be chance."
    assert "Data set" not in page.text
    (out / "data/seed-0").mkdir(parents=True)
    (out / "data/seed-0/dataset.json").write_text('{"name": "of seed 0", "kind": "letters"}')
    change(out / "experiment.json", dataset="data/seed-0")
    assert "Data set of seed 0 (letters)" in Page(report.render(out)).text
    line = f"Does FA help? {answer} fa - base {gain:+.1f} points of AP50, {sure}"
    assert line in page.text[: page.text.index("Contents")]
    assert "kNN top-1, 95 %" not in page.text, "one answer; the table shows the others"
    rows = page.cells("by every metric")
    assert [row[0] for row in rows] == [
        "AP50, fine-tuned", "AP50, backbone frozen", "linear top-1", "kNN top-1",
    ]  # fmt: skip
    if seeds == 1:
        assert rows[1][1:] == ["4.0", "8.0", "9.6", "fa - base", "+1.55", "–", *rows[1][7:]]
        assert [row[7:] for row in rows] == [["n = 1, no interval", "–"]] * 4
        head = page.source[: page.source.index('<nav class="contents"')]
        assert head.count('class="single"') == 4
        assert 'class="verdict single"' in head
    else:
        assert rows[0][1:5] == ["20.0 ± 0.0", "24.0 ± 0.0", f"{24 + gain:.1f} ± 0.3", "fa - base"]
        assert rows[0][5:] == [f"{gain:+.2f}", rows[0][6], "4", "better"]
        assert rows[3][1] == "–"
    for path in out.glob("detection/*/*/result.json"):
        change(path, AP50=0.5)
    text = Page(report.render(out)).text
    assert re.search(
        r"help\? AP near 0\. .* labels\. One seed .* points of linear top-1, n = 1", text
    )


OTHER_FORM = {"format": "fa-errors-1", "classes": 5, "splits": [], "rows": 3, "name": {}}
OTHER_FORM |= {"lists": [{}], "samples": [3], "repaired": []}


# Patterns of one row are of sections that do not read each other's files.
@pytest.mark.usefixtures("_no_charts")
@pytest.mark.parametrize(
    "patterns",
    [
        ("pretrain/*", "detection/*/*/curve.jsonl", "data/dataset.json"),
        ("pretrain/pictures/*.json", "detection/*/*/pr.json", "convert/*.json",
         "detection/random/*/result.json"),
        ("detection/*/*/detections.json", "detection/*/*/errors.json", "*/linear.json",
         "detection/*/*/labels.json"),
    ],
    ids=lambda patterns: patterns[0],
)  # fmt: skip
@pytest.mark.parametrize("content", [None, "[1, {}]", json.dumps(OTHER_FORM)])
def test_any_file_that_is_missing_or_of_another_form_leaves_a_page(
    run_folder, tmp_path, patterns, content
):
    subprocess.run(["cp", "-r", str(run_folder), str(tmp_path / "run")], check=True)
    run = tmp_path / "run"
    for path in [path for pattern in patterns for path in run.glob(pattern) if path.is_file()]:
        path.unlink() if content is None else path.write_text(content)
    assert "What ran" in Page(report.render(run)).text


@pytest.mark.usefixtures("_no_charts")
def test_pictures_of_a_set_elsewhere_are_found_from_a_moved_run_or_missed_aloud(
    run_folder, tmp_path
):
    run, labels = tmp_path / "deep/er/run", tmp_path / "labels"
    shutil.copytree(run_folder, run)
    (run / "data").rename(labels)
    change(run / "experiment.json", dataset="../../labels",
           config={"data": {"dataset": str(labels)}})  # fmt: skip
    found, before = (Page(report.render(folder)) for folder in (run, run_folder))
    assert found.source.count("<image ") == before.source.count("<image ") > 0
    assert "no such folder" not in found.text
    labels.rename(tmp_path / "moved")
    missed = Page(report.render(run))
    assert missed.source.count("<image ") == 0
    assert f"{labels} no such folder, so no picture of it is shown" in missed.text


def test_one_seed_nothing_at_all_and_no_run(tmp_path, capsys):
    page = Page(report.render(make_run(tmp_path / "a", seeds=1)))
    assert re.search(
        r"One seed cannot tell: pretrained - random \S+ points of AP50, n = 1", page.text
    )
    table = page.source.split("Test set: mean")[2].split("</table>")[0]
    assert table.count('<tr class="single">') == table.count("n = 1, no interval") == 4
    assert "<summary>Differences of one seed (n = 1, no interval" in page.source
    assert "Paired differences" not in page.source, "no picture of a difference by chance"
    dump(tmp_path / "b/experiment.json", {"format": "fa-stage-2", "plan": ["data", "pretrain"]})
    assert "data the stage not run" in Page(report.render(tmp_path / "b")).text
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert report.main([str(tmp_path / "aa")]) == 2
    assert f"no such folder; did you mean {tmp_path}/" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_charts")
@pytest.mark.parametrize("lowest", [0.5, 40.0])
def test_ap_near_zero_is_said_instead_of_a_difference(tmp_path, lowest):
    out = make_run(tmp_path)
    for arm in ("random", "pretrained"):
        for path in out.glob(f"detection/{arm}/*/result.json"):
            change(path, AP50=lowest if arm == "pretrained" else 0.1)
    text = Page(report.render(out)).text
    is_all = lowest < results.NEAR_ZERO
    assert (
        "AP near 0. AP50 is below 3 for Random, Pretrained: trained too short" in text
    ) is is_all
    assert ("points of AP50, " in text) is not is_all
    named = "Random, Pretrained" if is_all else "Random"
    assert f"AP50 near 0: {named}: trained too short." in text


def test_the_confusion_matrix_counts_every_object_and_detection(tmp_path):
    """Rows add up to objects, columns to detections."""
    kinds = dict.fromkeys(report.ERROR_KINDS, 0)
    cat = {"num_objects": 10, "best_scored": kinds | {"correct": 6, "background": 2, "missed": 4}}
    dog = {"num_objects": 5, "best_scored": kinds | {"correct": 2, "confusion": 3, "missed": 3}}
    taken = [{"object": "cat", "taken_for": "dog", "count": 3}]
    for seed in range(2):
        dump(tmp_path / f"{seed}/errors.json", {"format": "fa-errors-1", "confusions": taken,
                                                "classes": {"dog": dog, "cat": cat}})  # fmt: skip
    told = report.confusion([tmp_path / "0", tmp_path / "1", tmp_path / "none"])
    assert told == (["cat", "dog"], [[6, 3, 1], [0, 2, 3], [2, 0, 0]])
    (title, chart), *none = report.confusion_charts({"random": [tmp_path / "0"]})
    assert (title, none) == ("Random", [])
    assert "cat: most cat, 6 of 10; dog: most not found, 3 of 5" in chart


def test_numbers_of_tables():
    assert report.number(1.25) == "1.2"
    assert report.number(-3, 2, "+") == "\u22123.00"
    assert {report.number(value) for value in (None, float("nan"), True)} == {"\u2013"}


def test_writing_the_page_imports_no_library_of_the_stages():
    """A report is also written where they are not installed, and quickly."""
    code = "import sys, pipeline.report.report; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"matplotlib", "torch", "detectron2", "webdataset", "submitit", "pretrain", "detection"}
    assert not heavy & set(done.stdout.split())
