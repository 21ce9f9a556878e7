"""Projector g and predictor q."""

from __future__ import annotations

from torch import nn


def mlp(
    input_dim: int, hidden_dim: int, output_dim: int, *, num_layers: int, last_bn: bool = False
) -> nn.Sequential:
    """Linear layers with BN and ReLU between them (BYOL, NNCLR: 2 and 3 layers).

    Args:
        input_dim: Width of the input.
        hidden_dim: Width of every hidden layer.
        output_dim: Width of the output.
        num_layers: Linear layers, at least 1.
        last_bn: A BN after the last layer as well (NNCLR's projector).

    Raises:
        ValueError: If ``num_layers`` is below 1.
    """
    if num_layers < 1:
        raise ValueError(f"an MLP needs at least one layer, got num_layers={num_layers}")
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(input_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim)]
        layers.append(nn.ReLU(inplace=True))
        input_dim = hidden_dim
    layers.append(nn.Linear(input_dim, output_dim, bias=not last_bn))
    if last_bn:
        layers.append(nn.BatchNorm1d(output_dim))
    return nn.Sequential(*layers)
