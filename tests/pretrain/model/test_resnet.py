"""The backbone against torchvision's own ResNets, and the widths of thin ones."""

import math

import pytest
import torch
import torchvision
from torch import nn

from common.network import ResNet
from common.resnet import Arch
from pretrain.model.backbones.resnet import ResNetBackbone

FULL_WIDTH = {
    18: Arch(18, 64, 64, 64),
    34: Arch(34, 64, 64, 64),
    50: Arch(50, 64, 64, 256),
}
THIN = Arch(50, 16, 16, 64)


@pytest.mark.parametrize("depth", FULL_WIDTH)
def test_keys_shapes_and_features_equal_torchvision(depth):
    torch.manual_seed(depth)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    reference.fc = nn.Identity()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = ResNet(FULL_WIDTH[depth])
    expected = reference.state_dict()
    assert list(ours.state_dict()) == list(expected)  # same names in the same order
    ours.load_state_dict(expected, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mode in (False, True):
            reference.train(mode)
            ours.train(mode)
            torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=0)
    assert ours.output_dim == ours(images).shape[1]


def test_initialisation_is_kaiming_fan_out_and_unit_batch_norm():
    torch.manual_seed(0)
    backbone = ResNet(FULL_WIDTH[18])
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            expected = math.sqrt(2 / fan_out)
            tolerance = 4 * expected / math.sqrt(2 * module.weight.numel())
            assert abs(float(module.weight.detach().std()) - expected) < tolerance, name
            assert abs(float(module.weight.detach().mean())) < 4 * expected / math.sqrt(
                module.weight.numel()
            ), name
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert torch.equal(module.bias, torch.zeros_like(module.bias)), name


@pytest.mark.parametrize(("arch", "last"), [(Arch(18, 8, 8, 8), "bn2"), (THIN, "bn3")], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_residual_gamma_sets_the_last_bn_of_each_block_only(arch, last, gamma):
    torch.manual_seed(0)
    backbone = ResNet(arch, gamma)
    torch.manual_seed(0)
    plain = ResNet(arch).state_dict()
    num_blocks = 0
    for key, value in backbone.state_dict().items():
        if key.endswith(f"{last}.weight") and key.startswith("layer"):
            assert torch.equal(value, torch.full_like(value, gamma)), key
            num_blocks += 1
        else:
            assert torch.equal(value, plain[key]), key
    assert num_blocks == (8 if arch.depth == 18 else 16)


@pytest.mark.parametrize("depth", [18, 50])
def test_residual_gamma_0_is_torchvisions_zero_init_residual(depth):
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None, zero_init_residual=True)
    ours = ResNet(FULL_WIDTH[depth], residual_gamma=0).state_dict()
    for key, value in reference.state_dict().items():
        assert value.ndim > 1 or key.startswith("fc.") or torch.equal(ours[key], value), key


def test_features_are_the_mean_over_the_last_map():
    backbone = ResNet(THIN).eval()
    images = torch.randn(2, 3, 96, 64)
    maps = []
    backbone.get_submodule("layer4").register_forward_hook(lambda *args: maps.append(args[2]))
    with torch.no_grad():
        features, last = backbone(images), backbone(images, as_map=True)
    assert maps[0].shape == (2, 512, 3, 2)
    assert torch.equal(last, maps[0])
    torch.testing.assert_close(features, maps[0].mean(dim=(2, 3)))


def test_settings_are_those_of_the_network():
    sizes = {"depth": 50, "width_per_group": 8, "stem_channels": 12, "res2_channels": 32}
    network = ResNetBackbone(**sizes).build(0.25)
    assert network.arch == Arch(**sizes)
    assert network.output_dim == 8 * 32
    assert network.get_parameter("layer1.0.bn3.weight")[0].item() == 0.25
