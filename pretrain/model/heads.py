"""Projector g, predictor q, and the prototypes of clustering objectives."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


def mlp(
    input_dim: int,
    hidden_dim: int,
    output_dim: int,
    *,
    num_layers: int,
    last_bn: bool = False,
    last_bn_affine: bool = True,
    hidden_bn: bool = True,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear layers with BN and ReLU between them (BYOL, NNCLR: 2 and 3 layers).

    Args:
        input_dim: Width of the input.
        hidden_dim: Width of every hidden layer.
        output_dim: Width of the output.
        num_layers: Linear layers, at least 1.
        last_bn: A BN after the last layer as well (NNCLR's projector).
        last_bn_affine: Whether that BN has a scale and shift (SimSiam's projector: no).
        hidden_bn: BN in the hidden layers; without it they have a bias (MoCo v2's projector).
        dropout: Share of hidden units set to 0 in training, after each ReLU; no layer if 0.

    Raises:
        ValueError: If ``num_layers`` is below 1 or ``dropout`` outside [0, 1).
    """
    if num_layers < 1:
        raise ValueError(f"an MLP needs at least one layer, got num_layers={num_layers}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got dropout={dropout}")
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(input_dim, hidden_dim, bias=not hidden_bn))
        if hidden_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        input_dim = hidden_dim
    layers.append(nn.Linear(input_dim, output_dim, bias=not last_bn))
    if last_bn:
        layers.append(nn.BatchNorm1d(output_dim, affine=last_bn_affine))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Directions to which features are assigned (SwAV, arXiv 2006.09882).

    Only the direction of a row of ``weight`` counts: it is normalised in every forward pass, where
    SwAV normalises the parameter itself before each step. Rows start uniform on the unit sphere.

    Args:
        num_prototypes: Rows K of ``weight``.
        dim: Width d of a feature.

    Raises:
        ValueError: If either is below 1.
    """

    def __init__(self, num_prototypes: int, dim: int) -> None:
        super().__init__()
        if num_prototypes < 1 or dim < 1:
            raise ValueError(
                "prototypes need at least one row and column, "
                f"got num_prototypes={num_prototypes}, dim={dim}"
            )
        self.weight = nn.Parameter(functional.normalize(torch.randn(num_prototypes, dim), dim=1))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n K"]:
        """Cosine similarity of each feature to each prototype, in [-1, 1]."""
        return functional.normalize(x, dim=1) @ functional.normalize(self.weight, dim=1).T
