import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pretrain.data import views
from pretrain.data.order import counter_rng
from pretrain.data.views import BadSample, center_crop, decode, draw_crop_box, random_resized_crop
from tests.pretrain.data.picture_helpers import encode, smooth_picture

PICTURE = smooth_picture(5, 60, 80)


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def converted(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: turn by 90 degrees
    return converted("RGB", kind, exif=exif.tobytes(), **options)


FORMATS = {
    "jpeg": converted("RGB", "JPEG", quality=97),
    "progressive jpeg": converted("RGB", "JPEG", progressive=True),
    "4:4:4 jpeg": converted("RGB", "JPEG", subsampling=0),
    "grey jpeg": converted("L", "JPEG"),
    "CMYK jpeg": converted("CMYK", "JPEG"),
    "jpeg with stray bytes": converted("RGB", "JPEG") + b"stray",
    "png": converted("RGB", "PNG"),
    "grey png": converted("L", "PNG"),
    "grey + alpha png": converted("LA", "PNG"),
    "alpha png": converted("RGBA", "PNG"),
    "palette png": converted("P", "PNG"),
    "transparent palette png": converted("P", "PNG", transparency=3),
    "1-bit png": converted("1", "PNG"),
    "webp": converted("RGB", "WEBP"),
    "lossless webp": converted("RGBA", "WEBP", lossless=True),
    "bmp": converted("RGB", "BMP"),
    "gif": converted("RGB", "GIF"),
    "CMYK tiff": converted("CMYK", "TIFF"),
    "turned jpeg": turned("JPEG"),
    "turned png": turned("PNG"),
    "turned webp": turned("WEBP", lossless=True),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", FORMATS)
def test_formats_decode_exactly_as_with_pillow(name: str) -> None:
    image = decode(FORMATS[name], where=name)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, pillow(FORMATS[name]))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_pictures_keep_their_high_byte(suffix: str) -> None:
    values = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    image = decode(cv2.imencode(suffix, values)[1].tobytes(), where="")
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_16_bit_colour() -> None:
    data = cv2.imencode(".png", PICTURE[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode(data, where=""), PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_cut_pictures_are_refused(kind: str, share: float) -> None:
    data = encode(PICTURE, kind)
    with pytest.raises(BadSample, match=r"^a.b: (does not decode|not a picture)"):
        decode(data[: int(len(data) * share)], where="a.b")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello", b"\0" * 1000])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(BadSample, match=r"^x: "):
        decode(data, where="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_giant_pictures_are_refused_before_they_are_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(BadSample, match=r"80 x 60 pixels, more than .* shrink the picture"):
        decode(encode(PICTURE, kind), where="x")


def test_bomb_beyond_pillows_own_limit() -> None:
    header = bytearray(encode(np.zeros((1, 1, 3), np.uint8), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(BadSample, match=r"x: .*pixels"):
        decode(bytes(header), where="x")


# -- crops ----------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 100), (40, 300)])
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    num, ratio = 4000, (3 / 4, 4 / 3)
    rng = counter_rng("test boxes", height, width)
    ours = np.array([draw_crop_box(height, width, rng, scale, ratio) for _ in range(num)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(num)]
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
    rng = counter_rng("inside", height, width)
    for _ in range(200):
        top, left, h, w = draw_crop_box(height, width, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        assert top >= 0
        assert left >= 0
        assert h >= 1
        assert w >= 1
        assert top + h <= height
        assert left + w <= width


def test_crop_is_repeatable_and_takes_always_as_many_draws() -> None:
    first, second = counter_rng("a"), counter_rng("a")
    one = random_resized_crop(PICTURE, first, 32, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    two = random_resized_crop(PICTURE, second, 32, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    np.testing.assert_array_equal(one, two)
    random_resized_crop(PICTURE[:3], first, 32, (0.9, 1.0))
    random_resized_crop(PICTURE, second, 32, (0.2, 1.0))
    assert first.random() == second.random()


def test_flip() -> None:
    kept = random_resized_crop(PICTURE, counter_rng("a"), 32, (0.5, 1.0), flip_probability=0.0)
    flipped = random_resized_crop(PICTURE, counter_rng("a"), 32, (0.5, 1.0), flip_probability=1.0)
    np.testing.assert_array_equal(kept[:, ::-1], flipped)
    rng = counter_rng("flips")
    ramp = np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (60, 1, 3))
    pictures = [random_resized_crop(ramp, rng, 8, (0.5, 1.0)) for _ in range(400)]
    num_flipped = sum(int(picture[0, 0, 0]) > int(picture[0, -1, 0]) for picture in pictures)
    assert 160 < num_flipped < 240


def test_crop_writes_into_a_batch() -> None:
    batch = np.zeros((2, 16, 16, 3), np.uint8)
    random_resized_crop(PICTURE, counter_rng("a"), 16, (0.5, 1.0), out=batch[1])
    expected = random_resized_crop(PICTURE, counter_rng("a"), 16, (0.5, 1.0))
    np.testing.assert_array_equal(batch[1], expected)
    assert not batch[0].any()


def test_center_crop_takes_the_middle() -> None:
    image = np.zeros((80, 160, 3), np.uint8)
    image[5:75, 45:115] = 200  # 7/8 of the short side
    assert (center_crop(image, 35) == 200).all()
    image[:, :44] = image[:, 116:] = 90
    assert (center_crop(image, 35) == 200).all()
    assert center_crop(smooth_picture(0, 5, 3), 32).shape == (32, 32, 3)


# -- resizing -------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize("stretch", [0.75, 1.0, 1.3])
@pytest.mark.parametrize("side", [70, 100, 128, 180, 250, 370])
def test_shrinking_aliases_little(side: int, stretch: float) -> None:
    """Against Pillow's antialiased resize, on a zone plate: the worst a picture can hold."""
    height, width = side, round(side * stretch)
    y, x = np.mgrid[:height, :width] / side
    plate = np.cos(0.5 * np.pi * side * (x**2 + y**2) / 2) * 127 + 128
    image = np.repeat(plate.astype(np.uint8)[..., None], 3, axis=2)
    reference = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    ours = psnr(views.resize(image, 64, 64), reference)
    aliased = psnr(cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR), reference)
    assert ours > aliased - 0.1
    assert side < 130 or stretch != 1 or ours > aliased + 5


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (65, 129), (257, 127), (30, 20), (64, 700)]
)
def test_resize_gives_the_size_and_keeps_constants(height: int, width: int) -> None:
    image = np.full((height, width, 3), 77, np.uint8)[:, ::-1]
    out = views.resize(image, 32, 32)
    assert out.shape == (32, 32, 3)
    assert (out == 77).all()
