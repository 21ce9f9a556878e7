"""Reading checkpoints: what is read, what is refused and why; damaged files."""

import json
import os
import pickle
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.backbone import IMAGENET, parse_preprocessing, read_backbone
from common.checkpoints import read as load
from common.errors import UserError
from common.files import sha256_of
from common.resnet import D2_CARD, Arch, detectron2_name
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state

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
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 25]}, "bytes 0 to 25"),
        ({"dtype": "F32", "shape": [2000], "data_offsets": [0, 8000]}, "bytes 0 to 8000"),
        ({"dtype": "F8_E4M3", "shape": [6], "data_offsets": [0, 6]}, "F8_E4M3"),
        ({"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}, "shape"),
        ({"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}, "bytes -24 to 0"),
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
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 64, whole[:8] + b"[" * 99_999):
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
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnetaa50"}))
    with pytest.raises(UserError, match="arch 'resnetaa50' has a plain ResNet's tensors"):
        read_backbone(path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").unlink()
    for name in ("config.json", "model.json"):  # nobody waits on a pipe
        os.mkfifo(tmp_path / name)
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
    del checkpoint["state_dict_ema"]
    with pytest.raises(UserError, match="--branch ema: this timm checkpoint holds one network"):
        read_backbone(save(checkpoint, path), branch="ema")
    with pytest.raises(UserError, match="arch 'resnetblur50'"):
        read_backbone(save(checkpoint | {"arch": "resnetblur50"}, path))


SMALL = Arch(18, 4, 4, 4)  # a third of the tensors


def prefixed(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in torchvision_state(SMALL, seed).items()}


def numbered(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    """Children of an nn.Sequential."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = ((*n.partition("."), value) for n, value in torchvision_state(SMALL, seed).items())
    return {f"{prefix}{numbers[first]}.{rest}": value for first, _, rest, value in parts}


def heads(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2, 2) for name in names}


# Layout, whether there is a moving average (of seed 5), and the checkpoint.
WRAPPED: dict[str, tuple[str, bool, Any]] = {
    "compiled in DDP": ("torchvision", False, {"state_dict": prefixed("module._orig_mod.")}),
    "DDP in DDP": ("torchvision", False, {"model": prefixed("module.module.")}),
    "DDP in MoCo": ("moco", True, {
        "state_dict": prefixed("module.encoder_q.module.") | prefixed("encoder_k._orig_mod.", 5)
        | heads("module.queue", "module.encoder_q.fc.0.weight")}),
    "MoCo v3": ("moco", True, {"state_dict": prefixed("module.base_encoder.")
        | prefixed("module.momentum_encoder.", 5) | heads("module.predictor.0.weight")}),
    "an average": ("torchvision", False, prefixed("module.") | {"n_averaged": torch.tensor(3)}),
    "lightly's teacher": ("lightly", True, prefixed("student_backbone.")
        | prefixed("teacher_backbone.", 5) | heads("projection_head.layers.0.weight", "other.w")),
    "SupContrast": ("solo-learn", False, {"model": prefixed("encoder.module.") | heads("head.w")}),
    "Lightning": ("torchvision", False, {
        "state_dict": prefixed("model.") | heads("model.fc.weight"), "loops": {"epoch": {0: 1}}}),
    "MoCo in Lightning": ("moco", True, {
        "state_dict": prefixed("model.encoder_q.") | prefixed("model.encoder_k.", 5)}),
    "DINO": ("solo-learn", True, {
        "student": prefixed("module.backbone.") | heads("module.head.mlp.0.weight"),
        "teacher": prefixed("backbone.", 5) | heads("head.mlp.0.weight"),
        "optimizer": {"state": prefixed("")}, "dino_loss": heads("center")}),
    "DINO in Lightning": ("solo-learn", True, {
        "state_dict": prefixed("student.backbone.") | prefixed("teacher.backbone.", 5)}),
    "VISSL": ("torchvision", False, {"phase": 1, "classy_state_dict": {
        "base_model": {"model": {"trunk": prefixed("base_model._feature_blocks."),
                                 "heads": heads("0.clf.0.weight")}, "meters": {}},
        "loss": prefixed("moco_encoder.trunk._feature_blocks.", 5)}}),
    "SwAV": ("torchvision", False, prefixed("module.") | heads(
        "module.projection_head.0.weight", "module.prototypes.weight")),
    "Barlow Twins": ("solo-learn", False, {"model": prefixed("module.backbone.") | heads(
        "module.projector.0.weight", "module.bn.running_mean")}),
    "lightly": ("lightly", True, {
        "state_dict": numbered("backbone.") | numbered("backbone_momentum.", 5)}),
    "lightly's collection": ("lightly", True, {
        "state_dict": numbered("resnet_moco.backbone.")
        | numbered("resnet_moco.momentum_backbone.", 5)}),
    "children alone": ("lightly", False, numbered("")),
    "DenseCL": ("moco", True, {
        "state_dict": prefixed("encoder_q.0.") | prefixed("encoder_k.0.", 5)
        | heads("queue2", "encoder_q.1.mlp2.0.weight", "encoder_k.1.mlp.0.weight")}),
    "OpenSelfSup": ("solo-learn", True, {  # the backbone has two names
        "state_dict": prefixed("backbone.") | prefixed("online_net.0.")
        | prefixed("target_net.0.", 5)}),
    "PixPro": ("solo-learn", True, {
        "model": prefixed("module.encoder.") | prefixed("module.encoder_k.", 5)}),
    "timm's average": ("torchvision", True, {
        "model": prefixed(""), "ema": {"module": prefixed("", 5)}}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_backbone_is_found_in_any_wrapping(case: str, tmp_path: Path) -> None:
    layout, has_average, checkpoint = WRAPPED[case]
    path = save(checkpoint, tmp_path / "a.pth")
    for branch, seed in (("online", 0), ("ema", 5)):
        if branch == "ema" and not has_average:
            with pytest.raises(UserError, match="--branch"):
                read_backbone(path, branch=branch)
            continue
        source = read_backbone(path, branch=branch)
        assert source.layout == layout
        expected = torchvision_state(SMALL, seed)
        assert all(torch.equal(value, expected[name]) for name, value in source.tensors.items())
        assert all(torch.equal(value, expected[name]) for name, value in source.counters.items())


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        (torch.nn.Linear(2, 2), "holds a whole object, a torch.nn.*Linear.*model.state_dict"),
        ({"model": torch.nn.Linear(2, 2)}, "'model' is a whole object.*model.state_dict"),
        (prefixed("rgb.") | prefixed("depth.", 5), "two backbones that differ, 'rgb.' and 'depth"),
        ({"a": prefixed(""), "b": prefixed("")}, "networks under 'a.' and 'b.'"),
        ({"teacher": prefixed("")}, r"backbones found: 'teacher.'.*--branch"),
    ],
)
def test_what_holds_no_one_backbone(checkpoint: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.pth: .*{reason}"):
        read_backbone(save(checkpoint, tmp_path / "a.pth"))


def with_nan(state: dict[str, Any]) -> None:
    state["layer2.0.bn1.bias"] = torch.full_like(state["layer2.0.bn1.bias"], float("nan"))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        # Networks that only look like a ResNet: each has tensors of its own, or of other shapes.
        (lambda s: s.update({"conv1.0.weight": s.pop("conv1.weight")}), "no conv1.weight"),
        (lambda s: s.update({"layer1.0.se.fc1.weight": torch.ones(4, 5, 1, 1)}), "has layer1.0.se"),
        (lambda s: s.update({"layer1.0.downsample.2.weight": torch.ones(5)}), "has layer1.0.down"),
        (lambda s: s.update({"layer1.0.conv2.weight": torch.ones(2, 1, 3, 3)}), "a ResNet-50 .*ne"),
        (lambda s: s.update({"conv1.weight": torch.ones(3, 1, 7, 7)}), r"shape \(3, 1, 7, 7\)"),
        (lambda s: s.update({"conv1.weight": torch.ones(3, 3, 3, 3)}), r"shape \(3, 3, 3, 3\)"),
        (lambda s: s.pop("bn1.running_mean"), "lacks bn1.running_mean"),
        # Incomplete or damaged ones.
        (lambda s: s.pop("layer3.1.conv1.weight"), "lacks layer3.1.conv1.weight"),
        (with_nan, "layer2.0.bn1.bias holds NaN or infinity"),
        (lambda s: s.update({"layer1.0.x": torch.ones(1)}), "has layer1.0.x and 0 more beside"),
        (lambda s: s.update({"conv1.weight": torch.ones(3)}), r"conv1.weight has shape \(3,\)"),
        (lambda s: s.update({"bn1.weight": torch.ones(7)}), r"bn1.weight has shape \(7,\)"),
        (lambda s: s.update({"bn1.weight": torch.ones(3).int()}), "bn1.weight is Tensor of torch."),
        (lambda s: s.update({"bn1.weight": "text"}), "bn1.weight is str, no dense"),
        (lambda s: s.update({"bn1.weight": torch.ones(3).to_sparse()}), "no dense floating-point"),
        (lambda s: s.update({"bn1.weight": torch.ones(3).to("meta")}), "no dense floating-point"),
        (lambda s: s.update({"bn1.num_batches_tracked": torch.tensor(-1)}), "not a count of batch"),
        (lambda s: s.update({"bn1.num_batches_tracked": torch.tensor(1.5)}), "not a count of batc"),
        (lambda s: s.update({"bn9.num_batches_tracked": torch.tensor(1)}), "a batch counter of no"),
    ],
)
def test_what_is_no_complete_plain_resnet_is_refused(alter, reason, tmp_path):
    state: dict[str, Any] = torchvision_state()
    alter(state)
    with pytest.raises(UserError, match=rf"a.pth: .*{reason}"):
        read_backbone(save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize("counter", [torch.tensor(7.0), np.float32(7), 7.0])
def test_counters_of_averaged_weights_are_floats(counter, tmp_path):
    state: dict[str, Any] = torchvision_state()
    state["bn1.num_batches_tracked"] = counter
    source = read_backbone(save(state, tmp_path / "a.pth"))
    assert source.counters["bn1.num_batches_tracked"] == 7


def test_our_checkpoint_and_its_architecture_must_belong_together(tmp_path: Path) -> None:
    state, path = torchvision_state(), tmp_path / "a.pth"
    for changes, reason in (
        ({"arch": {**asdict(TINY), "depth": 101}}, "is no ResNet-101 .*lacks layer3.6"),
        ({"arch": {**asdict(TINY), "stem_channels": 8}}, "has layer1.0.downsample"),
        ({"arch": None}, "expected the keys depth"),
        ({"model": {"projector.weight": torch.ones(1)}}, "no key begins with 'backbone.'"),
        ({"preprocessing": {"mean": [0.5] * 3, "std": [1] * 3, "order": "BGR"}}, "only RGB"),
        ({"preprocessing": {"mean": 5, "std": 5}}, "a.pth: preprocessing "),
        ({"preprocessing": "imagenet"}, "a.pth: preprocessing "),
    ):
        with pytest.raises(UserError, match=reason):
            read_backbone(save(our_checkpoint(state) | changes, path))
    save(our_checkpoint(state), path)
    with pytest.raises(UserError, match=r"no ema network.*--branch online"):
        read_backbone(path, branch="ema")
    with pytest.raises(UserError, match="use --layout auto"):
        read_backbone(path, layout="moco")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_backbone(tmp_path / "none.pth")
    path = tmp_path / "a.pth"
    for content, reason in (
        (torch.ones(3), "holds Tensor, not a state_dict"),
        ({}, "holds nothing, not a state_dict"),
        ({0: torch.ones(3)}, "not names of tensors"),
        ({"patch_embed.proj.weight": torch.ones(1)}, "no known layout: the keys begin with patch"),
        ({"stages.0.blocks.0.conv1.weight": torch.ones(1)}, "no known layout"),
    ):
        with pytest.raises(UserError, match=reason):
            read_backbone(save(content, path))
    blobs = {"blobs": {"conv1_w": np.ones((64, 3, 7, 7), np.float32)}}  # Caffe2's
    (tmp_path / "detectron1.pkl").write_bytes(pickle.dumps(blobs))
    with pytest.raises(UserError, match="no known layout: the keys begin with conv1_w"):
        read_backbone(tmp_path / "detectron1.pkl")


def detectron2_pkl(path: Path, state: dict[str, Tensor]) -> Path:
    model = {detectron2_name(n): v.numpy() for n, v in state.items() if "tracked" not in n}
    path.write_bytes(pickle.dumps({"model": model, "matching_heuristics": True}))
    return path


def test_arrays_in_foreign_byte_order_are_read(tmp_path: Path) -> None:
    data = {"model": {n: v.numpy() for n, v in torchvision_state().items()}}
    data["model"]["conv1.weight"] = data["model"]["conv1.weight"].astype(">f4")
    data["model"]["bn1.bias"] = np.asfortranarray(data["model"]["bn1.bias"])
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(data))
    source = read_backbone(tmp_path / "c.pkl")
    assert torch.equal(source.tensors["conv1.weight"], torchvision_state()["conv1.weight"])


def test_detectron2_file_without_card_must_be_explained(tmp_path: Path) -> None:
    path = detectron2_pkl(tmp_path / "b.pkl", torchvision_state())
    with pytest.raises(UserError, match=r"no card beside it \(b.json\).*--preprocessing and --str"):
        read_backbone(path)
    with pytest.raises(UserError, match=r"give --preprocessing and --stride-in 3x3"):
        read_backbone(path, preprocessing=IMAGENET)
    source = read_backbone(path, preprocessing=IMAGENET, stride_in_1x1=False)
    assert source.origins == {"preprocessing": "option", "stride": "option"}
    with pytest.raises(UserError, match="stride in the 1x1 convolution"):
        read_backbone(path, preprocessing=IMAGENET, stride_in_1x1=True)


def test_card_of_a_detectron2_file(tmp_path: Path) -> None:
    path = detectron2_pkl(tmp_path / "b.pkl", torchvision_state())
    pixels = {"pixel_mean": [127.5, 102.0, 76.5], "pixel_std": [51.0] * 3, "input_format": "RGB",
              "stride_in_1x1": False}  # fmt: skip
    card = {"format": D2_CARD, "arch": asdict(TINY), "preprocessing": pixels, "branch": "online",
            "source": {"file": "a", "sha256": "0", "layout": "ours"},
            "weights_sha256": sha256_of(path)}  # fmt: skip

    def read(**changes: Any) -> Any:
        (tmp_path / "b.json").write_text(json.dumps(card | changes))
        return read_backbone(path)

    source = read()
    assert source.preprocessing.mean == (0.5, 0.4, 0.3)
    assert source.origins == {"preprocessing": "card", "stride": "card"}
    with pytest.raises(UserError, match="stride in the 1x1 convolution"):
        read(preprocessing=pixels | {"stride_in_1x1": True})
    with pytest.raises(UserError, match="no mean and std"):
        read(preprocessing={})
    with pytest.raises(UserError, match=r"b.json beside it describes another file"):
        read(weights_sha256="0")


@pytest.mark.parametrize("text", ["1,2/3", "0.5,0.5,0.5/0,1,1", "123,116,103/58,57,57", "x/y"])
def test_preprocessing_that_makes_no_sense(text: str) -> None:
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        parse_preprocessing(text)


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_damaged_bytes_give_a_message_never_a_traceback(ending: str, tmp_path: Path) -> None:
    """50 damaged copies of each kind of file: read, or refused with one message."""
    state = torchvision_state(Arch(50, 1, 1, 4))
    path = tmp_path / f"b{ending}"
    write = {".pth": lambda p, s: save(s, p), ".pkl": detectron2_pkl, ".safetensors":
             write_safetensors}[ending]  # fmt: skip
    write(path, state)
    whole, draw = path.read_bytes(), random.Random(5)
    refusals: list[str] = []
    for _ in range(50):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 4, 40])):
            place = draw.randrange(len(content)) if draw.random() < 0.5 else draw.randrange(2000)
            content[place] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content)] * 3 + [draw.randrange(len(whole))])])
        try:
            read_backbone(path, assume=True)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 12
    assert all(str(path) in refusal for refusal in refusals)
