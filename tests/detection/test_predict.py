"""Boxes from a trained detector: those of its evaluation, on anything that holds pictures."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from PIL import Image

from common.annotations.record import SetChoice, read_set
from common.drawing import draw_boxes, drawable_name, place_plate
from common.errors import UserError
from common.files import read_json as read
from detection import predict as predict_module
from detection.predict import Prediction, find_weights, load_detector
from detection.training import config
from detection.training.config import describe, load_config, parse_overrides
from tests.detection.evaluation.reference_metrics import (
    VOC_2012,
    VOC_THRESHOLDS,
    DetectionSet,
    FoundBox,
    TrueObject,
    average_precisions,
)
from tests.detection.tiny_detection import CLASSES, CONFIGS, make_voc
from tests.locks import holding
from tools import train_voc
from tools.predict import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A run's folder with data/ (pictures of different sizes) and detection/random/seed-0."""
    run = tmp_path_factory.mktemp("run")
    make_voc(run / "data", num_test=12, size=64, growth=6)
    more = "SOLVER.MAX_ITER=15 SOLVER.WARMUP_ITERS=5 SOLVER.STEPS=() TEST.IMS_PER_BATCH=5 "
    more += "MODEL.RPN.POST_NMS_TOPK_TEST=60 MODEL.RPN.POST_NMS_TOPK_TRAIN=60 "
    more += "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=8 MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0"
    assert train_voc.main([
        "random", "--config", str(CONFIGS / "thin_R50_C4.yaml"), "--data", str(run / "data"),
        "--out", str(run / "detection/random"), *tiny_overrides, *more.split(),
    ]) == 0  # fmt: skip
    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A file of an untrained detector, which sees something in every picture."""
    overrides = parse_overrides(tiny_overrides) | {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0"}
    cfg = load_config(CONFIGS / "thin_R50_C4.yaml", overrides)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("file") / "any name.pth"
    torch.save({"model": build_model(cfg).state_dict(), "detector": describe(cfg, CLASSES)}, path)
    return path


@pytest.fixture
def predict(weights: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the command on pictures; returns predictions.json."""

    def run(*arguments: str | Path, status: int = 0) -> list[dict[str, Any]]:
        out = ["--out", tmp_path / "out", "--score", "0", "--threads", "1"]
        assert main([str(word) for word in (weights, *out, *arguments)]) == status
        return read(tmp_path / "out/predictions.json") if status == 0 else []

    return run


def save_picture(path: Path, width: int = 60, height: int = 40, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, more.pop("format", "JPEG"), **more)
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.slow
def test_boxes_have_the_ap_of_the_result_and_the_file_alone_suffices(trained, tmp_path, capsys):
    """By a metric written from the definition, on a test list of different sizes."""
    file = shutil.copy(find_weights(trained), tmp_path / "alone.pth")
    split = read_set(trained / "data").test
    pictures = [str(picture.file) for picture in split.pictures]
    words = ["--out", str(tmp_path / "out"), "--score", "0", "--batch", "5"]
    assert main([str(file), *pictures, *words]) == 0
    rows = read(tmp_path / "out/predictions.json")
    assert [row["file"] for row in rows] == pictures
    truth, found = [], []
    for place, (picture, row) in enumerate(zip(split.pictures, rows, strict=True)):
        assert (row["width"], row["height"]) == (picture.width, picture.height)
        for item in picture.objects:
            corners = tuple(round(value) for value in item.voc_box)
            truth.append(TrueObject(place, CLASSES.index(item.class_name), corners, False))
        for box in row["boxes"]:
            label, corners = CLASSES.index(box["class"]), tuple(box["box"])
            found.append(FoundBox(place, label, box["score"], corners))
    data = DetectionSet(len(rows), len(CLASSES), tuple(truth), tuple(found))
    all_classes = [average_precisions(data, label, VOC_THRESHOLDS, VOC_2012) for label in range(3)]
    result = read(trained / "detection/random/seed-0/result.json")
    assert result["AP"] > 0
    assert 100 * np.mean(np.array(all_classes, float)) == pytest.approx(result["AP"], abs=1e-9)
    shown = capsys.readouterr()
    assert f"{len(found)} boxes" in shown.out
    assert "Warning" not in shown.err


