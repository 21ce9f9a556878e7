"""Conversion: proved, bit-equal both ways, and described by cards that hold nothing else."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

import detection.training.trainer  # noqa: F401  (registers the C4 head)
from common.backbone import IMAGENET, read_backbone
from common.errors import UserError
from common.files import sha256_of
from common.resnet import Arch
from detection import convert as conversion
from detection.convert import STAGES, build_bare_resnet, convert, place
from detection.training.config import load_config, set_arch
from detection.training.weights import check_card, load_backbone, write_weights
from tests.detection.tiny_detection import CONFIGS, liven_norms
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state
from tools.convert_to_d2 import main


def there_and_back(path: Path, ending: str, size: int = 64) -> dict[str, Tensor]:
    """The state_dict after both conversions."""
    folder = path.parent
    convert(read_backbone(path), folder / f"there{ending}", size=size)
    back = read_backbone(folder / f"there{ending}")
    convert(back, folder / "back.pth", to="torchvision", size=size)
    return torch.load(folder / "back.pth", weights_only=True)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)  # torchvision's order too
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name


@pytest.mark.parametrize(("arch", "ending"), [(TINY, ".pkl"), (Arch(50, 5, 3, 4), ".pth")], ids=str)
def test_every_bit_comes_back_for_any_width(arch: Arch, ending: str, tmp_path: Path) -> None:
    state = torchvision_state(arch, 7)
    if ending == ".pth":  # a checkpoint of old times has few counters or none
        state = {n: v for n, v in state.items() if n[:3] == "bn1" or not n.endswith("tracked")}
    state["conv1.weight"].view(-1)[:3] = torch.tensor([-0.0, 1e-45, -1e-40])  # easily lost bits
    assert_same_bits(there_and_back(save(state, tmp_path / "from.pth"), ending), state)


def torchvision_features(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Features of torchvision's own model, by its own forward."""
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(f"layer{number}").register_forward_hook(
            lambda _module, _inputs, output, stage=stage: found.__setitem__(stage, output)
        )
        for number, stage in enumerate(STAGES, start=1)
    ]
    with torch.no_grad():
        network.eval()(image)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parity
@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_torchvisions_own_forward_equals_detectron2s(depth: int, tmp_path: Path) -> None:
    torch.manual_seed(depth)
    network = liven_norms(getattr(torchvision.models, f"resnet{depth}")(), depth)
    path = save(network.state_dict(), tmp_path / "from.pth")
    back = there_and_back(path, ".pkl")
    state = {n: v for n, v in network.state_dict().items() if not n.startswith("fc.")}
    assert_same_bits(back, state)
    detector = nn.Module()
    detector.backbone = build_bare_resnet(read_backbone(path).arch)
    num_weights = sum(not name.endswith("num_batches_tracked") for name in state)
    assert load_backbone(detector, tmp_path / "there.pkl") == num_weights
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    expected = torchvision_features(network, image)
    with torch.no_grad():
        found = detector.backbone.eval()(image)
    network.fc = nn.Identity()
    network.load_state_dict(back)  # strictly
    returned = torchvision_features(network, image)
    for stage in STAGES:
        assert expected[stage].abs().max() > 0
        limit = 1e-5 * expected[stage].abs().max()
        assert (found[stage] - expected[stage]).abs().max() <= limit
        assert torch.equal(returned[stage], expected[stage])


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_same_tensors_give_the_same_bytes(ending: str, tmp_path: Path) -> None:
    state = torchvision_state()
    for name in ("one", "two"):
        write_weights(tmp_path / f"{name}{ending}", state, {"a": 1})
    assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()


