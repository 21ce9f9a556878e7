"""Golden: tensors that conversion writes, from every layout, and the command's exit statuses."""

import argparse
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden.detection_inputs import ARCHS, backbone
from tests.golden.gate import check, digest, exit_status
from tools import convert_to_d2

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("ours", "torchvision", "timm", "moco", "solo-learn", "lightly", "detectron2")
WITH_EMA = ("ours", "timm", "moco", "solo-learn", "lightly")
CARD_FACTS = ("arch", "preprocessing", "branch", "num_tensors", "num_norms", "num_counters",
              "cast_to_float32")  # fmt: skip
State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def numbered(state: State, prefix: str) -> State:
    """lightly's names: children of a ResNet in an nn.Sequential."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = ((*name.partition("."), value) for name, value in state.items())
    return {f"{prefix}{numbers[first]}.{rest}": value for first, _, rest, value in parts}


def detectron2_detector(state: State) -> State:
    """Names of the ResNet inside a C4 detector."""
    found = {}
    for name, value in state.items():
        module, field = name.rsplit(".", 1)
        module = module.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for number in (1, 2, 3):
            module = module.replace(f"bn{number}", f"conv{number}.norm")
        for number in (1, 2, 3, 4):
            module = module.replace(f"layer{number}", f"res{number + 1}")
        place = "backbone." if module.startswith(("res2", "res3", "res4")) else "roi_heads."
        place = place if module.startswith("res") else "backbone.stem."
        found[f"{place}{module}.{field}"] = value
    return found


def in_layout(layout: str, arch: str) -> dict[str, Any]:
    """A checkpoint as that project writes it; its moving average is another network."""
    online, ema = backbone(arch, 1), backbone(arch, 2)
    head, fc = {"projector.0.weight": torch.ones(2, 2)}, {"fc.weight": torch.ones(3, 2)}
    depth, divisor = ARCHS[arch]
    match layout:
        case "ours":
            sizes = {"depth": depth, "width_per_group": 64 // divisor,
                     "stem_channels": 64 // divisor,
                     "res2_channels": (64 if depth == 18 else 256) // divisor}  # fmt: skip
            pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "order": "RGB"}
            return {"format": "fa-pretrain-1", "arch": sizes, "preprocessing": pixels,
                    "model": prefixed(online, "backbone.") | head,
                    "ema": prefixed(ema, "backbone.")}  # fmt: skip
        case "torchvision":
            return dict(online | fc)
        case "timm":
            return {"arch": f"resnet{depth}", "state_dict": online | fc, "state_dict_ema": ema | fc}
        case "moco":
            state = prefixed(online | fc, "module.encoder_q.")
            state |= prefixed(ema | fc, "module.encoder_k.")
            return {"epoch": 200, "state_dict": state | {"module.queue": torch.zeros(2, 2)}}
        case "solo-learn":
            state = prefixed(online, "backbone.") | prefixed(ema, "momentum_backbone.") | head
            return {"state_dict": state, "hyper_parameters": argparse.Namespace(method="byol")}
        case "lightly":
            state = numbered(online, "backbone.") | numbered(ema, "backbone_momentum.")
            return {"state_dict": state | {"projection_head.layers.0.weight": torch.ones(2)}}
        case _:
            more = {"proposal_generator.rpn_head.conv.weight": torch.ones(2)}
            return {"model": detectron2_detector(online) | more}


def written(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file that conversion wrote, and what else it holds."""
    if path.suffix == ".pkl":
        contents = pickle.loads(path.read_bytes())
    else:
        contents = torch.load(path, weights_only=True)
    if "model" not in contents:
        return contents, {}
    tensors = {name: torch.as_tensor(value) for name, value in contents["model"].items()}
    return tensors, {key: value for key, value in contents.items() if key != "model"}


