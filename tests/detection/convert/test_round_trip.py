"""torchvision -> Detectron2 -> torchvision: every bit comes back, and the function stays."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import detection.training.trainer  # noqa: F401  (registers the C4 head)
from common.backbone import IMAGENET, read_backbone
from common.errors import UserError
from common.resnet import Arch
from detection.convert.parity import build_bare_resnet
from detection.convert.to_detectron2 import convert
from detection.training.config import load_config, set_arch
from detection.training.weights import load_backbone
from tests.detection.tiny_detection import CONFIGS, liven_norms
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state

STAGES = ("res2", "res3", "res4", "res5")


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


archs = st.builds(
    Arch,
    st.sampled_from([50, 101, 152]),
    st.integers(1, 5), st.integers(1, 5), st.integers(4, 9),  # one channel may be dead: no proof
)  # fmt: skip


@settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(arch=archs, seed=st.integers(0, 99), ending=st.sampled_from([".pkl", ".pth"]))
def test_every_bit_comes_back_for_any_width(
    tmp_path_factory: pytest.TempPathFactory, arch: Arch, seed: int, ending: str
) -> None:
    state = torchvision_state(arch, seed)
    state["conv1.weight"].view(-1)[:3] = torch.tensor([-0.0, 1e-45, -1e-40])  # easily lost bits
    path = save(state, tmp_path_factory.mktemp("any") / "from.pth")
    assert_same_bits(there_and_back(path, ending), state)


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
@pytest.mark.parametrize(
    "depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50, 101))]
)
def test_torchvisions_own_forward_equals_detectron2s(depth: int, tmp_path: Path) -> None:
    torch.manual_seed(depth)
    network = liven_norms(getattr(torchvision.models, f"resnet{depth}")(), depth)
    path = save(network.state_dict(), tmp_path / "from.pth")
    back = there_and_back(path, ".pkl")
    state = {n: v for n, v in network.state_dict().items() if not n.startswith("fc.")}
    assert_same_bits(back, state)
    detector = nn.Module()
    arch = read_backbone(path).arch
    detector.backbone = build_bare_resnet(arch)
    num_weights = sum(not name.endswith("num_batches_tracked") for name in state)
    assert load_backbone(detector, tmp_path / "there.pkl") == num_weights
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    expected = torchvision_features(network, image)
    with torch.no_grad():
        found = detector.backbone.eval()(image)
    again = getattr(torchvision.models, f"resnet{depth}")()
    again.fc = nn.Identity()
    again.load_state_dict(back)  # strictly
    returned = torchvision_features(again, image)
    for stage in STAGES:
        assert expected[stage].abs().max() > 0
        limit = 1e-5 * expected[stage].abs().max()
        assert (found[stage] - expected[stage]).abs().max() <= limit
        assert torch.equal(returned[stage], expected[stage])


def test_counters_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    """A checkpoint of old times has none; torchvision's network loads without them."""
    state = {n: v for n, v in torchvision_state().items() if not n.endswith("tracked")}
    some = state | {"bn1.num_batches_tracked": torch.tensor(5)}
    for name, given_state in (("none", state), ("one", some)):
        folder = tmp_path / name
        folder.mkdir()
        back = there_and_back(save(given_state, folder / "from.pth"), ".pkl")
        assert set(back) == set(given_state)


def test_detectron2_itself_reads_counters_beside_the_model(tmp_path: Path) -> None:
    """They lie beside "model": within it, a frozen norm would have no place for them."""
    convert(
        read_backbone(save(torchvision_state(), tmp_path / "a.pth")), tmp_path / "b.pkl", size=64
    )
    data = pickle.loads((tmp_path / "b.pkl").read_bytes())
    assert not [name for name in data["model"] if name.endswith("num_batches_tracked")]
    assert data["num_batches_tracked"]["stem.conv1.norm.num_batches_tracked"] == 1000
    assert len(data["num_batches_tracked"]) == 53


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32_and_the_card_says_so(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in torchvision_state().items()}
    card = convert(read_backbone(save(state, tmp_path / "a.pth")), tmp_path / "b.pth",
                   to="torchvision", size=64)  # fmt: skip
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(torch.equal(back[name], value.float()) for name, value in state.items())
    kind = str(dtype).removeprefix("torch.")
    assert card["cast_to_float32"] == {kind: 265}
    assert f"- Brought to float32: {kind} 265\n" in (tmp_path / "b.md").read_text()


