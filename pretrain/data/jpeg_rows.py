"""JPEGs decoded fast: the whole picture, or its upper rows alone."""

import numpy as np
import simplejpeg

_HUFFMAN_FRAMES = (0xC0, 0xC1)  # sequential, whose rows follow each other in the file
_TABLES = (0xC4, 0xC8, 0xCC)  # markers among those of frames that are none
_SCAN, _END, _RESTARTS = 0xDA, 0xD9, 0xDD
_BLOCKS = 16  # rows that are decoded together in most files
_LEFT_OVER = "extraneous bytes before marker 0xd9"  # libjpeg, of data between the rows and the end


def decode_fastest(
    data: bytes | bytearray | memoryview,
    size: tuple[int, int],
    reduction: int,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a whole JPEG with the fast DCT and the unsmoothed chroma.

    Args:
        data: A JPEG that libjpeg-turbo can turn into RGB.
        size: Height and width in pixels, from its header.
        reduction: 1, 2, 4 or 8: decode so many times smaller, sides rounded up.
        buffer: Where to write the pixels; new memory if none.
    Returns:
        uint8 [h, w, 3], RGB.
    Raises:
        ValueError: If libjpeg warns or fails; what could be decoded is in the buffer.
    """
    height, width = size
    return simplejpeg.decode_jpeg(
        data,
        "RGB",
        fastdct=True,
        fastupsample=True,
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
        min_factor=reduction,
        buffer=buffer,
    )


def decode_upper_rows(
    data: bytes | bytearray | memoryview, size: tuple[int, int], num_rows: int, reduction: int
) -> np.ndarray | None:
    """Decode the upper rows by a copy whose header gives a smaller height.

    libjpeg stops after these rows, looks for the end marker and warns of what it passed over. That
    warning must be the first and only one: a file cut short anywhere, or damaged in these rows,
    gives another and is left to the caller, who decodes the whole.

    Args:
        data: A JPEG that libjpeg-turbo can turn into RGB.
        size: Height and width in pixels, from its header.
        num_rows: Rows needed.
        reduction: 1, 2, 4 or 8: decode so many times smaller, sides rounded up.
    Returns:
        uint8 [h, w, 3], RGB: at least the rows needed, equal to those of `decode_fastest`. None if
        nothing can be saved, or the file is not such that its rows can be decoded alone.
    """
    height, width = size
    num_rows = -(-num_rows // _BLOCKS) * _BLOCKS
    at = _place_of_height(data) if num_rows < height else None
    if at is None or int.from_bytes(data[at : at + 2], "big") != height:
        return None
    lower = bytearray(data)
    lower[at : at + 2] = num_rows.to_bytes(2, "big")
    image = np.empty((-(-num_rows // reduction), -(-width // reduction), 3), np.uint8)
    try:
        decode_fastest(lower, (num_rows, width), reduction, image)
    except ValueError as error:  # raised after the rows were written
        return image if str(error).endswith(_LEFT_OVER) else None
    return None


def _place_of_height(data: bytes | bytearray | memoryview) -> int | None:
    """Where the header has the height; None unless all rows follow each other in one scan.

    So progressive files, those of several scans, and those with restart markers are left out: what
    libjpeg says of the data behind the rows would then tell too little.
    """
    at, place, num_colours = 2, None, 0
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _HUFFMAN_FRAMES:
            place, num_colours = at + 5, data[at + 9]
        elif marker == _SCAN:
            is_one_scan = place is not None and data[at + 4] == num_colours
            return place if is_one_scan else None
        elif marker in (_RESTARTS, _END) or (0xC0 <= marker <= 0xCF and marker not in _TABLES):
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