def test_pkl_is_what_detectron2_expects(thin_weights: Path) -> None:
    """Counters lie beside "model": within it, a frozen norm would have no place for them."""
    data = pickle.loads(thin_weights.read_bytes())
    assert data["matching_heuristics"] is True
    assert data["__author__"]
    assert all(isinstance(value, np.ndarray) for value in data["model"].values())
    assert "stem.conv1.weight" in data["model"]
    assert not [name for name in data["model"] if name.endswith("num_batches_tracked")]
    assert "stem.conv1.norm.num_batches_tracked" in data["num_batches_tracked"]
    assert len(data["num_batches_tracked"]) == 53


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in torchvision_state().items()}
    source = read_backbone(save(state, tmp_path / "a.pth"))
    assert all(torch.equal(value, state[name].float()) for name, value in source.tensors.items())
    assert source.cast == {str(dtype).removeprefix("torch."): 265}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arch"),
    [("thin_R50_C4.yaml", Arch(101, 16, 16, 64)), ("R18_FPN.yaml", Arch(18, 64, 64, 64))],
)
def test_backbone_comes_out_of_a_whole_detector(config: str, arch: Arch, tmp_path: Path) -> None:
    state = torchvision_state(arch, 3)
    convert(read_backbone(save(state, tmp_path / "a.pth")), tmp_path / "b.pkl", size=64)
    thin = {"MODEL.FPN.OUT_CHANNELS": "16", "MODEL.ROI_BOX_HEAD.FC_DIM": "16"}
    cfg = load_config(CONFIGS / config, {"MODEL.DEVICE": "cpu"} | (thin if "FPN" in config else {}))
    set_arch(cfg, arch)
    model = build_model(cfg)
    load_backbone(model, tmp_path / "b.pkl")
    path = save({"model": model.state_dict(), "iteration": 7}, tmp_path / "model_final.pth")
    source = read_backbone(path, preprocessing=IMAGENET, stride_in_1x1=False)
    assert source.layout == "detectron2"
    assert source.arch == arch
    for name, value in source.tensors.items():
        assert torch.equal(value, state[name])
    reasons = set(source.dropped.values())
    assert any("part of the detector" in reason for reason in reasons)
    assert any("extra norm" in reason for reason in reasons) == ("C4" in config)


def test_nothing_is_written_when_features_differ(tmp_path, monkeypatch):
    source = read_backbone(save(torchvision_state(), tmp_path / "a.pth"))
    swapped = conversion.to_detectron2(source.tensors)
    swapped["res4.0.conv1.weight"] = swapped["res4.0.conv1.weight"].flip(0)
    monkeypatch.setattr(conversion, "to_detectron2", lambda _: swapped)
    with pytest.raises(UserError, match=r"features differ.*res4 .*nothing was written"):
        convert(source, tmp_path / "out.pkl", size=64)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten_that_is_no_card(tmp_path: Path) -> None:
    path = save(torchvision_state(), tmp_path / "a.pth")
    source = read_backbone(path)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        convert(source, path, to="torchvision")
    (tmp_path / "summary.json").write_text('{"steps": 5}')
    with pytest.raises(UserError, match=r"summary.json exists and is no card"):
        convert(source, tmp_path / "summary.pkl")
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(UserError, match=r"README.md exists and is no card"):
        convert(source, tmp_path / "README.pth")
    convert(source, tmp_path / "b.pkl", size=64)
    with pytest.raises(UserError, match=r"b.json exists and is no card of it"):
        convert(source, tmp_path / "b.pth", to="torchvision")
    for to, ending in (("torchvision", ".pkl"), ("detectron2", ".pt")):
        with pytest.raises(UserError, match=r"end the name in \.p"):
            convert(source, tmp_path / f"c{ending}", to=to)
    arch = Arch(18, 64, 16, 64)
    narrow = read_backbone(save(our_checkpoint(torchvision_state(arch), arch), path))
    with pytest.raises(UserError, match="Detectron2 builds ResNet-18/34 with 64 channels only"):
        convert(narrow, tmp_path / "n.pkl", size=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "a.pth", "b.json", "b.md", "b.pkl", "summary.json",
    ]  # fmt: skip


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    path = save(our_checkpoint(torchvision_state()), tmp_path / "a.pth")
    status, out, _ = call(path, tmp_path / "b.pkl", "--size", 64)
    assert status == 0
    assert "265 tensors and 53 batch counters converted to detectron2" in out
    assert "a head or state of pretraining" in out
    status, out, _ = call(path, tmp_path / "b.pkl", "--size", 64, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "b.json").read_text())
    for words in ([tmp_path / "none.pth", tmp_path / "b.pkl"], [path, tmp_path / "b.pkl",
                  "--branch-b", "ema"]):  # fmt: skip
        status, _, error = call(*words)
        assert status == 2
        assert error.startswith("error: ")
        assert "Traceback" not in error


CONFIG = {
    "out": "/data/someone/runs/first",
    "data": {
        "shards": {"/data/someone/sets/photos": 1.0, "https://u:secret@host.org/a/b?s=token": 0.5},
    },
    "objective": {"name": "by|ol`\n## Heading <b>"},
    "fa": {"method": "nn+noise", "architecture": "parallel"},
    "eval": {"probe_train": "/data/someone/probe/train"},
    "loss": float("nan"),
    "weights": torch.ones(2),
}  # fmt: skip


