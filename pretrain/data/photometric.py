"""Photometric operations on batches of pictures, each with a value of its own.

All take and give float [n, 3, h, w] in 0..1, RGB, and follow torchvision's functional operations on
float tensors to within rounding: values are clamped to 0..1 after each, but not rounded to 256
levels in between, as a chain of uint8 operations would.
"""

import torch
from torch import Tensor

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision
SOLARIZE_THRESHOLD = 0.5  # between 127/255 and 128/255: uint8 values from 128 on are inverted


def to_gray(x: Tensor) -> Tensor:
    """Luma, [n, 1, h, w], of float [n, 3, h, w]."""
    red, green, blue = x.unbind(1)
    return (GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue).unsqueeze(1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by factor [n], clamped to 0..1."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the picture's mean luma: factor * x + (1 - factor) * mean, clamped to 0..1."""
    mean = to_gray(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel: factor * x + (1 - factor) * luma, clamped to 0..1."""
    return torch.lerp(to_gray(x), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV by `turn` [n] of the circle; value and saturation stay.

    The picture never goes to HSV and back: with the hue in sixths, each channel is value - chroma *
    w, where w is a trapezoid of the hue, 0 near the channel's own sector and 1 far from it.
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    inverse = 1 / chroma.clamp_min(1e-12)
    hue = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    hue = hue + 6 * turn.view(-1, 1, 1)
    result = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        k = torch.remainder(hue + offset, 6)
        weight = torch.minimum(k, 4 - k).clamp_(0, 1)
        result[:, channel] = value - chroma * weight
    return result


def blur_matrix(sigma: Tensor, size: int, kernel_size: int) -> Tensor:
    """One-dimensional Gaussian blur with mirrored borders as a matrix for each sample.

    Args:
        sigma: float [n], pixels.
        size: Length of the blurred axis.
        kernel_size: Odd; at most 2 * size - 1.
    Returns:
        float [n, size, size]; rows sum to 1.
    """
    half = kernel_size // 2
    steps = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + steps
    source = source.abs()
    source = torch.where(
        source >= size, 2 * (size - 1) - source, source
    )  # mirror without repeating the edge
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), -1, -1), kernel[:, None, :].expand(-1, size, -1).contiguous()
    )


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma [n] in pixels and a kernel of about a tenth of the side.

    Two batched matrix products: at these sizes faster than grouped convolutions on the CPU and on a
    GPU.
    """
    size = x.shape[-1]
    matrix = blur_matrix(sigma, size, blur_kernel_size(size)).unsqueeze(1)
    return matrix @ x @ matrix.transpose(2, 3)


def blur_kernel_size(image_size: int) -> int:
    """About 10 % of the picture's side, odd, at least 3: 23 at 224 px, 7 at 64 px."""
    return max(3, round((image_size * 0.1 - 1) / 2) * 2 + 1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values from SOLARIZE_THRESHOLD on."""
    return torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)
