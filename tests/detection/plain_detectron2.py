"""What Detectron2 without this project finds; imported where `detection` is not."""

import json
import sys
from pathlib import Path

import cv2
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor


def print_found(picture: Path, detectors: list[tuple[Path, Path]]) -> None:
    """A line for each pair of config and weights: boxes, scores and classes."""
    for config, weights in detectors:
        cfg = get_cfg()
        cfg.merge_from_file(str(config))
        cfg.MODEL.WEIGHTS = str(weights)
        found = DefaultPredictor(cfg)(cv2.imread(str(picture)))["instances"]
        assert "detection" not in sys.modules
        columns = (found.pred_boxes.tensor, found.scores, found.pred_classes)
        print("found", json.dumps([column.tolist() for column in columns]))
