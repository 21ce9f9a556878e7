"""Settings of ResNets; the network has its own tests (model/test_resnet.py)."""

import pytest

from common.errors import UserError
from common.resnet import BLOCKS_PER_STAGE, Arch, read_arch
from pretrain.model.backbones.resnet import ResNetBackbone


@pytest.mark.parametrize("depth", BLOCKS_PER_STAGE)
def test_every_depth_is_a_choice(depth):
    assert ResNetBackbone(depth=depth, res2_channels=64 if depth < 50 else 256).depth == depth


def test_settings_are_those_of_the_network():
    sizes = {"depth": 50, "width_per_group": 8, "stem_channels": 12, "res2_channels": 32}
    network = ResNetBackbone(**sizes).build(0.25)
    assert network.arch == Arch(**sizes)
    assert network.output_dim == 8 * 32
    assert network.get_parameter("layer1.0.bn3.weight")[0].item() == 0.25


def test_a_checkpoint_with_another_backbone_is_refused():
    sizes = vars(Arch())
    assert read_arch(sizes) == read_arch(sizes | {"name": "resnet"}) == Arch()
    with pytest.raises(UserError, match=r"arch\.name is 'toy': only a ResNet's checkpoint can"):
        read_arch({"name": "toy", "width": 3})
