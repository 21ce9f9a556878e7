import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference

from common.errors import UserError
from pretrain.data.augmentations.blur import (
    Blur,
    blur_by_matrix,
    blur_by_taps,
    blur_kernel_size,
    uint8_kernels,
)
from tests.pretrain.data.augmentations.ways import SIZE, check_uint8, close, floats


@pytest.mark.parity
@pytest.mark.parametrize("size", [16, 32, 40, 64, 224])
def test_floats_equal_torchvision(size: int) -> None:
    images, sigmas = floats(size), [0.1, 0.3, 0.8, 1.2, 1.7, 2.0]
    kernel = blur_kernel_size(size)
    expected = [
        reference.gaussian_blur(x, [kernel, kernel], [s, s])
        for x, s in zip(images, sigmas, strict=True)
    ]
    close(blur_by_taps(images, torch.tensor(sigmas), kernel), torch.stack(expected))
    close(blur_by_matrix(images, torch.tensor(sigmas), kernel), torch.stack(expected))


@pytest.mark.parity
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.2, 2.0])
def test_uint8_is_close_to_both_references(sigma: float) -> None:
    kernel = [blur_kernel_size(SIZE)] * 2
    check_uint8(
        Blur(), lambda image: reference.gaussian_blur(image, kernel, [sigma] * 2),
        {"sigma": sigma}, (1.8, 0.4, 2, 0.3),
    )  # fmt: skip


@pytest.mark.parametrize("size", [8, 32, 64, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_uint8_kernels_are_symmetric_short_and_keep_the_sum(size: int, sigma: float) -> None:
    most = blur_kernel_size(size)
    none, kernel = uint8_kernels(np.array([0, sigma], np.float32), most)
    assert none is None
    if kernel is None:
        assert sigma < 0.3  # the neighbours' weight is below 1/512
        return
    assert len(kernel) % 2 == 1
    assert len(kernel) <= most
    assert kernel.sum() == 1
    assert (kernel > 0).all()
    np.testing.assert_array_equal(kernel, kernel[::-1])
    np.testing.assert_array_equal(kernel * 256, np.rint(kernel * 256))


def test_settings_decide_what_is_drawn() -> None:
    uniforms = np.random.default_rng(0).random((2, 20_000))
    sigma = Blur(probability=0.3, sigma=(0.5, 1.5)).draw(uniforms)["sigma"]
    assert (sigma > 0).mean() == pytest.approx(0.3, abs=0.015)
    sigma = sigma[sigma > 0]
    assert (sigma.min(), sigma.max()) == pytest.approx((0.5, 1.5), abs=0.01)
    assert sigma.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sigma", [(0.0, 1.0), (2.0, 1.0)])
def test_impossible_settings(sigma: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"blur\.sigma .* must satisfy 0 < low <= high"):
        Blur(sigma=sigma)
