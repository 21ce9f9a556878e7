"""Colour jitter: brightness, contrast, saturation and hue, in a random order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from common.lazy import Tensor, torch
from pretrain.data.augmentations.grey import GREY_MATRIX, to_grey
from pretrain.data.augmentations.operation import Operation, Parameters, Step, change_where

ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
_FACTORS = ("brightness", "contrast", "saturation")
_LUMA = GREY_MATRIX[0].tolist()  # as the matrices have it, in single precision


@dataclass(frozen=True)
class Jitter(Operation):
    """Brightness, contrast, saturation and hue change in an order of each sample's own.

    Attributes:
        brightness: Factor from 1 - b to 1 + b, not below 0.
        contrast: Likewise.
        saturation: Likewise.
        hue: Turn from -h to h of the colour circle, h at most 0.5.
    """

    position = 10
    num_draws = 6
    first_draw = 0

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _FACTORS:
            self.check(name, getattr(self, name), 0, np.inf)
        self.check("hue", self.hue, 0, 0.5)

    def draw(self, uniforms: np.ndarray) -> Parameters:
        """See `Operation`.

        Returns:
            "brightness", "contrast", "saturation" (1: no change), "hue" (0: none) and "order"
            (number of a permutation in ORDERS).
        """
        acts, order, *factors, hue = uniforms
        acts = acts < self.probability
        drawn = {
            "order": np.floor(order * len(ORDERS)),
            "hue": np.where(acts, (2.0 * hue - 1.0) * self.hue, 0.0),
        }
        for name, uniform in zip(_FACTORS, factors, strict=True):
            spread = getattr(self, name)
            low, high = max(0.0, 1.0 - spread), 1.0 + spread
            drawn[name] = np.where(acts, low + uniform * (high - low), 1.0)
        return {name: values.astype(np.float32) for name, values in drawn.items()}

    def change_batch(self, x: Tensor, parameters: Parameters) -> None:
        """See `Operation`."""
        functions = (
            (adjust_brightness, parameters["brightness"], 1),
            (adjust_contrast, parameters["contrast"], 1),
            (adjust_saturation, parameters["saturation"], 1),
            (adjust_hue, parameters["hue"], 0),
        )
        orders = np.array(ORDERS)[parameters["order"].astype(np.int64)]  # [n, 4]
        for turn in range(4):
            for number, (function, values, neutral) in enumerate(functions):
                is_due = (values != neutral) & (orders[:, turn] == number)
                change_where(x, is_due, function, values)

    def picture_steps(self, parameters: Parameters, image_size: int) -> list[list[Step]]:
        """See `Operation`. All but the hue are products with a matrix, made here for all."""
        brightness, saturation = parameters["brightness"], parameters["saturation"]
        eye = np.eye(3, dtype=np.float32)
        scaled = brightness[:, None, None] * eye
        blended = saturation[:, None, None] * (eye - GREY_MATRIX) + GREY_MATRIX
        shifted = parameters["contrast"][:, None, None] * np.eye(3, 4, dtype=np.float32)
        brightness, saturation = brightness.tolist(), saturation.tolist()
        contrasts = parameters["contrast"].tolist()
        turns = (np.rint(parameters["hue"] * 256).astype(np.int64) % 256).tolist()
        all_steps = []
        for k, order in enumerate(parameters["order"].astype(np.int64).tolist()):
            steps = (
                partial(_multiply, matrix=scaled[k]) if brightness[k] != 1 else None,
                partial(_blend_with_mean, matrix=shifted[k], factor=contrasts[k])
                if contrasts[k] != 1
                else None,
                partial(_multiply, matrix=blended[k]) if saturation[k] != 1 else None,
                partial(_turn_hue, turn=turns[k]) if turns[k] else None,
            )
            all_steps.append([step for n in ORDERS[order] if (step := steps[n]) is not None])
        return all_steps


# -- batches of floats ----------------------------------------------------------------------------


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by factor [n], clamped to 0..1."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the picture's mean luma: factor * x + (1 - factor) * mean, clamped to 0..1."""
    mean = to_grey(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel: factor * x + (1 - factor) * luma, clamped to 0..1."""
    return torch.lerp(to_grey(x), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


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


# -- one uint8 picture ----------------------------------------------------------------------------


def _multiply(image: np.ndarray, matrix: np.ndarray) -> None:
    import cv2

    cv2.transform(image, matrix, dst=image)


def _blend_with_mean(image: np.ndarray, matrix: np.ndarray, factor: float) -> None:
    """Blend with the picture's mean luma, in place: factor * x + (1 - factor) * mean.

    Args:
        image: uint8 [h, w, 3].
        matrix: float32 [3, 4], the factor on its diagonal; its last column is written.
        factor: Of the contrast.
    """
    import cv2

    red, green, blue, _ = cv2.sumElems(image)  # half the time of cv2.mean
    total = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    matrix[:, 3] = (1 - factor) * total / (image.shape[0] * image.shape[1])
    cv2.transform(image, matrix, dst=image)


def _turn_hue(image: np.ndarray, turn: int) -> None:
    """Turn the hue of 8-bit HSV by `turn` 256ths of the circle, in place."""
    import cv2

    height, width = image.shape[:2]
    cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL, dst=image)
    num = math.gcd(height, 16)  # rows at once, for long loops
    rows = image.reshape(height // num, num * 3 * width)
    np.add(rows, _hues(num * width) * np.uint8(turn), out=rows)  # wraps around at 256
    cv2.cvtColor(image, cv2.COLOR_HSV2RGB_FULL, dst=image)


@lru_cache(maxsize=8)
def _hues(num_pixels: int) -> np.ndarray:
    """uint8 [3 * num_pixels] with 1 at the hue of each pixel, else 0."""
    return np.tile(np.array([1, 0, 0], np.uint8), num_pixels)
