"""CutMix: the share that comes from the partner."""

import math

import pytest
import torch

from tests.pretrain.features.helpers import augment, random_of


@pytest.mark.parametrize("ratio", [0.2, 0.99])
def test_cutmix_takes_its_share_of_the_partner_and_never_all(ratio):
    z, partner = torch.full((400, 64), 1.0), torch.full((400, 64), -1.0)
    taken = augment("cutmix", z, random_of(400, 3), partner, ratio=ratio) < 0
    sigma = math.sqrt(ratio * (1 - ratio) / z.numel())
    assert abs(float(taken.double().mean()) - ratio) < 5 * sigma + 0.01
    assert not bool(taken.all(dim=1).any())
