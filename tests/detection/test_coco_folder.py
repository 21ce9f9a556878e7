"""A COCO folder: trained on, and evaluated as pycocotools evaluates the files themselves."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.annotations.record import read_set
from detection.evaluation.metrics import coco_metric
from detection.training.config import load_config
from tests.detection.tiny_detection import CONFIGS, NUMBERS, collect, make_coco
from tests.detection.training.test_other_sets import _TINY
from tools.train_voc import main


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


@pytest.mark.parity
def test_figures_equal_pycocotools_on_the_files_themselves(coco_root: Path) -> None:
    coco = read_set(coco_root)
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
    figures, classes = coco_metric(coco.test, coco.classes, collect(coco.test, given))
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
        curve = row.curves["0.50"].precision
        assert row.ap50 == pytest.approx(100 * np.mean(curve), abs=0.01), name


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
