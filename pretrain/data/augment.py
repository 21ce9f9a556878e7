"""Photometric augmentation in batches on the device, with parameters of their own for each sample.

The parameters are a pure function of (seed, repeat, hash, view). They are applied in the order
jitter, grey, blur, solarise, normalise.
"""

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.data.order import stable_hash

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


_MAX_KEPT = 4  # blocks that lie idle; a batch ahead and one in use need two


class ReusedMemory:
    """Hands out tensors; the memory of those that are gone, views of them included, comes again."""

    def __init__(self) -> None:
        self._idle: list[np.ndarray] = []
        self._lock = threading.RLock()  # a tensor may vanish in any thread, at any moment

    def tensor(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
        """A tensor on the CPU with any content.

        Args:
            shape: Its shape.
            dtype: NumPy's type of its elements.
        """
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._take(num_bytes)
        # The tensor's storage keeps this very array, and nothing else does.
        held = block.view(dtype).reshape(shape)
        weakref.finalize(held, self._give_back, block).atexit = False
        return torch.from_numpy(held)

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for position, block in enumerate(self._idle):
                if block.nbytes == num_bytes:
                    return self._idle.pop(position)
        return np.empty(num_bytes, np.uint8)  # NumPy asks for huge pages

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._idle.append(block)
            if len(self._idle) > _MAX_KEPT:
                self._idle.pop(0)


_MEMORY = ReusedMemory()
JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue


@dataclass(frozen=True)
class ViewAugment:
    """Distribution of the changes to one view.

    Attributes:
        crop_scale: Range of the crop's area as a share of the picture's (applied by the loader).
        jitter_probability: Probability that brightness, contrast, saturation and hue are changed at
            all.
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


_WEAK = ViewAugment(
    crop_scale=(0.2, 1.0), jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.4,
    hue=0.1, gray_probability=0.2,
)  # fmt: skip
_STRONG = replace(
    _WEAK, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2,
    blur_probability=0.5,
)  # fmt: skip
_BYOL = replace(_WEAK, crop_scale=(0.08, 1.0), saturation=0.2, blur_probability=1.0)
PRESETS: dict[str, tuple[ViewAugment, ViewAugment]] = {
    "none": (ViewAugment(crop_scale=(1.0, 1.0)), ViewAugment(crop_scale=(1.0, 1.0))),
    "symmetric_weak": (_WEAK, _WEAK),
    "symmetric_strong": (_STRONG, _STRONG),
    "asymmetric": (_BYOL, replace(_BYOL, blur_probability=0.1, solarize_probability=0.2)),
    "asymmetric_strong": (_WEAK, replace(_STRONG, solarize_probability=0.2)),
}
_DRAWN = "jitter jitter_order brightness contrast saturation hue gray blur blur_sigma solarize"


def draw_parameters(
    view: ViewAugment,
    sample_hashes: Tensor | np.ndarray,
    repeats: Tensor | np.ndarray | int,
    *,
    seed: int,
    view_index: int,
) -> dict[str, Tensor]:
    """Parameters of each sample of a batch: a pure function of (seed, repeat, hash, view).

    Args:
        view: The distribution.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], how often each sample was due before; or one number for all.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        float32 [n] on the CPU each: "brightness", "contrast", "saturation" (1: no change), "hue"
        (0: none), "jitter_order" (number of a permutation in JITTER_ORDERS), "gray", "solarize" (0
        or 1), "blur_sigma" (pixels, 0: no blur).
    """
    names = _DRAWN.split()
    draws = draw_uniforms(
        "augment", sample_hashes, repeats, len(names), seed=seed, view_index=view_index
    )
    u: dict[str, np.ndarray] = dict(zip(names, draws, strict=True))
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


def draw_uniforms(
    purpose: str,
    sample_hashes: Tensor | np.ndarray,
    repeats: Tensor | np.ndarray | int,
    num_draws: int,
    *,
    seed: int,
    view_index: int,
) -> np.ndarray:
    """Uniform numbers for each sample: a function of its arguments and the draw alone.

    Args:
        purpose: What the numbers are for; two purposes draw independently.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], or one number for all samples.
        num_draws: Draws per sample.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        float64 [num_draws, n] in [0, 1).
    """
    sample_hashes = (
        sample_hashes.detach().cpu().numpy()
        if isinstance(sample_hashes, Tensor)
        else np.asarray(sample_hashes)
    )
    repeats = repeats.detach().cpu().numpy() if isinstance(repeats, Tensor) else np.asarray(repeats)
    return uniforms(
        sample_hashes, stream_bases(purpose, repeats, seed=seed, view_index=view_index), num_draws
    )


def stream_bases(purpose: str, repeats: np.ndarray, *, seed: int, view_index: int) -> np.ndarray:
    """Numbers of the streams that `uniforms` draws from, a function of all its arguments.

    Args:
        purpose: What the numbers are for.
        repeats: int64 [n] or one number.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        uint64, of the shape of `repeats`, or one number if all repeats are equal.
    """
    if repeats.size and (repeats == repeats.flat[0]).all():
        repeats = np.asarray(repeats.flat[0])  # as nearly always; finding the kinds would cost more
    kinds, which = np.unique(repeats, return_inverse=True)
    bases = [stable_hash(purpose, seed, int(kind), view_index, num_bytes=8) for kind in kinds]
    base = np.array([int.from_bytes(b, "little") for b in bases], np.uint64)
    return base[which.reshape(repeats.shape)]


def uniforms(sample_hashes: np.ndarray, base: np.ndarray | int, num_draws: int) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1): SplitMix64's mixer over (base, hash, draw).

    Args:
        sample_hashes: int64 or uint64 [n].
        base: 64-bit number of the stream; or uint64 [n], one for each hash.
        num_draws: Draws per hash.
    Returns:
        float64 [num_draws, n], multiples of 2**-53.
    """
    sample_hashes = np.ascontiguousarray(sample_hashes).view(np.uint64)
    counters = np.arange(1, num_draws + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(sample_hashes ^ np.asarray(base, np.uint64))[None, :] + counters)
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
        params: From `draw_parameters`, on the CPU: which rows an operation touches is decided
            there, so that the device is never waited for.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [n, 3, s, s].
    """
    x = images.contiguous().float().mul_(1 / 255)  # in this order: a quarter of the time
    _jitter(x, params)
    _on_rows(x, params["gray"] > 0, lambda rows, _: to_gray(rows).expand(-1, 3, -1, -1))
    _on_rows(x, params["blur_sigma"] > 0, gaussian_blur, params["blur_sigma"])
    _on_rows(x, params["solarize"] > 0, lambda rows, _: solarize(rows))
    shift, scale = (torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1) for values in (mean, std))
    shift = shift.to(x.device, non_blocking=True)
    scale = 1 / scale.to(x.device, non_blocking=True)
    return x.sub_(shift).mul_(scale)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Only normalise: for pictures whose photometric changes are done.

    On the CPU picture by picture, so that one stays in the cache, and into memory that is used
    again once the tensor is gone: first touching new memory would cost several times as much.

    Args:
        images: uint8 [*, 3, s, s], RGB, on any device.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [*, 3, s, s], lying channels-last in memory.
    """
    deviation = torch.tensor(std, dtype=torch.float32)
    scale = (1 / (255 * deviation)).to(images.device, non_blocking=True)
    shift = torch.tensor(mean, dtype=torch.float32) / deviation
    shift = shift.to(images.device, non_blocking=True)
    pixels = images.movedim(-3, -1)
    if images.device.type != "cpu":
        return pixels.float().mul_(scale).sub_(shift).movedim(-1, -3)
    size = images.shape[-1]
    rows = pixels.reshape(-1, images.shape[-2], 3 * size)  # pixels of a line in a row: long loops
    scale, shift = scale.repeat(size), shift.repeat(size)
    out = _MEMORY.tensor(tuple(rows.shape), np.float32)
    for picture, floats in zip(rows, out, strict=True):
        floats.copy_(picture).mul_(scale).sub_(shift)
    return out.view(pixels.shape).movedim(-1, -3)


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


def _on_rows(
    x: Tensor, mask: Tensor, function: Callable[..., Tensor], values: Tensor | None = None
) -> None:
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
