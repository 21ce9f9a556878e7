import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.data import augment as ops
from pretrain.data.augment import (
    JITTER_ORDERS,
    PRESETS,
    ViewAugment,
    augment,
    draw_parameters,
    normalize,
    uniforms,
)
from tests.pretrain.data.picture_helpers import seeded, smooth_picture

NUM = 6
TOLERANCE = 1e-5  # of values in 0..1: rounding of single precision
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(num: int = NUM, size: int = 40) -> Tensor:
    """uint8 [num, 3, size, size], soft ones and one of pure noise."""
    images = [smooth_picture(seed, size, size) for seed in range(num - 1)]
    images.append(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def floats() -> Tensor:
    return (pictures().double() / 255).float()


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


KEYS = torch.arange(1000)


def drawn(view: ViewAugment, keys: Tensor = KEYS, **changes: Any) -> dict[str, Tensor]:
    arguments = {"repeats": 0, "seed": 0, "view_index": 0} | changes
    return draw_parameters(view, keys, **arguments)


# -- operations against torchvision's -------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (ops.adjust_brightness, reference.adjust_brightness, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (ops.adjust_contrast, reference.adjust_contrast, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (ops.adjust_saturation, reference.adjust_saturation, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (ops.adjust_hue, reference.adjust_hue, [-0.5, -0.2, -0.03, 0.0, 0.1, 0.45]),
    ],
)
def test_jitter_equals_torchvision(ours, theirs, values: list[float]) -> None:
    images = floats()
    expected = torch.stack([theirs(x, v) for x, v in zip(images, values, strict=True)])
    close(ours(images, torch.tensor(values)), expected)


@pytest.mark.parity
@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (255, 255, 255), (9, 9, 9), (255, 0, 0), (0, 255, 255)]
)
def test_hue_of_pure_and_grey_colours(colour: tuple[int, int, int]) -> None:
    image = (torch.tensor(colour).float() / 255).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    for turn in (-0.5, -0.1, 0.2, 1 / 3):
        close(
            ops.adjust_hue(image, torch.tensor([turn])), reference.adjust_hue(image, min(turn, 0.5))
        )


@seeded
@given(st.integers(0, 2**24 - 1), st.floats(-0.5, 0.5, width=32))
def test_hue_keeps_value_and_saturation(colour: int, turn: float) -> None:
    channels = [(colour >> shift) & 255 for shift in (0, 8, 16)]
    image = torch.tensor(channels).float().view(1, 3, 1, 1) / 255
    out = ops.adjust_hue(image, torch.tensor([turn]))
    assert abs(out.amax().item() - image.amax().item()) < 1e-6
    assert abs(out.amin().item() - image.amin().item()) < 1e-6


@pytest.mark.parity
def test_gray_equals_torchvision() -> None:
    close(ops.to_gray(floats()), reference.rgb_to_grayscale(floats()))


@pytest.mark.parity
def test_solarize_equals_torchvision_on_bytes() -> None:
    expected = reference.solarize(pictures(), 128).float() / 255
    close(ops.solarize(floats()), expected)


@pytest.mark.parity
@pytest.mark.parametrize("size", [16, 32, 40, 64, 224])
def test_blur_equals_torchvision(size: int) -> None:
    images = pictures(size=size).float() / 255
    sigmas = [0.1, 0.3, 0.8, 1.2, 1.7, 2.0]
    kernel = ops.blur_kernel_size(size)
    expected = [
        reference.gaussian_blur(x, [kernel, kernel], [s, s])
        for x, s in zip(images, sigmas, strict=True)
    ]
    close(ops.blur_by_taps(images, torch.tensor(sigmas), kernel), torch.stack(expected))
    close(ops.blur_by_matrix(images, torch.tensor(sigmas), kernel), torch.stack(expected))


def test_kernel_is_a_tenth_of_the_side_and_odd() -> None:
    assert [ops.blur_kernel_size(size) for size in (224, 96, 64, 32, 8)] == [23, 9, 7, 3, 3]


