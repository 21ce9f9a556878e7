"""Projector and predictor: which layers stand where, and what they compute."""

import pytest
import torch
from torch import nn

from pretrain.model.joint_embedding import mlp


def kinds(module):
    return [type(layer).__name__ for layer in module]


@pytest.mark.parametrize("last_bn", [False, True])
def test_byol_s_and_nnclr_s_heads_keep_their_keys_and_bits(last_bn):
    """Checkpoints hold these names, and seeded runs these weights."""
    torch.manual_seed(3)
    head = mlp(8, 16, 4, num_layers=3, last_bn=last_bn)
    torch.manual_seed(3)
    by_hand = nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 4, bias=not last_bn), *([nn.BatchNorm1d(4)] if last_bn else []),
    )  # fmt: skip
    assert list(head.state_dict()) == list(by_hand.state_dict())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name
    x = torch.randn(6, 8)
    assert torch.equal(head(x), by_hand(x))


def test_without_hidden_bn_as_in_moco_v2():
    head = mlp(8, 32, 4, num_layers=2, hidden_bn=False)
    assert kinds(head) == ["Linear", "ReLU", "Linear"]
    assert list(head.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    one, all_rows = torch.randn(1, 8), torch.randn(5, 8)
    joined = head(torch.cat([one, all_rows]))[:1]
    torch.testing.assert_close(head(one), joined)  # a row does not see its batch


def test_last_bn_without_affine_as_in_simsiam():
    head = mlp(8, 32, 4, num_layers=3, last_bn=True, last_bn_affine=False)
    assert kinds(head)[-2:] == ["Linear", "BatchNorm1d"]
    assert [head[6].bias, head[7].weight, head[7].bias] == [None, None, None]
    assert head[4].weight is not None
    out = head(torch.randn(64, 8))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)


def test_dropout_follows_each_hidden_relu():
    head = mlp(8, 32, 4, num_layers=3, dropout=0.25)
    block = ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert kinds(head) == [*block, *block, "Linear"]
    x = torch.randn(256, 8)
    hidden = head[:3](x)
    dropped = head[3](hidden)
    share = float((dropped == 0)[hidden > 0].float().mean())
    assert share == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_one_layer_is_linear():
    head = mlp(8, 32, 4, num_layers=1, dropout=0.5)
    assert kinds(head) == ["Linear"]
    assert head.train()(torch.zeros(2, 8)).shape == (2, 4)
