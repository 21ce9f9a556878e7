"""Calibration of frozen batch norms: what it leaves of the detector's state."""

import torch
from detectron2.modeling import build_model

from detection.training.config import load_config
from detection.training.trainer import Trainer  # noqa: F401  (registers the heads)
from detection.training.weights import calibrate_frozen_norms
from tests.detection.tiny_detection import CONFIGS


def test_each_module_keeps_its_training_mode():
    overrides = {"MODEL.DEVICE": "cpu", "MODEL.BACKBONE.FREEZE_AT": "4"}
    detector = build_model(load_config(CONFIGS / "thin_R50_C4.yaml", overrides)).train()
    detector.get_submodule("backbone.res3").eval()
    before = {name: module.training for name, module in detector.named_modules()}
    assert set(before.values()) == {True, False}
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    assert calibrate_frozen_norms(detector, [[{"image": image}]], 1) == 43
    assert {name: module.training for name, module in detector.named_modules()} == before
