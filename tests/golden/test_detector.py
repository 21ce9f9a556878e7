"""Golden: the first losses of a detector's training, and AP of fixed detections."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from common.annotations.record import read_set
from tests.golden.detection_inputs import (
    CONFIG,
    TrueBox,
    backbone,
    evaluate,
    random_detections,
    random_objects,
    write_devkit,
)
from tests.golden.gate import check, digest
from tools import convert_to_d2
from tools import train_voc as train

CLASSES = ("disc", "box", "bar", "never")
SIDE = 96
_TIMES = {"seconds", "evaluation_seconds", "peak_memory_bytes", "num_threads", "versions"}


def make_devkit(root: Path, num_train: int, num_test: int, metric_year: int) -> dict[str, Any]:
    """Write a devkit; returns its test objects by picture. No test object is of the last class."""
    draw = np.random.default_rng(5)
    names = [f"{number:06d}" for number in range(num_train + num_test)]
    objects = {name: random_objects(draw, 3, SIDE, whole=True) for name in names}
    objects[names[0]].append(TrueBox(3, (4.0, 4.0, 50.0, 40.0)))
    lists = {"train": {name: objects[name] for name in names[:num_train]},
             "test": {name: objects[name] for name in names[num_train:]}}  # fmt: skip
    write_devkit(root, CLASSES, lists, side=SIDE, metric_year=metric_year)
    return lists["test"]


@pytest.mark.parametrize("year", [2007, 2012])
def test_fixed_detections(year: int, tmp_path: Path) -> None:
    objects = make_devkit(tmp_path / "data", 1, 12, year)
    draw = np.random.default_rng(6)
    found = {
        name: random_detections(draw, rows, len(CLASSES), SIDE) for name, rows in objects.items()
    }
    voc = read_set(tmp_path / "data")
    assert voc.metric_year == year
    last = evaluate(voc, found, tmp_path)
    figures = {key: value for key, value in last.to_json().items() if key not in _TIMES}
    curves = last.curves_to_json()["classes"]
    values = {
        "figures": figures,
        "errors": last.errors,
        "detections": last.detections,
        "max_recall": {
            name: {key: curve["max_recall"] for key, curve in row.items()}
            for name, row in curves.items()
        },
        "mean precision": {
            name: {key: float(np.mean(curve["precision"])) for key, curve in row.items()}
            for name, row in curves.items()
        },
    }
    assert 0 < figures["AP75"] < figures["AP50"] < 100
    check(f"detector_fixed_{year}", values, rtol=1e-9, atol=1e-9)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = 4
    make_devkit(tmp_path / "data", 8, 6, 2012)
    pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "order": "RGB"}
    sizes = {"depth": 50, "width_per_group": 16, "stem_channels": 16, "res2_channels": 64}
    state = {f"backbone.{name}": value for name, value in backbone("thin_R50", 3).items()}
    checkpoint = {"format": "fa-pretrain-1", "arch": sizes, "preprocessing": pixels,
                  "model": state, "ema": None}  # fmt: skip
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    weights = tmp_path / "backbone.pkl"
    assert convert_to_d2.main([str(tmp_path / "checkpoint.pth"), str(weights), "--size", "64"]) == 0

    losses: list[dict[str, float]] = []
    put = EventStorage.put_scalar

    def keep(self: EventStorage, name: str, value: Any, *more: Any, **options: Any) -> None:
        put(self, name, value, *more, **options)
        if "loss" in name:
            while len(losses) <= self.iter:
                losses.append({})
            losses[self.iter][name] = float(value)

    monkeypatch.setattr(EventStorage, "put_scalar", keep)
    threads = torch.get_num_threads()
    status = train.main([
        str(weights), "--config", str(CONFIG), "--data", str(tmp_path / "data"),
        "--out", str(tmp_path / "out"), "--threads", "1", "--eval-every", str(iterations // 2),
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", str(iterations), "SOLVER.BASE_LR", "0.02",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", "32", "MODEL.RPN.POST_NMS_TOPK_TEST", "16",
        "MODEL.BACKBONE.CALIBRATE_BN_BATCHES", "2", "TEST.PRECISE_BN.NUM_ITER", "2",
    ])  # fmt: skip
    torch.set_num_threads(threads)
    assert status == 0
    assert len(losses) == iterations
    folder = tmp_path / "out/seed-0"
    result = json.loads((folder / "result.json").read_text())
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    last = [row["total_loss"] for row in rows if "total_loss" in row][-1]
    assert last == pytest.approx(losses[-1]["total_loss"], rel=1e-6)
    bits = {
        "losses": [[f"{key}={value!r}" for key, value in row.items()] for row in losses],
        "result": {key: repr(value) for key, value in result.items() if key not in _TIMES},
        "model": _model_digest(folder / "model_final.pth"),
    }
    # From the second step on, rounding that differs between processors chooses other proposals.
    check("detector_losses", losses[0], rtol=1e-5, atol=1e-6, bits=bits)
    values = {
        "result keys": sorted(result),
        "coco keys": sorted(result["coco"]),
        "summary keys": sorted(summary),
        "files": sorted(path.name for path in folder.iterdir()),
        "curve": [sorted(point) for point in curve],
        "iterations": [point["iteration"] for point in curve],
        "settled": {key: result[key] for key in (
            "arm", "seed", "classes", "classes_without_test_objects", "frozen", "iterations",
            "metric_year", "num_test_images", "num_train_images", "weights",
        )},
    }  # fmt: skip
    check("detector_result", values)


def _model_digest(path: Path) -> str:
    model = torch.load(path, weights_only=True)["model"]
    return digest(*(name.encode() + value.numpy().tobytes() for name, value in model.items()))
