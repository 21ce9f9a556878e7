"""Detectors and backbones in other programs' forms: the same results, or no file."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from common import checkpoints
from common.backbone import read_backbone
from common.errors import UserError
from common.network import ResNet
from common.resnet import Arch
from detection import export
from detection.predict import Detector, load_detector
from detection.training.config import describe, load_config, parse_overrides, write_config
from tests.detection.plain_detectron2 import print_found
from tests.detection.tiny_detection import CLASSES, CONFIGS, liven_norms
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state
from tests.ranks import Rank, ends_of
from tools.export import main

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
IMAGES = [image[:120, : 90 + 40 * i] for i, image in enumerate(export.comparison_pictures()[:3])]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory, tiny_overrides):
    """Untrained detectors with a lively extra norm and different scores, as a seed's folder."""

    @functools.cache
    def make(name: str) -> Path:
        place = tmp_path_factory.mktemp("export") / name
        thin = ["MODEL.FPN.OUT_CHANNELS=32", "MODEL.ROI_BOX_HEAD.FC_DIM=64"] * ("FPN" in name)
        cfg = load_config(CONFIGS / f"{name}.yaml", parse_overrides([*tiny_overrides, *thin]))
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
        torch.manual_seed(0)
        model = build_model(cfg)
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0
        features = model.backbone.train()(torch.randn(2, 3, 64, 64))  # norms measure: near 1
        if "C4" in name:
            model.roi_heads.res5.train()(features["res4"])
            liven_norms(model.roi_heads.res5.norm)
        predictor = model.roi_heads.box_predictor
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.1)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=1e-2)
        place.mkdir()
        write_config(cfg, place / "config.yaml")
        save({"model": model.state_dict(), "detector": describe(cfg, CLASSES)},
             place / "model_final.pth")  # fmt: skip
        return place

    return make


@pytest.fixture
def folder(make_folder):
    return make_folder("thin_R50_C4")


@pytest.fixture(scope="module")
def make_detector(make_folder):
    """The detectors of these folders; not to be changed."""
    return functools.cache(lambda name: load_detector(make_folder(name), device="cpu"))


@pytest.fixture
def detector(make_detector) -> Detector:
    return make_detector("thin_R50_C4")


@pytest.mark.slow
def test_plain_detectron2_finds_the_same(make_folder, make_detector, tmp_path):
    """A pyramid from the seed's own files; a C4 detector exported, its extra norm folded."""
    detectors = [make_detector("R18_FPN"), make_detector("thin_R50_C4")]
    own = make_folder("R18_FPN")
    export.export_detector(detectors[1], tmp_path / "plain.pth", "detectron2", IMAGES)
    cv2.imwrite(str(tmp_path / "a.png"), IMAGES[2][..., ::-1])
    exported = (tmp_path / "plain.yaml", tmp_path / "plain.pth")
    files = [(own / "config.yaml", own / "model_final.pth"), exported]
    ((status, printed),) = ends_of([Rank(print_found, (tmp_path / "a.png", files))])
    assert status == 0, printed
    lines = [line for line in printed.splitlines() if line.startswith("found ")]
    for detector, line in zip(detectors, lines, strict=True):
        rows = zip(*json.loads(line.removeprefix("found ")), strict=True)
        ours = detector(IMAGES[2], score=0)
        assert ours
        for one, (box, score, label) in zip(ours, rows, strict=True):
            assert one.class_name == CLASSES[label]
            assert one.score == pytest.approx(score, abs=1e-4)
            assert one.box == pytest.approx(box, abs=1e-2)