def test_the_folders_that_mean_a_weight_file(trained: Path, tmp_path: Path) -> None:
    seed = trained / "detection/random/seed-0"
    for place in (trained, seed.parent, seed, seed / "model_final.pth"):
        assert find_weights(place) == seed / "model_final.pth"
    for arm, number, ap in (("a", 3, 20.0), ("b", 0, 10.0), ("pretrained", 10, 0.0),
                            ("pretrained", 2, 0.0), ("pretrained", 1, None)):  # fmt: skip
        folder = tmp_path / f"detection/{arm}/seed-{number}"
        folder.mkdir(parents=True)
        (folder / "model_final.pth").touch()
        if ap is not None:  # else not finished
            (folder / "result.json").write_text(json.dumps({"AP": ap}))
    assert find_weights(tmp_path).parent == tmp_path / "detection/pretrained/seed-2"
    shutil.rmtree(tmp_path / "detection/pretrained")
    assert find_weights(tmp_path).parent == tmp_path / "detection/a/seed-3"
    for nothing in (tmp_path / "detection", tmp_path / "missing"):
        with pytest.raises(UserError, match="train it with"):
            find_weights(nothing)


def test_files_of_before_are_read_with_what_lies_beside_them(trained: Path, tmp_path: Path) -> None:
    seed = trained / "detection/random/seed-0"
    content = torch.load(seed / "model_final.pth", weights_only=True)
    old = tmp_path / "model_final.pth"
    torch.save({"model": content["model"], "iteration": 39}, old)
    with pytest.raises(UserError, match=r"config\.yaml and result\.json is not beside it"):
        load_detector(old)
    shutil.copy(seed / "result.json", tmp_path)
    config, extra = (yaml.safe_load((seed / name).read_text())
                     for name in ("config.yaml", "config_extra.yaml"))  # fmt: skip
    for section, values in extra.items():  # as one file, which it was
        if section == "MODEL":
            config["MODEL"]["BACKBONE"] |= values["BACKBONE"]
        elif section != "VERSION":
            config[section] |= values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    files = [picture.file for picture in read_set(trained / "data").test.pictures[:4]]
    detector, before = load_detector(trained, device="cpu"), load_detector(old, device="cpu")
    assert before.cfg == detector.cfg
    found = detector(files, score=0.0)
    assert before(files, score=0.0) == found
    assert any(found)
    (tmp_path / "result.json").write_text('{"classes": ["disc"]}')
    with pytest.raises(UserError, match="its classes are not those of"):
        load_detector(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 5}, "holds no detector"),
        ({"detector": None}, "description of the detector is wrong"),
        ({"detector": {"format": "fa-detector-9"}}, "fa-detector-9"),
        ({"config": "MODEL: {RESNETS: {DEPHT: 50}}"}, "did you mean MODEL.RESNETS.DEPTH"),
        ({"config": "!!python/object/apply:os.system [exit]"}, "makes Python objects"),
        ({"config": "_BASE_: /etc/passwd"}, "reserved key"),
        ({"config": "[1]"}, "description of the detector is wrong"),
        ({"config": 5}, "description of the detector is wrong"),
        ({"config_extra": "TEST: {IMS_PER_BATCH: many}"}, "Type mismatch"),
        ({"classes": ["disc", "box"]}, "2 names for 3 classes"),
        ({"classes": ["disc", "box", "\x1b[2J"]}, "class name"),
        ({"config": "MODEL: {ROI_HEADS: {NAME: Nobody}}"}, "do not fit its config"),
        ({"config": "MODEL: {RESNETS: {WIDTH_PER_GROUP: 32}}"}, "do not fit its config"),
    ],
)
def test_wrong_files_give_one_error(change, message, weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    for key, value in change.items():
        if key == "config" and isinstance(value, str) and value.startswith("MODEL: {R"):
            config = yaml.safe_load(content["detector"]["config"])
            for section, keys in yaml.safe_load(value)["MODEL"].items():
                config["MODEL"][section] |= keys
            value = yaml.safe_dump(config)
        (content if key in content else content["detector"])[key] = value
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=message):
        load_detector(tmp_path / "wrong.pth")


def test_values_are_checked_once_and_again_with_overrides(weights: Path, monkeypatch) -> None:
    checked: list[object] = []
    for module in (config, predict_module):
        monkeypatch.setattr(module, "check_values", lambda *given: checked.append(given))
    load_detector(weights, device="cpu")
    assert len(checked) == 1
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"any name.pth: INPUT.MIN_SIZE_TEST is -1; give at least"):
        load_detector(weights, device="cpu", overrides={"INPUT.MIN_SIZE_TEST": "-1"})


