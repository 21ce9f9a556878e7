"""Photometric augmentation in batches on the device, with parameters of their own for each sample.

Drawing is a pure function of (seed, epoch, key, view); what is drawn is applied by the operations
of `photometric`, in the order jitter, grey, blur, solarise, normalise.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.order import stable_hash
from pretrain.data.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    solarize,
    to_gray,
)
from pretrain.data.reused_memory import ReusedMemory

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


def _jittered(
    scale: tuple[float, float],
    jitter: tuple[float, float, float, float],
    blur_probability: float = 0.0,
    solarize_probability: float = 0.0,
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
        blur_probability=blur_probability,
        solarize_probability=solarize_probability,
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
    visits: Tensor | np.ndarray | int,
    *,
    seed: int,
    view_index: int,
) -> dict[str, Tensor]:
    """Parameters of each sample of a batch: a pure function of (seed, visit, key, view).

    Args:
        view: The distribution.
        keys: int64 [n], the samples' hashed names.
        visits: int64 [n], how often each sample was due before; or one number for all.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        float32 [n] on the CPU each: "brightness", "contrast", "saturation" (1: no change), "hue"
        (0: none), "jitter_order" (number of a permutation in JITTER_ORDERS), "gray", "solarize" (0
        or 1), "blur_sigma" (pixels, 0: no blur).
    """
    draws = draw_uniforms("augment", keys, visits, len(_DRAWS), seed=seed, view_index=view_index)
    u: dict[str, np.ndarray] = dict(zip(_DRAWS, draws, strict=True))
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
    keys: Tensor | np.ndarray,
    visits: Tensor | np.ndarray | int,
    num_draws: int,
    *,
    seed: int,
    view_index: int,
) -> np.ndarray:
    """Uniform numbers for each sample: a function of (purpose, seed, visit, key, view, draw) alone.

    Args:
        purpose: What the numbers are for; two purposes draw independently.
        keys: int64 [n], the samples' hashed names.
        visits: int64 [n], or one number for all samples.
        num_draws: Draws per sample.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        float64 [num_draws, n] in [0, 1).
    """
    keys = keys.detach().cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    visits = visits.detach().cpu().numpy() if isinstance(visits, Tensor) else np.asarray(visits)
    return uniforms(
        keys, stream_bases(purpose, visits, seed=seed, view_index=view_index), num_draws
    )


def stream_bases(purpose: str, visits: np.ndarray, *, seed: int, view_index: int) -> np.ndarray:
    """Numbers of the streams that `uniforms` draws from, a function of all its arguments.

    Args:
        purpose: What the numbers are for.
        visits: int64 [n] or one number.
        seed: Seed of the run.
        view_index: 0 or 1.
    Returns:
        uint64, of the shape of `visits`, or one number if all visits are equal.
    """
    if visits.size and (visits == visits.flat[0]).all():
        visits = np.asarray(visits.flat[0])  # as nearly always; finding the kinds would cost more
    kinds, which = np.unique(visits, return_inverse=True)
    bases = [stable_hash(purpose, seed, int(kind), view_index, num_bytes=8) for kind in kinds]
    base = np.array([int.from_bytes(b, "little") for b in bases], np.uint64)
    return base[which.reshape(visits.shape)]


def uniforms(keys: np.ndarray, base: np.ndarray | int, num_draws: int) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1): SplitMix64's mixer over (base, key, draw).

    Args:
        keys: int64 or uint64 [n].
        base: 64-bit number of the stream; or uint64 [n], one for each key.
        num_draws: Draws per key.
    Returns:
        float64 [num_draws, n], multiples of 2**-53.
    """
    keys = np.ascontiguousarray(keys).view(np.uint64)
    counters = np.arange(1, num_draws + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(keys ^ np.asarray(base, np.uint64))[None, :] + counters)
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
