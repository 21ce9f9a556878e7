"""Photometric augmentation of batches on the device, and normalisation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.data.augmentations.operation import Operation, Parameters
from pretrain.data.memory import ReusedMemory
from pretrain.data.policy import ViewPolicy
from pretrain.data.random_numbers import draw_uniforms

Drawn = list[tuple[Operation, Parameters]]
# Of its own: blocks of other sizes would push these out.
_MEMORY = ReusedMemory()


def draw_parameters(
    view: ViewPolicy,
    sample_hashes: np.ndarray,
    repeats: np.ndarray | int,
    *,
    seed: int,
    view_index: int,
) -> Drawn:
    """The operations of a view, in their order, with the parameters of each sample of a batch.

    Args:
        view: The policy.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], how often each sample was due before; or one number for all.
        seed: Seed of the run.
        view_index: 0 or 1.
    """
    drawn = []
    for operation in view.operations:
        purpose, first = operation.stream
        numbers = draw_uniforms(
            purpose, sample_hashes, repeats, operation.num_draws, seed=seed,
            view_index=view_index, first=first,
        )  # fmt: skip
        drawn.append((operation, operation.draw(numbers)))
    return drawn


def augment(images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change and normalise a batch, each sample with its own parameters.

    Args:
        images: uint8 [n, 3, s, s], RGB, on any device.
        drawn: From `draw_parameters`.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [n, 3, s, s].
    """
    x = images.contiguous().float().mul_(1 / 255)  # in this order: a quarter of the time
    for operation, parameters in drawn:
        operation.change_batch(x, parameters)
    shift, scale = (torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1) for values in (mean, std))
    shift = shift.to(x.device, non_blocking=True)
    scale = 1 / scale.to(x.device, non_blocking=True)
    return x.sub_(shift).mul_(scale)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Only normalise: for pictures whose photometric changes are done.

    On the CPU picture by picture, so that one stays in the cache, and into memory that is used
    again.

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
