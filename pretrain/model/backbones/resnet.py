"""ResNets of any width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import positive, require
from common.lazy import nn
from common.resnet import BLOCKS_PER_STAGE, Arch
from pretrain.model.backbones.base import Backbone


@dataclass(frozen=True)
class ResNetBackbone(Arch, Backbone):
    """Depth and widths that torchvision's blocks, of which the network is built, can have."""

    name: Literal["resnet"] = "resnet"

    def __post_init__(self) -> None:
        depths = ", ".join(map(str, BLOCKS_PER_STAGE))
        require(self.depth in BLOCKS_PER_STAGE, f"arch.depth {self.depth}: give {depths}")
        positive(self, "arch", "width_per_group", "stem_channels", "res2_channels")
        if not self.is_bottleneck:
            require(
                self.res2_channels == self.width_per_group,
                f"arch: depth {self.depth} has basic blocks, so res2_channels must equal "
                f"width_per_group ({self.width_per_group}), got {self.res2_channels}",
            )
            return
        require(
            self.res2_channels % 4 == 0,
            f"arch.res2_channels must be a multiple of 4 at depth {self.depth}, "
            f"got {self.res2_channels}",
        )
        require(
            256 * self.width_per_group % self.res2_channels == 0,
            f"arch: 256 * width_per_group ({self.width_per_group}) must be a multiple of "
            f"res2_channels ({self.res2_channels}) for depth {self.depth}, "
            "e.g. 64 and 256, 16 and 64",
        )

    def build(self, residual_gamma: float = 1.0) -> nn.Module:
        """See the base class."""
        from common.network import ResNet

        sizes = (self.depth, self.width_per_group, self.stem_channels, self.res2_channels)
        return ResNet(Arch(*sizes), residual_gamma)
