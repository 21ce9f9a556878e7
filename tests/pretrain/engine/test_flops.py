"""FLOPs against a count by hand and against what PyTorch counts in a real training step."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights, ResNet101_Weights

from pretrain.config import HeadConfig
from pretrain.engine import flops
from pretrain.models.backbone import Arch, ResNet
from pretrain.models.row_random import fa_generator
from tests.pretrain.conftest import THIN, TINY_HEADS


def test_forward_of_a_small_network_by_hand():
    """Two FLOPs for each multiply-add; norm, ReLU and pooling count nothing."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),  # 8 x 8 -> 4 x 4
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    first = 4 * 4 * 4 * (3 * 3 * 3)  # places x channels out x multiply-adds of each
    second = 4 * 4 * 6 * 2  # two groups of 2 channels in
    last = 6 * 5
    assert flops.forward_flops(network, 1, 3, 8, 8) == 2 * (first + second + last)
    assert flops.forward_flops(network, 7, 3, 8, 8) == 7 * 2 * (first + second + last)
    assert network.training


def test_a_full_resnet_18_has_its_published_count():
    """1.8 billion multiply-adds at 224 px (He et al., 2016, table 1)."""
    count = flops.forward_flops(ResNet(Arch(18, 64, 64, 64)), 1, 3, 224, 224)
    assert count == pytest.approx(2 * 1.8e9, rel=0.01)


@pytest.mark.parametrize(
    ("depth", "weights"),
    [(50, ResNet50_Weights.IMAGENET1K_V1), (101, ResNet101_Weights.IMAGENET1K_V1)],
)
def test_full_bottleneck_networks_have_torchvisions_count(depth, weights):
    """torchvision states thousand millions of multiply-adds at 224 px, the classifier included."""
    count = flops.forward_flops(ResNet(Arch(depth, 64, 64, 256)), 1, 3, 224, 224)
    classifier = 2 * 2048 * 1000
    assert count + classifier == pytest.approx(2e9 * weights.meta["_ops"], rel=0.001)


@pytest.mark.parametrize(
    ("objective", "fa"),
    [
        ("byol", {"method": "none"}),
        ("simsiam", {"method": "none"}),
        ("byol", {"method": "mask", "architecture": "pre", "num_features": 3}),
    ],
)
def test_a_step_costs_what_pytorch_counts(make_model, make_views, objective, fa):
    """These losses have no matrix product. Three times the forward pass has one term too many: no
    gradient of the pixels is computed."""
    n, size = 4, 32
    model = make_model(objective, **fa).train()
    views = make_views(n=n, size=size)
    counter = FlopCounterMode(display=False)
    with counter:
        model.step(views, fa_generator(0, 0, views.device)).loss.backward()
    counted = flops.model_flops(model, size)
    first = 2 * (THIN.stem_channels * 3 * 7 * 7) * (size // 2) ** 2
    pixels = flops.NUM_VIEWS * n * first
    predictor = model.online.predictor
    unneeded = pixels
    if fa["method"] == "mask":  # FA's gradient stop: none flows into the predictor's input
        unneeded += 2 * n * 3 * 2 * TINY_HEADS.output_dim * TINY_HEADS.predictor_hidden_dim
        encoder = counted.backbone + counted.projector
        unneeded += 2 * n * 2 * encoder - pixels
    assert predictor is not None
    assert n * counted.per_picture - unneeded == counter.get_total_flops()


def test_a_replaced_forward_pass_counts_as_the_plain_one(make_model):
    """As ``engine.compile`` leaves it; the copy must not lead back to the original."""
    model = make_model("byol")
    expected = flops.model_flops(model, 32)

    def refuse(_images):
        raise AssertionError("the original was called")

    model.online.backbone.forward = refuse
    model.online.backbone.checkpoints_stages = True
    assert flops.model_flops(model, 32) == expected
    assert model.online.backbone.forward is refuse


def test_parts_that_are_missing_count_nothing(make_model):
    simclr = flops.model_flops(make_model("simclr", method="none"), 32)
    assert (simclr.predictor, simclr.prototypes, simclr.has_ema) == (0, 0, False)
    assert simclr.per_picture == 2 * 3 * (simclr.backbone + simclr.projector)
    moco = flops.model_flops(make_model("moco", method="none"), 32)
    assert moco.per_picture == simclr.per_picture * 4 // 3
    swav = make_model("swav", objective_options={"num_prototypes": 20}, method="none")
    assert flops.model_flops(swav, 32).prototypes == 2 * 20 * TINY_HEADS.output_dim


def test_width_of_a_head_with_a_last_norm(make_model):
    heads = HeadConfig(
        projector_hidden_dim=24, predictor_hidden_dim=24, output_dim=12, projector_last_bn=True
    )
    counted = flops.model_flops(make_model("byol", heads=heads), 32)
    assert counted.predictor == 2 * 2 * 12 * 24


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "tf32", 378),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "fp16", 362.05),
        ("NVIDIA L40", "bf16", 181.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A40", "fp32", 37.4),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp32", 8.1),
    ],
)
def test_rates_of_known_devices(name, precision, tflops):
    ceiling = flops.known_ceiling(name, precision)
    assert ceiling.flops_per_second == tflops * 1e12
    assert "NVIDIA" in ceiling.source
    assert not ceiling.is_measured


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a slice
        ("NVIDIA A10G", "bf16"),  # not an A10
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),  # has none
        ("Some Other Device", "fp32"),
    ],
)
def test_other_devices_are_measured(name, precision):
    assert flops.known_ceiling(name, precision) is None


def test_measured_rate_is_that_of_a_product(monkeypatch):
    """With a clock that says 1 ms for every product."""
    ticks = iter(range(1000))
    monkeypatch.setattr(flops.time, "process_time", lambda: next(ticks) * 1e-3)
    found = flops.measured_ceiling(torch.device("cpu"), "fp32", size=64, seconds=0)
    assert found.flops_per_second == pytest.approx(2 * 64**3 / 1e-3)
    assert found.is_measured
    assert "64 x 64 matrix product, 1 threads" in found.source


def test_precision_is_that_of_the_context():
    cpu = torch.device("cpu")
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        assert flops.precision_of(torch.autocast("cpu", dtype=dtype), cpu) == name
    assert flops.precision_of(torch.autocast("cpu", enabled=False), cpu) == "fp32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_no_gpu_beats_its_data_sheet(precision):
    device = torch.device("cuda")
    known = flops.known_ceiling(torch.cuda.get_device_name(device), precision)
    found = flops.measured_ceiling(device, precision)
    if known is not None:
        share = found.flops_per_second / known.flops_per_second
        assert 0.3 < share < 1.1
    assert found.flops_per_second > 1e11
