import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference

from pretrain.data.augmentations.solarize import Solarize
from tests.pretrain.data.augmentations.ways import check_uint8, close, floats


@pytest.mark.parity
def test_equals_torchvision() -> None:
    images = floats()
    expected = reference.solarize((images * 255).round().to(torch.uint8), 128).float() / 255
    Solarize().change_batch(images, {"is_solarized": np.ones(len(images), np.float32)})
    close(images, expected)
    check_uint8(
        Solarize(), lambda image: reference.solarize(image, 128), {"is_solarized": 1.0},
        (1e-3, 1e-3, 0, 0),
    )  # fmt: skip


def test_probability() -> None:
    drawn = Solarize(probability=0.3).draw(np.array([[0.0, 0.29, 0.3, 0.99]]))
    assert drawn["is_solarized"].tolist() == [1, 1, 0, 0]
