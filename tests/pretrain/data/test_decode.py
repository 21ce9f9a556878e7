import io
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from common.pictures import decode_fast, read_header, upright
from pretrain.data import decode as crops
from pretrain.data.augmentations.grey import Grey
from pretrain.data.decode import boxes_from_draws, crop, draw_crops, reductions_for, resize
from pretrain.data.policy import Crop, Flip, SmallCrops, ViewPolicy
from pretrain.data.random_numbers import draw_uniforms
from tests.pretrain.data.picture_helpers import encode, smooth_picture

PICTURE = smooth_picture(5, 60, 80)
SEED: dict[str, Any] = {"seed": 3, "view_index": 0, "scale": (0.08, 1.0)}
RATIO = Crop().ratio


def draw_one(*pictures, scale, flip_probability=0.5, **options):
    return draw_crops(ViewPolicy(Crop(scale), Flip(flip_probability)), *pictures, **options)


def sizes(num: int, height: int, width: int) -> np.ndarray:
    return np.tile(np.array([height, width], np.int64), (num, 1))


@pytest.mark.parity
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 100), (40, 300)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    num = 4000
    options = SEED | {"scale": scale}
    ours = draw_one(sizes(num, height, width), np.arange(num), 0, **options).boxes
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(num)]
    )
    derived = [np.column_stack([b, b[:, 2] * b[:, 3], b[:, 3] / b[:, 2]]) for b in (ours, theirs)]
    for column in range(6):
        distance = kolmogorov_smirnov(derived[0][:, column], derived[1][:, column])
        assert distance < 1.95 * np.sqrt(2 / num), column  # 1 in 1,000 of equal ones lie above


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.concatenate([a, b])
    one = np.searchsorted(np.sort(a), points, side="right") / len(a)
    other = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(one - other).max())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3), (2000, 1500)])
def test_boxes_lie_inside(height: int, width: int) -> None:
    boxes = draw_one(sizes(500, height, width), np.arange(500), 0, **SEED).boxes
    assert boxes.dtype == np.int64
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()


def test_ten_failures_give_the_central_box_as_torchvision() -> None:
    draws = np.full((40, 3), 1 - 2**-53)  # whole area at ratio 4/3: fits only 4:3 pictures
    shapes = np.array([[100, 100], [40, 300], [300, 40]])
    boxes = boxes_from_draws(draws, shapes, (0.08, 1.0), RATIO)
    np.testing.assert_array_equal(boxes, [[0, 0, 100, 100], [0, 123, 40, 53], [123, 0, 53, 40]])


def test_the_first_attempt_that_fits_counts() -> None:
    shapes, keys = sizes(300, 40, 90), np.arange(300)  # many whole boxes are too high
    boxes = draw_one(shapes, keys, 2, **SEED).boxes
    draws = draw_uniforms("crop", keys, 2, 41, seed=3, view_index=0)[1:].reshape(10, 4, 300)
    each = np.array([boxes_from_draws(one, shapes, (0.08, 1.0), RATIO) for one in draws])
    area, ratio = draws[:, 0] * 0.92 + 0.08, (3 / 4) ** (1 - 2 * draws[:, 1])
    fits = np.rint(np.sqrt(area / ratio * 3600)) <= 40
    assert 0.2 < fits[0].mean() < 0.8
    np.testing.assert_array_equal(boxes, each[fits.argmax(axis=0), keys])


def test_crops_depend_on_seed_repeat_hash_view_and_size_alone() -> None:
    keys, repeats = np.arange(50) * 7919, np.arange(50) % 3
    shapes = np.random.default_rng(0).integers(50, 400, (50, 2))
    whole = draw_one(shapes, keys, repeats, **SEED)
    rows = np.array([31, 4, 4, 17])
    part = draw_one(shapes[rows], keys[rows], repeats[rows], **SEED)
    np.testing.assert_array_equal(part.boxes, whole.boxes[rows])
    np.testing.assert_array_equal(part.flips, whole.flips[rows])
    for change in ({"seed": 4}, {"view_index": 1}):
        other = draw_one(shapes, keys, repeats, **SEED | change)
        assert (other.boxes == whole.boxes).all(axis=1).mean() < 0.1
    for other_keys, other_repeats in ((keys + 1, repeats), (keys, repeats + 1)):
        other = draw_one(shapes, other_keys, other_repeats, **SEED)
        assert (other.boxes == whole.boxes).all(axis=1).mean() < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [8, 100])  # decoded smaller, decoded whole
