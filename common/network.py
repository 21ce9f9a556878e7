"""The one ResNet of all programs: torchvision's blocks and names, at any width."""

from __future__ import annotations

import common.startup  # noqa: F401  (before torchvision)

# isort: split
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.resnet import BLOCKS_PER_STAGE, Arch

_HAS_AVX512 = torch.cpu._is_avx512_supported()


class _NoDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_draw = func in (Tensor.normal_, Tensor.uniform_)
        return args[0] if is_draw else func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules made in this context have no values, on the device "meta", and draw none.

    To draw there torch imports its compiler: 1.4 s and 150 MB.
    """
    with torch.device("meta"), _NoDraws():
        yield


class Shortcut(nn.Conv2d):
    """The 1x1 convolution of a residual block's shortcut.

    With AVX2 oneDNN (torch 2.15) writes past its memory at stride 2, channels-last and fewer than 8
    input channels. There the pixels that count are picked first; the sums are the same.
    """

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        """The convolution."""
        if self.in_channels < 8 and input.device.type == "cpu" and not _HAS_AVX512:
            step = self.stride[0]
            return nn.functional.conv2d(input[:, :, ::step, ::step], self.weight)
        return super().forward(input)


class ResNet(nn.Module):
    """A ResNet without its classifier (He et al., 2016; stride in the 3x3, as torchvision).

    Modules are named as torchvision's (``conv1``, ``bn1``, ``layer1`` to ``layer4``, ``avgpool``,
    ``fc``, which is the identity), so at full width its ``state_dict`` is a torchvision one without
    ``fc``.

    Args:
        arch: Depth and widths. Bottleneck stages have ``res2_channels * 2**i`` output channels, a
            multiple of 4, and ``width_per_group * 2**i`` in the 3x3 convolution, as in Detectron2.
        residual_gamma: Initial weight of the last BN of each residual block. 1 is torchvision's;
            0 starts each block as the identity (Goyal et al., arXiv 1706.02677, section 5.1).
            Below 1 a deep, narrow net leaves the plateau of InfoNCE earlier; at 0 a short run
            leaves the branches almost closed, and fine-tuning by SGD then hardly trains them.

    Attributes:
        output_dim: Number of features.
        checkpoints_stages: Whether a forward pass with gradient keeps the input of each stage only
            and the backward pass computes the stage once more: less memory, about a third more
            time. The numbers are the same.
    """

    def __init__(self, arch: Arch, residual_gamma: float = 1.0) -> None:
        super().__init__()
        self.arch, self.checkpoints_stages = arch, False
        block: type[BasicBlock | Bottleneck] = Bottleneck if arch.is_bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, arch.stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(arch.stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = arch.stem_channels
        for stage, num_blocks in enumerate(BLOCKS_PER_STAGE[arch.depth]):
            layer, channels = self._stage(block, channels, stage, num_blocks)
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Identity()
        self.output_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.constant_(last.get_parameter("weight"), residual_gamma)

    def _stage(
        self, block: type[BasicBlock | Bottleneck], in_channels: int, stage: int, num_blocks: int
    ) -> tuple[nn.Sequential, int]:
        out_channels = self.arch.res2_channels * 2**stage
        planes = out_channels // block.expansion
        # torchvision truncates planes * base_width / 64, where rounding must not decide.
        width = self.arch.width_per_group * 2**stage
        base_width = 64 * (width + 0.5) / planes if block is Bottleneck else 64
        blocks = []
        for i in range(num_blocks):
            stride = 2 if i == 0 and stage > 0 else 1
            downsample = None
            if stride != 1 or in_channels != out_channels:
                downsample = nn.Sequential(
                    Shortcut(in_channels, out_channels, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(out_channels),
                )
            own = (in_channels, planes, stride, downsample)
            blocks.append(block(*own, base_width=base_width))  # pyright: ignore[reportArgumentType]
            in_channels = out_channels
        return nn.Sequential(*blocks), out_channels

    def stages(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n c y x"]]:
        """The maps of all stages, under Detectron2's names.

        Args:
            images: Normalised pictures, float32.

        Returns:
            "res2" (n, C, h/4, w/4) to "res5" (n, 8 C, h/32, w/32).
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = {}
        for stage in range(4):
            layer = self.get_submodule(f"layer{stage + 1}")
            if self.checkpoints_stages and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, use_reentrant=False,
                    preserve_rng_state=False,  # no stage draws random numbers
                    context_fn=lambda layer=layer: (nullcontext(), _standing_statistics(layer)),
                )  # fmt: skip
            else:
                x = layer(x)
            maps[f"res{stage + 2}"] = x
        return maps

    def forward(
        self, images: Float[Tensor, "n 3 h w"], as_map: bool = False
    ) -> Float[Tensor, "n d"] | Float[Tensor, "n d y x"]:
        """Globally average-pooled features of the last stage, or its map."""
        res5 = self.stages(images)["res5"]
        # `is`, since a symbolic trace of the network (torch.fx) cannot ask whether a value is true.
        return res5 if as_map is True else self.fc(torch.flatten(self.avgpool(res5), 1))


@contextmanager
def _standing_statistics(layer: nn.Module) -> Iterator[None]:
    """BN normalises as ever and keeps what it kept, but running statistics stay as they are.

    The first pass has moved them. With momentum 0 the same kernel moves them by nothing.
    """
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:  # SyncBatchNorm counts always: here in a copy
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
