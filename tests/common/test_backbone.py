"""Reading checkpoints: what converts, what is refused and why; damaged files."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.backbone import read_backbone
from common.checkpoints import load_safetensors as load
from common.errors import UserError
from common.layouts import refuse_other_networks
from common.resnet import Arch
from detection.convert.to_detectron2 import convert
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state
from tools.convert_to_d2 import main

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def write_safetensors(path: Path, state: dict[str, Tensor], **header: Any) -> Path:
    """Bytes as the format's description has them; `header` replaces entries."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in state.items():
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape),
                         "data_offsets": [len(data), len(data) + len(content)]}  # fmt: skip
        data += content
    text = json.dumps(entries | header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_safetensors_are_read_bit_by_bit(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "odd": torch.arange(3).to(torch.bfloat16),  # 6 bytes: what follows is not aligned
        "half": torch.full((2, 1), 1.5, dtype=torch.float16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    found = load(write_safetensors(tmp_path / "w.safetensors", state))
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 25]}, "25 bytes at 0"),
        ({"dtype": "F32", "shape": [2000], "data_offsets": [0, 8000]}, "8000 bytes at 0"),
        ({"dtype": "F8_E4M3", "shape": [6], "data_offsets": [0, 6]}, "type 'F8_E4M3' is none of"),
        ({"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}, "no whole numbers"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "no whole numbers"),
        ({"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}, "no whole numbers"),
        ({"dtype": "F32", "shape": [1]}, "data_offsets"),
        (5, "w.safetensors: not a readable"),
    ],
)
def test_header_and_bytes_must_agree(entry: object, reason: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2, 3)}, a=entry)
    with pytest.raises(UserError, match=reason):
        load(path)


def test_cut_safetensors_are_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2, 3)})
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:20], whole[:-1], b"\xff" * 64, b"[]" * 40,
                    (2).to_bytes(8, "little") + b"[]"):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w.safetensors: not a readable .safetensors file"):
            load(path)


