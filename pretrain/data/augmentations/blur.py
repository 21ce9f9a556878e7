"""Gaussian blur."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from common.errors import require
from common.lazy import Tensor, functional, torch
from pretrain.data.augmentations.operation import Operation, Parameters, Step, change_where
from pretrain.precision import exact_products

# Weights are multiples of 1/256: OpenCV then filters in integers, twice as fast.
_KERNEL_STEPS = 256


@dataclass(frozen=True)
class Blur(Operation):
    """Gaussian blur with a kernel of about a tenth of the side, borders mirrored.

    Attributes:
        sigma: Range of the standard deviation, pixels.
    """

    position = 30
    num_draws = 2
    first_draw = 7

    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.sigma
        require(0 < low <= high, f"blur.sigma {self.sigma}: must satisfy 0 < low <= high")

    def draw(self, uniforms: np.ndarray) -> Parameters:
        """`sigma` in pixels, 0 for no blur; see `Operation`."""
        low, high = self.sigma
        sigma = np.where(uniforms[0] < self.probability, low + uniforms[1] * (high - low), 0.0)
        return {"sigma": sigma.astype(np.float32)}

    def change_batch(self, x: Tensor, parameters: Parameters) -> None:
        """See `Operation`. Of two ways each device takes the one that is faster there."""
        blur = blur_by_taps if x.device.type == "cpu" else blur_by_matrix
        kernel_size = blur_kernel_size(x.shape[-1])
        function = partial(blur, kernel_size=kernel_size)
        change_where(x, parameters["sigma"] > 0, function, parameters["sigma"])

    def picture_steps(self, parameters: Parameters, image_size: int) -> list[list[Step]]:
        """See `Operation`."""
        kernels = uint8_kernels(parameters["sigma"], blur_kernel_size(image_size))
        return [[] if kernel is None else [partial(_filter, kernel=kernel)] for kernel in kernels]


def blur_kernel_size(image_size: int) -> int:
    """About 10 % of the picture's side, odd, at least 3: 23 at 224 px, 7 at 64 px."""
    return max(3, round((image_size * 0.1 - 1) / 2) * 2 + 1)


def gaussian_kernel(sigma: Tensor, kernel_size: int) -> Tensor:
    """Weights [n, kernel_size] of each sample, with sum 1."""
    half = kernel_size // 2
    steps = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


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
    """Blur square pictures along both axes by a matrix from the left and from the right."""
    size, num = x.shape[-1], len(x)
    kernel = gaussian_kernel(sigma, kernel_size)
    # Row i of the matrix has the weights of pixel i's neighbours; those beyond the border are
    # mirrored without repeating the edge.
    steps = torch.arange(kernel_size, device=x.device) - kernel_size // 2
    source = (torch.arange(size, device=x.device)[:, None] + steps).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    matrix = torch.zeros(num, size, size, device=x.device).scatter_add_(
        2, source.expand(num, -1, -1), kernel[:, None, :].expand(-1, size, -1).contiguous()
    )
    matrix = matrix.unsqueeze(1)
    with exact_products(x.device):
        return matrix @ x @ matrix.transpose(2, 3)


def uint8_kernels(sigma: np.ndarray, kernel_size: int) -> list[np.ndarray | None]:
    """Kernels in steps of 1/256 with sum 1, without the taps that become 0; None for no blur.

    Args:
        sigma: float32 [n], pixels; 0 for no blur.
        kernel_size: Longest kernel.
    """
    exact = gaussian_kernel(torch.from_numpy(sigma).clamp_min(1e-3), kernel_size).numpy()
    steps = np.rint(exact * _KERNEL_STEPS)
    half = kernel_size // 2
    steps[:, half] += _KERNEL_STEPS - steps.sum(axis=1)
    reach = (steps[:, :half] > 0).sum(axis=1).tolist()  # taps on each side
    kernels = steps / np.float32(_KERNEL_STEPS)
    return [
        kernels[i, half - reach[i] : half + reach[i] + 1] if value > 0 and reach[i] else None
        for i, value in enumerate(sigma.tolist())
    ]


def _filter(image: np.ndarray, kernel: np.ndarray) -> None:
    import cv2

    cv2.sepFilter2D(image, -1, kernel, kernel, dst=image)
