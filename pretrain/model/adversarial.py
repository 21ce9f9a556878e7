"""Adversarial examples at the input: FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n 3 s s"]


def step_length(epsilon: float, num_steps: int, step_size: float | None) -> float:
    """The given step, or one that reaches the bound: 1.25 epsilon alone, 2.5 epsilon / steps."""
    if step_size is not None:
        return step_size
    return 1.25 * epsilon if num_steps == 1 else 2.5 * epsilon / num_steps


def perturb(
    loss_of: Callable[[Images], Float[Tensor, ""]],
    images: Images,
    *,
    epsilon: float,
    num_steps: int,
    step_size: float | None,
    pixel_mean: tuple[float, float, float],
    pixel_std: tuple[float, float, float],
    generator: torch.Generator | None = None,
) -> Images:
    """Pictures near the given ones at which the loss is higher.

    Each step moves every pixel value by ``step_size`` in the direction of the sign of its
    gradient, then back into the bound: at most epsilon from where it was, and in 0..1. Gradients
    are taken at the pictures only; those of the network's parameters stay as they are.

    Args:
        loss_of: The loss of normalised pictures, with a graph to them.
        images: Normalised; of valid pixels, 0..1 before (x - mean) / std.
        epsilon: Largest change of a pixel value, in 1/255; 0 changes nothing.
        num_steps: 1 is FGSM; more are PGD.
        step_size: In 1/255; None: see ``step_length``.
        pixel_mean: Of the normalisation, RGB.
        pixel_std: Of the normalisation, RGB.
        generator: Draws a random start within the bound; None: the start is the picture itself.
    Returns:
        Normalised pictures without a graph.
    Raises:
        ValueError: If epsilon is negative, or a step or their number is not positive.
    """
    if epsilon < 0 or num_steps < 1 or (step_size is not None and not step_size > 0):
        raise ValueError(
            f"epsilon must be >= 0, num_steps >= 1 and step_size > 0, got {epsilon}, {num_steps} "
            f"and {step_size}"
        )
    if epsilon == 0:
        return images.detach()
    step = step_length(epsilon, num_steps, step_size) / 255
    mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in (pixel_mean, pixel_std))
    pixels = images.detach() * std + mean
    low, high = (pixels - epsilon / 255).clamp(0, 1), (pixels + epsilon / 255).clamp(0, 1)
    if generator is not None:
        draws = torch.rand(pixels.shape, generator=generator, device=generator.device)
        pixels = (pixels + (2 * draws.to(pixels) - 1) * epsilon / 255).clamp(low, high)
    for _ in range(num_steps):
        with torch.enable_grad():
            candidate = pixels.detach().requires_grad_()
            loss = loss_of((candidate - mean) / std)
        (gradient,) = torch.autograd.grad(loss, candidate)
        pixels = (pixels + step * gradient.sign()).clamp(low, high)
    return (pixels - mean) / std
