"""Collapse figures: numbers that fall when features stop telling pictures apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def feature_std(z: Float[Tensor, "n d"]) -> float:
    """Mean std per dimension of the normalised features, times sqrt(d) (SimSiam, section 4.1).

    About 1 for features spread over the sphere, 0 when collapsed.
    """
    normalised = functional.normalize(z.float(), dim=1)
    return float(normalised.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5)


@torch.no_grad()
def effective_rank(z: Float[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, 2007).

    Of the centred, normalised features: between 1 and min(n, d); 0 if all rows are the same.
    """
    normalised = functional.normalize(z.double(), dim=1)
    singular = torch.linalg.svdvals(normalised - normalised.mean(dim=0))
    total = singular.sum()
    if total <= 1e-12 * z.shape[0]:
        return 0.0
    shares = singular / total
    return float(torch.exp(torch.special.entr(shares).sum()))
