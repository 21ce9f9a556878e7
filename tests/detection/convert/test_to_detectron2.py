import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from common.backbone import IMAGENET, parse_preprocessing, read_backbone
from common.errors import UserError
from common.resnet import Arch
from detection.convert import to_detectron2 as conversion
from detection.convert.parity import (
    compare,
    comparison_picture,
    detectron2_features,
    reference_features,
)
from detection.convert.to_detectron2 import convert, to_detectron2
from tests.detection.tiny_detection import ROOT, liven_norms, write_our_checkpoint
from tools.convert_to_d2 import main


def torchvision_state(depth: int) -> dict[str, Tensor]:
    torch.manual_seed(depth)
    return liven_norms(getattr(torchvision.models, f"resnet{depth}")()).state_dict()


@pytest.fixture
def r18(tmp_path: Path) -> Path:
    torch.save(torchvision_state(18), tmp_path / "r18.pth")
    return tmp_path / "r18.pth"


@pytest.mark.parity
@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_card_says_how_the_conversion_was_proved(depth: int, tmp_path: Path) -> None:
    state = torchvision_state(depth)
    torch.save(state, tmp_path / "x.pth")
    card = convert(read_backbone(tmp_path / "x.pth"), tmp_path / "out.pkl", size=128)
    assert card["num_tensors"] == {18: 100, 50: 265}[depth]
    assert set(card["stages"]) == {"res2", "res3", "res4", "res5"}
    assert card["max_relative_difference"] == max(card["stages"].values()) <= 1e-5
    assert card == json.loads((tmp_path / "out.json").read_text())
    assert card["preprocessing"]["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert card["preprocessing"]["input_format"] == "RGB"


def in_moco(state: dict[str, Tensor]) -> dict[str, object]:
    keys = {f"module.encoder_q.{name}": value for name, value in state.items()}
    return {"epoch": 200, "arch": "resnet18",
            "state_dict": keys | {"module.queue": torch.zeros(2, 2)}}  # fmt: skip


def in_solo_learn(state: dict[str, Tensor]) -> dict[str, object]:
    keys = {f"backbone.{n}": v for n, v in state.items() if not n.startswith("fc.")}
    return {"epoch": 1, "state_dict": keys | {"projector.0.weight": torch.ones(2)},
            "hyper_parameters": argparse.Namespace(method="nnclr")}  # fmt: skip


def in_lightly(state: dict[str, Tensor]) -> dict[str, object]:
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    keys = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first in numbers:
            keys[f"backbone.{numbers[first]}.{rest}"] = value
    return {"state_dict": keys | {"projection_head.layers.0.weight": torch.ones(2)},
            "callbacks": {"stopper": Stopper()}}  # fmt: skip


class Stopper:
    """Stands for a class of somebody's training code inside a Lightning checkpoint."""


@pytest.mark.parametrize(
    ("wrap", "layout"),
    [
        (lambda state: state, "torchvision"),
        (lambda state: {"state_dict": state}, "torchvision"),
        (in_moco, "moco"),
        (in_solo_learn, "solo-learn"),
        (in_lightly, "lightly"),
    ],
)
def test_foreign_checkpoints_give_the_same_tensors(wrap, layout: str, tmp_path: Path) -> None:
    state = torchvision_state(18)
    torch.save(wrap(state), tmp_path / "foreign.ckpt")
    source = read_backbone(tmp_path / "foreign.ckpt")
    assert source.layout == layout
    assert source.arch == Arch(18, 64, 64, 64)
    assert source.preprocessing == IMAGENET
    assert all(torch.equal(value, state[name]) for name, value in source.tensors.items())
    assert len(source.tensors) == 100


def test_our_checkpoint_and_its_branches(thin_checkpoint: Path, tmp_path: Path) -> None:
    online = read_backbone(thin_checkpoint)
    ema = read_backbone(thin_checkpoint, branch="ema")
    assert online.layout == "ours"
    assert online.arch == Arch(50, 16, 16, 64)
    assert not torch.equal(online.tensors["bn1.weight"], ema.tensors["bn1.weight"])
    card = convert(ema, tmp_path / "b.pth", size=96)
    assert card["branch"] == "ema"
    assert "projector.0.weight" in card["dropped"]
    assert card["source"]["file"] == "checkpoint.pth"
    assert card["max_relative_difference"] <= 1e-4


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_same_tensors_give_the_same_bytes(
    ending: str, thin_checkpoint: Path, tmp_path: Path
) -> None:
    source = read_backbone(thin_checkpoint)
    written = []
    for name in ("one", "two"):
        convert(source, tmp_path / name / f"out{ending}", size=64)
        written.append((tmp_path / name / f"out{ending}").read_bytes())
    assert written[0] == written[1]


def test_pkl_is_what_detectron2_expects(thin_checkpoint: Path, tmp_path: Path) -> None:
    convert(read_backbone(thin_checkpoint), tmp_path / "out.pkl", size=64)
    data = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert data["matching_heuristics"] is True
    assert data["__author__"]
    assert all(isinstance(value, np.ndarray) for value in data["model"].values())
    assert "stem.conv1.weight" in data["model"]


@pytest.mark.parity
def test_wrong_stride_convention_is_caught_by_the_features(thin_checkpoint: Path) -> None:
    source = read_backbone(thin_checkpoint)
    image = IMAGENET.normalise(comparison_picture(None, 128))
    state = to_detectron2(source)
    reference = reference_features(source.arch, source.tensors, image)
    right, wrong = (
        compare(
            reference,
            detectron2_features(source.arch, state, image, stride_in_1x1=stride_in_1x1),
        )
        for stride_in_1x1 in (False, True)
    )
    assert max(right.values()) <= 1e-4
    assert wrong["res2"] <= 1e-4  # no stride there
    assert min(wrong["res3"], wrong["res4"], wrong["res5"]) > 0.01


def test_nothing_is_written_when_features_differ(
    thin_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_backbone(thin_checkpoint)
    swapped = dict(to_detectron2(source))
    swapped["res4.0.conv1.weight"] = swapped["res4.0.conv1.weight"].flip(0)
    monkeypatch.setattr(conversion, "to_detectron2", lambda _: swapped)
    with pytest.raises(UserError, match=r"features differ.*res4 .*nothing was written"):
        convert(source, tmp_path / "out.pkl", size=64)
    assert not list(tmp_path.glob("out*"))


def nan_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["backbone.layer2.0.bn1.bias"][0] = float("nan")
    return state


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    path = write_our_checkpoint(tmp_path / "c.pth")
    good = torch.load(path, weights_only=True)

    def refused(match: str, **changes: object) -> None:
        torch.save({**good, **changes}, path)
        with pytest.raises(UserError, match=match) as caught:
            read_backbone(path)
        assert str(path) in str(caught.value)

    model = good["model"]
    refused(r"holds NaN or infinity", model=nan_in({n: v.clone() for n, v in model.items()}))
    refused(r"is no ResNet-101 .*lacks layer3.6", arch={**good["arch"], "depth": 101})
    refused(
        r"no ResNet-18.*has layer1.0.conv3.*look like a ResNet-50",
        arch=dict(zip(good["arch"], (18, 64, 64, 64), strict=True)),
    )
    refused(r"has layer1.0.downsample.*look like", arch={**good["arch"], "stem_channels": 64})
    refused(r"layer1.0.conv1.weight has shape \(16", arch={**good["arch"], "width_per_group": 8})
    refused(
        r"is no ResNet-50 .*lacks layer3.1.conv1.weight",
        model={name: value for name, value in model.items() if "layer3.1.conv1" not in name},
    )
    refused(r"has layer1.9.x", model={**model, "backbone.layer1.9.x": torch.ones(1)})
    refused(r"order 'BGR': only RGB", preprocessing={**good["preprocessing"], "order": "BGR"})
    refused(r"expected the keys depth", arch=None)
    refused(r"no key begins with 'backbone.'", model={"projector.weight": torch.ones(1)})
    torch.save({**good, "ema": None}, path)
    with pytest.raises(UserError, match=r"no ema network.*--branch online"):
        read_backbone(path, branch="ema")
    with pytest.raises(UserError, match="use --layout auto"):
        read_backbone(path, layout="moco")


def test_truncated_missing_and_foreign_files(r18: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        read_backbone(tmp_path / "none.pth")
    r18.write_bytes(r18.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"r18\.pth: not a readable"):
        read_backbone(r18)
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds Tensor, not a state_dict"):
        read_backbone(tmp_path / "tensor.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds nothing, not a state_dict"):
        read_backbone(tmp_path / "empty.pth")
    blobs = {"blobs": {"conv1_w": np.ones((64, 3, 7, 7), np.float32)}}
    (tmp_path / "detectron1.pkl").write_bytes(pickle.dumps(blobs))
    with pytest.raises(UserError, match="conv1_w: Caffe2's names"):
        read_backbone(tmp_path / "detectron1.pkl")
    torch.save({0: torch.ones(3)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="not names of tensors"):
        read_backbone(tmp_path / "numbers.pth")


def test_cifar_stem_is_explained(tmp_path: Path) -> None:
    state = torchvision_state(18)
    state["conv1.weight"] = torch.ones(64, 3, 3, 3)
    torch.save(state, tmp_path / "cifar.pth")
    with pytest.raises(UserError, match="CIFAR stem does not convert"):
        read_backbone(tmp_path / "cifar.pth")


def test_out_must_say_what_it_is(thin_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"end the name in \.pkl"):
        convert(read_backbone(thin_checkpoint), tmp_path / "out.bin")


@pytest.mark.parametrize("text", ["", "1,2/3", "0.5,0.5,0.5/0,1,1", "123,116,103/58,57,57", "x/y"])
def test_preprocessing_that_makes_no_sense(text: str) -> None:
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        parse_preprocessing(text)


def test_command_line(
    thin_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "tools" / "convert_to_d2.py", *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    Image.fromarray(comparison_picture(None, 100).numpy()).save(tmp_path / "p.png")
    done = call(thin_checkpoint, tmp_path / "b.pkl", "--image", tmp_path / "p.png", "--size", 96)
    assert done.returncode == 0, done.stderr
    assert "265 tensors and 53 batch counters converted to detectron2" in done.stdout
    assert "a head of pretraining" in done.stdout
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "b.pkl")]) == 2
    failed = capsys.readouterr().err
    assert failed.startswith("error: ")
    assert "Traceback" not in failed
