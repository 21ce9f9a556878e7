"""The backward pass of ROIAlign has the bits of torchvision's."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from detection.training.roi_align import speed_up_backward
from detection.training.trainer import train_in_bfloat16


def random_rois(num: int) -> Tensor:
    """Of two pictures in any order; small, large, outside, without extent, turned round."""
    rois = torch.rand(num, 5) * torch.tensor([2.0, 300, 250, 0, 0])
    rois[:, 0].floor_()
    rois[:, 3:] = rois[:, 1:3] + torch.rand(num, 2) * torch.rand(num, 1) * 250
    rois[0, 1:] = torch.tensor([-60.0, -90, 600, 500])
    rois[1, 1:] = torch.tensor([10.0, 20, 10, 20])
    rois[2, 1:] = torch.tensor([40.0, 50, 30, 20])
    rois[3, 1:] = torch.tensor([700.0, 800, 900, 900])
    return rois


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("scale", [1 / 16, 1 / 4])
def test_gradients_have_torchvisions_bits(aligned: bool, ratio: int, scale: float) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(ROIAlign((7, 5), scale, ratio, aligned) for _ in range(2))
    speed_up_backward(layers[1])
    assert type(layers[0]) is ROIAlign is not type(layers[1])
    rois, gradients, pooled = random_rois(40), [], []
    for layer in layers:
        torch.manual_seed(1)
        maps = torch.randn(2, 20, 20, 25, requires_grad=True)
        pooled.append(layer(maps, rois))
        pooled[-1].backward(torch.randn_like(pooled[-1]))
        gradients.append(maps.grad)
    assert torch.equal(*pooled)
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > 1000


def test_poolers_over_levels_and_without_a_roi() -> None:
    torch.manual_seed(0)
    poolers = [ROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2") for _ in range(2)]
    speed_up_backward(poolers[1])
    boxes = [Boxes(random_rois(12)[:, 1:].sort(dim=1).values), Boxes(torch.empty(0, 4))]
    gradients = []
    for pooler in poolers:
        torch.manual_seed(1)
        maps = [torch.randn(2, 8, side, side, requires_grad=True) for side in (64, 32)]
        pooler(maps, boxes).square().sum().backward()
        gradients.append([level.grad for level in maps])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    nothing = poolers[1](maps, [Boxes(torch.empty(0, 4))] * 2)
    assert nothing.shape == (0, 8, 7, 7)


def test_only_steps_are_in_bfloat16() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 1), ROIAlign((2, 2), 1.0, 0)

        def forward(self, batch: Tensor) -> tuple[torch.dtype, Tensor]:
            maps = self.conv(batch)
            return maps.dtype, self.pool(maps, torch.tensor([[0.0, 0, 0, 3, 3]]))

    detector, batch = Detector(), torch.rand(1, 3, 4, 4)
    speed_up_backward(detector)
    train_in_bfloat16(detector)
    dtype, pooled = detector(batch)
    assert dtype == pooled.dtype == torch.bfloat16
    pooled.float().sum().backward()
    weight = detector.conv.weight.grad
    assert weight is not None
    assert weight.dtype == torch.float32
    assert weight.abs().min() > 0
    with torch.no_grad():
        assert detector(batch)[0] == torch.float32
    assert detector.eval()(batch)[0] == torch.float32
