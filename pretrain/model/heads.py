"""Projector g and predictor q."""

from __future__ import annotations

from torch import nn


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
    """
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
