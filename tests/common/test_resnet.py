import pytest
import torch
import torchvision

from common import network
from common import resnet as layouts
from common.backbone import tensor_shapes
from common.errors import UserError
from common.network import ResNet
from common.resnet import Arch, infer_arch, read_arch
from detection.convert import build_bare_resnet

ARCHS = {18: Arch(18, 64, 64, 64), 50: Arch(50, 64, 64, 256)}
THIN = Arch(50, 16, 16, 64)


def name_table(arch: Arch) -> dict[str, str]:
    return {name: layouts.detectron2_name(name) for name in tensor_shapes(arch)}


def without_counters(names) -> set[str]:
    return {name for name in names if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("depth", ARCHS)
def test_table_covers_torchvisions_own_network(depth: int) -> None:
    with torch.device("meta"):
        network = getattr(torchvision.models, f"resnet{depth}")()
    theirs = {name: tuple(value.shape) for name, value in network.state_dict().items()
              if not name.startswith("fc.")}  # fmt: skip
    assert set(name_table(ARCHS[depth])) == without_counters(theirs)
    shapes = tensor_shapes(ARCHS[depth])
    assert list(shapes.items()) == [(n, theirs[n]) for n in theirs if "num_batches" not in n]
    assert infer_arch(theirs) == ARCHS[depth]


def prefixed(prefix: str, extra: dict[str, int] | None = None) -> dict[str, int]:
    names = [*tensor_shapes(ARCHS[18]), "bn1.num_batches_tracked"]
    return {f"{prefix}{name}": index for index, name in enumerate(names)} | (extra or {})


SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def sequential(prefix: str) -> dict[str, int]:
    def number(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{prefix}{SEQUENTIAL[first]}.{rest}"

    return {number(name): index for index, name in enumerate(tensor_shapes(ARCHS[18]))}


def in_detectron2(prefix: str, extra: dict[str, int] | None = None) -> dict[str, int]:
    names = [*name_table(ARCHS[18]).values(), "stem.conv1.norm.num_batches_tracked"]
    return {f"{prefix}{name}": index for index, name in enumerate(names)} | (extra or {})


# Beside what the golden values of conversion hold.
@pytest.mark.parametrize("arch", [*ARCHS.values(), THIN], ids=str)
def test_detectron2s_names_cover_its_own_network_both_ways(arch: Arch) -> None:
    with torch.device("meta"):
        theirs = build_bare_resnet(arch).state_dict()
        ours = set(ResNet(arch).state_dict())
    assert {layouts.torchvision_name(name) for name in theirs} == ours
    table = name_table(arch)
    assert set(table.values()) == without_counters(theirs)
    assert len(set(table.values())) == len(table)
    shapes = tensor_shapes(arch)
    assert all(shapes[old] == tuple(theirs[new].shape) for old, new in table.items())
    assert all(
        layouts.detectron2_name(str(layouts.torchvision_name(name))) == name for name in theirs
    )


def test_two_backbones_in_one_file_are_refused() -> None:
    state = in_detectron2("backbone.") | {"backbone.bottom_up.stem.conv1.weight": 0}
    with pytest.raises(UserError, match=r"is a second conv1.weight; the checkpoint holds two"):
        layouts.to_torchvision(state, "detectron2", "online")
    twice = sequential("backbone.") | {"backbone.conv1.weight": 0}
    with pytest.raises(UserError, match=r"'backbone.conv1.weight' is a second conv1.weight"):
        layouts.to_torchvision(twice, "lightly", "online")


def test_unknown_part_of_a_detectron2_file_is_named() -> None:
    """A deformable convolution's offsets, for instance: without them the function is another."""
    for key in ("backbone.res4.0.conv2_offset.weight", "backbone.res6.0.conv1.weight", "mystery"):
        with pytest.raises(UserError, match=f"unknown key '{key}'"):
            layouts.to_torchvision(in_detectron2("backbone.", {key: 0}), "detectron2", "online")


def test_branch_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"'momentum_backbone.'.*--branch"):
        layouts.to_torchvision(prefixed("backbone."), "solo-learn", "ema")
    with pytest.raises(UserError, match="--branch ema: a detectron2 checkpoint"):
        layouts.to_torchvision({"stem.conv1.weight": 0}, "detectron2", "ema")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected the keys depth"),
        ({"depth": 50}, "expected the keys depth"),
        (
            {"depth": 50, "width_per_group": 0, "stem_channels": 64, "res2_channels": 256},
            "positive",
        ),
        ({"depth": 20, "width_per_group": 1, "stem_channels": 64, "res2_channels": 64}, "depth 20"),
        ({"depth": 50, "width_per_group": 1, "stem_channels": 1, "res2_channels": 2}, "of 4"),
    ],
)
def test_impossible_arch_is_refused(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_arch(value)


def test_state_dict_that_is_no_resnet() -> None:
    with pytest.raises(UserError, match=r"no conv1.weight"):
        infer_arch({"patch_embed.weight": (1,)})
    shapes = {name: shape for name, shape in tensor_shapes(ARCHS[18]).items()
              if not name.startswith("layer3.1")}  # fmt: skip
    with pytest.raises(UserError, match=r"\(2, 2, 1, 2\) blocks per stage"):
        infer_arch(shapes)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_that_picks_its_pixels_first_is_the_same_convolution(monkeypatch, stride):
    monkeypatch.setattr(network, "_HAS_AVX512", False)
    ours = network.Shortcut(4, 6, 1, stride=stride, bias=False).double()
    plain = torch.nn.Conv2d(4, 6, 1, stride=stride, bias=False).double()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-12, atol=1e-12)