def test_timm_hub_folder(tmp_path: Path) -> None:
    """model.safetensors and config.json, as timm publishes weights."""
    state = torchvision_state()
    path = write_safetensors(tmp_path / "model.safetensors", state)
    config = {"architecture": "resnet50", "num_classes": 1000,
              "pretrained_cfg": {"mean": [0.5, 0.5, 0.4], "std": [0.5, 0.5, 0.6]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = read_backbone(path)
    assert source.layout == "timm"
    assert source.preprocessing.mean == (0.5, 0.5, 0.4)
    assert source.origins["preprocessing"] == "config"
    assert torch.equal(source.tensors["conv1.weight"], state["conv1.weight"])
    card = convert(source, tmp_path / "b.pkl", size=64)
    assert card["preprocessing"]["pixel_mean"] == [127.5, 127.5, 102.0]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnetaa50"}))
    with pytest.raises(UserError, match="arch 'resnetaa50': its tensors have a plain ResNet's"):
        read_backbone(path)
    (tmp_path / "config.json").write_text("{}")
    assert read_backbone(path).origins["preprocessing"] == "assumed"


def test_timm_training_checkpoint_and_its_average(tmp_path: Path) -> None:
    """As timm's CheckpointSaver writes it."""
    checkpoint = {
        "epoch": 3, "arch": "resnet50", "version": 2, "metric": 71.0, "saver": {"best": 1},
        "state_dict": torchvision_state() | {"fc.weight": torch.ones(4, 40)},
        "state_dict_ema": {f"module.{n}": v for n, v in torchvision_state(seed=5).items()},
    }  # fmt: skip
    path = save(checkpoint, tmp_path / "last.pth.tar")
    online, ema = read_backbone(path), read_backbone(path, branch="ema")
    assert online.layout == ema.layout == "timm"
    assert list(online.dropped) == ["fc.weight"]
    assert torch.equal(ema.tensors["conv1.weight"], torchvision_state(seed=5)["conv1.weight"])
    card = convert(online, tmp_path / "b.pkl", size=64)
    assert card["pretraining"]["epoch"] == 3
    assert "epochs 3" in (tmp_path / "b.md").read_text()
    del checkpoint["state_dict_ema"]
    with pytest.raises(UserError, match="--branch ema: this timm checkpoint holds one network"):
        read_backbone(save(checkpoint, path), branch="ema")
    with pytest.raises(UserError, match="arch 'resnetblur50'"):
        read_backbone(save(checkpoint | {"arch": "resnetblur50"}, path))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"conv1.0.weight": (32, 3, 3, 3)}, r"conv1.0.weight: a deep stem .*resnet..d"),
        ({"layer1.0.se.fc1.weight": (4, 5, 1, 1)}, "squeeze-and-excitation"),
        ({"layer1.0.downsample.2.weight": (5,)}, r"average pooling in its shortcuts \(ResNet-D\)"),
        ({"layer1.0.conv1.conv.weight": (2, 3, 1, 1)}, "selective kernels"),
        ({"layer1.0.convs.0.weight": (2, 2, 3, 3)}, "Res2Net"),
        ({"layer1.0.conv2.weight": (2, 1, 3, 3)}, r"2 channels in 2 groups \(ResNeXt\)"),
        ({"conv1.weight": (3, 1, 7, 7)}, "1 input channels; pictures have three"),
        ({"bn1.running_mean": None}, "no running statistics .group norm"),
        ({"stages.0.blocks.0.conv1.weight": (1,)}, "another family"),
        ({"stem.conv1.conv.weight": (1, 3, 3, 3)}, "another family"),
        ({"patch_embed.proj.weight": (1, 3, 16, 16)}, "vision transformer"),
        ({"res2_0_branch2a_w": (1, 1, 1, 1)}, "Caffe2's names"),
        ({"conv1_w": (3, 3, 7, 7)}, "Caffe2's names"),
    ],
)
def test_networks_that_only_look_like_a_resnet(
    changed: dict[str, tuple[int, ...] | None], reason: str, tmp_path: Path
) -> None:
    state = torchvision_state()
    for name, shape in changed.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.ones(shape)
    with pytest.raises(UserError, match=rf"is no plain ResNet: .*{reason}"):
        read_backbone(save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize("arch", [TINY, Arch(18, 64, 64, 64), Arch(101, 3, 2, 4)], ids=str)
def test_plain_resnets_are_none_of_these(arch: Arch) -> None:
    shapes = {name: tuple(value.shape) for name, value in torchvision_state(arch).items()}
    refuse_other_networks(shapes, architecture="resnet50")
    with pytest.raises(UserError, match="arch 'seresnetaa50d'"):
        refuse_other_networks(shapes, architecture="seresnetaa50d")


def test_arrays_in_foreign_byte_order_are_read(tmp_path: Path) -> None:
    convert(
        read_backbone(save(torchvision_state(), tmp_path / "a.pth")), tmp_path / "b.pkl", size=64
    )
    data = {"model": {n: v.numpy() for n, v in torchvision_state().items()}}
    data["model"]["conv1.weight"] = data["model"]["conv1.weight"].astype(">f4")
    data["model"]["bn1.bias"] = np.asfortranarray(data["model"]["bn1.bias"])
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(data))
    source = read_backbone(tmp_path / "c.pkl")
    assert torch.equal(source.tensors["conv1.weight"], torchvision_state()["conv1.weight"])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.tensor(-1), "not a count of batches"),
        (torch.tensor([1, 2]), "not a count of batches"),
        (torch.tensor(1.5), "not a count of batches"),
        ("many", "bn1.num_batches_tracked is str 'many'"),
    ],
)
def test_counter_that_is_none_is_refused(value: object, reason: str, tmp_path: Path) -> None:
    state: dict[str, Any] = {**torchvision_state(), "bn1.num_batches_tracked": value}
    with pytest.raises(UserError, match=reason):
        read_backbone(save(state, tmp_path / "a.pth"))
    state = {**torchvision_state(), "bn9.num_batches_tracked": torch.tensor(1)}
    with pytest.raises(UserError, match=r"bn9.num_batches_tracked: a batch counter of no norm"):
        read_backbone(save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64), torch.ones(3).to("meta"),
        None, [1.0, 2.0, 3.0], {"a": 1},
    ],
    ids=str,
)  # fmt: skip
def test_weight_that_is_no_dense_tensor_is_refused(value: object, tmp_path: Path) -> None:
    state = torchvision_state() | {"bn1.weight": value}
    with pytest.raises(UserError, match=r"bn1.weight is .*not a dense tensor of floating-point"):
        read_backbone(save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "given", [{"mean": 5, "std": 5}, {"mean": ["a"] * 3, "std": [1] * 3}, "imagenet", [1]]
)
def test_preprocessing_that_is_none_is_refused(given: object, tmp_path: Path) -> None:
    path = save(our_checkpoint(torchvision_state(), preprocessing=given), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: preprocessing "):
        read_backbone(path)


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_damaged_bytes_give_a_message_never_a_traceback(ending: str, tmp_path: Path) -> None:
    """120 damaged copies of each kind of file: read, or refused with one message."""
    state = torchvision_state(Arch(50, 1, 1, 1))
    source = tmp_path / "a.pth"
    save(state, source)
    path = tmp_path / f"b{ending}"
    if ending == ".safetensors":
        write_safetensors(path, state)
    else:
        convert(read_backbone(source), path, size=64)
    whole, draw = path.read_bytes(), random.Random(5)
    refusals: list[str] = []
    for _ in range(120):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 4, 40])):
            place = draw.randrange(len(content)) if draw.random() < 0.5 else draw.randrange(2000)
            content[place] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content)] * 3 + [draw.randrange(len(whole))])])
        try:
            read_backbone(path, assume=True)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert all(str(path) in refusal for refusal in refusals)


def test_command_refuses_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save({"conv1.0.weight": torch.ones(1)}, tmp_path / "a.pth")
    assert main([str(path), str(tmp_path / "b.pkl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: is no plain ResNet: conv1.0.weight")
    assert main([str(path), str(tmp_path / "b.pkl"), "--branch-b", "ema"]) == 2
    assert "--branch-b goes with --verify" in capsys.readouterr().err
    good = save(torchvision_state(), tmp_path / "good.pth")
    out = tmp_path / "c.pth"
    assert main([str(good), str(out), "--to", "torchvision", "--size", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "c.json").read_text())


def test_a_narrow_resnet_18_is_read_but_not_converted(tmp_path: Path) -> None:
    arch = Arch(18, 64, 16, 64)
    path = save(our_checkpoint(torchvision_state(arch), arch), tmp_path / "narrow.pth")
    source = read_backbone(path)
    assert source.arch == arch
    with pytest.raises(UserError, match="Detectron2 builds ResNet-18/34 with 64 channels only"):
        convert(source, tmp_path / "b.pkl", size=64)