def detector(config: str, arch: Arch) -> nn.Module:
    cfg = load_config(CONFIGS / config, {"MODEL.DEVICE": "cpu"})
    set_arch(cfg, arch)
    return build_model(cfg)


@pytest.mark.parametrize(
    ("config", "arch"),
    [("thin_R50_C4.yaml", Arch(50, 16, 16, 64)), ("R18_FPN.yaml", Arch(18, 64, 64, 64))],
)
def test_backbone_comes_out_of_a_whole_detector(config: str, arch: Arch, tmp_path: Path) -> None:
    state = torchvision_state(arch, 3)
    convert(read_backbone(save(state, tmp_path / "a.pth")), tmp_path / "b.pkl", size=64)
    model = detector(config, arch)
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


def test_resnet101_lands_in_a_detector(tmp_path: Path) -> None:
    arch = Arch(101, 16, 16, 64)
    state = torchvision_state(arch)
    convert(read_backbone(save(state, tmp_path / "a.pth")), tmp_path / "b.pkl", size=64)
    model = detector("thin_R50_C4.yaml", arch)
    assert load_backbone(model, tmp_path / "b.pkl") == 520
    landed = model.state_dict()["backbone.res4.22.conv3.norm.running_var"]
    assert torch.equal(landed, state["layer3.22.bn3.running_var"])


def test_file_without_card_must_be_explained(tmp_path: Path) -> None:
    convert(
        read_backbone(save(torchvision_state(), tmp_path / "a.pth")), tmp_path / "b.pkl", size=64
    )
    (tmp_path / "b.json").unlink()
    with pytest.raises(UserError, match=r"no card beside it \(b.json\).*--preprocessing and --str"):
        read_backbone(tmp_path / "b.pkl")
    with pytest.raises(UserError, match=r"give --stride-in 3x3 to tools"):
        read_backbone(tmp_path / "b.pkl", preprocessing=IMAGENET)
    source = read_backbone(tmp_path / "b.pkl", preprocessing=IMAGENET, stride_in_1x1=False)
    assert source.origins == {"preprocessing": "option", "stride": "option"}
    wrong = read_backbone(tmp_path / "b.pkl", preprocessing=IMAGENET, stride_in_1x1=True)
    with pytest.raises(UserError, match=r"stride in the 1x1 convolution.*no renaming moves it"):
        convert(wrong, tmp_path / "c.pth", to="torchvision")
    assert not (tmp_path / "c.pth").exists()


def test_card_of_another_file_is_no_help(tmp_path: Path) -> None:
    convert(
        read_backbone(save(torchvision_state(), tmp_path / "a.pth")), tmp_path / "b.pkl", size=64
    )
    data = pickle.loads((tmp_path / "b.pkl").read_bytes())
    data["model"]["stem.conv1.weight"] = data["model"]["stem.conv1.weight"] * np.float32(2)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match=r"b.json beside it describes another file"):
        read_backbone(tmp_path / "b.pkl")


def test_pixel_statistics_come_back(tmp_path: Path) -> None:
    path = save(our_checkpoint(torchvision_state()), tmp_path / "checkpoint.pth")
    there_and_back(path, ".pkl")
    back = read_backbone(tmp_path / "back.pth").preprocessing
    assert back == read_backbone(path).preprocessing
    assert back.mean == (0.5, 0.4, 0.3)


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
    with pytest.raises(UserError, match=r"b.json, which describes b.pkl"):
        convert(source, tmp_path / "b.pth", to="torchvision")
    convert(source, tmp_path / "b.pkl", size=64)  # its own card may be written again
    for to, ending in (("torchvision", ".pkl"), ("detectron2", ".pt")):
        with pytest.raises(UserError, match=r"end the name in \.p"):
            convert(source, tmp_path / f"c{ending}", to=to)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "a.pth", "b.json", "b.md", "b.pkl", "summary.json",
    ]  # fmt: skip


def test_tiny_network_is_what_these_tests_think() -> None:
    assert len(torchvision_state()) == 265 + 53
    assert TINY.is_bottleneck
