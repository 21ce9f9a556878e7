"""A COCO folder: read, checked, trained on, evaluated as pycocotools evaluates the files."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.errors import UserError
from detection.dataset import is_coco, read_coco, read_set
from detection.evaluation.coco import coco_metric
from detection.training.config import load_config
from detection.training.data import to_detectron2
from tests.detection.tiny_detection import CONFIGS, collect, make_voc
from tests.detection.training.test_other_sets import _TINY
from tools.train_voc import main

NUMBERS = {"disc": 7, "box": 3, "bar": 90}  # as COCO's, with gaps and out of order


def make_coco(root: Path) -> Path:
    """The tiny VOC set as COCO: one crowd a list, masks of half the box but for discs."""
    voc = read_set(make_voc(root.parent / "as_voc", num_train=6, num_test=5))
    (root / "annotations").mkdir(parents=True)
    for split, name in ((voc.train[0], "train2017"), (voc.test, "val2017")):
        (root / name).mkdir()
        images, annotations = [], []
        for number, picture in enumerate(split.pictures, start=100):
            shutil.copy(picture.file, root / name)
            images.append({"id": number, "file_name": picture.file.name, "width": 96, "height": 96})
            for item in picture.objects:
                x0, y0, x1, y1 = list(item.box)
                area = (x1 - x0) * (y1 - y0) / (1 if item.class_name == "disc" else 2)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number,
                    "category_id": NUMBERS[item.class_name], "iscrowd": int(number == 101),
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area,
                })  # fmt: skip
        categories = [{"id": number, "name": key} for key, number in NUMBERS.items()]
        content = {"images": images[::-1], "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def test_boxes_classes_and_crowds(coco_root: Path) -> None:
    coco = read_coco(coco_root)
    assert is_coco(coco_root)
    assert not is_coco(coco_root.parent / "as_voc")
    assert coco.classes == ("box", "disc", "bar"), "in the order of COCO's numbers"
    assert coco.metric_year is None
    assert [picture.image_id for picture in coco.train[0].pictures] == [
        str(number) for number in range(100, 106)
    ]
    voc = read_set(coco_root.parent / "as_voc")
    theirs = to_detectron2(voc.train[0], coco.classes)
    for place, (ours, other) in enumerate(
        zip(to_detectron2(coco.train[0], coco.classes), theirs, strict=True)
    ):
        expected = [] if place == 1 else other["annotations"]  # crowds are not trained on
        assert ours["annotations"] == expected
    assert [item.crowd for p in coco.test.pictures for item in p.objects] == [
        False, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parity
def test_figures_equal_pycocotools_on_the_files_themselves(coco_root: Path) -> None:
    coco = read_coco(coco_root)
    draw = np.random.default_rng(0)
    rows, given = [], []
    for picture in coco.test.pictures:
        boxes, labels, scores = [], [], draw.random(6).astype(np.float32).tolist()
        for item in picture.objects * 6:
            moved = np.array(item.box) + draw.integers(-40, 40, 4) / 8
            boxes.append(moved.tolist())
            labels.append((coco.classes.index(item.class_name) + int(draw.random() < 0.2)) % 3)
        given += [
            (picture.image_id, label, score, box)
            for label, score, box in zip(labels, scores, boxes, strict=True)
        ]
        rows += [
            {
                "image_id": int(picture.image_id),
                "category_id": NUMBERS[coco.classes[label]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
        ]
    found = collect(coco.test, given)
    columns = (found.image, found.label, found.score, found.box)
    figures, classes = coco_metric(coco.test, coco.classes, *columns)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco_root / "annotations/instances_val2017.json"))
        loaded = truth.loadRes(rows)  # pyright: ignore[reportArgumentType]
        evaluation = COCOeval(truth, loaded, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    for key, value in zip(("AP", "AP50", "AP75", "APs", "APm"), evaluation.stats, strict=False):
        assert figures[key] == pytest.approx(100 * value), key
    assert 0 < figures["APs"] < 100, "small by its mask, not by its box"
    for name, row in classes.items():
        curve = row["curves"]["0.50"]["precision"]
        assert row["AP50"] == pytest.approx(100 * np.mean(curve), abs=0.01), name


def test_coco_trains_and_its_own_metric_is_the_result(coco_root: Path, tmp_path: Path) -> None:
    options = [*_TINY, "DATALOADER.NUM_WORKERS", "0"]
    config = str(CONFIGS / "thin_R50_C4.yaml")
    data, out = str(coco_root), str(tmp_path / "out")
    assert main(["random", "--config", config, "--data", data, "--out", out, *options]) == 0
    result = json.loads((tmp_path / "out/seed-0/result.json").read_text())
    assert result["metric_year"] is None
    assert result["AP"] == result["coco"]["AP"]
    assert set(result["per_class_AP75"]) == set(result["coco"]["per_class"])
    curves = json.loads((tmp_path / "out/seed-0/pr.json").read_text())
    assert set(curves["classes"]) == set(result["per_class"])
    assert main(["random", "--config", config, "--data", data, "--out", out, "--metric-year",
                 "2007", *options]) == 2  # fmt: skip


def test_the_config_is_the_1x_schedule() -> None:
    cfg = load_config(CONFIGS / "coco_R50_C4_1x.yaml")
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, list(solver.STEPS), solver.BASE_LR) == (90_000, [60_000, 80_000], 0.02)
    assert (solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE) == (16, 8)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON) == (80, False)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "annotations"),
            r"files there: none.*val2017",
        ),
        (lambda root: (root / "annotations/instances_val2017.json").unlink(), "val2017.json: no s"),
        (lambda root: (root / "val2017/000007.jpg").unlink(), "000007.jpg: no such picture"),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": []}'),
            "is no COCO annotation of instances .KeyError: 'categories'",
        ),
        (
            lambda root: (root / "annotations/instances_val2017.json").write_text("{"),
            "JSONDecodeError",
        ),
    ],
)
def test_what_is_missing_is_named(coco_root: Path, harm, message: str) -> None:
    harm(coco_root)
    with pytest.raises(UserError, match=message):
        read_coco(coco_root)


def test_other_categories_are_refused(coco_root: Path) -> None:
    path = coco_root / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace('"bar"', '"pole"'))
    with pytest.raises(UserError, match="different categories"):
        read_coco(coco_root)