def test_basic_blocks_have_no_plain_form(make_detector, tmp_path):
    with pytest.raises(UserError, match="basic blocks"):
        export.export_detector(make_detector("R18_C4"), tmp_path / "a.pth", "detectron2", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchscript", "onnx"])
@pytest.mark.parametrize("name", ["thin_R50_C4", "R18_FPN", "R18_C4"])
def test_traced_forms_find_the_same_at_every_size(make_detector, name, to, tmp_path):
    detector = make_detector(name)
    out = tmp_path / {"torchscript": "a.pt", "onnx": "a.onnx"}[to]
    if to == "onnx" and not HAS_ONNX:
        with pytest.raises(UserError, match="pip install onnx onnxruntime"):
            export.export_detector(detector, out, to, IMAGES)
        assert not list(tmp_path.iterdir())
        return
    card = export.export_detector(detector, out, to, IMAGES)
    assert card["num_boxes"] > 0
    assert card["largest_difference"] <= 1e-3
    assert json.loads(out.with_suffix(".json").read_text())["classes"] == list(CLASSES)
    if to == "torchscript":
        example = detector.example(IMAGES[1])
        boxes, scores, _ = torch.jit.load(out)(example["image"].float())
        own = detector(IMAGES[1], score=0)
        assert scores.tolist() == pytest.approx([one.score for one in own], abs=1e-3)
        scale = IMAGES[1].shape[1] / example["image"].shape[2]
        assert scale * boxes[0, 0].item() == pytest.approx(own[0].box[0], abs=0.01)


def test_a_form_that_computes_something_else_is_not_written(detector, tmp_path, monkeypatch):
    real = torch.jit.load

    def changed(file: object) -> object:
        network = real(file)
        return lambda image: [value * 1.001 for value in network(image)]

    monkeypatch.setattr(torch.jit, "load", changed)
    with pytest.raises(UserError, match="nothing was written"):
        export.export_detector(detector, tmp_path / "a.pt", "torchscript", IMAGES[:1])
    monkeypatch.undo()
    predictor: Any = detector.model.get_submodule("roi_heads.box_predictor")
    monkeypatch.setattr(predictor, "test_score_thresh", 1.0)
    with pytest.raises(UserError, match="finds nothing on the 3 pictures"):
        export.export_detector(detector, tmp_path / "a.pth", "detectron2", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows.flip(0), 0.0),  # another order
        (lambda rows: rows + torch.tensor([5e-4, 0, 0, 0, 0, 0]), 5e-4),
        (lambda rows: rows + 2e-3 * torch.eye(3, 6).roll(4, 1), 2e-3),  # one score
        (lambda rows: rows[1:], float("inf")),  # one is missing
        (lambda rows: rows[:2], 0.0),  # one at the threshold is missing
        (lambda rows: torch.cat([rows, rows[:1]]), float("inf")),  # one is there twice
        (lambda rows: rows + torch.tensor([0, 0, 0, 0, 0, 1.0]), float("inf")),  # other classes
        (lambda rows: rows * float("nan"), float("inf")),
    ],
)
def test_difference_of_two_sets_of_boxes(change, expected: float) -> None:
    rows = torch.tensor(
        [[0, 0, 9, 9, 0.9, 0], [1, 1, 5, 5, 0.5, 1], [2, 2, 4, 4, 0.0505, 1]], dtype=torch.float32
    )

    def columns(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows[:, :4], rows[:, 4], rows[:, 5].nan_to_num().long()

    found = export.difference(columns(rows), columns(change(rows)), 0.05)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("to", "name"),
    [("torchvision", "a.pth"), ("timm", "a.pth"), ("safetensors", "a.safetensors"),
     ("torchscript", "a.pt"), ("onnx", "a.onnx")],
)  # fmt: skip
def test_backbone_in_every_form(to, name, tmp_path, capsys):
    arch = Arch(18, 2, 3, 2) if to in ("torchscript", "onnx") else TINY
    state = torchvision_state(arch)
    source = save(our_checkpoint(state, arch), tmp_path / "checkpoint.pth")
    out = tmp_path / "out" / name
    out.parent.mkdir()
    status = main([str(tmp_path), str(out), "--to", to])
    if to == "onnx" and not HAS_ONNX:
        assert status == 2
        assert "needs onnx and onnxruntime" in capsys.readouterr().err
        assert not list(out.parent.iterdir())
        return
    assert status == 0
    card = json.loads(out.with_suffix(".json").read_text())
    if to in ("torchscript", "onnx"):
        assert card["largest_difference"] <= 1e-3
    if to == "torchscript":
        image = torch.rand(2, 3, 64, 96)
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
        network = ResNet(arch).eval()
        network.load_state_dict(state)
        with torch.no_grad():
            own = network((image - mean) / std)
            assert torch.allclose(torch.jit.load(out)(image)[0], own, atol=1e-4)
    elif to != "onnx":
        written = checkpoints.read(out)
        assert list(written) == list(state)
        assert all(torch.equal(written[key], value) for key, value in state.items())
        assert read_backbone(out).preprocessing == read_backbone(source).preprocessing


def test_backbone_of_a_detector_and_wrong_requests(folder, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert main([str(folder), str(out), "--to", "safetensors"]) == 0
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    written = checkpoints.read(out)
    key = "layer4.0.conv1.weight"
    assert torch.equal(written[key], model["roi_heads.res5.0.conv1.weight"])
    assert json.loads((tmp_path / "a.json").read_text())["preprocessing"]["order"] == "RGB"
    notes = save({"model": {"fc.weight": torch.ones(3)}}, tmp_path / "b.pth")
    for words, message in (
        ([folder, tmp_path / "a.pth", "--to", "torchscript"], "end the name in .pt or .ts"),
        ([folder, folder / "model_final.pth", "--to", "detectron2"], "is the input"),
        ([folder, tmp_path, "--to", "onnx"], "is a folder"),
        ([folder, out.with_suffix(".pt"), "--to", "torchscript"], "a.json exists and is not of it"),
        ([tmp_path / "none.pth", out, "--to", "timm"], "no such file or folder"),
        ([notes, out, "--to", "torchscript"], "b.pth"),
        ([folder, out, "--to", "timm", "--pictures", str(out)], "goes with a detector"),
    ):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_safetensors_of_every_type_and_shape_are_read_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "half": torch.randn(3).half(),
        "turned": torch.arange(6.0).view(2, 3).t(), "bits": torch.tensor([True, False]),
    }  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(checkpoints.dump_safetensors(tensors))
    again = checkpoints.read(tmp_path / "a.safetensors")
    assert list(again) == list(tensors)
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype
        np.testing.assert_array_equal(again[key].numpy(), value.numpy())