def run_folder(folder: Path, **changes: Any) -> Path:
    """A pretraining run as `pretrain/` leaves it."""
    facts = {
        "config": CONFIG,
        "step": 4000,
        "position": {"step": 4000, "epoch": 40},
        "schedule": {"num_steps": 20000, "data_fingerprint": "f1a9"},
        "versions": {"torch": "2.9.1", "python": "3.12.1"},
    }
    folder.mkdir(exist_ok=True)
    path = save(our_checkpoint(torchvision_state(), **facts | changes), folder / "checkpoint.pth")
    (folder / "environment.json").write_text(json.dumps({"commit": "c0ffee", "device": "cpu"}))
    summary = {"steps": 4000, "knn_top1": 0.625, "num_samples": 12345, "images_per_second": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    return path


def cards(path: Path, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    convert(read_backbone(path), out, size=64, **options)
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def test_what_is_known_stands_in_both_cards_and_is_handed_on(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    card, text = cards(path, tmp_path / "b.pkl")
    known = card["pretraining"]
    assert card["weights_file"] == "b.pkl"
    assert card["weights_sha256"] == sha256_of(tmp_path / "b.pkl")
    assert card["source"]["sha256"] == sha256_of(path)
    assert (known["step"], known["num_steps"], known["epoch"]) == (4000, 20000, 40)
    assert (known["commit"], known["data_fingerprint"]) == ("c0ffee", "f1a9")
    assert known["figures"] == {"knn_top1": 0.625, "num_samples": 12345}
    assert known["config"]["fa"] == CONFIG["fa"]
    assert known["versions"] == {"torch": "2.9.1", "python": "3.12.1"}
    for part in (
        "nn+noise",
        "4000",
        "c0ffee",
        "0.625",
        card["weights_sha256"],
        "[127.5, 102.0, 76",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 24
    # Nothing else: no place on a machine, no secret, no markup; what is no JSON becomes text.
    for written in (json.dumps(card), text):
        for secret in ("secret", "token", "/data/someone", "u:"):
            assert secret not in written
    shards = known["config"]["data"]["shards"]
    assert shards == {"sets/photos": 1.0, "https://host.org/a/b": 0.5}
    assert (known["config"]["loss"], known["config"]["weights"]) == ("nan", "<Tensor>")
    assert not [line for line in text.splitlines()[1:] if "`" in line or "<" in line]
    assert [x for x in text.splitlines() if x.startswith("#")] == ["# Model card: b.pkl"]
    # The pixels of the card are those of Detectron2's keys.
    cfg = get_cfg()
    set_arch(cfg, TINY)
    pixels = card["preprocessing"]
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = pixels["input_format"], pixels["pixel_mean"]
    cfg.MODEL.PIXEL_STD, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = pixels["pixel_std"], False
    check_card(tmp_path / "b.pkl", cfg)
    second, _ = cards(tmp_path / "b.pkl", tmp_path / "c.pth", to="torchvision")
    assert second["pretraining"] == known
    assert second["made_from"] == card["source"]
    assert second["preprocessing"] == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "order": "RGB", "pixel_range": [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("runs/data/shards", "runs/data/shards"),
        ("/a/b/c/d", "c/d"),
        ("/", ""),
        ("https://host/x/shard-{000..009}.tar", "https://host/x/shard-{000..009}.tar"),
        ("s3://key:pass@bucket/x?versionId=3#f", "s3://bucket/x"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://h/x", "pipe:curl .."),
    ],
)
def test_location_as_shown(location: str, shown: str) -> None:
    assert place(location) == shown


def test_assumption_stays_one_through_conversions(tmp_path: Path) -> None:
    card, _ = cards(save(torchvision_state(), tmp_path / "a.pth"), tmp_path / "b.pkl")
    assert not any(card["pretraining"].values())
    card, _ = cards(tmp_path / "b.pkl", tmp_path / "c.pth", to="torchvision")
    assert card["origins"]["preprocessing"] == "assumed"


def test_figures_of_another_step_are_left_out(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", step=3000)
    assert conversion.pretraining(read_backbone(path))["figures"] is None
    older = path.parent / "checkpoints" / "step-4000.pth"
    older.parent.mkdir()
    run_folder(path.parent).rename(older)
    figures = conversion.pretraining(read_backbone(older))["figures"]
    assert figures["knn_top1"] == 0.625  # of the run's folder above
