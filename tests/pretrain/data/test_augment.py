"""The chain of operations, and normalisation."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image
from torch import Tensor

from pretrain.data.augmentations.blur import blur_kernel_size
from pretrain.data.augmentations.jitter import ORDERS
from pretrain.data.input_pipeline import augment, normalize
from pretrain.data.policy import PRESETS, Drawn, draw_parameters, preset_view
from tests.pretrain.data.picture_helpers import smooth_picture

NUM, SIZE = 48, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.stack([smooth_picture(seed, SIZE, SIZE) for seed in range(NUM)])
BATCH = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
VIEWS = [(preset, number) for preset in sorted(PRESETS) for number in (0, 1)]


def drawn_of(preset: str, number: int, hashes: np.ndarray | None = None) -> Drawn:
    hashes = np.arange(NUM) if hashes is None else hashes
    return draw_parameters(preset_view(number, preset), hashes, 0, seed=0, view_index=number)


def reference_chain(x: Tensor | Image.Image, drawn: Drawn, row: int) -> Tensor | Image.Image:
    """The same changes to one picture by torchvision, on floats or on Pillow's bytes."""
    value = {name: values[row].item() for _, own in drawn for name, values in own.items()}
    if "order" in value:
        jitter = ("brightness", "contrast", "saturation", "hue")
        for name in (jitter[number] for number in ORDERS[int(value["order"])]):
            if value[name] != (name != "hue"):
                x = getattr(reference, f"adjust_{name}")(x, value[name])
    if value.get("is_grey"):
        x = reference.rgb_to_grayscale(x, 3)
    if sigma := value.get("sigma"):
        x = reference.gaussian_blur(x, [blur_kernel_size(SIZE)] * 2, [sigma] * 2)
    if value.get("is_solarized"):
        x = reference.solarize(x, 0.5 if isinstance(x, Tensor) else 128)
    return x


@pytest.mark.parity
@pytest.mark.parametrize(("preset", "number"), VIEWS)
def test_chain_of_floats_equals_torchvision(preset: str, number: int) -> None:
    drawn = drawn_of(preset, number)
    ours = augment(BATCH, drawn, MEAN, STD)
    chain = [reference_chain(image.float() / 255, drawn, row) for row, image in enumerate(BATCH)]
    theirs = torch.stack([reference.normalize(x, list(MEAN), list(STD)) for x in chain])
    # One value that rounding puts on the other side of the solarising threshold differs by far.
    differs = (ours - theirs).abs() > 1e-5 / min(STD)
    assert differs.float().mean().item() < 1e-4
    assert ours.dtype == torch.float32


@pytest.mark.parity
@pytest.mark.parametrize(("preset", "number"), VIEWS)
def test_chain_of_uint8_is_close_to_both_references(preset: str, number: int) -> None:
    """Shares and means are bounded: a level beyond the solarising threshold differs by far."""
    drawn = drawn_of(preset, number)
    exact = augment(BATCH, drawn, (0.0,) * 3, (1.0,) * 3).permute(0, 2, 3, 1).numpy() * 255
    ours = IMAGES.copy()
    for operation, parameters in drawn:
        for picture, steps in zip(ours, operation.picture_steps(parameters, SIZE), strict=True):
            for step in steps:
                step(picture)
    pillow = np.stack([
        np.asarray(reference_chain(Image.fromarray(image), drawn, row))
        for row, image in enumerate(IMAGES)
    ])  # fmt: skip
    to_float, to_pillow = np.abs(ours - exact), np.abs(ours.astype(int) - pillow)
    assert to_float.mean() < 1
    assert np.quantile(to_float, 0.99) < 5
    assert to_pillow.mean() < 2
    assert np.quantile(to_pillow, 0.99) < 10


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_normalize_is_what_remains_of_no_augmentation(shape: tuple[int, ...], layout: str) -> None:
    images = torch.randint(0, 256, (*shape, 3, 24, 20), dtype=torch.uint8)
    if layout == "channels last":
        images = images.movedim(-3, -1).contiguous().movedim(-1, -3)
    out = normalize(images, MEAN, STD)
    assert out.movedim(-3, -1).is_contiguous()
    assert out.dtype == torch.float32
    expected = reference.normalize(images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    drawn = drawn_of("asymmetric", 1)
    on_gpu = augment(BATCH.cuda(), drawn, MEAN, STD).cpu()
    differs = (on_gpu - augment(BATCH, drawn, MEAN, STD)).abs() > 1e-3
    assert differs.float().mean().item() < 1e-4
