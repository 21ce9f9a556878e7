"""Projector and predictor: which layers stand where."""

import pytest
import torch
from torch import nn

from pretrain.models.heads import mlp


def kinds(module):
    return [type(layer).__name__ for layer in module]


def test_two_layers_as_in_byol():
    head = mlp(8, 32, 4, num_layers=2)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [head[0].in_features, head[0].out_features, head[3].out_features] == [8, 32, 4]
    assert head[0].bias is None  # BN follows
    assert head[3].bias is not None


def test_three_layers_with_a_last_bn_as_in_nnclr():
    head = mlp(8, 32, 4, num_layers=3, last_bn=True)
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(head) == [*block, *block, "Linear", "BatchNorm1d"]
    assert head[6].bias is None
    assert isinstance(head[7], nn.BatchNorm1d)
    assert head[7].num_features == 4


def test_one_layer_is_linear():
    head = mlp(8, 32, 4, num_layers=1)
    assert kinds(head) == ["Linear"]
    assert head(torch.zeros(2, 8)).shape == (2, 4)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match=r"at least one layer, got num_layers=0"):
        mlp(8, 32, 4, num_layers=0)
