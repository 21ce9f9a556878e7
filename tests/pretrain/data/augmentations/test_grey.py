import numpy as np
import pytest
import torchvision.transforms.v2.functional as reference

from pretrain.data.augmentations.grey import Grey, to_grey
from tests.pretrain.data.augmentations.ways import check_uint8, close, floats


@pytest.mark.parity
def test_equals_torchvision() -> None:
    close(to_grey(floats()), reference.rgb_to_grayscale(floats()))
    check_uint8(
        Grey(), lambda image: reference.rgb_to_grayscale(image, 3), {"is_grey": 1.0},
        (0.6, 0.3, 1, 0.3),
    )  # fmt: skip


def test_probability() -> None:
    drawn = Grey(probability=0.3).draw(np.array([[0.0, 0.29, 0.3, 0.99]]))
    assert drawn["is_grey"].tolist() == [1, 1, 0, 0]
