"""What the report shows, as plain data: figures, kinds of errors, pictures, what was skipped."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.report import report_data
from pipeline.report.report_data import PipelineRun, ap_curves_of_pair, per_class_rows, seed_rows
from tests.pipeline.report.run_fixture import (
    ARM_LEVELS,
    CLASSES,
    change_record,
    dump,
    dump_lines,
    evaluate_elsewhere,
    make_run,
    picture,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(run_folder) -> PipelineRun:
    return PipelineRun.load(run_folder)


def stored(out: Path, arm: str, file: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"detection/{arm}/*/{file}"))]


def ap50(arm: str, seed: int) -> float:
    """As `make_run` writes it."""
    return ARM_LEVELS[arm] + 2.5 * math.sin(7 * seed + ARM_LEVELS[arm])


# Average precision


@pytest.mark.parametrize(
    ("pair", "random", "pretrained"),
    [
        ("fine_tuned", "random", "pretrained"),
        ("frozen", "random_frozen", "pretrained_frozen"),
    ],
)
def test_curves_of_a_pair_are_those_of_its_arms_and_their_means(tmp_path, pair, random, pretrained):
    levels = {random: (10.0, 20.0), pretrained: (40.0, 60.0)}
    for arm, values in levels.items():
        for seed, ap in enumerate(values):
            rows = [{"iteration": i, "AP50": ap * i / 100, "AP": 1.0} for i in (100, 200)]
            dump_lines(tmp_path / f"detection/{arm}/seed-{seed}/curve.jsonl", rows)
    detection = {arm: [{"seed": 0}, {"seed": 1}] for arm in levels}
    curves = ap_curves_of_pair(PipelineRun(tmp_path, {}, {"detection": detection}), pair, "AP50")
    assert curves == {
        "random": ({0: [(100, 10), (200, 20)], 1: [(100, 20), (200, 40)]}, [(100, 15), (200, 30)]),
        "pretrained": (
            {0: [(100, 40), (200, 80)], 1: [(100, 60), (200, 120)]},
            [(100, 50), (200, 100)],
        ),
    }


def test_rows_of_seeds_hold_random_first_and_only_seeds_of_both_arms():
    detection = {
        "random": [{"seed": 0, "AP50": 10.0}, {"seed": 1, "AP50": 12.0}, {"seed": 2, "AP50": 9.0}],
        "pretrained": [{"seed": 1, "AP50": 32.0}, {"seed": 0, "AP50": 30.0}],
        "random_frozen": [{"seed": 0, "AP50": 1.0}],
        "pretrained_frozen": [{"seed": 0, "AP50": 2.0}],
    }
    assert seed_rows(detection, "fine_tuned", "AP50") == [(0, 10.0, 30.0), (1, 12.0, 32.0)]
    assert seed_rows(detection, "frozen", "AP50") == [(0, 1.0, 2.0)]


def test_figures_per_class_are_means_over_the_seeds_random_first():
    detection = {
        "random": [
            {"per_class": {"cat": 10.0, "ant": 1.0}},
            {"per_class": {"cat": 20.0, "ant": float("nan")}},
            {"per_class": {"cat": 60.0}},
            {"per_class": None},
        ],
        "pretrained": [{"per_class": {"cat": 50.0, "dog": 7.0}}, {"per_class": {"cat": 60.0}}],
    }
    assert per_class_rows(detection, "fine_tuned") == [
        ("ant", 1.0, None),
        ("cat", 30.0, 55.0),
        ("dog", None, 7.0),
    ]


def test_mean_curve_takes_shared_iterations_only():
    assert report_data.mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0), (3, 1.0)]]) == [(2, 5.0)]
    assert report_data.mean_curve([]) == []


def test_precision_is_the_mean_over_the_seeds(run, run_folder):
    for arm in ARM_LEVELS:
        curves = report_data.precision_curves(run, arm)
        assert set(curves) == set(CLASSES)
        for name, curve in curves.items():
            files = stored(run_folder, arm, "pr.json")
            values = [file["classes"][name]["0.50"]["precision"] for file in files]
            assert curve == pytest.approx(np.mean(values, axis=0).tolist())


def test_lines_end_where_precision_is_zero():
    curve = [1.0, 0.5, 0.0, 0.0]
    assert report_data.reached(curve) == [(0, 1.0), (0.01, 0.5), (0.02, 0.0)]
    assert report_data.reached([0.5] * 101)[-1] == (1.0, 0.5)
    assert report_data.reached([]) == []


def test_precision_at_three_levels_and_the_highest_recall():
    curve = [1 - level / 100 for level in range(80)] + [0.0] * 21
    assert report_data.precision_figures(curve) == [0.75, 0.5, 0.25, 0.79]
    assert report_data.precision_figures(None) == [None] * 4


# Kinds of errors


def test_kinds_of_errors_are_means_over_the_seeds(run, run_folder):
    rows = report_data.error_rows(run)
    assert [row["arm"] for row in rows] == list(ARM_LEVELS)
    for row in rows:
        files = stored(run_folder, row["arm"], "errors.json")
        kinds = [*report_data.ERROR_KINDS, "missed"]
        assert list(row["counts"]) == kinds
        for key, name in (("counts", "best_scored"), ("gained", "AP50_gained")):
            for kind, value in row[key].items():
                assert value == pytest.approx(np.mean([file[name][kind] for file in files]))
        counts = [file["confusions"][0]["count"] for file in files]
        assert row["confusions"] == {("bird", "fish"): pytest.approx(np.mean(counts))}
        assert (row["n"], row["num_objects"]) == (3, 100)


def test_the_most_frequent_confusions_come_first():
    arms = [{"confusions": {("a", "b"): 1.0, ("c", "d"): 4.0}}, {"confusions": {("a", "b"): 5.0}}]
    assert report_data.confusion_rows(arms) == [
        {"pair": ("a", "b"), "counts": [1.0, 5.0]},
        {"pair": ("c", "d"), "counts": [4.0, 0.0]},
    ]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "other"}', None])
def test_results_of_an_older_version_leave_errors_and_curves_empty(tmp_path, damage):
    out = make_run(tmp_path, seeds=1)
    for name in ("pr.json", "errors.json"):
        for path in out.glob(f"detection/*/*/{name}"):
            path.unlink()
            if damage is not None:
                path.write_text(damage)
    found = PipelineRun.load(out)
    assert report_data.error_rows(found) == []
    assert report_data.precision_curves(found, "random") == {}


# Pictures with boxes


def pictures(out: Path) -> dict:
    found = PipelineRun.load(out)
    return report_data.detection_pictures(
        found, found.results["detection"], "detections.json", found.dataset()
    )


def change(path: Path, kinds: dict[int, list[str]]) -> None:
    """Give the first boxes of some pictures other kinds."""
    found = json.loads(path.read_text())
    for number, changed in kinds.items():
        for detection, kind in zip(found[number]["detections"], changed, strict=False):
            detection["kind"] = kind
    dump(path, found)


def test_first_pictures_and_those_with_the_largest_difference(tmp_path):
    """Pretrained finds one object in each; random none, but two in 9 and 1, and one in 7."""
    out = make_run(tmp_path, seeds=2)
    random = out / "detection/random/seed-0/detections.json"
    two = ["correct", "correct"]
    change(random, {1: two, 9: two, 7: ["localisation", "correct"]})
    found = pictures(out)
    assert (found["seed"], found["pair"], found["num_saved"]) == (0, "fine-tuned", 10)
    assert [list(row["arms"]) for row in found["first"]] == [["random", "pretrained"]] * 6
    assert [row["name"] for row in found["first"]] == [f"{i:06d}.jpg" for i in range(6)]
    shown = [(row["name"], row["lead"]) for row in found["different"]]
    assert shown == [("000006.jpg", 1), ("000008.jpg", 1), ("000009.jpg", -1)]
    change(out / "detection/pretrained/seed-0/detections.json", {8: two})
    shown = [(row["name"], row["lead"]) for row in pictures(out)["different"]]
    assert shown == [("000008.jpg", 2), ("000006.jpg", 1), ("000009.jpg", -1)]


def test_as_many_boxes_as_objects_and_kinds_decide(run_folder):
    truth = [{"class": "cat", "box": [0, 0, 10, 10]}]
    truth.append({"class": "dog", "box": [50, 0, 60, 10], "difficult": True})
    boxes = [
        {"class": "cat", "score": 0.7, "box": [0, 0, 10, 9], "kind": "duplicate"},
        {"class": "dog", "score": 0.9, "box": [50, 0, 60, 10], "kind": "ignored"},
        {"class": "cat", "score": 0.8, "box": [0, 0, 10, 10], "kind": "correct"},
    ]
    shown = report_data.displayed({"ground_truth": truth, "detections": boxes})
    assert [(d["score"], d["correct"]) for d in shown] == [(0.8, True)]
    told = report_data.sentence({"ground_truth": truth}, shown)
    assert told == "Labelled: cat, dog. Detected: cat 0.80 correct."
    assert report_data.displayed({}) == []


def test_pictures_outside_the_data_set_are_never_read(tmp_path):
    out = make_run(tmp_path / "run", seeds=1)
    (tmp_path / "secret.jpg").write_bytes((out / "data/VOC2007/JPEGImages/000000.jpg").read_bytes())
    for arm in ARM_LEVELS:
        path = out / f"detection/{arm}/seed-0/detections.json"
        found = json.loads(path.read_text())
        found[0]["file_name"] = "../../secret.jpg"
        dump(path, found)
    found = pictures(out)
    names = [row["name"] for row in (*found["first"], *found["different"])]
    assert "secret.jpg" not in names
    assert len(names) == 9


def test_large_pictures_are_made_smaller(tmp_path):
    from PIL import Image

    Image.effect_noise((3000, 2000), 100).save(tmp_path / "big.png")
    found = report_data.embed(tmp_path / "big.png", 600)
    assert found is not None
    assert (found.width, found.height) == (600, 400)
    (tmp_path / "big.png").write_bytes(b"no picture")
    assert report_data.embed(tmp_path / "big.png", 600) is None


# Other sets


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    out = make_run(tmp_path / "run")
    evaluate_elsewhere(out, "real_scenes", tmp_path / "real_scenes")
    return out


def test_figures_are_those_of_the_other_set(elsewhere):
    (other,) = report_data.other_sets(PipelineRun.load(elsewhere))
    assert (other["name"], other["outdated"]) == ("real_scenes", [])
    for arm, rows in other["detection"].items():
        assert [row["seed"] for row in rows] == [0, 1, 2]
        assert [row["AP50"] for row in rows] == pytest.approx([ap50(arm, s) - 10 for s in range(3)])
        assert {row["num_test_images"] for row in rows} == {10}
    assert len(other["pictures"]["first"]) == 6


def test_a_detector_trained_again_does_not_count(elsewhere):
    seed = elsewhere / "detection/random/seed-1"
    model = seed / "model_final.pth"
    model.write_bytes(b"trained again")
    later = (seed / "eval-on-real_scenes.json").stat().st_mtime + 10
    os.utime(model, (later, later))
    (other,) = report_data.other_sets(PipelineRun.load(elsewhere))
    assert other["outdated"] == ["random/seed-1"]
    assert [row["seed"] for row in other["detection"]["random"]] == [0, 2]
    result = json.loads((seed / "eval-on-real_scenes.json").read_text())
    same = {"model_sha256": hashlib.sha256(b"trained again").hexdigest()}
    dump(seed / "eval-on-real_scenes.json", result | same)
    os.utime(model, (later + 99, later + 99))
    (other,) = report_data.other_sets(PipelineRun.load(elsewhere))
    assert other["outdated"] == [], "only copied"


def test_names_that_look_like_other_files(elsewhere, tmp_path):
    evaluate_elsewhere(elsewhere, "typing-errors", tmp_path / "typing-errors")
    names = [other["name"] for other in report_data.other_sets(PipelineRun.load(elsewhere))]
    assert names == ["real_scenes", "typing-errors"]


def test_sets_without_pictures_and_no_set_at_all(elsewhere, tmp_path):
    (tmp_path / "real_scenes").rename(tmp_path / "gone")
    (other,) = report_data.other_sets(PipelineRun.load(elsewhere))
    assert other["pictures"]["first"] == []
    for path in elsewhere.glob("detection/*/seed-*/eval-on-*"):
        path.unlink()
    assert report_data.other_sets(PipelineRun.load(elsewhere)) == []


# Pretraining


def rewrite_metrics(out: Path, change) -> None:
    path = out / "pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    dump_lines(path, change(rows))


def test_curves_hold_every_number_over_its_epoch(run):
    curves = report_data.metric_curves(run)
    assert curves["loss"][0] == (0.2, pytest.approx(4.78 + 0.1 * math.sin(10)))
    assert [x for x, _ in curves["knn_top1"]] == [0, 5, 10, 15, 20]
    assert len(curves["fa_cosine"]) == 96  # not those that are "nan"


@pytest.mark.parametrize("shares", [None, [], ["nan", 0.5], 3, [True]])
def test_histograms_that_are_none_are_left_out(tmp_path, shares):
    out = make_run(tmp_path, seeds=1)
    rewrite_metrics(out, lambda rows: [
        row | {"positives": shares, "negatives": shares} if row["kind"] == "similarity" else row
        for row in rows
    ])  # fmt: skip
    assert report_data.last_histogram(PipelineRun.load(out)) == {}


def test_the_last_histogram_is_drawn_as_its_outline(run):
    outlines = report_data.last_histogram(run)
    assert set(outlines) == {"positives", "negatives"}
    corners = outlines["positives"]
    assert (corners[0], corners[-1]) == ((-1.0, 0.0), (1.0, 0.0))
    raised = [(round(x, 9), y) for x, y in corners if y > 0]
    assert raised == [(0.8, 0.25), (0.9, 0.25), (0.9, 0.75), (1.0, 0.75)]


def test_rows_of_pictures_are_cut_into_tiles(run):
    views = report_data.picture_rows(run, "views")
    assert [len(row["tiles"]) for row in views] == [3] * 6
    assert {(tile.width, tile.height) for row in views for tile in row["tiles"]} == {(96, 96)}
    assert [len(row["tiles"]) for row in report_data.picture_rows(run, "neighbours")] == [7] * 6


def make_gallery(out: Path, name: str, num_same: int, num_rows: int = 4) -> None:
    """Rows of a query and six neighbours, `num_same` of its class."""
    folder = out / "pretrain/pictures"
    rows = [
        {
            "query": f"q{i}",
            "query_label": CLASSES[i % 3],
            "neighbour_labels": [CLASSES[i % 3]] * num_same
            + [CLASSES[(i + 1) % 3]] * (6 - num_same),
        }
        for i in range(num_rows)
    ]
    picture(folder / f"{name}.jpg", 7 * 100 - 4, num_rows * 100 - 4, 1)
    dump(folder / f"{name}.json", {"num_bank": 321, "rows": rows})


@pytest.fixture
def galleries(tmp_path) -> Path:
    out = make_run(tmp_path, seeds=1)
    make_gallery(out, "neighbours_before", 2)
    make_gallery(out, "neighbours", 5)
    return out


def test_neighbours_of_the_same_queries_with_their_counts(galleries):
    found = report_data.neighbours(PipelineRun.load(galleries))
    assert (len(found["rows"]), found["bank"]) == (4, 321)
    for i, row in enumerate(found["rows"]):
        assert row["query"] == CLASSES[i % 3]
        counts = [(title, s["num_same"], s["k"]) for title, s in row["states"].items()]
        assert counts == [("Before pretraining", 2, 6), ("After pretraining", 5, 6)]
        labels = [label for _, label in row["states"]["After pretraining"]["tiles"]]
        assert labels == [CLASSES[i % 3]] * 6 + [CLASSES[(i + 1) % 3]]
    assert found["totals"] == [("Before pretraining", 8, 24), ("After pretraining", 20, 24)]


def test_neighbours_before_of_other_queries_are_left_out(galleries):
    make_gallery(galleries, "neighbours_before", 2, num_rows=3)
    found = report_data.neighbours(PipelineRun.load(galleries))
    assert [list(row["states"]) for row in found["rows"]] == [["After pretraining"]] * 4
    (galleries / "pretrain/pictures/neighbours.jpg").unlink()
    assert report_data.neighbours(PipelineRun.load(galleries)) == {}


def test_without_labels_nothing_is_counted(galleries):
    for name in ("neighbours_before", "neighbours"):
        path = galleries / f"pretrain/pictures/{name}.json"
        found = json.loads(path.read_text())
        for row in found["rows"]:
            row["query_label"], row["neighbour_labels"] = None, [None] * 6
        dump(path, found)
    found = report_data.neighbours(PipelineRun.load(galleries))
    assert found["totals"] == []
    assert found["rows"][0]["states"]["After pretraining"]["num_same"] is None


# Skipped or failed


@pytest.fixture
def clean(tmp_path) -> Path:
    """A run in which nothing was skipped."""
    out = make_run(tmp_path / "clean", seeds=1)
    dump(out / "shards/index.json", {"skipped": []})
    dump(out / "pretrain/summary.json", {"steps": 1000, "num_skipped_samples": 0})
    return out


def items(out: Path) -> list[tuple[str, str, str, str]]:
    """Every entry, gravest first."""
    groups = report_data.skipped_groups(report_data.skipped_of_pipeline(PipelineRun.load(out)))
    return [(i.kind, i.where, i.what, i.why) for group in groups for i in group["rows"]]


def test_nothing_was_skipped(clean):
    assert items(clean) == []


def test_a_failed_stage_is_told_with_the_end_of_its_log(clean):
    change_record(clean, "random/seed-0", status="failed", exit_status=1)
    (clean / "stages/pretrained/seed-0.json").unlink()
    (clean / "logs/random").mkdir(parents=True)
    (clean / "logs/random/seed-0.log").write_text("# command\nfirst\nsecond\n\nerror: memory\n")
    assert items(clean) == [
        ("failed", "random/seed-0", "the stage",
         "exit status 1. The log ends: first\nsecond\nerror: memory"),
        ("not run", "pretrained/seed-0", "the stage", "not run"),
    ]  # fmt: skip


def test_steps_that_were_not_finite_are_told(clean):
    folder = clean / "pretrain"
    row = {"step": 7, "policy": "skip", "loss": "nan", "gradient_norm": "inf"}
    dump(folder / "nonfinite/step-00000007.json", row)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for step in (7, 9):
            event = {"kind": "event", "step": step, "num_skipped_steps": 1, "message": f"at {step}"}
            file.write(json.dumps(event) + "\n")
        file.write(json.dumps({"kind": "train", "step": 1000, "num_overflow_steps": 4}) + "\n")
    assert items(clean) == [
        ("damaged", "pretrain", "metrics.jsonl", "has 1 damaged lines"),
        ("not finite", "pretrain", "step 7, left out",
         "loss nan, gradient norm inf; batch: nonfinite/step-00000007.json"),
        ("not finite", "pretrain", "step 9, left out", "at 9"),
        ("overflow", "pretrain", "4 steps",
         "gradients too large for the loss scale of fp16; it was lowered"),
    ]  # fmt: skip


def test_alarms_and_notes_are_told_and_figures_are_not(clean):
    events = [
        {"collapse": {"feature_std": 0.1}, "message": "collapsed"},
        {"message": "wandb went away"},
        {"message": "kNN before training", "knn_top1_initial": 0.2},
        {"message": "stopped by SIGTERM after step 4"},
    ]
    rewrite_metrics(
        clean, lambda rows: [*rows, *({"kind": "event", "step": 1000} | event for event in events)]
    )
    assert items(clean) == [
        ("alarm", "pretrain", "step 1000", "collapsed"),
        ("noted", "pretrain", "step 1000", "wandb went away"),
    ]
    assert report_data.collapse_alarms(PipelineRun.load(clean)) == ["collapsed"]


def test_what_detection_did_not_use_is_told_once(clean):
    for arm in ("random", "pretrained"):
        path = clean / f"detection/{arm}/seed-0/result.json"
        found = json.loads(path.read_text())
        dump(path, found | {"classes_without_test_objects": ["tool"], "num_test_images": 60})
        (path.parent / "log.txt").write_text(
            "Removed 9 images with no usable annotations. 3 images left.\n"
            "Removed 12 images with no usable annotations. 188 images left.\n"
        )
    assert items(clean) == [
        ("left out", "detection", "class tool", "no object in the test pictures"),
        ("left out", "detection", "40 of 100 test pictures", "TEST.NUM_IMAGES"),
        ("left out", "detection", "12 training pictures", "no object in them"),
    ]


def test_every_replaced_sample_is_told_once(clean):
    rows = [{"sample": i % 23, "reason": f"byte {i}", "rank": 1} for i in range(25)]
    dump_lines(clean / "pretrain/bad_samples.jsonl", [*rows, {"sample": 99}])
    found = items(clean)
    assert found[0] == ("replaced", "pretrain", "sample 0", "byte 0")
    assert [what for _, _, what, _ in found] == [f"sample {i}" for i in [*range(23), 99]]
    assert found[-1][3] == "no reason was kept"
    dump(clean / "pretrain/summary.json", {"steps": 1000, "num_skipped_samples": 24})
    assert len(items(clean)) == 24
    (clean / "pretrain/bad_samples.jsonl").unlink()
    assert items(clean) == [
        ("replaced", "pretrain", "24 samples", "did not decode during pretraining")
    ]


def test_many_of_a_kind_are_counted(clean):
    entries = [{"file": f"{i}.jpg", "reason": "does not decode"} for i in range(70)]
    dump(clean / "shards/index.json", {"skipped": entries})
    (group,) = report_data.skipped_groups(report_data.skipped_of_pipeline(PipelineRun.load(clean)))
    assert (group["count"], len(group["rows"])) == (70, report_data.MOST_OF_A_KIND)
