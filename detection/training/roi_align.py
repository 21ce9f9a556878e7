"""Detectron2's ROIAlign with a faster backward pass on a CPU.

torchvision's kernel takes one channel of one sample at a time. Here every sample's weights are
found once and added for all channels together. Each place of a feature map gets the same addends in
the same order, so that gradients have the same bits.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from typing import Any

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

_BLOCK = 1 << 16  # numbers at a time, which a core's cache holds


def speed_up_backward(model: nn.Module) -> None:
    """Give every ROIAlign of a model the faster backward pass, in place."""
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = _ROIAlign


class _ROIAlign(ROIAlign):
    """The module; what is not on a CPU, or needs no gradient, goes the usual way."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool ROIs (R, 5) of feature maps (N, C, H, W): (R, C, P, P)."""
        is_known = input.device.type == "cpu" and input.dtype in (torch.float32, torch.bfloat16)
        if not (is_known and input.requires_grad and len(rois)):
            return super().forward(input, rois)
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        # As torchvision under autocast: computed in float32.
        return _Pooled.apply(input.float(), rois.float(), *options).to(input.dtype)


class _Pooled(Function):
    """`torchvision.ops.roi_align` of float32 maps on a CPU."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rois: Tensor, *options: Any) -> Tensor:
        """The arguments are those of `roi_align`."""
        ctx.save_for_backward(rois)
        ctx.shape, ctx.options = maps.shape, options
        return roi_align(maps, rois, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the maps, of that of the pooled ROIs (R, C, P, P)."""
        (rois,) = ctx.saved_tensors
        (num, channels, height, width), (bins, scale, ratio, aligned) = ctx.shape, ctx.options
        corners = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
        sides = corners[:, 2:] - corners[:, :2]
        if not aligned:
            sides = sides.clamp(min=1)
        places_y, weights_y, is_y, num_y = _samples(
            corners[:, 1], sides[:, 1], bins[0], height, ratio
        )
        places_x, weights_x, is_x, num_x = _samples(
            corners[:, 0], sides[:, 0], bins[1], width, ratio
        )

        # Samples in torchvision's order: ROI, bin (y, x), sample (y, x); each has four neighbours.
        roi, bin_y, bin_x, y, x = (is_y[:, :, None, :, None] & is_x[:, None, :, None]).nonzero().T
        weights = weights_y[roi, bin_y, y][:, :, None] * weights_x[roi, bin_x, x][:, None]
        places = (width * places_y[roi, bin_y, y])[:, :, None] + places_x[roi, bin_x, x][:, None]
        places += (height * width * rois[roi, 0].long())[:, None, None]
        pooled = ((bins[0] * roi + bin_y) * bins[1] + bin_x)[:, None].expand(-1, 4)
        count = (num_y * num_x)[roi, None].expand(-1, 4)

        rows = gradient.permute(0, 2, 3, 1).reshape(-1, channels)
        out = gradient.new_zeros(num * height * width, channels)
        step = max(1, _BLOCK // channels)
        columns = (pooled.flatten(), places.flatten(), weights.view(-1, 1), count.reshape(-1, 1))
        for source, target, weight, number in zip(*(c.split(step) for c in columns), strict=True):
            out.index_add_(0, target, rows[source].mul_(weight).div_(number))
        maps = out.view(num, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return maps, None, None, None, None, None


def _samples(
    start: Tensor, side: Tensor, num_bins: int, length: int, ratio: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the samples of ROIs lie along one axis.

    Args:
        start: (R,), in places of the map.
        side: (R,).
        num_bins: P.
        length: Of the map.
        ratio: Samples of a bin; 0: as many as it has places, so that ROIs differ.

    Returns:
        The two neighbours of each sample and their weights, (R, P, samples, 2) each; whether it is
        there, (R, P, samples); samples of a bin, (R,).
    """
    size = (side / num_bins)[:, None, None]
    num = torch.full_like(size, ratio) if ratio > 0 else size.ceil()
    sample = torch.arange(max(1, int(num.max())))
    at = start[:, None, None] + torch.arange(num_bins)[:, None] * size
    at = at + (sample + 0.5) * size / num
    there = (sample < num) & (at >= -1) & (at <= length)
    at = at.clamp(min=0).nan_to_num()  # a ROI without extent has no samples
    low = at.long().clamp(max=length - 1)
    is_last = low == length - 1
    share = torch.where(is_last, 0.0, at - low)
    neighbours = torch.stack([low, torch.where(is_last, low, low + 1)], dim=-1)
    return neighbours, torch.stack([1 - share, share], dim=-1), there, num.flatten()
