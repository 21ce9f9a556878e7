"""Feature augmentation: features in, similar features out, with their input's norm.

Each method is a pure function of features and random numbers. ``random`` draws for the global
batch and hands out these rows, so the number of processes changes nothing. ``strength`` in [0, 1]
scales a method: 0 is the identity. The definitions are ours (docs/method.md); the idea is that of
arXiv 2410.12396.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pretrain.features.memory_bank import consensus
from pretrain.features.row_random import RowRandom

Features = Float[Tensor, "n d"]


def keep_norm(augmented: Float[Tensor, "... d"], original: Float[Tensor, "... d"]) -> Tensor:
    """Rescale each augmented row to the norm of its original."""
    return functional.normalize(augmented, dim=-1) * original.norm(dim=-1, keepdim=True)


def mask(z: Features, random: RowRandom, *, ratio: float, strength: float = 1.0) -> Tensor:
    """Zero dimensions: z * m, m ~ Bernoulli(1 - ratio) each; at least one dimension is kept."""
    return keep_norm(z * _kept(z, random, strength * ratio).to(z.dtype), z)


def noise(z: Features, random: RowRandom, *, sigma: float, strength: float = 1.0) -> Tensor:
    """Gaussian noise of about sigma |z|: z + sigma |z| / sqrt(d) eps with eps ~ N(0, I)."""
    eps = random.normal(z.shape[1], dtype=z.dtype)
    scale = strength * sigma * z.norm(dim=1, keepdim=True) / z.shape[1] ** 0.5
    return keep_norm(z + scale * eps, z)


def mixup(
    z: Features, partner: Features, random: RowRandom, *, alpha: float, strength: float = 1.0
) -> Tensor:
    """Mix with another feature: lambda z + (1 - lambda) z_j, l ~ Beta(alpha, alpha) for each row.

    lambda = max(l, 1 - l), so that the row itself weighs most; (1 - lambda) is scaled by strength.
    """
    lam = random.beta(alpha, 1, dtype=z.dtype)
    share = strength * torch.minimum(lam, 1 - lam)
    return keep_norm((1 - share) * z + share * partner, z)


def cutmix(
    z: Features, partner: Features, random: RowRandom, *, ratio: float, strength: float = 1.0
) -> Tensor:
    """Take a random subset of dimensions from another feature: z_j where not m, m as in `mask`."""
    return keep_norm(torch.where(_kept(z, random, strength * ratio), z, partner), z)


def extrapolate(
    z: Features,
    partner: Features,
    random: RowRandom,
    *,
    scale: float,
    per_dimension: bool,
    strength: float = 1.0,
) -> Tensor:
    """Move away from another feature: z + lambda (z - z_j), lambda = scale Beta(2, 2).

    One lambda for each row, or one for each of its dimensions (as arXiv 2108.02982 draws them).
    """
    lam = strength * scale * random.beta(2.0, z.shape[1] if per_dimension else 1, dtype=z.dtype)
    return keep_norm(z + lam * (z - partner), z)


def neighbour(
    z: Features,
    nearest: Float[Tensor, "n k d"],
    random: RowRandom,
    *,
    choice: str,
    number: int | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Replace z by a neighbour, straight-through: the neighbour's value, z's gradient.

    Args:
        z: Features.
        nearest: Their k nearest entries of the support queue, nearest first.
        random: Chooses among the k.
        choice: ``random``: one of the k for each row; ``consensus``: their robust centre.
        number: The neighbour of this rank instead, where several features are made.
        strength: Below 1 a mixture of directions: (1 - strength) z + strength NN(z).
    """
    if number is not None:
        found = nearest[:, number]
    elif choice == "consensus":
        found = consensus(nearest, z.detach())
    elif nearest.shape[1] == 1:
        found = nearest[:, 0]
    else:
        found = _take(nearest, random.integers(nearest.shape[1], 1))
    original = z.detach()
    found = keep_norm(found.to(z.dtype), original)
    if strength < 1:
        found = keep_norm((1 - strength) * original + strength * found, original)
    return z + (found - z).detach()


def _take(nearest: Float[Tensor, "n k d"], which: Int[Tensor, "n 1"]) -> Features:
    """Entry ``which[i]`` of row i."""
    return nearest.gather(1, which.unsqueeze(2).expand(-1, 1, nearest.shape[2])).squeeze(1)


def _kept(z: Features, random: RowRandom, ratio: float) -> Tensor:
    """Dimensions that stay: each with probability 1 - ratio, and that of the row's largest draw."""
    draws = random.uniform(z.shape[1])
    return (draws >= ratio) | (draws == draws.amax(dim=1, keepdim=True))
