"""A trained detector on another set: same figures on the same set, refusals, nothing touched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.picture_draws import read_draws
from tests.detection.tiny_detection import CLASSES, CONFIGS, annotation, make_coco, make_voc
from tools.train_voc import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A folder with data/ and a run/ of two seeds; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    make_voc(folder / "data", num_test=6)
    config = str(CONFIGS / "thin_R50_C4.yaml")
    assert main(["random", "--config", config, "--data", str(folder / "data"),
                 "--out", str(folder / "run"), "--seeds", "0,1", *tiny_overrides]) == 0  # fmt: skip
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """An own copy of the trained seeds and their set."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def evaluate(place: Path) -> Callable[..., int]:
    return lambda data, *more: main(
        ["--out", str(place / "run"), "--eval-on", str(place / data), *more]
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def times(folder: Path) -> dict[str, int]:
    return {path.name: os.stat(path).st_mtime_ns for path in folder.iterdir()}


def test_same_set_gives_the_same_figures_and_touches_nothing(place: Path, evaluate) -> None:
    seed = place / "run/seed-0"
    before = times(seed)
    assert evaluate("data") == 0
    again, result = read(seed / "eval-on-data.json"), read(seed / "result.json")
    for key in ("AP", "AP50", "AP75", "per_class", "coco", "classes", "num_test_images"):
        assert again[key] == result[key], key
    after = times(seed)
    assert {name: after[name] for name in before if name != "log.txt"} == {
        name: time for name, time in before.items() if name != "log.txt"
    }
    summary = read(place / "run/eval-on-data.json")
    assert (summary["n"], summary["seeds"], summary["name"]) == (2, [0, 1], "data")
    assert len(read(seed / "eval-on-data-pr.json")["recall"]) == 101
    assert read(seed / "eval-on-data-errors.json") == read(seed / "errors.json")
    boxes = (seed / "detections.json").read_text()
    assert (seed / "eval-on-data-detections.json").read_text() == boxes
    assert '"score"' in boxes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test-split", "val"], "with --eval-on give --eval-split"),
        (["--freeze"], "--freeze: is of training"),
        (["--num-gpus", "2"], "--num-gpus: is of training"),
        (["--no-card"], "--no-card: is of training"),
    ],
)
def test_options_of_training_are_refused(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--out", "run", "--eval-on", "data", *words])
    assert message in capsys.readouterr().err


def test_intervals_over_the_pictures_of_the_set(
    place: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each seed, and of the mean by the same draws. What seed 0 found is what is labelled."""
    for number, row in enumerate(read(place / "run/seed-0/detections.json")):
        found = row["detections"][number % 3]
        x0, y0, x1, y1 = (round(value) for value in found["box"])
        text = annotation(96, [(found["class"], x0 + 1, y0 + 1, x1, y1)])
        name = Path(row["file_name"]).stem
        (place / f"data/VOC2007/Annotations/{name}.xml").write_text(text)
    assert evaluate("data") == 0
    folders = [place / f"run/seed-{number}" for number in range(2)]
    rows = [read(folder / "eval-on-data.json") for folder in folders]
    files = [folder / "eval-on-data-draws.json" for folder in folders]
    summary = read(place / "run/eval-on-data.json")
    draws = [read_draws(file, row) or {} for file, row in zip(files, rows, strict=True)]
    for metric in ("AP", "AP50", "AP75"):
        own = [figures[metric] for figures in draws]
        ends = [np.quantile(figures, [0.025, 0.975]).tolist() for figures in own]
        found = [row["picture_interval"][metric] for row in rows]
        np.testing.assert_allclose(found, ends, rtol=1e-12)
        of_mean = np.quantile((own[0] + own[1]) / 2, [0.025, 0.975])
        np.testing.assert_allclose(summary["picture_interval"][metric], of_mean, rtol=1e-12)
    low, high = summary["picture_interval"]["AP50"]
    assert 0 <= low < summary["mean"]["AP50"] < high <= 100
    assert f"AP50 {summary['mean']['AP50']:.1f} [{low:.1f}, {high:.1f}]" in capsys.readouterr().out
    files[1].unlink()  # as an older version left it
    assert evaluate("data") == 0
    assert "eval-on-data-draws.json is missing; the seed is evaluated" in capsys.readouterr().err
    assert read(place / "run/eval-on-data.json") == summary


def test_other_set_other_figures_kept_until_the_set_changes(
    place: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bare VOC folder without dataset.json, the classes in another order of appearance."""
    other = make_voc(place / "other", num_train=1, num_test=9)
    (other / "dataset.json").unlink()
    shutil.move(other / "VOC2007", place / "scenes")
    chosen = ("--seeds", "1", "--eval-split", "test")
    assert evaluate("scenes", *chosen) == 0
    file = place / "run/seed-1/eval-on-scenes-test.json"
    assert read(file)["num_test_images"] == 9
    assert not (place / "run/seed-0/eval-on-scenes-test.json").exists()
    before = file.stat().st_mtime_ns
    assert evaluate("scenes", *chosen) == 0
    assert file.stat().st_mtime_ns == before, "kept, not computed again"
    listed = place / "scenes/ImageSets/Main/test.txt"
    listed.write_text("\n".join(listed.read_text().split()[:7]) + "\n")
    assert evaluate("scenes", *chosen) == 2
    assert "was made with another data_sha256" in capsys.readouterr().err
    assert evaluate("scenes", *chosen, "--overwrite", "TEST.NUM_SAVED_IMAGES=2") == 0
    assert read(file)["num_test_images"] == 7
    assert len(read(file.with_name("eval-on-scenes-test-detections.json"))) == 2
    assert evaluate("scenes", *chosen, "INPUT.MIN_SIZE_TEST", "32") == 2
    assert "only keys of TEST" in capsys.readouterr().err


def test_damaged_results_are_made_again_or_named(
    place: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    file, result = place / "run/seed-1/eval-on-data.json", place / "run/seed-1/result.json"
    assert evaluate("data", "--seeds", "1") == 0
    figures, whole = read(file), result.read_bytes()
    (place / "run/seed-x").mkdir()
    (place / "run/seed-x/result.json").touch()  # no seed
    for content in (b'{"AP": 1', b"{}"):  # more kinds of damage: common/test_files.py
        file.write_bytes(content)
        assert evaluate("data") == 0
        assert "eval-on-data.json is damaged, and is made again" in capsys.readouterr().err
        assert read(file)["per_class"] == figures["per_class"]
        result.write_bytes(content)
        assert evaluate("data") == 2
        assert "seed-1/result.json: is damaged; train it first" in capsys.readouterr().err
        result.write_bytes(whole)


def test_a_coco_folder(place: Path, evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other files' names, and with annotations that are wrong: told before any work."""
    root = make_coco(place / "coco")
    file = (root / "annotations/instances_val2017.json").rename(root / "annotations/holiday.json")
    (root / "val2017").rename(root / "holiday")
    content = read(file)
    content["annotations"][0]["bbox"][0] = -0.5
    file.write_text(json.dumps(content))
    assert evaluate("coco", "--seeds", "0", "--eval-split", "holiday") == 0
    row = read(place / "run/seed-0/eval-on-coco-holiday.json")
    assert (row["metric_year"], row["num_test_images"]) == (None, 5)
    log = (place / "run/seed-0/log.txt").read_text()
    assert f"{root}: 1 boxes up to 1 pixel outside their picture: clipped\n" in log
    for row in content["annotations"][:3]:
        row["bbox"][2] = -1
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert evaluate("coco", "--seeds", "0", "--eval-split", "holiday") == 2
    assert capsys.readouterr().err.count("give x, y, width >= 0, height >= 0") == 3


def rename_class(root: Path, old: str, new: str) -> None:
    for path in (root / "VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace(f"<name>{old}<", f"<name>{new}<"))


def test_other_class_names_are_refused(
    place: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_voc(place / "other")
    rename_class(other, CLASSES[0], "ball")
    text = (other / "dataset.json").read_text().replace(f'"{CLASSES[0]}"', '"ball"')
    (other / "dataset.json").write_text(text)
    assert evaluate("other") == 2
    assert "only in the set: ball; missing in the set: disc" in capsys.readouterr().err
    (other / "dataset.json").unlink()
    assert evaluate("other", "--eval-split", "test") == 2
    assert "only in the set: ball" in capsys.readouterr().err
    assert not list(place.glob("run/seed-*/eval-on-*.json"))


def test_wrong_places_are_explained(
    place: Path, evaluate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    run, data = str(place / "run"), str(place / "data")
    assert "no such folder" in refused("--out", run, "--eval-on", f"{place}/nowhere")
    assert "no finished seed" in refused("--out", data, "--eval-on", data)
    assert "seed-7: is not finished" in refused("--out", run, "--eval-on", data, "--seeds", "7")
    (place / "run/seed-0/model_final.pth").unlink()
    assert "model_final.pth is missing; train it first" in refused("--out", run, "--eval-on", data)
    for words in (["--eval-on", data, "--config", "x.yaml"], [], ["random", "--config", "x",
                  "--data", "y", "--eval-split", "test"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(["--out", run, *words])
