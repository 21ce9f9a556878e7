"""Is Detectron2's ResNet with the converted weights the same function? Compared on one picture.

The reference is a ResNet in torchvision's layout, of any widths; with the usual ones it equals
torchvision's own (a test keeps this).
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.pictures import BadPicture, decode
from common.resnet import Arch
from detection.training.config import set_arch
from detection.training.weights import load_backbone

STAGES = ("res2", "res3", "res4", "res5")


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Conv2d:
    """A convolution without bias that keeps the size, up to its stride."""
    return nn.Conv2d(
        channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False
    )


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1; the first 3x3 has the stride."""

    def __init__(self, channels: Sequence[int], stride: int) -> None:
        """Build it.

        Args:
            channels: Of the input, and behind each of the two or three convolutions.
            stride: Of the block.
        """
        super().__init__()
        kernels = (3, 3) if len(channels) == 3 else (1, 3, 1)
        self.num_convs = len(kernels)
        for place, kernel in enumerate(kernels):
            conv_stride = stride if place == kernels.index(3) else 1
            conv = _conv(channels[place], channels[place + 1], kernel, conv_stride)
            self.add_module(f"conv{place + 1}", conv)
            self.add_module(f"bn{place + 1}", nn.BatchNorm2d(channels[place + 1]))
        self.downsample = None
        if stride != 1 or channels[0] != channels[-1]:
            self.downsample = nn.Sequential(
                _conv(channels[0], channels[-1], 1, stride), nn.BatchNorm2d(channels[-1])
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = x
        for number in range(1, self.num_convs + 1):
            y = y.relu() if number > 1 else y
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ReferenceResNet(nn.Module):
    """A ResNet without its classifier, with torchvision's names."""

    def __init__(self, arch: Arch) -> None:
        """Build it.

        Args:
            arch: Depth and channels; see `common.resnet`.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(3, arch.stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(arch.stem_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = arch.stem_channels
        for stage, num_blocks in enumerate(arch.blocks_per_stage):
            width, out = arch.width_per_group << stage, arch.res2_channels << stage
            layer = nn.Sequential()
            for number in range(num_blocks):
                inner = (width, width) if arch.is_bottleneck else (out,)
                layer.append(Block((channels, *inner, out), 2 if stage > 0 and number == 0 else 1))
                channels = out
            self.add_module(f"layer{stage + 1}", layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the four stages.

        Args:
            x: Normalised pictures (N, 3, H, W), float32.

        Returns:
            "res2" (N, C, H/4, W/4) to "res5" (N, 8C, H/32, W/32).
        """
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        features = {}
        for number, name in enumerate(STAGES, start=1):
            x = self.get_submodule(f"layer{number}")(x)
            features[name] = x
        return features


def build_bare_resnet(arch: Arch, *, stride_in_1x1: bool = False) -> ResNet:
    """Detectron2's ResNet with all four stages as outputs (a C4 detector's own stops at res4).

    Raises:
        UserError: If Detectron2 builds no ResNet of these widths.
    """
    if not arch.is_bottleneck and (arch.res2_channels, arch.stem_channels) != (64, 64):
        raise UserError(f"{arch}: Detectron2 builds ResNet-18/34 with 64 channels only")
    cfg = get_cfg()
    set_arch(cfg, arch)
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def comparison_picture(path: Path | None, size: int) -> Tensor:
    """The picture that features are compared on.

    Args:
        path: A picture file; None generates one with edges, gradients and texture.
        size: Side in pixels.

    Returns:
        uint8 RGB (size, size, 3).
    """
    if path is not None:
        try:
            picture = decode(Path(path).read_bytes(), where=str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such picture") from None
        except (BadPicture, OSError) as error:
            raise UserError(f"{error}; give another picture") from error
        return torch.from_numpy(np.array(Image.fromarray(picture).resize((size, size))))
    generator = np.random.default_rng(20)
    y, x = np.mgrid[0:size, 0:size] / size
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], axis=-1)
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06)[..., None] * np.array([0.7, -0.4, 0.3])
    noise = generator.normal(0, 0.08, (size, size, 3))
    return torch.from_numpy((255 * np.clip(smooth + disc + noise, 0, 1)).astype(np.uint8))


def reference_features(arch: Arch, state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """Features res2 to res5 of the reference ResNet with torchvision-named tensors."""
    return _features(ReferenceResNet(arch), state, image)


def detectron2_features(
    arch: Arch, state: dict[str, Tensor], image: Tensor, *, stride_in_1x1: bool = False
) -> dict[str, Tensor]:
    """Features res2 to res5 of Detectron2's own ResNet with its own names."""
    return _features(build_bare_resnet(arch, stride_in_1x1=stride_in_1x1), state, image)


@torch.no_grad()
def _features(network: nn.Module, state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """In fp32 and evaluation mode; every tensor must find its place."""
    result = network.load_state_dict(state, strict=False)
    left = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert not left, f"missing {left}"
    assert not result.unexpected_keys, f"unexpected {result.unexpected_keys}"
    return network.eval()(image)


def compare(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Compare the features of two networks, stage by stage.

    Returns:
        {"res2": `relative_difference`, ..}; infinity where the reference's stage is dead, since
        that proves nothing.
    """
    return {
        stage: relative_difference(reference[stage], other[stage])
        if reference[stage].any()
        else float("inf")
        for stage in STAGES
    }


def relative_difference(first: Tensor, second: Tensor) -> float:
    """max|a - b| / max(|a|, |b|); 0 where both are 0, infinity where it is no number."""
    if first.shape != second.shape:
        return float("inf")
    if torch.equal(first, second):
        return 0.0
    scale = torch.maximum(first.abs().max(), second.abs().max()).double()
    difference = ((first.double() - second.double()).abs().max() / scale).item()
    return difference if np.isfinite(difference) else float("inf")


def check_written(arch: Arch, path: Path, state: dict[str, Tensor]) -> None:
    """Load a written file as training does and compare every tensor with the one that was written.

    Raises:
        UserError: If a tensor did not land or changed on the way.
    """
    detector = nn.Module()  # just enough of one for its checkpointer
    detector.backbone = build_bare_resnet(arch)
    load_backbone(detector, path)
    loaded = detector.backbone.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(loaded[name], value)]
    if changed:
        raise UserError(f"{path}: {changed[0]} changed on the way through the file")
