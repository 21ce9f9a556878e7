"""The photometric operations on one uint8 picture, with OpenCV: for runs without a GPU.

The same operations in the same order and with the same drawn parameters as `augment`, which does
them in float, a batch at a time. Here values are rounded and clamped to 0..255 after each one, as
in a chain of Pillow operations. docs/augmentation.md says how far the two are apart.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from pretrain.data.augment import GRAY_WEIGHTS, JITTER_ORDERS, blur_kernel_size, gaussian_kernel

_LUMA = np.array(GRAY_WEIGHTS, np.float32)
_GRAY = np.tile(_LUMA, (3, 1))
_KERNEL_STEPS = (
    256  # weights are multiples of 1/256: OpenCV then filters in integers, twice as fast
)


@dataclass(slots=True)
class Changes:
    """What is done to one picture; None where an operation is left out.

    Attributes:
        order: Numbers of brightness (0), contrast (1), saturation (2) and hue (3) in their order.
        brightness: float32 [3, 3], the matrix that multiplies by the factor.
        contrast: Factor.
        saturation: float32 [3, 3], the matrix that blends with the luma.
        hue: Turn in 256ths of the circle, 1 to 255.
        is_gray: The picture becomes grey.
        blur: float32 [k], the kernel along each axis.
        is_solarized: Values from 128 on are inverted.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    brightness: np.ndarray | None = None
    contrast: float | None = None
    saturation: np.ndarray | None = None
    hue: int | None = None
    is_gray: bool = False
    blur: np.ndarray | None = None
    is_solarized: bool = False


def changes_of(params: dict[str, Tensor], image_size: int) -> list[Changes]:
    """Matrices and kernels of a batch.

    Args:
        params: From `augment.draw_parameters`, float32 [n] each.
        image_size: Side of the pictures in pixels, which bounds the blur's kernel.
    Returns:
        n of them.
    """
    one = {name: values.tolist() for name, values in params.items()}
    brightness, saturation = params["brightness"].numpy(), params["saturation"].numpy()
    scaled = brightness[:, None, None] * np.eye(3, dtype=np.float32)
    blended = saturation[:, None, None] * (np.eye(3, dtype=np.float32) - _GRAY) + _GRAY
    turns = np.rint(params["hue"].numpy() * 256).astype(np.int64) % 256
    kernels = _kernels(params["blur_sigma"], image_size)
    return [
        Changes(
            order=JITTER_ORDERS[int(one["jitter_order"][i])],
            brightness=scaled[i] if one["brightness"][i] != 1 else None,
            contrast=one["contrast"][i] if one["contrast"][i] != 1 else None,
            saturation=blended[i] if one["saturation"][i] != 1 else None,
            hue=int(turns[i]) or None,
            is_gray=one["gray"][i] > 0,
            blur=kernels[i],
            is_solarized=one["solarize"][i] > 0,
        )
        for i in range(len(brightness))
    ]


def _kernels(sigma: Tensor, image_size: int) -> list[np.ndarray | None]:
    """Kernels in steps of 1/256 with sum 1, without the taps that become 0; None for no blur."""
    kernel_size = blur_kernel_size(image_size)
    exact = gaussian_kernel(sigma.clamp_min(1e-3), kernel_size).numpy()
    steps = np.rint(exact * _KERNEL_STEPS)
    half = kernel_size // 2
    steps[:, half] += _KERNEL_STEPS - steps.sum(axis=1)
    reach = (steps[:, :half] > 0).sum(axis=1).tolist()  # taps on each side
    kernels = steps / np.float32(_KERNEL_STEPS)
    return [
        kernels[i, half - reach[i] : half + reach[i] + 1] if value > 0 and reach[i] else None
        for i, value in enumerate(sigma.tolist())
    ]


def apply(image: np.ndarray, changes: Changes) -> None:
    """Change a picture in place: jitter in its order, grey, blur, solarise.

    Args:
        image: uint8 [h, w, 3], RGB, contiguous.
        changes: What is done.
    """
    for number in changes.order:
        if number == 0 and changes.brightness is not None:
            cv2.transform(image, changes.brightness, dst=image)
        elif number == 1 and changes.contrast is not None:
            adjust_contrast(image, changes.contrast)
        elif number == 2 and changes.saturation is not None:
            cv2.transform(image, changes.saturation, dst=image)
        elif number == 3 and changes.hue is not None:
            turn_hue(image, changes.hue)
    if changes.is_gray:
        cv2.transform(image, _GRAY, dst=image)
    if changes.blur is not None:
        cv2.sepFilter2D(image, -1, changes.blur, changes.blur, dst=image)
    if changes.is_solarized:
        cv2.min(image, cv2.bitwise_not(image), dst=image)  # 127 < 255/2 < 128


def adjust_contrast(image: np.ndarray, factor: float) -> None:
    """Blend with the picture's mean luma, in place: factor * x + (1 - factor) * mean."""
    mean = float(_LUMA @ cv2.mean(image)[:3])
    matrix = np.zeros((3, 4), np.float32)
    matrix[[0, 1, 2], [0, 1, 2]] = factor
    matrix[:, 3] = (1 - factor) * mean
    cv2.transform(image, matrix, dst=image)


def turn_hue(image: np.ndarray, turn: int) -> None:
    """Turn the hue of 8-bit HSV by `turn` 256ths of the circle, in place."""
    height, width = image.shape[:2]
    cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL, dst=image)
    rows = image.reshape(height, 3 * width)
    step = np.zeros((width, 3), np.uint8)
    step[:, 0] = turn
    np.add(rows, step.reshape(-1), out=rows)  # wraps around at 256
    cv2.cvtColor(image, cv2.COLOR_HSV2RGB_FULL, dst=image)
