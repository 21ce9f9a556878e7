"""Photometric augmentation as batched tensor operations, with parameters of their own for each sample.

Drawing is a pure function of (seed, epoch, key, view); applying follows torchvision's functional operations
on float pictures, each within rounding of single precision. Between the operations values are clamped to
0..1 as there; they are not rounded to 256 levels in between, as a chain of uint8 operations would.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.order import stable_hash

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision
SOLARIZE_THRESHOLD = 0.5  # between 127/255 and 128/255: uint8 values from 128 on are inverted
JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue


@dataclass(frozen=True)
class ViewAugment:
    """Distribution of the changes to one view.

    Attributes:
        crop_scale: Range of the crop's area as a share of the picture's (applied by the loader).
        jitter_probability: Probability that brightness, contrast, saturation and hue are changed at all.
        brightness: Factor from 1 - b to 1 + b, not below 0; contrast and saturation likewise.
        hue: Turn from -h to h of the colour circle, h at most 0.5.
        gray_probability: Probability of a grey picture.
        blur_probability: Probability of a Gaussian blur.
        blur_sigma: Range of its standard deviation in pixels.
        solarize_probability: Probability that bright values are inverted.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0


def _jittered(
    scale: tuple[float, float], jitter: tuple[float, float, float, float], **rest: float
) -> ViewAugment:
    brightness, contrast, saturation, hue = jitter
    return ViewAugment(
        crop_scale=scale,
        jitter_probability=0.8,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        gray_probability=0.2,
        **rest,
    )


