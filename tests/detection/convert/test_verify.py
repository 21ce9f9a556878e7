"""`--verify A B`: the same network or not, and where not."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.backbone import read_backbone
from common.files import sha256_of
from common.resnet import Arch
from detection.convert.to_detectron2 import convert
from detection.convert.verify import text, verify
from tests.detection.tiny_weights import our_checkpoint, save, torchvision_state
from tools.convert_to_d2 import main


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return save(our_checkpoint(torchvision_state()), tmp_path / "checkpoint.pth")


@pytest.fixture
def pkl(ours: Path, tmp_path: Path) -> Path:
    convert(read_backbone(ours), tmp_path / "b.pkl", size=64)
    return tmp_path / "b.pkl"


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
    convert(read_backbone(pkl), tmp_path / "back.pth", to="torchvision", size=64)
    moco = {f"module.encoder_q.{name}": value for name, value in state.items()}
    files = [
        pkl,
        tmp_path / "back.pth",
        save(state, tmp_path / "plain.pth"),
        save({"state_dict": moco, "epoch": 3}, tmp_path / "moco.pth.tar"),
        save({"state_dict": state, "state_dict_ema": state}, tmp_path / "timm.pth"),
    ]
    layouts = ["detectron2", "torchvision", "torchvision", "moco", "timm"]
    for file, layout in zip(files, layouts, strict=True):
        report = verify(ours, file, size=64)
        assert report["same"], report["reasons"]
        assert report["b"]["layout"] == layout
        assert set(report["stages"].values()) == {0.0}
        assert all(item["same_bits"] for item in report["tensors"].values())
        assert report["counters"] == {
            "num_equal": 53, "num_different": 0, "num_only_in_a": 0, "num_only_in_b": 0,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changed_from"),
    [("res4.0.conv1.weight", "res4"), ("stem.conv1.norm.running_var", "res2"),
     ("res5.2.conv3.norm.bias", "res5")],
)  # fmt: skip
def test_one_changed_tensor_is_named_and_so_is_its_stage(
    name: str, changed_from: str, ours: Path, pkl: Path
) -> None:
    def flip(model: dict[str, Any]) -> None:
        model[name] = np.ascontiguousarray(model[name][::-1])

    report = verify(ours, change(pkl, flip), size=64)
    assert not report["same"]
    off = [n for n, x in report["tensors"].items() if not x["same_bits"]]
    assert len(off) == 1
    assert changed_from in report["reasons"][0] or "stem" in report["reasons"][0]
    assert off[0] in report["reasons"][0]
    stages = ("res2", "res3", "res4", "res5")
    for stage in stages:
        reached = stages.index(stage) >= stages.index(changed_from)
        assert (report["stages"][stage] > 1e-5) == reached
    assert f"the features differ from {changed_from} on" in report["reasons"][1]
    assert off[0] in text(report)


def test_relative_difference_is_of_the_largest_value(ours: Path, pkl: Path) -> None:
    """Against numpy: one element moved by a known share of the tensor's largest."""
    before = pickle.loads(pkl.read_bytes())["model"]["res3.1.conv2.weight"]
    moved = before.copy()
    moved.flat[0] += np.float32(3e-4) * np.abs(before).max()
    report = verify(ours, change(pkl, lambda m: m.update({"res3.1.conv2.weight": moved})), size=64)
    expected = np.abs(moved.astype(float) - before).max() / np.abs(before).max()
    found = report["tensors"]["layer2.1.conv2.weight"]["relative_difference"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert not report["same"]
    loose = verify(ours, pkl, size=64, tolerance=1e-2)
    assert loose["same"]
    assert not loose["tensors"]["layer2.1.conv2.weight"]["same_bits"]


def test_stride_in_another_place_is_seen_although_all_tensors_are_equal(
    ours: Path, pkl: Path
) -> None:
    card = json.loads(pkl.with_suffix(".json").read_text())
    card["preprocessing"]["stride_in_1x1"] = True
    pkl.with_suffix(".json").write_text(json.dumps(card))
    report = verify(ours, pkl, size=64)
    assert all(item["same_bits"] for item in report["tensors"].values())
    assert report["stages"]["res2"] == 0
    assert min(report["stages"][stage] for stage in ("res3", "res4", "res5")) > 1e-2
    assert report["reasons"] == ["the features differ from res3 on (res3, res4, res5)"]
    pkl.with_suffix(".json").unlink()
    assert verify(ours, pkl, size=64)["same"]
    assert not verify(ours, pkl, size=64, stride_in_1x1=True)["same"]


def test_other_pixel_statistics_are_another_network(ours: Path, tmp_path: Path) -> None:
    changed = our_checkpoint(torchvision_state())
    changed["preprocessing"] = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "order": "RGB"}
    report = verify(ours, save(changed, tmp_path / "other.pth"), size=64)
    assert report["reasons"] == ["the files state different pixel statistics"]
    assert report["preprocessing"] == "different"


