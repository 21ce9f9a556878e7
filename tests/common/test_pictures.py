import io
import os
import time
import warnings
import zlib
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from common import pictures
from common.pictures import (
    BadPicture,
    decode,
    decode_fast,
    read_file,
    read_header,
    read_shape,
    upright,
)
from tests.pretrain.data.picture_helpers import encode, seeded, smooth_picture

PICTURE = smooth_picture(5, 60, 80)
OTHER = Image.new("RGB", (80, 60))


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def converted(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int = 6, mode: str = "RGB", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation  # 6: turn by 90 degrees
    return converted(mode, kind, exif=exif.tobytes(), **options)


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
    "grey + alpha tiff": converted("LA", "TIFF"),
    "LAB tiff": converted("LAB", "TIFF"),
    "fax tiff": converted("1", "TIFF", compression="group4"),
    "avif": converted("RGB", "AVIF"),
    "jpeg 2000": converted("RGB", "JPEG2000"),
    "16-bit colour png": cv2.imencode(".png", PICTURE.astype(np.uint16) * 257)[1].tobytes(),
    **{
        f"{kind} of two frames": converted("RGB", kind, save_all=True, append_images=[OTHER])
        for kind in ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
    },
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


TURNED = {
    "jpeg": ("JPEG", "RGB", {}),
    "progressive jpeg": ("JPEG", "RGB", {"progressive": True}),
    "CMYK jpeg": ("JPEG", "CMYK", {}),
    "mpo": ("MPO", "RGB", {}),
    "png": ("PNG", "RGB", {}),
    "webp": ("WEBP", "RGB", {"lossless": True}),
    "avif": ("AVIF", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
    "lzw tiff": ("TIFF", "L", {"compression": "tiff_lzw"}),
}


@pytest.mark.parity
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", TURNED)
def test_pictures_are_upright_as_pillows(name: str, orientation: int, tmp_path: Path) -> None:
    kind, mode, options = TURNED[name]
    data = turned(kind, orientation, mode, **options)
    (tmp_path / "x").write_bytes(data)
    expected = pillow(data)
    image = decode(data, where="x")
    np.testing.assert_array_equal(image, expected)
    assert image.flags.c_contiguous
    shape = read_shape(tmp_path / "x")
    assert (shape.height, shape.width) == expected.shape[:2]
    assert (shape.stored_size, shape.orientation) == ((60, 80), orientation)
    header = read_header(data, where="x")
    stored, _ = decode_fast(data, header, 1, where="x")
    assert (header.height, header.width) == expected.shape[:2]
    assert header.stored_size == stored.shape[:2]
    np.testing.assert_allclose(upright(stored, header.orientation), expected, atol=40)
    top, left, height, width = box = (3, 7, 20, 30)  # a crop, cut out of the stored pixels
    row, column, rows, columns = header.stored_box(box)
    part = upright(stored[row : row + rows, column : column + columns], header.orientation)
    whole = upright(stored, header.orientation)
    np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


def test_exif_behind_a_pngs_pixels_counts() -> None:
    data, plain = turned("PNG"), FORMATS["png"]
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    behind = plain[:-12] + chunk + plain[-12:]
    np.testing.assert_array_equal(decode(behind, where=""), pillow(behind))
    assert read_header(behind, where="").orientation == 6


@seeded
@given(
    orientation=st.integers(0, 9),
    order=st.sampled_from("<>"),
    changes=st.lists(st.tuples(st.integers(4, 25), st.integers(0, 255)), max_size=3),
    cut=st.sampled_from([0, 0, 0, 3, 9, 20]),
    before=st.sampled_from([b"", b"\xff\xfe\x00\x04ab", b"\xff\xff"]),
)
def test_orientations_of_jpegs_are_those_that_pillow_reads(
    orientation: int, order: str, changes: list[tuple[int, int]], cut: int, before: bytes
) -> None:
    """Of whole and of damaged EXIF data; what Pillow fails on or browsers do not know is 1."""
    exif = Image.Exif()
    exif.endian = order
    exif[0x112] = orientation
    block = bytearray(exif.tobytes())
    for place, value in changes:
        block[6 + place] = value
    block = block[: len(block) - cut]
    data = FORMATS["jpeg"]
    segment = b"\xff\xe1" + (2 + len(block)).to_bytes(2, "big") + bytes(block)
    data = data[:2] + before + segment + data[2:]
    with warnings.catch_warnings(action="ignore"):
        try:
            expected = Image.open(io.BytesIO(data)).getexif().get(0x112, 1)
        except Exception:  # of many kinds
            expected = 1
    expected = expected if expected in range(1, 9) else 1
    assert read_header(data, where="").orientation == expected


GREY_16 = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13


def saved(values: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm", "jp2"])
def test_16_bit_pictures_keep_their_high_byte(kind: str) -> None:
    if kind == "big-endian tiff":
        data = saved(GREY_16.astype(">u2"), "TIFF")
    else:
        data = cv2.imencode(f".{kind}", GREY_16)[1].tobytes()
    image = decode(data, where="")
    np.testing.assert_array_equal(image, np.repeat((GREY_16 >> 8)[..., None], 3, axis=2))


def with_tag(tag: int, value: int) -> bytes:
    """A 16-bit TIFF with another value of a tag."""
    data = saved(GREY_16, "TIFF")
    start = data.index(tag.to_bytes(2, "little") + b"\3\0\1\0\0\0")
    return data[: start + 8] + value.to_bytes(2, "little") + data[start + 10 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(GREY_16.astype(np.float32) / 65535, "TIFF"), "values of 32 bits"),
        (saved(GREY_16.astype(np.int32), "TIFF"), "values of 32 bits"),
        (saved(GREY_16.astype(np.float32), "PPM"), "values of 32 bits"),
        (with_tag(258, 12), "12-bit values"),
        (with_tag(262, 0), "0 is white"),
        (converted("RGB", "EPS"), "no known format"),  # Ghostscript would run it
    ],
)
def test_what_would_come_out_wrong_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BadPicture, match=rf"x: .*{message}"):
        decode(data, where="x")
    with pytest.raises(BadPicture, match=rf"x: .*{message}"):
        read_shape(tmp_path / "x")


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@cache
def bombs() -> dict[str, tuple[bytes, str]]:
    """Small or plain files that cost much time or memory, and a word of their refusal."""
    png, jpeg, grey = FORMATS["png"], FORMATS["jpeg"], converted("L", "TIFF")
    zeros = zlib.compress(bytes(1 << 24), 9)
    text, segment = chunk(b"zTXt", b"a\0\0" + zeros), b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)
    progressive = FORMATS["progressive jpeg"]
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    strips = grey.index(b"\x11\1\4\0\1\0\0\0")
    more = "more data than its pixels"
    return {
        "text": (png[:33] + text + png[33:], "too large"),
        "texts behind the pixels": (png[:-12] + text * 101 + png[-12:], more),
        "EXIF of a PNG": (png[:33] + chunk(b"eXIf", bytes(1 << 25)) + png[33:], more),
        "pixels": (png[:33] + chunk(b"IDAT", zeros) * 9 + png[-12:], more),
        "EXIF": (jpeg[:2] + segment * 257 + jpeg[2:], "bytes of metadata"),
        "scans": (progressive[:-2] + scan * 64 + progressive[-2:], "more than 64 scans"),
        "strips": (grey[: strips + 6] + b"\0\1" + grey[strips + 8 :], "16,777,217 values"),
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_at_once(name: str) -> None:
    data, message = bombs()[name]
    started = time.process_time()
    with pytest.raises(BadPicture, match=message):
        decode(data, where="x")
    with pytest.raises(BadPicture, match=message):
        read_header(data, where="x")
    assert time.process_time() - started < 5


def test_files_on_which_one_would_wait_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, message in ((tmp_path / "pipe.jpg", "named pipe"), (Path("/dev/zero"), "device")):
        for read in (read_file, read_shape):
            with pytest.raises(BadPicture, match=message):
                read(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_cut_pictures_are_refused(kind: str, share: float) -> None:
    data = encode(PICTURE, kind)
    with pytest.raises(BadPicture, match=r"^a.b: (does not decode|not a picture)"):
        decode(data[: int(len(data) * share)], where="a.b")


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"hello", b"\0" * 1000, b"\x89PNG\r\n\x1a\n", b"II*\0"]
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(BadPicture, match=r"^x: "):
        decode(data, where="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_giant_pictures_are_refused_before_they_are_decoded(kind, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", (60 * 80 - 1) * (2 if kind == "AVIF" else 1))
    with pytest.raises(BadPicture, match=r"80 x 60 pixels, more than .* shrink the picture"):
        decode(encode(PICTURE, kind), where="x")
    with pytest.raises(BadPicture, match=r"80 x 60 pixels, more than .* shrink the picture"):
        read_header(encode(PICTURE, kind), where="x")


def test_bomb_beyond_pillows_own_limit() -> None:
    header = bytearray(encode(np.zeros((1, 1, 3), np.uint8), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(BadPicture, match=r"x: .*pixels"):
        decode(bytes(header), where="x")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reduction", [1, 4])
def test_fast_decoding_is_close_to_exact_decoding(name: str, reduction: int) -> None:
    data = FORMATS[name]
    header = read_header(data, where=name)
    assert header.stored_size == (60, 80)
    assert header.is_fast == ((name.endswith("jpeg") and "CMYK" not in name) or "stray" in name)
    image, by = decode_fast(data, header, reduction, where=name)
    assert by in (1, reduction)
    exact = decode(data, where=name)
    if not header.is_fast:
        assert by == 1
        np.testing.assert_array_equal(upright(image, header.orientation), exact)
        return
    assert image.shape == (-(-60 // by), -(-80 // by), 3)
    exact = np.rot90(exact) if header.orientation == 6 else exact
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