@pytest.mark.parametrize("options", [{}, {"progressive": True}])  # upper rows alone, or all
def test_views_of_turned_pictures_are_upright(orientation, size, options, monkeypatch):
    """Crops of the upright picture; reduced, their edges are rounded in the stored one."""
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(smooth_picture(2, 131, 203), exif=exif, **options)
    header = read_header(data, where="")
    assert (header.width < header.height) == (orientation >= 5)
    places = np.arange(131 * 203).reshape(131, 203, 1)  # number of the stored pixel
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    assert turned == (header.width, header.height)
    policy = ViewPolicy(Crop((0.2, 0.6)), Flip(0.5))
    samples = [crops.Sample(0, key, 0, -1, data) for key in range(6)]
    views = np.zeros((2, 6, size, size, 3), np.uint8)
    decoded = []

    def spy(*args: Any, **named: Any) -> tuple[np.ndarray, int]:
        decoded.append(decode_fast(*args, **named))
        return decoded[-1]

    monkeypatch.setattr(crops, "decode_fast", spy)
    writer = crops.ViewWriter(image_size=size, views=(policy, policy), seed=3)
    assert writer.write(samples, views) == {}
    shapes = sizes(6, header.height, header.width)
    for number in range(2):
        drawn = draw_crops(policy, shapes, np.arange(6), 0, seed=3, view_index=number)
        for key, (top, left, height, width) in enumerate(drawn.boxes.tolist()):
            by = decoded[key][1]
            assert (by > 1) == (size == 8)
            whole, _ = decode_fast(data, header, by, where="")
            part = upright(places, orientation)[top : top + height, left : left + width]
            (y0, x0), (y1, x1) = (divmod(int(at), 203) for at in (part.min(), part.max()))
            y0, x0, y1, x1 = ((at + by // 2) // by for at in (y0, x0, y1 + 1, x1 + 1))
            expected = resize(upright(whole[y0:y1, x0:x1], orientation), size, size)
            expected = expected[:, ::-1] if drawn.flips[key] else expected
            np.testing.assert_array_equal(views[number, key], expected)
    is_upper = [len(image) < -(-131 // by) for image, by in decoded]
    assert any(is_upper) == (not options)


def test_crop_writes_into_a_batch() -> None:
    batch = np.zeros((2, 16, 16, 3), np.uint8)
    for is_flipped in (False, True):
        expected = crop(PICTURE, (0, 0, 50, 60), 16, is_flipped=is_flipped)
        crop(PICTURE, (0, 0, 50, 60), 16, is_flipped=is_flipped, out=batch[1])
        np.testing.assert_array_equal(batch[1], expected)
    assert not batch[0].any()


@pytest.mark.parametrize("size", [24, 90])
def test_bicubic_views_are_those_of_pillow(size: int) -> None:
    """Shrunk and enlarged; the other view stays as it is without the option."""
    policies = ViewPolicy(), ViewPolicy(Crop(interpolation="bicubic"))
    image = falling_spectrum(60, 80)
    _, data = cv2.imencode(".png", image[..., ::-1])
    views = np.zeros((2, 20, size, size, 3), np.uint8)
    samples = [crops.Sample(k, k, 0, -1, data.tobytes()) for k in range(20)]
    assert crops.ViewWriter(image_size=size, views=policies, seed=3).write(samples, views) == {}
    for number, view in enumerate(views):
        drawn = draw_one(sizes(20, 60, 80), np.arange(20), 0, **SEED | {"view_index": number})
        for ours, (top, left, height, width), flip in zip(
            view, drawn.boxes.tolist(), drawn.flips, strict=True
        ):
            box = image[top : top + height, left : left + width]
            resized = Image.fromarray(box).resize((size, size), Image.Resampling.BICUBIC)
            expected = resize(box, size, size) if number == 0 else np.asarray(resized)
            expected = expected[:, ::-1] if flip else expected
            assert np.abs(ours.astype(int) - expected).max() <= 2 * number


@pytest.mark.parametrize("with_colours", [False, True])
def test_small_crops_are_further_views_by_their_own_policy(with_colours: bool) -> None:
    """Of the same decoding, which their size decides too; drawn by the number of the view."""
    large = ViewPolicy(Crop((0.5, 1.0)))
    small = SmallCrops(Crop((0.05, 0.14)), grey=Grey(1.0), num=3, image_size=16)  # type: ignore[call-arg]
    data = encode(smooth_picture(5, 210, 280), quality=95)
    samples = [crops.Sample(k, k, 0, -1, data) for k in range(4)]
    views = [np.zeros((4, size, size, 3), np.uint8) for size in (32, 32, 16, 16, 16)]
    writer = crops.ViewWriter(image_size=32, views=(large, large), seed=3, small_crops=small,
                              with_colours=with_colours)  # fmt: skip
    assert writer.write(samples, views) == {}
    header = read_header(data, where="")
    boxes = [
        draw_crops(view, sizes(4, 210, 280), np.arange(4), 0, seed=3, view_index=number)
        for number, view in enumerate((large, large, small, small, small))
    ]
    sides = np.array([view.boxes[:, 2:].min(axis=1) for view in boxes])
    needed = reductions_for(sides[:2].min(axis=0), 32), reductions_for(sides[2:].min(axis=0), 16)
    reductions = np.minimum(*needed)
    assert needed[0].tolist() == [4] * 4
    assert 2 in reductions
    for number, view in enumerate(views):
        for k, by in enumerate(reductions.tolist()):
            whole, _ = decode_fast(data, header, by, where="")
            expected = crop(
                whole, boxes[number].boxes[k].tolist(), len(view[k]), reduction=by,
                is_flipped=boxes[number].flips[k],
            )  # fmt: skip
            is_grey = bool((view[k] == view[k][..., :1]).all())
            assert is_grey == (with_colours and number >= 2)
            if not is_grey:
                np.testing.assert_array_equal(view[k], expected)


def test_reduced_pictures_keep_crops_larger_than_the_view() -> None:
    sides = np.array([30, 64, 65, 129, 130, 259, 260, 519, 520, 4000])
    assert reductions_for(sides, 64).tolist() == [1, 1, 1, 1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (301, 203)])
def test_boxes_of_reduced_pictures_are_off_by_half_a_pixel_at_most(
    reduction: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edges that are cut, multiplied back, are those of the box within half a reduced pixel."""
    small = np.zeros((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    small[..., 0] = np.arange(small.shape[0])[:, None]
    small[..., 1] = np.arange(small.shape[1])
    cut = []
    monkeypatch.setattr(crops, "resize", lambda image, *_: cut.append(image) or image)
    boxes = draw_one(sizes(200, height, width), np.arange(200), 0, **SEED).boxes
    boxes = boxes[boxes[:, 2:].min(axis=1) >= 3 * reduction]
    for box in boxes.tolist():
        crop(small, tuple(box), 2, reduction=reduction)
        image = cut.pop().astype(int)
        edges = [image[0, 0, 0], image[0, 0, 1], image[-1, 0, 0] + 1, image[0, -1, 1] + 1]
        wanted = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        assert np.abs(np.array(edges) * reduction - wanted).max() <= reduction / 2


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def antialiased(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def zone_plate(height: int, width: int) -> np.ndarray:
    """All frequencies up to the highest that pixels hold."""
    y, x = np.mgrid[:height, :width] / height
    plate = np.cos(0.5 * np.pi * height * (x**2 + y**2) / 2) * 127 + 128
    return np.repeat(plate.astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parity
@pytest.mark.parametrize("stretch", [0.75, 1.0, 1.3])
@pytest.mark.parametrize("side", [70, 80, 100, 128, 150, 180, 250, 370])
def test_shrinking_a_zone_plate_aliases_little(side: int, stretch: float) -> None:
    """Against Pillow's antialiased resize: the worst that a picture can hold."""
    image = zone_plate(side, round(side * stretch))
    reference = antialiased(image, 64)
    ours = psnr(resize(image, 64, 64), reference)
    bilinear = psnr(cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR), reference)
    assert ours >= bilinear - 0.01
    factor = side * max(1, stretch) / 64
    if factor > crops._MAX_BINOMIAL:
        assert ours > 60  # the same filter
    elif factor > 1.5:
        assert ours > 24
        assert ours > bilinear + 4


def falling_spectrum(height: int, width: int) -> np.ndarray:
    """uint8 noise whose power falls with the square of the frequency, to the finest detail."""
    rng = np.random.default_rng(7)
    image = np.full((height, width, 3), 128, np.float32)
    cells = 4
    while cells <= 2 * max(height, width):
        noise = rng.standard_normal((min(cells, height), min(cells, width), 3)).astype(np.float32)
        image += 90 / np.sqrt(cells) * cv2.resize(noise, (width, height))
        cells *= 2
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [30, 40, 50, 70, 100, 300])
def test_resize_does_not_shift(side: int) -> None:
    """The result of the mirrored picture is the mirrored result."""
    image = falling_spectrum(side, side)
    mirrored = resize(np.ascontiguousarray(image[:, ::-1]), 32, 32)[:, ::-1].astype(int)
    assert np.abs(mirrored - resize(image, 32, 32)).max() <= 1


@pytest.mark.parity
@pytest.mark.parametrize("view_size", [64, 224])
def test_views_of_the_fast_path_are_those_of_pillow(view_size: int) -> None:
    """Whole path, from the JPEG: fast decoding, reduced where it fits, resized, against Pillow.

    The bound for a reduced picture is low since its box is rounded to reduced pixels: the view is
    shifted by up to half a pixel.
    """
    image = falling_spectrum(375, 500)
    data = encode(image, quality=90)
    exact = np.asarray(Image.open(io.BytesIO(data)))
    header = read_header(data, where="")
    boxes = draw_one(sizes(40, 375, 500), np.arange(40), 0, **SEED).boxes
    reductions = reductions_for(boxes[:, 2:].min(axis=1), view_size).tolist()
    assert len(set(reductions)) > 1 or view_size == 224
    for (top, left, height, width), reduction in zip(boxes.tolist(), reductions, strict=True):
        small, by = decode_fast(data, header, reduction, where="", num_rows=top + height)
        assert by == reduction
        ours = crop(small, (top, left, height, width), view_size, reduction=by)
        reference = antialiased(exact[top : top + height, left : left + width], view_size)
        assert psnr(ours, reference) > (32 if reduction == 1 else 25), (height, width, reduction)
