"""Grey pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.lazy import Tensor
from pretrain.data.augmentations.operation import Operation, Parameters, Step, change_where

LUMA = (0.2989, 0.587, 0.114)  # weights of R, G, B: ITU-R 601, as in torchvision
GREY_MATRIX = np.tile(np.array(LUMA, np.float32), (3, 1))


@dataclass(frozen=True)
class Grey(Operation):
    """Each pixel becomes its luma."""

    position = 20
    num_draws = 1
    first_draw = 6

    def draw(self, uniforms: np.ndarray) -> Parameters:
        """`is_grey`, 0 or 1; see `Operation`."""
        return {"is_grey": (uniforms[0] < self.probability).astype(np.float32)}

    def change_batch(self, x: Tensor, parameters: Parameters) -> None:
        """See `Operation`."""
        change_where(x, parameters["is_grey"] > 0, lambda y: to_grey(y).expand(-1, 3, -1, -1))

    def picture_steps(self, parameters: Parameters, image_size: int) -> list[list[Step]]:
        """See `Operation`."""
        return [[_to_grey_uint8] if is_grey else [] for is_grey in parameters["is_grey"] > 0]


def to_grey(x: Tensor) -> Tensor:
    """Luma, [n, 1, h, w], of float [n, 3, h, w]."""
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _to_grey_uint8(image: np.ndarray) -> None:
    import cv2

    cv2.transform(image, GREY_MATRIX, dst=image)