# -- the chain ------------------------------------------------------------------------------------


def reference_chain(image: Tensor, params: dict[str, Tensor], row: int) -> Tensor:
    """The same changes to one picture, by torchvision's functions."""
    x = image.float() / 255
    value = {name: tensor[row].item() for name, tensor in params.items()}
    steps = [
        lambda x: reference.adjust_brightness(x, value["brightness"]),
        lambda x: reference.adjust_contrast(x, value["contrast"]),
        lambda x: reference.adjust_saturation(x, value["saturation"]),
        lambda x: reference.adjust_hue(x, value["hue"]),
    ]
    for step in JITTER_ORDERS[int(value["jitter_order"])]:
        x = steps[step](x)
    if value["gray"]:
        x = reference.rgb_to_grayscale(x, 3)
    if value["blur_sigma"]:
        kernel = ops.blur_kernel_size(x.shape[-1])
        x = reference.gaussian_blur(x, [kernel, kernel], [value["blur_sigma"]] * 2)
    if value["solarize"]:
        x = reference.solarize(x, 0.5)
    return reference.normalize(x, list(MEAN), list(STD))


@pytest.mark.parity
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("view_index", [0, 1])
def test_chain_equals_torchvision(preset: str, view_index: int) -> None:
    images = pictures(48)
    params = drawn(PRESETS[preset][view_index], torch.arange(48), view_index=view_index)
    ours = augment(images, params, MEAN, STD)
    theirs = torch.stack([reference_chain(images[i], params, i) for i in range(48)])
    # One value that rounding puts on the other side of the solarising threshold differs by far.
    differs = (ours - theirs).abs() > TOLERANCE / min(STD)
    assert differs.float().mean().item() < 1e-4
    assert ours.dtype == torch.float32


def test_rows_do_not_know_their_neighbours() -> None:
    images, keys = pictures(24), torch.arange(24) * 7919
    view = PRESETS["asymmetric"][1]
    whole = augment(images, drawn(view, keys), MEAN, STD)
    for rows in ([3], [5, 1, 17], list(range(12, 24))):
        part = augment(images[rows], drawn(view, keys[rows]), MEAN, STD)
        close(part, whole[rows], 1e-5)


def test_input_is_left_alone_and_any_layout_will_do() -> None:
    images = pictures()
    before = images.clone()
    params = drawn(PRESETS["asymmetric"][0], torch.arange(NUM))
    one = augment(images, params, MEAN, STD)
    assert torch.equal(images, before)
    assert torch.equal(one, augment(images.contiguous(), params, MEAN, STD))