def test_counters_are_told_but_do_not_decide(ours: Path, tmp_path: Path) -> None:
    state = torchvision_state()
    state["bn1.num_batches_tracked"] = torch.tensor(1)
    del state["layer1.0.bn1.num_batches_tracked"]
    report = verify(ours, save(state, tmp_path / "b.pth"), size=64)
    assert report["same"]
    assert report["counters"] == {
        "num_equal": 51, "num_different": 1, "num_only_in_a": 1, "num_only_in_b": 0,
    }  # fmt: skip


def with_nan(state: dict[str, Any]) -> None:
    state["layer2.0.bn1.bias"] = torch.full_like(state["layer2.0.bn1.bias"], float("nan"))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda s: s.pop("layer3.1.conv1.weight"), "lacks layer3.1.conv1.weight"),
        (with_nan, "layer2.0.bn1.bias holds NaN or infinity"),
        (lambda s: s.update({"layer1.0.x": torch.ones(1)}), "has layer1.0.x and 0 more beside"),
        (lambda s: s.update({"bn1.weight": torch.ones(7)}), r"bn1.weight has shape \(7,\)"),
        (lambda s: s.update({"bn1.weight": torch.ones(3).int()}), "bn1.weight is Tensor of torch."),
        (lambda s: s.update({"bn1.weight": "text"}), "bn1.weight is str, not a dense tensor"),
        (lambda s: s.update({"conv1.weight": torch.ones(3)}), r"conv1.weight has shape \(3,\)"),
    ],
)  # fmt: skip
def test_incomplete_file_is_refused_with_the_reason(
    alter: Callable[[dict[str, Any]], object], reason: str, ours: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    state = torchvision_state()
    alter(state)
    path = save(state, tmp_path / "b.pth")
    assert main(["--verify", str(ours), str(path), "--size", "64", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["same"] is False
    assert re.search(reason, report["refused"])
    assert str(path) in report["refused"]


def test_another_architecture_is_refused(ours: Path, tmp_path: Path) -> None:
    other = save(torchvision_state(Arch(50, 2, 3, 6)), tmp_path / "b.pth")
    report = verify(ours, other, size=64)
    assert "another architecture" in report["refused"]
    assert "res2 5" in report["refused"]
    assert "res2 6" in report["refused"]
    assert "stages" not in report


def test_command_line(
    ours: Path, pkl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    capsys.readouterr()
    status, out, _ = call("--verify", ours, pkl, "--size", 64)
    assert status == 0
    assert out.endswith("the same network\n")
    assert "265 of 265 equal bit by bit" in out
    status, out, _ = call("--verify", ours, pkl, "--size", 64, "--json", tmp_path / "r.json")
    assert status == 0
    assert json.loads((tmp_path / "r.json").read_text())["same"] is True
    assert "the same network" in out
    two = our_checkpoint(torchvision_state())
    two["ema"] = {f"backbone.{n}": v for n, v in torchvision_state(seed=2).items()}
    both = save(two, tmp_path / "two.pth")
    assert call("--verify", both, both, "--size", 64)[0] == 0
    status, out, _ = call("--verify", both, both, "--branch-b", "ema", "--size", 64)
    assert status == 1
    assert "not the same: 265 of 265 tensors differ" in out
    for words, message in (
        (["--verify", ours, tmp_path / "none.pkl"], "none.pkl: no such checkpoint"),
        (["--verify", ours, pkl, "--to", "torchvision"], "leave to out"),
        (["--verify", ours, pkl, "--tolerance", "2"], "--tolerance 2.0"),
        ([ours, tmp_path / "x.pkl", "--tolerance", "0.1"], "--tolerance goes with --verify"),
        ([ours], "give the checkpoint and the file to write, or --verify A B"),
        (["--verify", ours, pkl, "--image", tmp_path / "no.png"], "no such picture"),
    ):
        status, _, err = call(*words)
        assert status == 2
        assert err.startswith("error: ")
        assert message in err


def test_damaged_file_is_not_the_same(ours: Path, pkl: Path) -> None:
    pkl.write_bytes(pkl.read_bytes()[:3000])
    report = verify(ours, pkl, size=64)
    assert "not a readable pickle" in report["refused"]
