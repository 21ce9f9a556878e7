"""Cluster directions of SwAV."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Prototypes(nn.Module):
    """Directions to which features are assigned (SwAV, arXiv 2006.09882).

    Only the direction of a row of ``weight`` counts: it is normalised in every forward pass, where
    SwAV normalises the parameter itself before each step. Rows start uniform on the unit sphere.

    Args:
        num_prototypes: Rows K of ``weight``.
        dim: Width d of a feature.
    """

    def __init__(self, num_prototypes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(torch.randn(num_prototypes, dim), dim=1))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n K"]:
        """Cosine similarity of each feature to each prototype, in [-1, 1]."""
        return functional.normalize(x, dim=1) @ functional.normalize(self.weight, dim=1).T
