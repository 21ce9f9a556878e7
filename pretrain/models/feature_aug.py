"""Feature augmentation: features in, N similar features out, with their input's norm.

Each method is a pure function of features and a random generator. Random draws are made for the
*global* batch and partners come from it, so the number of processes changes nothing. The
definitions are ours (docs/method.md); the idea is that of arXiv 2410.12396.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pretrain.models.support_queue import SupportQueue


def keep_norm(augmented: Float[Tensor, "... d"], original: Float[Tensor, "... d"]) -> Tensor:
    """Rescale each augmented row to the norm of its original."""
    return functional.normalize(augmented, dim=-1) * original.norm(dim=-1, keepdim=True)


def mask(z: Float[Tensor, "n d"], *, ratio: float, generator: torch.Generator) -> Tensor:
    """Zero dimensions: z * m, m ~ Bernoulli(1 - ratio) each; at least one dimension is kept."""
    draws = torch.rand(z.shape, generator=generator, device=z.device)
    kept = draws >= ratio
    kept |= draws == draws.amax(dim=1, keepdim=True)  # the row's largest draw is always kept
    return keep_norm(z * kept.to(z.dtype), z)


def noise(z: Float[Tensor, "n d"], *, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of about sigma |z|: z + sigma |z| / sqrt(d) eps with eps ~ N(0, I)."""
    eps = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    scale = sigma * z.norm(dim=1, keepdim=True) / z.shape[1] ** 0.5
    return keep_norm(z + scale * eps, z)


def mixup(z: Float[Tensor, "n d"], *, alpha: float, generator: torch.Generator) -> Tensor:
    """Mix rows: lambda z + (1 - lambda) z_j, lambda = max(l, 1 - l), l ~ Beta(alpha, alpha).

    The partner is another sample of the batch: j = i + shift (mod n), one drawn shift in 1..n-1.

    Raises:
        ValueError: If the batch has a single row, which has no partner.
    """
    n = z.shape[0]
    if n < 2:
        raise ValueError("mixup needs a batch of at least 2 samples: a single row has no partner")
    shift = int(torch.randint(1, n, (), generator=generator, device=z.device))
    lam = _beta(alpha, n, generator, z).unsqueeze(1)
    lam = torch.maximum(lam, 1 - lam)
    return keep_norm(lam * z + (1 - lam) * z.roll(-shift, dims=0), z)


def nearest_neighbour(
    z: Float[Tensor, "n d"],
    queue: SupportQueue,
    *,
    top_k: int,
    num_features: int,
    generator: torch.Generator,
) -> Float[Tensor, "N n d"]:
    """Neighbours of z in the queue, straight-through: values are the neighbours', gradients z's.

    top_k = 1: the nearest. top_k > 1 with one feature: a random one of the k nearest, per row.
    N > 1 features: the N nearest.
    """
    indices = queue.nearest_indices(z, top_k)
    if num_features == 1 and top_k > 1:
        choice = torch.randint(top_k, (z.shape[0], 1), generator=generator, device=z.device)
        indices = indices.gather(1, choice)
    neighbours = queue.features[indices[:, :num_features]].transpose(0, 1).to(z.dtype)
    neighbours = keep_norm(neighbours, z.detach().unsqueeze(0))
    return z + (neighbours - z).detach()


def _beta(alpha: float, n: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, " n"]:
    """Draw n times from Beta(alpha, alpha) with an explicit generator."""
    if alpha == 1.0:
        return torch.rand(n, generator=generator, device=like.device, dtype=like.dtype)
    first, second = (_log_gamma(alpha, n, generator, like.device) for _ in range(2))
    return torch.sigmoid(first - second).to(like.dtype)  # g1 / (g1 + g2)


def _log_gamma(
    alpha: float, n: int, generator: torch.Generator, device: torch.device
) -> Float[Tensor, " n"]:
    """Logarithms of Gamma(alpha, 1) draws, as Gamma(alpha + 1) U^(1 / alpha): no underflow.

    Only this private op of torch's takes a generator.
    """
    shape = torch.full((n,), alpha + 1, device=device, dtype=torch.float64)
    uniform = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    logarithm = uniform.clamp_min(torch.finfo(torch.float64).tiny).log()
    gamma = torch._standard_gamma(shape, generator=generator)  # type: ignore
    return gamma.log() + logarithm / alpha
