"""Weights in real detectors: every tensor lands, or the run does not start."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

import detection.training.trainer  # noqa: F401  (registers the C4 head)
from common.errors import UserError
from common.resnet import Arch
from detection.convert import to_detectron2
from detection.training.config import load_config, parse_overrides
from detection.training.weights import (
    RunCheckpointer,
    calibrate_frozen_norms,
    check_card,
    load_backbone,
    write_weights,
)
from tests.detection.tiny_detection import CONFIGS
from tests.detection.tiny_weights import torchvision_state

THIN = Arch(50, 8, 8, 32)  # not the width of any config
TO_THIN = [
    "MODEL.RESNETS.WIDTH_PER_GROUP=8", "MODEL.RESNETS.STEM_OUT_CHANNELS=8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS=32",
]  # fmt: skip


def detector(config: str, *overrides: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        load_config(CONFIGS / config, parse_overrides(["MODEL.DEVICE=cpu", *overrides]))
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for arch in (Arch(18, 64, 64, 64), Arch(34, 64, 64, 64), THIN):
        depth, state = arch.depth, torchvision_state(arch, arch.depth)
        state = {name: value for name, value in state.items() if "tracked" not in name}
        found[depth] = folder / f"r{depth}.pth"
        write_weights(found[depth], to_detectron2(state), {})
    return found


def assert_landed(model: nn.Module, path: Path, prefix: str) -> None:
    given = torch.load(path, weights_only=True)["model"]
    state = model.state_dict()
    for name, value in given.items():
        in_head = prefix == "backbone." and name.startswith("res5.")
        assert torch.equal(state[f"roi_heads.{name}" if in_head else f"{prefix}{name}"], value)


@pytest.mark.parametrize(
    ("config", "depth", "num_tensors", "frozen"),
    [
        ("R18_C4.yaml", 18, 100, 0),
        ("R18_C4.yaml", 34, 180, 4),
        ("R18_FPN.yaml", 18, 100, 0),
        ("voc0712_R50_C4_24k.yaml", 50, 265, 4),
    ],
)
def test_every_tensor_lands(config, depth, num_tensors, frozen, weights):
    overrides = [f"MODEL.RESNETS.DEPTH={depth}", f"MODEL.BACKBONE.FREEZE_AT={frozen}"]
    model = detector(config, *overrides, *(TO_THIN if depth == 50 else []))
    assert load_backbone(model, weights[depth]) == num_tensors
    assert_landed(model, weights[depth], "backbone.bottom_up." if "FPN" in config else "backbone.")


def test_another_depth_or_width_is_refused(weights: dict[int, Path]) -> None:
    with pytest.raises(UserError, match=r"r50.pth: only .* tensors match the 265"):
        load_backbone(detector("R18_C4.yaml"), weights[50])
    with pytest.raises(UserError, match=r"r50.pth: only 0 of"):
        load_backbone(detector("thin_R50_C4.yaml"), weights[50])


def write_pkl(path: Path, source: Path, change: dict[str, object]) -> Path:
    data = pickle.loads(source.read_bytes())
    data = {key: value for key, value in {**data, **change}.items() if value is not None}
    path.write_bytes(pickle.dumps(data))
    return path


def test_pkl_without_the_request_for_matching_is_refused(thin_weights, tmp_path):
    path = write_pkl(tmp_path / "b.pkl", thin_weights, {"matching_heuristics": None})
    stock = detector("thin_R50_C4.yaml")
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    DetectionCheckpointer(stock).load(str(path))  # Detectron2 itself warns, and loads nothing
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    with pytest.raises(UserError, match=r"only 0 of the detector's 265 backbone tensors match"):
        load_backbone(detector("thin_R50_C4.yaml"), path)


def test_damaged_weights_are_refused(thin_weights: Path, tmp_path: Path) -> None:
    model = detector("thin_R50_C4.yaml")
    given = pickle.loads(thin_weights.read_bytes())["model"]
    path = tmp_path / "b.pkl"
    without = {name: value for name, value in given.items() if name != "res3.1.conv2.weight"}
    write_pkl(path, thin_weights, {"model": without})
    with pytest.raises(UserError, match=r"only 264 of .*missing 1: backbone.res3.1.conv2.weight"):
        load_backbone(model, path)
    write_pkl(path, thin_weights, {"model": {**given, "res9.0.weight": given["stem.conv1.weight"]}})
    with pytest.raises(UserError, match=r"not in the detector 1: res9.0.weight"):
        load_backbone(model, path)
    bad = {**given, "res3.1.conv2.weight": given["res3.1.conv2.weight"] * float("nan")}
    write_pkl(path, thin_weights, {"model": bad})
    with pytest.raises(UserError, match=r"b.pkl: res3.1.conv2.weight holds NaN"):
        load_backbone(model, path)
    path.write_bytes(thin_weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"b.pkl"):
        load_backbone(model, path)
    with pytest.raises(UserError, match=r"no such weights"):
        load_backbone(model, tmp_path / "none.pkl")


def test_card_is_compared_with_the_config(thin_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.pkl"
    shutil.copy(thin_weights, path)
    config = CONFIGS / "thin_R50_C4.yaml"
    with pytest.raises(UserError, match=r"no preprocessing card b.json.*--no-card"):
        check_card(path, load_config(config))
    card = json.loads(thin_weights.with_suffix(".json").read_text())

    def refused(match: str, *overrides: str, **changes: object) -> None:
        path.with_suffix(".json").write_text(json.dumps({**card, **changes}))
        with pytest.raises(UserError, match=match):
            check_card(path, load_config(config, parse_overrides(overrides)))

    refused("INPUT.FORMAT must be 'RGB', not 'BGR'", "INPUT.FORMAT", "BGR")
    refused("MODEL.PIXEL_MEAN must be", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]")
    refused("MODEL.PIXEL_STD must be", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]")
    refused("STRIDE_IN_1X1 must be False", "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    refused("the weights are a ResNet-50 .width 16", "MODEL.RESNETS.DEPTH", "101")
    refused("b.json beside it describes another file", weights_sha256="0")
    refused("no preprocessing card b.json", format="x")
    refused("its card lacks input_format", preprocessing={})
    two = {**card["preprocessing"], "pixel_std": [1.0, 2.0]}
    refused("its card says no three numbers in pixel_std", preprocessing=two)
    path.with_suffix(".json").write_text(json.dumps(card))
    assert check_card(path, load_config(config)) == card
    with pytest.raises(UserError, match=r"no such weights.*say `random`"):
        check_card(tmp_path / "none.pkl", load_config(config))


def test_run_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    checkpointer = RunCheckpointer(model, str(tmp_path))
    checkpointer.save("first")
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"

    def fail(*_: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        checkpointer.save("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"


def test_damaged_checkpoint_of_a_detector_ends_its_resume(tmp_path: Path) -> None:
    model = nn.Linear(32, 32)
    checkpointer = RunCheckpointer(model, str(tmp_path))
    checkpointer.save("first")
    path = tmp_path / "first.pth"
    content = bytearray(path.read_bytes())
    content[content.index(model.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"first.pth: is damaged at .*CRC"):
        RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    torch.save([1], path)
    with pytest.raises(UserError, match=r"first.pth: holds a list"):
        RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    model.bias.data[3] = float("inf")
    checkpointer.save("first")
    with pytest.raises(UserError, match=r"first.pth: bias holds NaN or infinity"):
        RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_calibration_leaves_each_module_its_training_mode() -> None:
    model = detector("thin_R50_C4.yaml", "MODEL.BACKBONE.FREEZE_AT", "4").train()
    model.get_submodule("backbone.res3").eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert calibrate_frozen_norms(model, [[{"image": image}]], 1) == 43
    assert {name: module.training for name, module in model.named_modules()} == before
