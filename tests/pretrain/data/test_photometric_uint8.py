import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image
from torch import Tensor

from pretrain.data.augment import (
    JITTER_ORDERS,
    PRESETS,
    ViewAugment,
    augment,
    blur_kernel_size,
    draw_parameters,
)
from pretrain.data.augment_uint8 import Changes, apply, changes_of
from tests.pretrain.data.picture_helpers import smooth_picture

SIZE = 64
NEUTRAL = {
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "jitter_order": 0.0,
    "gray": 0.0,
    "blur_sigma": 0.0,
    "solarize": 0.0,
}
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
PICTURES = [smooth_picture(seed, SIZE, SIZE) for seed in range(4)] + [NOISE]


def params(num: int = 1, **values: float) -> dict[str, Tensor]:
    assert set(values) <= set(NEUTRAL)
    return {name: torch.full((num,), value) for name, value in (NEUTRAL | values).items()}


def ours(image: np.ndarray, **values: float) -> np.ndarray:
    out = image.copy()
    apply(out, changes_of(params(**values), image.shape[0])[0])
    return out


def in_float(image: np.ndarray, **values: float) -> np.ndarray:
    """Levels of 255 by the float operations; not normalised, not rounded."""
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = augment(batch, params(**values), (0.0,) * 3, (1.0,) * 3)
    return out[0].permute(1, 2, 0).numpy() * 255


def in_pillow(image: np.ndarray, name: str, value: float) -> np.ndarray:
    picture = Image.fromarray(image)
    kernel = blur_kernel_size(image.shape[0])
    changed = {
        "brightness": lambda: reference.adjust_brightness(picture, value),
        "contrast": lambda: reference.adjust_contrast(picture, value),
        "saturation": lambda: reference.adjust_saturation(picture, value),
        "hue": lambda: reference.adjust_hue(picture, value),
        "gray": lambda: reference.rgb_to_grayscale(picture, 3),
        "blur_sigma": lambda: reference.gaussian_blur(picture, [kernel] * 2, [value] * 2),
        "solarize": lambda: reference.solarize(picture, 128),
    }[name]()
    return np.asarray(changed).astype(float)


# -- one operation: (name, values, largest and mean difference in levels to the float operation,
#    the same to torchvision on Pillow) ------------------------------------------------------------

FACTORS = [0.0, 0.2, 0.7, 1.4, 1.8]
OPERATIONS = [
    ("brightness", FACTORS, 0.55, 0.26, 1, 0.6),
    ("contrast", FACTORS, 0.6, 0.5, 1, 0.65),
    ("saturation", FACTORS, 0.9, 0.3, 2, 0.8),
    ("hue", [-0.5, -0.2, -0.03, 0.1, 0.45], 11, 1.0, 20, 2.5),
    ("gray", [1.0], 0.6, 0.3, 1, 0.3),
    ("blur_sigma", [0.1, 0.3, 0.8, 1.2, 2.0], 1.8, 0.4, 2, 0.3),
    ("solarize", [1.0], 1e-3, 1e-3, 0, 0),
]
CASES = [(name, value, *bounds) for name, values, *bounds in OPERATIONS for value in values]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "value", "most", "mean", "most_pillow", "mean_pillow"), CASES)
def test_operation_equals_both_references(
    name: str, value: float, most: float, mean: float, most_pillow: float, mean_pillow: float
) -> None:
    found = np.zeros(4)
    for image in PICTURES:
        got = ours(image, **{name: value}).astype(float)
        exact = np.abs(got - in_float(image, **{name: value}))
        pillow = np.abs(got - in_pillow(image, name, value))
        found = np.maximum(found, [exact.max(), exact.mean(), pillow.max(), pillow.mean()])
    assert (found <= [most, mean, most_pillow, mean_pillow]).all(), found


def test_neutral_values_change_nothing() -> None:
    for image in PICTURES:
        np.testing.assert_array_equal(ours(image), image)
    assert changes_of(params(3), SIZE) == [Changes()] * 3


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue", "blur_sigma"])
def test_grey_surfaces_stay_as_they_are(name: str) -> None:
    for level in (0, 1, 100, 128, 254, 255):
        image = np.full((SIZE, SIZE, 3), level, np.uint8)
        np.testing.assert_array_equal(ours(image, **{name: 0.4}), image)


