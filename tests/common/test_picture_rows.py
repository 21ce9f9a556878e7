"""The upper rows of a JPEG are those of the whole; what is damaged is as bad as ever."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.pictures import BadPicture, decode_fast, decode_upper_rows, read_header
from tests.pretrain.data.picture_helpers import encode, seeded, smooth_picture

HEIGHT, WIDTH = 90, 83
NOISE = np.random.default_rng(0).integers(0, 16, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = smooth_picture(5, HEIGHT, WIDTH) // 2 + 60 + NOISE
FILLED = encode(PICTURE).replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1)
SEQUENTIAL = {
    "4:2:0": encode(PICTURE, subsampling=2),
    "4:2:2": encode(PICTURE, subsampling=1),
    "4:4:4": encode(PICTURE, subsampling=0),
    "grey": encode(PICTURE[..., 0]),
    "own tables": encode(PICTURE, optimize=True),
    "with a long comment": encode(PICTURE, comment=b"\xff\xc0" * 9000),
    "filled between segments": FILLED,
    "bytes behind the end": encode(PICTURE) + b"behind",
}
WHOLE_ONLY = {
    "progressive": encode(PICTURE, progressive=True),
    "restart markers": encode(PICTURE, restart_marker_blocks=2),
    "a restart a row": encode(PICTURE, restart_marker_rows=1),
}


def upper(data: bytes, num_rows: int, reduction: int = 1) -> np.ndarray | None:
    return decode_upper_rows(data, read_header(data, where=""), num_rows, reduction)


def whole(data: bytes, reduction: int) -> np.ndarray:
    image, by = decode_fast(data, read_header(data, where=""), reduction, where="")
    assert by == reduction
    return image


@pytest.mark.parity
@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_rows_are_those_of_the_whole_picture(name: str, reduction: int) -> None:
    data = SEQUENTIAL[name]
    intact = data.removesuffix(b"behind")
    for num_rows in range(1, 81):
        rows = upper(data, num_rows, reduction)
        assert rows is not None
        assert len(rows) == -(-num_rows // reduction)
        np.testing.assert_array_equal(rows, whole(intact, reduction)[: len(rows)])


@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_other_kinds_are_decoded_whole(name: str) -> None:
    data = WHOLE_ONLY[name]
    assert upper(data, 16) is None
    header = read_header(data, where="")
    assert header.height_at is None
    assert decode_fast(data, header, 1, where="", num_rows=16)[0].shape == PICTURE.shape


def test_nothing_to_save() -> None:
    for num_rows in (81, 90):
        assert upper(SEQUENTIAL["4:2:0"], num_rows) is None


def test_a_height_that_is_not_the_headers_is_left_alone() -> None:
    data = SEQUENTIAL["4:2:0"]
    header = replace(read_header(data, where=""), height=HEIGHT + 1)
    assert decode_upper_rows(data, header, 16, 1) is None


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("share", [0.5, 0.8, 0.99])
def test_a_picture_cut_below_the_rows_is_refused(name: str, share: float) -> None:
    data = SEQUENTIAL[name].removesuffix(b"behind")
    cut = data[: int(len(data) * share)]
    assert decode_upper_rows(cut, read_header(data, where=""), 1, 1) is None
    with pytest.raises(BadPicture, match=r"^a.b: does not decode"):
        decode_fast(cut, read_header(cut, where="a.b"), 1, where="a.b", num_rows=1)


def is_bad(data: bytes, num_rows: int | None) -> bool:
    try:
        decode_fast(data, read_header(data, where=""), 1, where="", num_rows=num_rows)
    except BadPicture:
        return True
    return False


@seeded
@given(
    name=st.sampled_from([*SEQUENTIAL, *WHOLE_ONLY]),
    place=st.floats(0, 1),
    kind=st.sampled_from(["cut", "byte", "left out", "marker"]),
    value=st.integers(0, 255),
    num_rows=st.integers(1, HEIGHT),
)
def test_damage_is_found_as_in_the_whole_picture(name, place, kind, value, num_rows):
    data = bytearray((SEQUENTIAL | WHOLE_ONLY)[name])
    at = 2 + int(place * (len(data) - 4))
    if kind == "cut":
        del data[at:]
    elif kind == "byte":
        data[at] = value
    elif kind == "left out":
        del data[at : at + 1 + value // 8]
    else:
        data[at : at + 2] = 0xFF, value
    assert is_bad(bytes(data), num_rows) == is_bad(bytes(data), None)
