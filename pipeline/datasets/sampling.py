"""Draws that all scenes share: picture shape, object sizes, numbers of objects, the camera."""

import cv2
import numpy as np

from pipeline.datasets.options import SetOptions


def draw_shape(rng: np.random.Generator, options: SetOptions) -> tuple[int, int]:
    """Return rows and columns of a picture: lying or upright with equal chance."""
    short, long = options.short_side, options.long_side
    return (short, long) if rng.random() < 0.5 else (long, short)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between two bounds."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def object_statistics(
    rng: np.random.Generator, options: SetOptions, part: str
) -> tuple[tuple[float, float], int]:
    """Return the range of object sizes (shares of the short side) and a number of objects."""
    if part in ("train", "test"):
        sizes = (options.min_object, options.max_object)
        return sizes, int(rng.integers(options.min_objects, options.max_objects + 1))
    sizes = (options.pool_min_object, options.pool_max_object)
    if part == "pool":
        return sizes, int(rng.integers(options.pool_min_objects, options.pool_max_objects + 1))
    return sizes, 1


def is_held_out(part: str) -> bool:
    """Tell whether a part shows objects, materials and scenes kept from training."""
    return part in ("test", "probe/val")


def finish(rng: np.random.Generator, image: np.ndarray, cast: float = 0.1) -> np.ndarray:
    """Apply the camera: colour cast, exposure, a little blur and noise.

    Args:
        rng: Source of random numbers.
        image: float32 (h, w, 3), about 0..255; changed in place.
        cast: Largest relative change of one channel against the others.
    Returns:
        uint8 of the same shape.
    """
    image *= (rng.uniform(0.85, 1.2) * rng.uniform(1 - cast, 1 + cast, 3)).astype(np.float32)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    sigma = np.float32(rng.uniform(0, 6))
    image += sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)
