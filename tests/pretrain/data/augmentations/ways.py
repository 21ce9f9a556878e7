"""Each operation three ways: torchvision's on Pillow, ours on uint8, ours in float."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.augmentations.operation import Operation
from tests.pretrain.data.picture_helpers import smooth_picture

SIZE = 64
TOLERANCE = 1e-5  # of values in 0..1: rounding of single precision
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
PICTURES = [*(smooth_picture(seed, SIZE, SIZE) for seed in range(4)), NOISE]


def floats(size: int = 40) -> Tensor:
    """float [6, 3, size, size] in 0..1: soft pictures and one of pure noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    images = [*(smooth_picture(seed, size, size) for seed in range(5)), noise]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert equality up to a tolerance."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


def on_uint8(operation: Operation, image: np.ndarray, **parameters: float) -> np.ndarray:
    """A changed copy of a picture, uint8."""
    one = {name: np.array([value], np.float32) for name, value in parameters.items()}
    out = image.copy()
    for step in operation.picture_steps(one, len(image))[0]:
        step(out)
    return out


def in_float(operation: Operation, image: np.ndarray, **parameters: float) -> np.ndarray:
    """The same in levels of 255 by the batched way, not rounded."""
    one = {name: np.array([value], np.float32) for name, value in parameters.items()}
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    operation.change_batch(batch, one)
    return batch[0].permute(1, 2, 0).numpy() * 255


def check_uint8(operation, in_pillow, parameters, bounds):
    """Compare the uint8 way with the other two.

    Args:
        operation: The operation.
        in_pillow: The same by torchvision on Pillow.
        parameters: Of the one picture.
        bounds: Largest and mean difference to the float way, and to Pillow, in levels of 255.
    """
    measured = np.zeros(4)
    for image in PICTURES:
        ours = on_uint8(operation, image, **parameters).astype(float)
        exact = np.abs(ours - in_float(operation, image, **parameters))
        pillow = np.abs(ours - np.asarray(in_pillow(Image.fromarray(image))).astype(float))
        measured = np.maximum(measured, [exact.max(), exact.mean(), pillow.max(), pillow.mean()])
    assert (measured <= bounds).all(), measured