def test_pixels_files_and_lists_give_the_same_boxes(weights: Path, tmp_path: Path) -> None:
    """And a score leaves boxes out; a batch of equal sizes changes nothing."""
    detector = load_detector(weights, device="cpu")
    file = save_picture(tmp_path / "a.png", format="PNG")
    pixels = np.ascontiguousarray(cv2.imread(str(file))[..., ::-1])
    found = detector(pixels, score=0.0)
    assert [found] == detector([file], score=0.0) == [detector(str(file), score=0.0)]
    limit = found[2].score
    assert detector(file, score=limit) == [one for one in found if one.score >= limit]
    together = detector([pixels, pixels[::-1].copy(), file], score=0.0, batch_size=3)
    for one, other in zip(together[2], found, strict=True):
        assert one.class_name == other.class_name
        assert one.box == pytest.approx(other.box, abs=1e-3)
    assert all(0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40 for x0, y0, x1, y1 in
               (one.box for one in found))  # fmt: skip
    for wrong in (pixels[..., 0], pixels / 255, np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(UserError, match="a picture is"):
            detector(wrong)


def test_pictures_by_content_upright_and_each_under_its_own_name(predict, tmp_path, capsys):
    root = tmp_path / "in"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    save_picture(root / "a/1.jpg")
    save_picture(root / "b/1.jpg", exif=exif)
    save_picture(root / "b/1.png", format="PNG")
    save_picture(root / "no suffix", format="WEBP")
    save_picture(root / "b/._1.jpg")
    (root / "notes.txt").write_text("no picture")
    (root / "loop").symlink_to(root, target_is_directory=True)
    rows = predict(root, root / "a/*.jpg", "--format", "voc, yolo", "--batch", "3")
    assert [row["file"] for row in rows] == [
        str(root / name) for name in ("a/1.jpg", "b/1.jpg", "b/1.png", "no suffix")
    ]
    assert "1 files of other kinds" in capsys.readouterr().out
    assert [(row["width"], row["height"]) for row in rows][:2] == [(60, 40), (40, 60)]
    drawn = [row["drawn"] for row in rows]
    assert drawn == ["pictures/1.jpg", "pictures/1-2.jpg", "pictures/1-3.jpg",
                     "pictures/no_suffix.jpg"]  # fmt: skip
    for row in rows:
        size = size_of(tmp_path / "out" / row["drawn"])
        assert size[0] * row["height"] == size[1] * row["width"]
    pictures = sorted((tmp_path / "out/yolo/images/default").iterdir())
    sizes = {path.name: size_of(path) for path in pictures}
    assert sizes == {"1.jpg": (60, 40), "1-2.jpg": (40, 60), "1-3.png": (60, 40),
                     "no_suffix.png": (60, 40)}  # fmt: skip
    assert pictures[2].read_bytes() == (root / "a/1.jpg").read_bytes(), "upright: as it is"


def test_results_in_the_folder_are_not_predicted_on(predict, tmp_path, capsys):
    """Nor replaced unasked; those of a killed run are."""
    file = save_picture(tmp_path / "a.jpg")
    assert len(predict(tmp_path, "--format", "coco")) == 1
    predict(tmp_path, status=2)
    assert "give --overwrite" in capsys.readouterr().err
    assert len(predict(tmp_path, "--overwrite")) == 1
    assert not (tmp_path / "out/coco").exists()
    shutil.copytree(tmp_path / "out", tmp_path / "older")
    assert len(predict(tmp_path, "--overwrite")) == 1
    predict(tmp_path / "out/pictures", "--overwrite", status=2)
    assert "lies in --out" in capsys.readouterr().err
    (tmp_path / "out/predictions.json").unlink()
    predict(file, "--overwrite", status=2)
    assert "of another program" in capsys.readouterr().err
    (tmp_path / "out/.unfinished").touch()
    assert len(predict(file)) == 1


def test_a_second_call_leaves_the_results_of_the_first_alone(
    predict, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("common.files.HOLD_SECONDS", 0.2)
    file = save_picture(tmp_path / "a.jpg")
    (tmp_path / "out/pictures").mkdir(parents=True)
    (tmp_path / "out/.unfinished").touch()  # as of a killed run
    with holding(tmp_path / "out/.lock") as other:
        predict(file, status=2)
        assert f": process {other.pid} on " in capsys.readouterr().err
        assert (tmp_path / "out/pictures").is_dir()
    assert len(predict(file)) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["pictures", "predictions.json"]


def test_bad_pictures_are_named_counted_and_bounded(predict, tmp_path, capsys):
    root = tmp_path / "in"
    whole = save_picture(root / "a.jpg").read_bytes()
    (root / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "c.png").write_bytes(b"")
    os.mkfifo(root / "d.jfif")
    predict(root, "--max-bad", "2", status=2)
    error = capsys.readouterr().err
    assert [line.split(":")[0] for line in error.splitlines()] == 3 * ["bad picture"] + ["error"]
    assert "more than --max-bad 2" in error
    assert "Traceback" not in error
    assert len(predict(root, "--max-bad", "3")) == 1
    assert "3 bad pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/*.jpg"], "no such file or folder, and no glob"),
        (["{in}", "--score", "1.5"], "--score 1.5"),
        (["{in}", "--format", "voc,pascal"], "--format pascal"),
        (["{in}", "--device", "gpu"], "--device gpu"),
        (["{in}/notes"], "holds no file"),
        (["{in}/texts"], "no picture among 1 files"),
        (["{in}/texts/a.txt"], "does not decode"),
    ],
)
def test_wrong_arguments_give_one_error(words, message, predict, tmp_path, capsys):
    save_picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/notes").mkdir()
    (tmp_path / "in/texts").mkdir()
    (tmp_path / "in/texts/a.txt").write_text("text")
    predict(*(word.replace("{in}", str(tmp_path / "in")) for word in words), status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_frames_of_a_video_are_pictures(predict, tmp_path, capsys):
    file = tmp_path / "walk.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for shade in range(0, 250, 25):
        video.write(np.full((48, 64, 3), (shade, 0, 0), np.uint8))  # BGR
    video.release()
    renamed = file.rename(tmp_path / "walk")
    rows = predict(renamed, "--every", "4", "--format", "coco")
    assert [row["frame"] for row in rows] == [0, 4, 8]
    assert rows[1]["drawn"] == "pictures/walk-000004.jpg"
    assert (rows[0]["width"], rows[0]["height"]) == (64, 48)
    frame = cv2.imread(str(tmp_path / "out/coco/default/walk-000008.jpg"))
    assert frame.mean((0, 1))[::-1] == pytest.approx([0, 0, 200], abs=6)
    content = renamed.read_bytes()
    renamed.write_bytes(content[: len(content) // 3])
    before = sorted((tmp_path / "out").rglob("*"))
    predict(renamed, "--overwrite", status=2)
    assert "frames decode; repair it" in capsys.readouterr().err
    assert sorted((tmp_path / "out").rglob("*")) == before, "an error replaces nothing"


def test_formats_are_read_back_with_the_same_boxes(predict: Callable, tmp_path: Path) -> None:
    for number in range(3):
        save_picture(tmp_path / f"in/{number} of 3.jpg", 60 + 7 * number, 50)
    rows = predict(tmp_path / "in", "--format", "voc,coco,yolo")
    out = tmp_path / "out"
    for name in ("voc", "coco", "yolo"):
        choice = SetChoice(name, CLASSES, test_only=True)
        for picture, row in zip(read_set(out / name, choice).test.pictures, rows, strict=True):
            assert (picture.width, picture.height) == (row["width"], row["height"])
            assert [item.class_name for item in picture.objects] == [
                box["class"] for box in row["boxes"]
            ]
            for item, box in zip(picture.objects, row["boxes"], strict=True):
                off = 1.0 if name == "voc" else 1e-3  # texts are rounded
                assert item.box == pytest.approx(box["box"], abs=off)
    data = yaml.safe_load((out / "yolo/data.yaml").read_text())
    assert data == {"train": "images/default", "names": list(CLASSES)}


def test_labels_overlap_no_other_and_stay_in_the_picture() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        width, height = (int(value) for value in random.integers(60, 500, 2))
        plates: list[Any] = []
        num_left_out = 0
        for _ in range(25):
            x, y, w, h = random.random(4) * (width, height, width, height)
            size = (float(random.integers(20, 60)), 15.0)
            plate = place_plate((x, y, x + w, y + h), size, plates, (width, height))
            num_left_out += plate is None
            plates += [plate] * (plate is not None)
        for i, a in enumerate(plates):
            assert 0 <= a[0] < a[2] <= width
            assert 0 <= a[1] < a[3] <= height
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                           for b in plates[:i])  # fmt: skip
        assert num_left_out == 0 or width * height < 25 * 60 * 15 * 4
    blank = np.full((300, 400, 3), 90, np.uint8)
    one = Prediction("Größe " * 20, 0.5, (10.0, 150.0, 60.0, 200.0))
    drawn = np.asarray(draw_boxes(blank, [one], [one.class_name]))
    assert (drawn[150:200, 10:12] != 90).any(-1).all(), "the box"
    assert (drawn[:, 250:] == 90).all(), "a long name is cut"
    assert drawable_name("собака", ["a", "собака"]) == "собака"
    assert drawable_name("\u732b", ["a", "\u732b"]) == "class 1", "the font has no such letter"