def numbers(state: dict[str, Tensor]) -> list[list[str | float]]:
    """Rows in the file's order: name, type and shape; sum, sum of squares, three elements."""
    rows = []
    for name, value in state.items():
        flat = value.numpy().ravel().astype(np.float64)
        figures = (flat.sum(), (flat**2).sum(), flat[0], flat[len(flat) // 2], flat[-1])
        kind = f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        rows.append([kind, *(float(figure) for figure in figures)])
    return rows


def bytes_of(state: dict[str, Tensor]) -> str:
    return digest(*(name.encode() + value.numpy().tobytes() for name, value in state.items()))


def convert(folder: Path, layout: str, arch: str, branch: str, out: str, *more: str):
    """Convert through the command; returns what it wrote and its card."""
    folder.mkdir(exist_ok=True)
    torch.save(in_layout(layout, arch), folder / "checkpoint.pth")
    if layout == "detectron2":
        more = (*more, "--preprocessing", "imagenet", "--stride-in", "3x3")
    status = convert_to_d2.main([
        str(folder / "checkpoint.pth"), str(folder / out), "--size", "64", "--branch", branch,
        "--json", str(folder / "answer.json"), *more,
    ])  # fmt: skip
    assert status == 0
    card = json.loads((folder / "answer.json").read_text())
    assert card == json.loads((folder / out).with_suffix(".json").read_text())
    assert card["source"]["layout"] == layout
    assert card["max_relative_difference"] < 1e-5
    (folder / "checkpoint.pth").unlink()
    facts = {key: card[key] for key in CARD_FACTS}
    parts = 2 if layout == "moco" else 1
    facts["dropped"] = dict(Counter(".".join(key.split(".")[:parts]) for key in card["dropped"]))
    return *written(folder / out), facts


SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("R18", "R50")]


@pytest.mark.parametrize("arch", ["thin_R50", *SLOW])
def test_every_layout_gives_these_tensors(arch: str, tmp_path: Path) -> None:
    cards, first, beside = {}, {}, {}
    for layout in LAYOUTS:
        out = "out.pth" if layout in ("timm", "lightly") else "out.pkl"
        state, more, cards[layout] = convert(tmp_path / layout, layout, arch, "online", out)
        assert beside.setdefault(Path(out).suffix, more) == more, layout
        first = first or state
        assert list(state) == list(first), layout
        assert bytes_of(state) == bytes_of(first), layout
    check(f"conversion_{arch}", numbers(first), rtol=1e-6, atol=1e-6, bits=bytes_of(first))
    check(f"conversion_{arch}_cards", {"cards": cards, "beside": beside}, rtol=1e-6)


@pytest.mark.slow
def test_moving_averages(tmp_path: Path) -> None:
    cards, first = {}, {}
    for layout in WITH_EMA:
        state, _, cards[layout] = convert(tmp_path / layout, layout, "thin_R50", "ema", "out.pkl")
        first = first or state
        assert bytes_of(state) == bytes_of(first), layout
    few = [row for row in numbers(first) if "conv1.norm" in str(row[0])]
    values = {"tensors": few, "cards": cards}
    check("conversion_ema", values, rtol=1e-6, atol=1e-6, bits=bytes_of(first))


def in_process(arguments: list[str]) -> int:
    return exit_status(convert_to_d2.main, arguments)


def as_program(arguments: list[str]) -> int:
    command = [sys.executable, "tools/convert_to_d2.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode


@pytest.mark.parametrize("run", [in_process, pytest.param(as_program, marks=pytest.mark.slow)])
def test_command_there_and_back(run: Callable[[list[str]], int], tmp_path: Path) -> None:
    torch.save(in_layout("moco", "thin_R50"), tmp_path / "moco.pth")
    other = {name: value.clone() for name, value in backbone("thin_R50", 1).items()}
    other["layer4.2.bn3.bias"][3] += 0.01
    torch.save(other, tmp_path / "other.pth")
    torch.save({"weights": torch.ones(2)}, tmp_path / "nothing.pth")
    moco, there, back, other_file, nothing = (
        str(tmp_path / name)
        for name in ("moco.pth", "d2.pkl", "tv.pth", "other.pth", "nothing.pth")
    )
    size = ["--size", "64"]
    steps = {
        "convert": [moco, there, *size],
        "back": [there, back, "--to", "torchvision", *size],
        "verify d2": ["--verify", moco, there, *size],
        "verify torchvision": ["--verify", there, back, *size, "--json", f"{tmp_path}/v.json"],
        "verify ema": ["--verify", moco, there, "--branch", "ema", *size],
        "verify other": ["--verify", there, other_file, *size],
        "verify tolerant": ["--verify", there, other_file, "--tolerance", "0.9", *size],
        "verify no ResNet": ["--verify", there, nothing, *size],
        "convert no ResNet": [nothing, str(tmp_path / "n.pkl")],
        "no such file": [str(tmp_path / "absent.pth"), str(tmp_path / "n.pkl")],
        "ending": [moco, str(tmp_path / "n.txt"), *size],
        "torchvision as pkl": [moco, str(tmp_path / "n.pkl"), "--to", "torchvision", *size],
        "onto itself": [moco, moco, *size],
        "layout": [moco, str(tmp_path / "n.pkl"), "--layout", "lightly", *size],
        "unknown option": [moco, there, "--lay", "moco"],
        "nothing given": [],
        "small": [moco, str(tmp_path / "n.pkl"), "--size", "32"],
        "help": ["--help"],
    }
    if run is as_program:  # seconds each: one of each status, what lies between in this process
        few = ("convert", "back", "verify torchvision", "verify other", "ending", "unknown option")
        steps = {name: steps[name] for name in few}
    own = ("back", "verify torchvision", "ending")
    statuses = {
        name: (in_process if name in own else run)(arguments) for name, arguments in steps.items()
    }
    report = json.loads((tmp_path / "v.json").read_text())
    assert not (tmp_path / "n.pkl").exists()
    returned, _ = written(Path(back))
    check(
        f"conversion_command_{run.__name__}",
        {
            "statuses": statuses,
            "order": list(returned),
            "tensors": [row for row in numbers(returned) if "layer4.2" in str(row[0])],
            "same": report["same"],
            "features agree": max(report["stages"].values()) < 1e-5,
        },
        rtol=1e-6,
        atol=1e-6,
        bits=bytes_of(returned),
    )
