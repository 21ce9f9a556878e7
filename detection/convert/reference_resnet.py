"""The ResNet that conversion is proved against: torchvision's names and layout, any width.

Written from the published architecture (He et al., 2015, with the stride in the 3x3 convolution, as
torchvision and all self-supervised codes have it). Kept apart from `pretrain/`: the checkpoint file
is the only thing the two houses share.
"""

import torch
from torch import Tensor, nn

from common.resnet import Arch

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
