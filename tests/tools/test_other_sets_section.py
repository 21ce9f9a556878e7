"""Other sets in the report: what `--eval-on` left, and what was trained again since."""

import hashlib
import json
import os
import statistics
from pathlib import Path

import pytest

from tests.tools.run_fixture import ARM_LEVELS, CLASSES, dump, evaluate_elsewhere, make_run
from tests.tools.test_detection_section import section, stored, table_after
from tests.tools.test_report import Page
from tools.flow import report


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    out = make_run(tmp_path / "run")
    evaluate_elsewhere(out, "real_scenes", tmp_path / "real_scenes")
    return out


def test_figures_are_those_of_the_other_set(run_folder: Path) -> None:
    text = report.render(run_folder)
    Page(text)
    part = section(text, "other-sets")
    table = table_after(part, "real_scenes: mean")
    assert len(table) == len(ARM_LEVELS)
    values = [row["AP50"] for row in stored(run_folder, "pretrained", "eval-on-real_scenes.json")]
    expected = f"{statistics.mean(values):.1f} <small>± {statistics.stdev(values):.1f}</small>"
    shown = next(row for row in table if row[0] == "Pretrained")
    assert shown[2] == expected
    assert shown[-2:] == ["10", "3"]
    own = [row["AP50"] for row in stored(run_folder, "pretrained", "result.json")]
    assert f"{statistics.mean(own):.1f} <small>" not in part, "not those of its own test set"


def test_differences_are_paired_by_seed(run_folder: Path) -> None:
    files = {
        arm: stored(run_folder, arm, "eval-on-real_scenes.json") for arm in ("random", "pretrained")
    }
    gains = [b["AP"] - a["AP"] for a, b in zip(files["random"], files["pretrained"], strict=True)]
    part = section(report.render(run_folder), "other-sets")
    row = next(r for r in table_after(part, "pretrained minus random") if r[0] == "Fine-tuned, AP")
    assert row[1].replace("−", "-") == f"{statistics.mean(gains):+.1f}"
    assert row[-1] == "3"


def test_pictures_of_the_set_with_the_boxes_of_both_arms(run_folder: Path, tmp_path: Path) -> None:
    part = section(report.render(run_folder), "other-sets")
    assert part.count("<img ") == 6 * 2
    assert "The first 6 pictures of real_scenes" in part
    (tmp_path / "real_scenes").rename(tmp_path / "gone")
    assert "<img " not in section(report.render(run_folder), "other-sets")


def test_every_class_has_a_row(run_folder: Path) -> None:
    part = section(report.render(run_folder), "other-sets")
    rows = table_after(part, "AP per class, mean over the seeds")
    assert [row[0] for row in rows] == sorted(CLASSES)


def test_a_detector_trained_again_does_not_count(run_folder: Path) -> None:
    seed = run_folder / "detection/random/seed-1"
    model = seed / "model_final.pth"
    model.write_bytes(b"trained again")
    later = (seed / "eval-on-real_scenes.json").stat().st_mtime + 10
    os.utime(model, (later, later))
    part = section(report.render(run_folder), "other-sets")
    assert "Left out, trained again since: random/seed-1." in part
    assert next(r for r in table_after(part, "real_scenes: mean"))[-1] == "2"
    result = json.loads((seed / "eval-on-real_scenes.json").read_text())
    same = {"model_sha256": hashlib.sha256(b"trained again").hexdigest()}
    dump(seed / "eval-on-real_scenes.json", result | same)
    os.utime(model, (later + 99, later + 99))
    assert "Left out" not in section(report.render(run_folder), "other-sets"), "only copied"


def test_names_that_look_like_other_files(run_folder: Path, tmp_path: Path) -> None:
    evaluate_elsewhere(run_folder, "typing-errors", tmp_path / "typing-errors")
    part = section(report.render(run_folder), "other-sets")
    assert part.index("<h3>real_scenes</h3>") < part.index("<h3>typing-errors</h3>")
    assert part.count("<h3>") == 2


def test_one_arm_alone_and_no_set_at_all(run_folder: Path) -> None:
    for path in run_folder.glob("detection/random*/seed-*/eval-on-*"):
        path.unlink()
    part = section(report.render(run_folder), "other-sets")
    assert len(table_after(part, "real_scenes: mean")) == 2
    assert "pretrained minus random" not in part
    for path in run_folder.glob("detection/*/seed-*/eval-on-*"):
        path.unlink()
    assert 'id="other-sets"' not in report.render(run_folder)