_WEAK = _jittered((0.2, 1.0), (0.4, 0.4, 0.4, 0.1))
_STRONG = _jittered((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur_probability=0.5)
_BYOL = (0.4, 0.4, 0.2, 0.1)
PRESETS: dict[str, tuple[ViewAugment, ViewAugment]] = {
    "none": (ViewAugment(crop_scale=(1.0, 1.0)), ViewAugment(crop_scale=(1.0, 1.0))),
    "symmetric_weak": (_WEAK, _WEAK),
    "symmetric_strong": (_STRONG, _STRONG),
    "asymmetric": (
        _jittered((0.08, 1.0), _BYOL, blur_probability=1.0),
        _jittered((0.08, 1.0), _BYOL, blur_probability=0.1, solarize_probability=0.2),
    ),
    "asymmetric_strong": (
        _WEAK,
        _jittered(
            (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur_probability=0.5, solarize_probability=0.2
        ),
    ),
}

_DRAWS = (
    "jitter",
    "jitter_order",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray",
    "blur",
    "blur_sigma",
    "solarize",
)


def draw_parameters(
    view: ViewAugment,
    keys: Tensor | np.ndarray,
    *,
    seed: int,
    epoch: int,
    view_index: int,
    image_size: int,
) -> dict[str, Tensor]:
    """Parameters of each sample of a batch: a pure function of (seed, epoch, key, view).

    Args:
        view: The distribution.
        keys: int64 [n], the samples' hashed names.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.
        view_index: 0 or 1.
        image_size: Side of the view in pixels; unused by the draws, sigma is in pixels.
    Returns:
        float32 [n] on the CPU each: "brightness", "contrast", "saturation" (1: no change), "hue" (0: none),
        "jitter_order" (number of a permutation in JITTER_ORDERS), "gray", "solarize" (0 or 1), "blur_sigma"
        (pixels, 0: no blur).
    """
    keys = keys.detach().cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    base = int.from_bytes(stable_hash("augment", seed, epoch, view_index, num_bytes=8), "little")
    u = dict(zip(_DRAWS, uniforms(keys, base, len(_DRAWS)), strict=True))
    jitter = u["jitter"] < view.jitter_probability

    def factor(name: str, spread: float) -> np.ndarray:
        low, high = max(0.0, 1.0 - spread), 1.0 + spread
        return np.where(jitter, low + u[name] * (high - low), 1.0)

    low, high = view.blur_sigma
    values = {
        "brightness": factor("brightness", view.brightness),
        "contrast": factor("contrast", view.contrast),
        "saturation": factor("saturation", view.saturation),
        "hue": np.where(jitter, (2.0 * u["hue"] - 1.0) * view.hue, 0.0),
        "jitter_order": np.floor(u["jitter_order"] * len(JITTER_ORDERS)),
        "gray": u["gray"] < view.gray_probability,
        "blur_sigma": np.where(
            u["blur"] < view.blur_probability, low + u["blur_sigma"] * (high - low), 0.0
        ),
        "solarize": u["solarize"] < view.solarize_probability,
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def uniforms(keys: np.ndarray, base: int, num_draws: int) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1): two rounds of SplitMix64's mixer over (base, key, draw).

    Args:
        keys: int64 or uint64 [n].
        base: 64-bit number of the stream.
        num_draws: Draws per key.
    Returns:
        float64 [num_draws, n], multiples of 2**-53.
    """
    keys = np.ascontiguousarray(keys).view(np.uint64)
    counters = np.arange(1, num_draws + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(keys ^ np.uint64(base))[None, :] + counters)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, element by element, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def augment(
    images: Tensor, params: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Jitter, grey, blur, solarise and normalise a batch, each sample with its own parameters.

    Args:
        images: uint8 [n, 3, s, s], RGB, on any device.
        params: From `draw_parameters`, on the CPU: which rows an operation touches is decided there, so that
            the device is never waited for.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [n, 3, s, s].
    """
    x = images.float().mul_(1 / 255).contiguous()
    _jitter(x, params)
    _on_rows(x, params["gray"] > 0, lambda rows, _: to_gray(rows).expand(-1, 3, -1, -1))
    _on_rows(x, params["blur_sigma"] > 0, gaussian_blur, params["blur_sigma"])
    _on_rows(x, params["solarize"] > 0, lambda rows, _: solarize(rows))
    shift = torch.tensor(mean, dtype=x.dtype).view(1, 3, 1, 1).to(x.device)
    scale = 1 / torch.tensor(std, dtype=x.dtype).view(1, 3, 1, 1).to(x.device)
    return x.sub_(shift).mul_(scale)


def _jitter(x: Tensor, params: dict[str, Tensor]) -> None:
    """Brightness, contrast, saturation and hue in each sample's own order, in place."""
    operations = (
        (adjust_brightness, params["brightness"], params["brightness"] != 1),
        (adjust_contrast, params["contrast"], params["contrast"] != 1),
        (adjust_saturation, params["saturation"], params["saturation"] != 1),
        (adjust_hue, params["hue"], params["hue"] != 0),
    )
    orders = torch.tensor(JITTER_ORDERS)[params["jitter_order"].long()]  # [n, 4]
    for turn in range(4):
        for number, (function, values, active) in enumerate(operations):
            _on_rows(x, active & (orders[:, turn] == number), function, values)


def _on_rows(x: Tensor, mask: Tensor, function, values: Tensor | None = None) -> None:
    """Replace the rows where `mask` (on the CPU) holds by function(rows, their values)."""
    rows = mask.nonzero().squeeze(1)
    if len(rows) == 0:
        return
    own = None if values is None else values[rows].to(x.device, non_blocking=True)
    if len(rows) == len(x):
        x.copy_(function(x, own))
        return
    rows = rows.to(x.device, non_blocking=True)
    x.index_copy_(0, rows, function(x.index_select(0, rows), own))


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
    """Turn the hue of HSV by `turn` [n] of the circle; value and saturation stay, exactly as in HSV.

    The picture never goes to HSV and back: with the hue in sixths, each channel is value - chroma * w, where w
    is a trapezoid of the hue, 0 near the channel's own sector and 1 far from it.
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
    """Gaussian blur with sigma [n] in pixels; the kernel is about a tenth of the side, odd, at least 3.

    Two batched matrix products: at these sizes faster than grouped convolutions on the CPU and on a GPU.
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
