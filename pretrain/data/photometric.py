"""Photometric operations on batches of pictures, each with a value of its own.

All take and give float [n, 3, h, w] in 0..1, RGB, and follow torchvision's functional operations on
float tensors to within rounding: values are clamped to 0..1 after each, but not rounded to 256
levels in between, as a chain of uint8 operations would.
"""

import torch
from torch import Tensor
from torch.nn import functional

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision


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

    The picture never goes to HSV and back: with the hue in sixths, each channel is
    value - chroma * w, where w is a trapezoid of the hue, 0 near the channel's own sector and 1 far
    from it. Selections are done by signs, which a CPU does many times faster than by masks.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    inverse = 1 / chroma.clamp_min(1e-12)
    in_red = (green - blue) * inverse
    in_green = (blue - red) * inverse + 2
    in_blue = (red - green) * inverse + 4
    not_red, not_green = torch.sign(value - red), torch.sign(value - green)
    hue = torch.lerp(in_red, torch.lerp(in_green, in_blue, not_green), not_red)  # in sixths
    hue = hue / 6 + turn.view(-1, 1, 1)
    result = torch.empty_like(x)
    for channel, center in enumerate((3, 1, -1)):
        distance = hue + center / 6
        distance = distance.sub_(distance.round()).abs_()  # on the circle, 0 to 1/2
        weight = distance.mul_(-6).add_(2).clamp_(0, 1)
        torch.sub(value, weight.mul_(chroma), out=result[:, channel])
    return result


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma [n] in pixels and a kernel of about a tenth of the side.

    On the CPU a sum of shifted pictures, elsewhere two batched matrix products: the faster one
    each.
    """
    kernel_size = blur_kernel_size(x.shape[-1])
    if x.device.type == "cpu":
        return blur_by_taps(x, sigma, kernel_size)
    return blur_by_matrix(x, sigma, kernel_size)


def blur_by_taps(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur along both axes as a weighted sum of shifted pictures."""
    weights = gaussian_kernel(sigma, kernel_size).T.reshape(kernel_size, -1, 1, 1, 1)
    half = kernel_size // 2
    for axis, padding in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        size = x.shape[axis]
        padded = functional.pad(x, padding, mode="reflect")
        x = padded.narrow(axis, 0, size) * weights[0]
        for tap in range(1, kernel_size):
            x.addcmul_(padded.narrow(axis, tap, size), weights[tap])
    return x


def blur_by_matrix(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur along both axes by matrices from the left and the right."""
    matrix = blur_matrix(sigma, x.shape[-1], kernel_size).unsqueeze(1)
    return matrix @ x @ matrix.transpose(2, 3)


def gaussian_kernel(sigma: Tensor, kernel_size: int) -> Tensor:
    """Weights [n, kernel_size] of each sample, with sum 1."""
    half = kernel_size // 2
    steps = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def blur_matrix(sigma: Tensor, size: int, kernel_size: int) -> Tensor:
    """One-dimensional Gaussian blur with mirrored borders as a matrix for each sample.

    Args:
        sigma: float [n], pixels.
        size: Length of the blurred axis.
        kernel_size: Odd; at most 2 * size - 1.
    Returns:
        float [n, size, size]; rows sum to 1.
    """
    kernel = gaussian_kernel(sigma, kernel_size)
    steps = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    source = (torch.arange(size, device=sigma.device)[:, None] + steps).abs()
    source = torch.where(
        source >= size, 2 * (size - 1) - source, source
    )  # mirror without repeating the edge
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), -1, -1), kernel[:, None, :].expand(-1, size, -1).contiguous()
    )


def blur_kernel_size(image_size: int) -> int:
    """About 10 % of the picture's side, odd, at least 3: 23 at 224 px, 7 at 64 px."""
    return max(3, round((image_size * 0.1 - 1) / 2) * 2 + 1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values from one half on: uint8 values from 128 on, as 127 < 255/2 < 128."""
    return torch.minimum(x, 1 - x)
