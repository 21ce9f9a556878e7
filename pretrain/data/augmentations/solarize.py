"""Solarisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.lazy import Tensor, torch
from pretrain.data.augmentations.operation import Operation, Parameters, Step, change_where


@dataclass(frozen=True)
class Solarize(Operation):
    """Values from one half on are inverted: uint8 values from 128 on, as 127 < 255/2 < 128."""

    position = 40
    num_draws = 1
    first_draw = 9

    def draw(self, uniforms: np.ndarray) -> Parameters:
        """`is_solarized`, 0 or 1; see `Operation`."""
        return {"is_solarized": (uniforms[0] < self.probability).astype(np.float32)}

    def change_batch(self, x: Tensor, parameters: Parameters) -> None:
        """See `Operation`."""
        change_where(x, parameters["is_solarized"] > 0, lambda y: torch.minimum(y, 1 - y))

    def picture_steps(self, parameters: Parameters, image_size: int) -> list[list[Step]]:
        """See `Operation`."""
        return [[_solarize_uint8] if changes else [] for changes in parameters["is_solarized"] > 0]


def _solarize_uint8(image: np.ndarray) -> None:
    import cv2

    cv2.min(image, cv2.bitwise_not(image), dst=image)
