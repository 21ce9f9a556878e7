"""Golden gate: crops, random parameters and pixels of 64 samples' views, of each preset."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pretrain.config import DataConfig
from pretrain.data.decode import draw_crops
from pretrain.data.index import sample_hash
from pretrain.data.input_pipeline import InputPipeline
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.random_numbers import draw_uniforms
from tests.golden.gate import check, digest
from tests.golden.pictures import encode, pixels, png, write_tar

NUM, SIZE, SEED = 64, 64, 7
PRESETS = ("asymmetric", "asymmetric_strong", "none", "symmetric_strong", "symmetric_weak")
KINDS = ("JPEG 4:2:0", "JPEG 4:4:4", "JPEG grey", "PNG", "PNG with alpha", "WebP")
OPERATIONS = ("jitter", "grey", "blur", "solarize")
RECORDED_NAMES = {
    "order": "jitter_order", "is_grey": "gray", "sigma": "blur_sigma", "is_solarized": "solarize",
}  # fmt: skip
LEVELS = 1.0  # of 255; means over a quarter differ by less between processors


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 pictures of 6 kinds and many sizes, some so large that they are decoded smaller."""
    folder = tmp_path_factory.mktemp("pictures")
    files = {}
    for i in range(NUM):
        height, width = (70 + 11 * i % 150, 60 + 17 * i % 190) if i % 8 else (330, 500)
        image = pixels(100 + i, height, width)
        kind = KINDS[i % len(KINDS)]
        suffix = kind.split()[0].lower()
        if kind.startswith("JPEG"):
            data = encode(
                image[..., 1] if kind.endswith("grey") else image, "JPEG", quality=92,
                subsampling=kind.split()[1] if ":" in kind else 0,
            )  # fmt: skip
        elif kind == "PNG with alpha":
            data = encode(np.dstack([image, image[..., 0]]), "PNG")
        elif kind == "WebP":
            data = encode(image, "WEBP", lossless=True)
        else:
            data = encode(image, "PNG") if image.nbytes > 60_000 else png(image)
        files[f"picture-{i:02d}.{suffix}"] = data
    write_tar(folder / "pictures.tar", files)
    return str(folder)


def views_of(shards: str, folder: Path, preset: str, place: str) -> tuple[list[int], torch.Tensor]:
    """Sample numbers [64] of an epoch of one batch, and its views [2, 64, 3, s, s] in 0..255."""
    data = DataConfig(
        shards=shards, image_size=SIZE, batch_size=NUM, photometric=place, num_workers=0,
        augmentation=AugmentationPolicy.of(preset),
    )  # fmt: skip
    pipeline = InputPipeline(
        data, seed=SEED, device=torch.device("cpu"), channels_last=True, folder=folder
    )
    (one,) = pipeline.epoch(1)
    assert isinstance(one.views, torch.Tensor)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.pixel_mean, data.pixel_std))
    return one.samples.sample_ids.tolist(), (one.views * std + mean) * 255


def figures(view: torch.Tensor) -> list[float]:
    """Of [3, s, s]: mean of each colour in the four quarters, and the texture.

    The texture is the mean difference of neighbours, in which a blur shows.
    """
    half = view.shape[-1] // 2
    quarters = view.reshape(3, 2, half, 2, half).mean(dim=(2, 4)).flatten().tolist()
    texture = view.diff(dim=-1).abs().mean() + view.diff(dim=-2).abs().mean()
    return [round(value, 1) for value in [*quarters, float(texture)]]


@pytest.mark.parametrize("place", ["device", "workers"])
@pytest.mark.parametrize("preset", PRESETS)
def test_pixels(shards: str, tmp_path: Path, preset: str, place: str) -> None:
    cv2.setNumThreads(1)
    order, views = views_of(shards, tmp_path, preset, place)
    measured = {
        "order": order,
        "view 1": [figures(view) for view in views[0]],
        "view 2": [figures(view) for view in views[1]],
    }
    bits = [digest(view.contiguous().numpy().tobytes()) for view in views.flatten(0, 1)]
    check(f"views_{preset}_{place}", measured, atol=LEVELS, bits=bits)


def test_crop_boxes_and_random_parameters() -> None:
    """Exactly, by digests of all and the numbers of the first samples."""
    keys = np.array([sample_hash(f"picture-{i:02d}") for i in range(NUM)], np.uint64).view(np.int64)
    repeats = np.arange(NUM) % 3
    sizes = np.stack([40 + 7 * np.arange(NUM), 500 - 7 * np.arange(NUM)], axis=1)
    measured = {}
    for name in PRESETS:
        for number, view in enumerate(AugmentationPolicy.of(name).views):
            drawn = draw_crops(view, sizes, keys, repeats, seed=SEED, view_index=number)
            boxes = np.column_stack([drawn.boxes, drawn.flips]).astype(np.int64)
            draws = draw_uniforms("augment", keys, repeats, 10, seed=SEED, view_index=number)
            parameters = {}
            for operation in OPERATIONS:
                settings = getattr(view, operation)
                assert settings.stream[0] == "augment"
                own = draws[settings.first_draw :][: settings.num_draws]
                for parameter, values in settings.draw(own).items():
                    parameters[RECORDED_NAMES.get(parameter, parameter)] = values
            measured[f"{name}, view {number + 1}"] = {
                "boxes and flips": digest(boxes.astype("<i8").tobytes()),
                "first boxes and flips": boxes[:4].tolist(),
                "parameters": {
                    parameter: {
                        "digest": digest(values.astype("<f4").tobytes()),
                        "first": values[:8].tolist(),
                    }
                    for parameter, values in sorted(parameters.items())
                },
            }
    check("views_parameters", measured, atol=1e-6)