def test_no_augmentation_only_normalises() -> None:
    images = pictures()
    out = augment(images, drawn(PRESETS["none"][0], torch.arange(NUM)), (0.5,) * 3, (0.25,) * 3)
    close(out, (images.float() / 255 - 0.5) / 0.25, 1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_normalize_is_what_remains_of_no_augmentation(shape: tuple[int, ...], layout: str) -> None:
    images = torch.randint(0, 256, (*shape, 3, 24, 20), dtype=torch.uint8)
    if layout == "channels last":
        images = images.movedim(-3, -1).contiguous().movedim(-1, -3)
    out = normalize(images, MEAN, STD)
    assert out.movedim(-3, -1).is_contiguous()
    assert out.dtype == torch.float32
    close(out, reference.normalize(images.float() / 255, list(MEAN), list(STD)), 2e-6)


# -- drawing --------------------------------------------------------------------------------------


def test_draws_depend_on_seed_repeat_hash_and_view_alone() -> None:
    view = PRESETS["asymmetric_strong"][1]
    one = drawn(view)
    for name, values in drawn(view, KEYS.flip(0)).items():
        assert torch.equal(values.flip(0), one[name])
        assert values.dtype == torch.float32
        assert values.shape == (1000,)
    for change in ({"seed": 1}, {"repeats": 1}, {"repeats": -1}, {"view_index": 1}):
        other = drawn(view, KEYS, **change)
        assert (other["brightness"] == one["brightness"]).float().mean() < 0.2
    assert (drawn(view, KEYS + 10**6)["hue"] == one["hue"]).float().mean() < 0.2


def test_each_row_is_drawn_by_its_own_repeat_index() -> None:
    view = PRESETS["asymmetric_strong"][1]
    repeats = torch.arange(1000) % 3 - 1
    mixed = drawn(view, repeats=repeats)
    for repeat in (-1, 0, 1):
        whole = drawn(view, repeats=repeat)
        for name, values in mixed.items():
            assert torch.equal(values[repeats == repeat], whole[name][repeats == repeat])


def test_draws_keep_their_values_from_version_to_version() -> None:
    values = uniforms(np.array([0, -1, 2**62]), 12345, 2)
    np.testing.assert_allclose(
        values,
        [
            [0.4988858903732927, 0.8667438760137676, 0.2750324310396237],
            [0.4581311898914051, 0.241001349737475, 0.5160745385112253],
        ],
        rtol=0,
        atol=1e-15,
    )


def test_uniform_numbers_are_uniform_and_independent() -> None:
    keys = np.arange(20_000)  # the worst case: neighbouring keys
    draws = uniforms(keys, 99, 10)
    assert draws.min() >= 0
    assert draws.max() < 1
    for row in draws:
        counts = np.histogram(row, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 96  # 49 degrees of freedom, 1 in 10,000
    correlations = np.corrcoef(np.vstack([draws, np.roll(draws, 1, axis=1)]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(len(keys))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_draws_follow_the_preset(preset: str) -> None:
    keys = torch.arange(20_000)
    for number, view in enumerate(PRESETS[preset]):
        p = drawn(view, keys, view_index=number)
        share = {
            "jitter": (p["brightness"] != 1).float().mean().item(),
            "gray": p["gray"].mean().item(),
            "blur": (p["blur_sigma"] > 0).float().mean().item(),
            "solarize": p["solarize"].mean().item(),
        }
        for name, value in share.items():
            assert value == pytest.approx(getattr(view, f"{name}_probability"), abs=0.015), name
        for name in ("brightness", "contrast", "saturation"):
            spread = getattr(view, name)
            assert p[name].min() >= 1 - spread - 1e-6
            assert p[name].max() <= 1 + spread + 1e-6
            assert p[name].mean().item() == pytest.approx(1, abs=0.02)
        assert p["hue"].abs().max() <= view.hue
        blurred = p["blur_sigma"][p["blur_sigma"] > 0]
        if len(blurred):
            assert blurred.min() >= view.blur_sigma[0]
            assert blurred.mean().item() == pytest.approx(1.05, abs=0.04)
        assert torch.bincount(p["jitter_order"].long(), minlength=24).min() > 700


def test_presets_are_those_of_the_papers() -> None:
    assert {"none", "symmetric_weak", "symmetric_strong", "asymmetric", "asymmetric_strong"} == set(
        PRESETS
    )
    one, two = PRESETS["asymmetric"]  # BYOL
    assert (one.blur_probability, two.blur_probability) == (1.0, 0.1)
    assert (one.solarize_probability, two.solarize_probability) == (0.0, 0.2)
    for view in (one, two):
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        assert jitter == (0.4, 0.4, 0.2, 0.1)
        assert (view.jitter_probability, view.gray_probability) == (0.8, 0.2)
        assert view.crop_scale == (0.08, 1.0)
    assert PRESETS["asymmetric_strong"][0] == PRESETS["symmetric_weak"][0]
    assert len(set(JITTER_ORDERS)) == len(list(itertools.permutations(range(4)))) == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    images = pictures(48, 64)
    params = drawn(PRESETS["asymmetric"][1], torch.arange(48))
    on_gpu = augment(images.cuda(), params, MEAN, STD).cpu()
    differs = (on_gpu - augment(images, params, MEAN, STD)).abs() > 1e-3
    assert differs.float().mean().item() < 1e-4