@pytest.mark.parametrize("size", [8, 32, 64, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_kernels_are_symmetric_short_and_keep_the_sum(size: int, sigma: float) -> None:
    kernel = changes_of(params(blur_sigma=sigma), size)[0].blur
    if kernel is None:
        assert sigma < 0.3  # the neighbours' weight is below 1/512
        return
    assert len(kernel) % 2 == 1
    assert len(kernel) <= blur_kernel_size(size)
    assert kernel.sum() == 1
    assert (kernel > 0).all()
    np.testing.assert_array_equal(kernel, kernel[::-1])
    np.testing.assert_array_equal(kernel * 256, np.rint(kernel * 256))


def test_hue_turns_around_the_circle() -> None:
    one = ours(ours(NOISE, hue=0.25), hue=0.25)
    assert np.abs(one.astype(int) - ours(NOISE, hue=0.5)).mean() < 1.5
    assert not np.array_equal(one, NOISE)


# -- the chain ------------------------------------------------------------------------------------


def pillow_chain(image: np.ndarray, params: dict[str, Tensor], row: int) -> np.ndarray:
    value = {name: tensor[row].item() for name, tensor in params.items()}
    jitter = ("brightness", "contrast", "saturation", "hue")
    order = [jitter[number] for number in JITTER_ORDERS[int(value["jitter_order"])]]
    for name in [*order, "gray", "blur_sigma", "solarize"]:
        if value[name] != NEUTRAL[name]:
            image = in_pillow(image, name, value[name]).astype(np.uint8)
    return image.astype(float)


@pytest.mark.parity
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("view_index", [0, 1])
def test_chain_is_close_to_both_references(preset: str, view_index: int) -> None:
    """With the parameters of real batches; a level on the other side of the solarising threshold
    differs by far, so that shares and means are bounded, not the largest difference.
    """
    images = [smooth_picture(seed, SIZE, SIZE) for seed in range(48)]
    drawn = draw_parameters(
        PRESETS[preset][view_index], np.arange(48), 0, seed=0, view_index=view_index
    )
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    exact = augment(batch, drawn, (0.0,) * 3, (1.0,) * 3).permute(0, 2, 3, 1).numpy() * 255
    to_float, to_pillow = [], []
    for row, (image, changes) in enumerate(zip(images, changes_of(drawn, SIZE), strict=True)):
        got = image.copy()
        apply(got, changes)
        to_float.append(np.abs(got - exact[row]))
        to_pillow.append(np.abs(got - pillow_chain(image, drawn, row)))
    assert np.mean(to_float) < 1
    assert np.quantile(to_float, 0.99) < 5
    assert np.mean(to_pillow) < 2
    assert np.quantile(to_pillow, 0.99) < 10


def test_order_of_the_jitter_is_kept() -> None:
    values = {"brightness": 1.8, "contrast": 0.4, "saturation": 1.7, "hue": 0.2}
    results = {ours(PICTURES[0], jitter_order=float(n), **values).tobytes() for n in range(24)}
    assert len(results) > 12
    for number in range(24):
        got = ours(PICTURES[0], jitter_order=float(number), **values)
        expected = in_float(PICTURES[0], jitter_order=float(number), **values)
        assert np.abs(got - expected).mean() < 1


def test_rows_of_a_batch_are_those_of_single_pictures() -> None:
    view = ViewAugment(
        jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        gray_probability=0.2, blur_probability=0.5, solarize_probability=0.3,
    )  # fmt: skip
    keys = np.arange(30)
    drawn = draw_parameters(view, keys, 0, seed=5, view_index=1)
    for row, changes in enumerate(changes_of(drawn, SIZE)):
        one = changes_of({name: values[row : row + 1] for name, values in drawn.items()}, SIZE)
        results = [NOISE.copy(), NOISE.copy()]
        apply(results[0], changes)
        apply(results[1], one[0])
        np.testing.assert_array_equal(*results)


def test_neighbours_in_memory_are_left_alone() -> None:
    batch = np.stack([NOISE] * 3)
    every = dict.fromkeys(("brightness", "contrast", "saturation"), 1.4)
    changes = changes_of(params(**every, hue=0.3, gray=1.0, blur_sigma=2.0, solarize=1.0), SIZE)[0]
    apply(batch[1], changes)
    np.testing.assert_array_equal(batch[0], NOISE)
    np.testing.assert_array_equal(batch[2], NOISE)
    assert not np.array_equal(batch[1], NOISE)
