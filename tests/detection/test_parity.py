"""`--verify A B`: the same network or not, and where not."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.backbone import read_backbone
from common.files import sha256_of
from common.resnet import Arch
from detection.convert import (
    build_bare_resnet,
    compare,
    comparison_picture,
    convert,
    features,
    relative_difference,
    to_detectron2,
    verify,
)
from tests.detection.tiny_weights import our_checkpoint, save, torchvision_state
from tools.convert_to_d2 import main


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    return save(our_checkpoint(torchvision_state()), folder / "checkpoint.pth")


@pytest.fixture(scope="module")
def converted(ours: Path) -> Path:
    convert(read_backbone(ours), ours.with_name("b.pkl"), size=64)
    return ours.with_name("b.pkl")


@pytest.fixture
def pkl(converted: Path, tmp_path: Path) -> Path:
    """A copy of its own, with its card."""
    shutil.copy(converted.with_suffix(".json"), tmp_path)
    return Path(shutil.copy(converted, tmp_path))


def change(pkl: Path, alter: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite the model inside a .pkl, and the hash in its card."""
    data = pickle.loads(pkl.read_bytes())
    alter(data["model"])
    pkl.write_bytes(pickle.dumps(data))
    card = json.loads(pkl.with_suffix(".json").read_text())
    pkl.with_suffix(".json").write_text(json.dumps(card | {"weights_sha256": sha256_of(pkl)}))
    return pkl


def test_every_layout_of_one_network_is_the_same(ours: Path, pkl: Path, tmp_path: Path) -> None:
    state = torchvision_state()
    moco = {f"module.encoder_q.{name}": value for name, value in state.items()}
    files = [
        pkl,
        save(state, tmp_path / "plain.pth"),
        save({"state_dict": moco, "epoch": 3}, tmp_path / "moco.pth.tar"),
        save({"state_dict": state, "state_dict_ema": state}, tmp_path / "timm.pth"),
    ]
    layouts = ["detectron2", "torchvision", "moco", "timm"]
    for file, layout in zip(files, layouts, strict=True):
        report = verify(ours, file, size=64)
        assert report["same"], report["reasons"]
        assert report["b"]["layout"] == layout
        assert set(report["stages"].values()) == {0.0}
        assert all(item["same_bits"] for item in report["tensors"].values())


@pytest.mark.parametrize(
    ("name", "changed_from"),
    [("res4.0.conv1.weight", "res4"), ("stem.conv1.norm.running_var", "res2"),
     ("res5.2.conv3.norm.bias", "res5")],
)  # fmt: skip
def test_one_changed_tensor_is_named_and_so_is_its_stage(name, changed_from, ours, pkl):
    def flip(model: dict[str, Any]) -> None:
        model[name] = np.ascontiguousarray(model[name][::-1])

    report = verify(ours, change(pkl, flip), size=64)
    assert not report["same"]
    off = [n for n, x in report["tensors"].items() if not x["same_bits"]]
    assert len(off) == 1
    assert off[0] in report["reasons"][0]
    stages = ("res2", "res3", "res4", "res5")
    for stage in stages:
        reached = stages.index(stage) >= stages.index(changed_from)
        assert (report["stages"][stage] > 1e-5) == reached
    assert f"the features differ from {changed_from} on" in report["reasons"][1]


def test_relative_difference_is_of_the_largest_value() -> None:
    first, second = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert relative_difference(first, second) == 0.5 / 4
    assert relative_difference(first, torch.tensor([float("nan"), 0.0])) == float("inf")
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parity
def test_stride_in_another_place_is_seen_although_all_tensors_are_equal(ours: Path) -> None:
    source = read_backbone(ours)
    image = source.preprocessing.normalise(comparison_picture(128).permute(2, 0, 1)[None])
    state = to_detectron2(source.tensors)

    def stride_elsewhere(arch: Arch) -> nn.Module:
        network = build_bare_resnet(arch)
        for stage in ("res3", "res4", "res5"):
            block = network.get_submodule(f"{stage}.0")
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)  # type: ignore[union-attr]
        return network

    right = features(build_bare_resnet, source.arch, state, image)
    stages = compare(right, features(stride_elsewhere, source.arch, state, image))
    assert stages["res2"] == 0
    assert min(stages[stage] for stage in ("res3", "res4", "res5")) > 1e-2


def test_other_pixel_statistics_are_another_network(ours: Path, tmp_path: Path) -> None:
    changed = our_checkpoint(torchvision_state())
    changed["preprocessing"] = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "order": "RGB"}
    report = verify(ours, save(changed, tmp_path / "other.pth"), size=64)
    assert report["reasons"] == ["the files state different pixel statistics"]
    assert report["preprocessing"] == "different"


def test_another_architecture_is_refused(ours: Path, tmp_path: Path) -> None:
    other = save(torchvision_state(Arch(50, 2, 3, 12)), tmp_path / "b.pth")
    report = verify(ours, other, size=64)
    assert report["same"] is False
    assert "another architecture" in report["refused"]
    assert "res2 8" in report["refused"]
    assert "res2 12" in report["refused"]
    assert "stages" not in report


def test_command_line(ours, pkl, tmp_path, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    capsys.readouterr()
    status, out, _ = call("--verify", ours, pkl, "--size", 64, "--json", tmp_path / "r.json")
    assert status == 0
    assert out.endswith("the same network\n")
    assert "265 of 265 equal bit by bit" in out
    assert json.loads((tmp_path / "r.json").read_text())["same"] is True
    two = our_checkpoint(torchvision_state())
    two["ema"] = {f"backbone.{n}": v for n, v in torchvision_state(seed=2).items()}
    both = save(two, tmp_path / "two.pth")
    status, out, _ = call("--verify", both, both, "--branch-b", "ema", "--size", 64)
    assert status == 1
    assert "not the same: 265 of 265 tensors differ" in out
    status, out, _ = call("--verify", ours, save({}, tmp_path / "e.pth"), "--json")
    assert status == 1
    assert "holds nothing" in json.loads(out)["refused"]
    for words, message in (
        (["--verify", ours, tmp_path / "none.pkl"], "none.pkl: no such checkpoint"),
        (["--verify", ours, pkl, "--to", "torchvision"], "leave to out"),
        (["--verify", ours, pkl, "--tolerance", "2"], "--tolerance 2.0"),
        ([ours, tmp_path / "x.pkl", "--tolerance", "0.1"], "--tolerance goes with --verify"),
        ([ours], "give the checkpoint and the file to write, or --verify A B"),
    ):
        status, _, err = call(*words)
        assert status == 2
        assert err.startswith("error: ")
        assert message in err
