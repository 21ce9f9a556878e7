import io

import cv2
import numpy as np
import pytest
from PIL import Image

from common import pictures
from common.pictures import BadPicture, decode, decode_fast, read_header
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_cut_pictures_are_refused(kind: str, share: float) -> None:
    data = encode(PICTURE, kind)
    with pytest.raises(BadPicture, match=r"^a.b: (does not decode|not a picture)"):
        decode(data[: int(len(data) * share)], where="a.b")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello", b"\0" * 1000])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(BadPicture, match=r"^x: "):
        decode(data, where="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_giant_pictures_are_refused_before_they_are_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(BadPicture, match=r"80 x 60 pixels, more than .* shrink the picture"):
        decode(encode(PICTURE, kind), where="x")
    with pytest.raises(BadPicture, match=r"80 x 60 pixels, more than .* shrink the picture"):
        read_header(encode(PICTURE, kind), where="x")


def test_bomb_beyond_pillows_own_limit() -> None:
    header = bytearray(encode(np.zeros((1, 1, 3), np.uint8), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(BadPicture, match=r"x: .*pixels"):
        decode(bytes(header), where="x")


# -- fast decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reduction", [1, 4])
def test_fast_decoding_is_close_to_exact_decoding(name: str, reduction: int) -> None:
    data = FORMATS[name]
    header = read_header(data, where=name)
    assert (header.height, header.width) == (60, 80)
    assert header.is_fast == ((name.endswith("jpeg") and "CMYK" not in name) or "stray" in name)
    image, by = decode_fast(data, header, reduction, where=name)
    assert by in (1, reduction)
    exact = decode(data, where=name)
    if not header.is_fast:
        assert by == 1
        np.testing.assert_array_equal(image, exact)
        return
    assert image.shape == (-(-60 // by), -(-80 // by), 3)
    whole = exact[: 60 // by * by, : 80 // by * by].reshape(60 // by, by, 80 // by, by, 3)
    difference = np.abs(image[: 60 // by, : 80 // by] - whole.mean(axis=(1, 3)))
    assert difference.mean() < 6  # a tenth of the blocks' chroma is unsmoothed at the edges


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("reduction", [1, 4])
def test_fast_decoding_refuses_cut_pictures(share: float, reduction: int) -> None:
    data = encode(PICTURE, "JPEG")
    cut = data[: int(len(data) * share)]
    with pytest.raises(BadPicture, match=r"^a.b: does not decode"):
        decode_fast(cut, read_header(cut, where="a.b"), reduction, where="a.b")
