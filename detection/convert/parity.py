"""Is Detectron2's ResNet with the converted weights the same function? Compared on one picture."""

from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from PIL import Image
from torch import Tensor, nn

import detection.compat  # noqa: F401  (before detectron2)
from common.errors import UserError
from common.pictures import BadPicture, decode
from common.resnet import Arch
from detection.training.config import set_arch
from detection.training.weights import load_backbone

STAGES = ("res2", "res3", "res4", "res5")


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, up to its stride."""
    return nn.Conv2d(
        channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False
    )


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    """Projection where the shape changes, nothing elsewhere."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(_conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv(channels_out, channels_out, 3)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1."""

    def __init__(self, channels_in: int, width: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, channels_out, 1)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ReferenceResNet(nn.Module):
    """A ResNet without its classifier."""

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
            channels_out = arch.res2_channels << stage
            blocks: list[nn.Module] = []
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                if arch.is_bottleneck:
                    width = arch.width_per_group << stage
                    blocks.append(Bottleneck(channels, width, channels_out, stride))
                else:
                    blocks.append(BasicBlock(channels, channels_out, stride))
                channels = channels_out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

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


def tensor_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Every tensor that an architecture needs: torchvision name -> shape, without counters."""
    with torch.device("meta"):
        state = ReferenceResNet(arch).state_dict()
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


# isort: split


def build_bare_resnet(arch: Arch, *, stride_in_1x1: bool = False) -> ResNet:
    """Detectron2's ResNet with all four stages as outputs (a C4 detector's own stops at res4)."""
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


def compare(
    arch: Arch,
    reference_state: dict[str, Tensor],
    detectron2_state: dict[str, Tensor],
    image: Tensor,
    *,
    stride_in_1x1: bool = False,
) -> dict[str, float]:
    """Compare both networks stage by stage, fp32, evaluation mode.

    Args:
        arch: Architecture.
        reference_state: Tensors under torchvision names.
        detectron2_state: The same under Detectron2 names.
        image: Normalised (1, 3, H, W).
        stride_in_1x1: For tests: where Detectron2 puts the stride.

    Returns:
        {"res2": max|a - b| / max|a|, ..}; infinity where a stage is dead or of another shape.
    """
    return compare_features(
        reference_features(arch, reference_state, image),
        detectron2_features(arch, detectron2_state, image, stride_in_1x1=stride_in_1x1),
    )


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
    result = network.load_state_dict(state, strict=False)
    left = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert not left, f"missing {left}"
    assert not result.unexpected_keys, f"unexpected {result.unexpected_keys}"
    return network.eval()(image)


def compare_features(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference of each stage; see `compare`."""
    return {stage: _relative_difference(first[stage], second[stage]) for stage in STAGES}


def _relative_difference(expected: Tensor, found: Tensor) -> float:
    scale = expected.abs().max().item()
    if expected.shape != found.shape or not np.isfinite(scale) or scale == 0:
        return float("inf")
    difference = (expected - found).abs().max().item() / scale
    return difference if np.isfinite(difference) else float("inf")


class _Detector(nn.Module):
    """Just enough of a detector for the weights to be loaded as training loads them."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.backbone = build_bare_resnet(arch)


def check_written(arch: Arch, path: Path, state: dict[str, Tensor]) -> None:
    """Load a written file as training does and compare every tensor with what was meant.

    Raises:
        UserError: If a tensor did not land or changed on the way; the file is removed.
    """
    detector = _Detector(arch)
    try:
        load_backbone(detector, path)
        loaded = detector.backbone.state_dict()
        changed = [name for name, value in state.items() if not torch.equal(loaded[name], value)]
        if changed:
            raise UserError(f"{path}: {changed[0]} changed on the way through the file")
    except UserError:
        path.unlink(missing_ok=True)
        raise
