"""Show each photometric operation three times: torchvision on Pillow, ours on uint8, ours in float.

A row per operation and one for all of them; the last two columns are the differences of ours on
uint8 to the other two, 16 times as large. The same figures, in levels of 255, are printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image

from common.errors import UserError, run_command
from common.files import write_bytes
from common.pictures import decode
from pretrain.data import augment_uint8 as photometric_uint8
from pretrain.data.augment import augment, blur_kernel_size
from pretrain.data.crops import resize

_EXAMPLE = """example:
  .venv/bin/python tools/augmentation_sheet.py photo.jpg docs/images/augmentation.jpg --size 128
"""
_NEUTRAL = {
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "jitter_order": 0.0,
    "gray": 0.0,
    "blur_sigma": 0.0,
    "solarize": 0.0,
}
_JITTER = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.1}
ROWS: dict[str, dict[str, float]] = {
    "brightness 1.4": {"brightness": 1.4},
    "contrast 0.6": {"contrast": 0.6},
    "saturation 1.8": {"saturation": 1.8},
    "hue 0.1": {"hue": 0.1},
    "grey": {"gray": 1.0},
    "blur, sigma 2": {"blur_sigma": 2.0},
    "solarise": {"solarize": 1.0},
    "jitter, blur, solarise": _JITTER | {"blur_sigma": 1.0, "solarize": 1.0},
}
COLUMNS = ("torchvision on Pillow", "uint8", "float", "uint8 - Pillow, x 16", "uint8 - float, x 16")
_GAIN = 16
_GAP = 4  # pixels between pictures
_LABELS = 150  # pixels for the names of the rows


def in_pillow(image: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """The operations of `values`, in their order, by torchvision on a Pillow picture."""
    picture = Image.fromarray(image)
    kernel = [blur_kernel_size(len(image))] * 2
    operations = {
        "brightness": reference.adjust_brightness,
        "contrast": reference.adjust_contrast,
        "saturation": reference.adjust_saturation,
        "hue": reference.adjust_hue,
        "gray": lambda x, _: reference.rgb_to_grayscale(x, 3),
        "blur_sigma": lambda x, sigma: reference.gaussian_blur(x, kernel, [sigma, sigma]),
        "solarize": lambda x, _: reference.solarize(x, 128),
    }
    for name, value in values.items():
        picture = operations[name](picture, value)
    return np.asarray(picture).astype(np.float32)


def in_uint8(image: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """The same by `pretrain.data.augment_uint8`."""
    params = {name: torch.tensor([value]) for name, value in (_NEUTRAL | values).items()}
    out = image.copy()
    photometric_uint8.apply(out, photometric_uint8.changes_of(params, len(image))[0])
    return out.astype(np.float32)


def in_float(image: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """The same by `pretrain.data.augment`, in levels of 255."""
    params = {name: torch.tensor([value]) for name, value in (_NEUTRAL | values).items()}
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = augment(batch, params, (0.0,) * 3, (1.0,) * 3)
    return out[0].permute(1, 2, 0).numpy() * 255


def sheet(image: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """All rows.

    Args:
        image: uint8 [s, s, 3], RGB.
    Returns:
        uint8 [height, width, 3] with labels, and a line of figures per row.
    """
    size = len(image)
    width = _LABELS + len(COLUMNS) * (size + _GAP)
    page = np.full((24 + len(ROWS) * (size + _GAP), width, 3), 255, np.uint8)
    for number, name in enumerate(COLUMNS):
        _write(page, name, _LABELS + number * (size + _GAP), 16)
    lines = []
    for number, (name, values) in enumerate(ROWS.items()):
        top = 24 + number * (size + _GAP)
        pillow, ours, exact = (f(image, values) for f in (in_pillow, in_uint8, in_float))
        differences = [np.abs(ours - other) for other in (pillow, exact)]
        tiles = [pillow, ours, exact, *(_GAIN * difference for difference in differences)]
        for column, tile in enumerate(tiles):
            left = _LABELS + column * (size + _GAP)
            page[top : top + size, left : left + size] = np.clip(np.rint(tile), 0, 255)
        _write(page, name, 4, top + size // 2)
        means = [f"mean {one.mean():.2f}, largest {one.max():.1f}" for one in differences]
        lines.append(f"{name:24} to Pillow: {means[0]:26} to float: {means[1]}")
    return page, lines


def _write(page: np.ndarray, text: str, left: int, bottom: int) -> None:
    cv2.putText(page, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.36, 0, 1, cv2.LINE_AA)


def load(path: Path, size: int) -> np.ndarray:
    """The central square of a picture, uint8 [size, size, 3].

    Raises:
        UserError: If the file cannot be read or is no picture.
    """
    try:
        image = decode(path.read_bytes(), where=str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a picture") from error
    except ValueError as error:
        raise UserError(f"{error}; give another picture") from error
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong arguments or input."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="any picture")
    parser.add_argument("out", type=Path, metavar="OUT", help="sheet to write (.jpg or .png)")
    parser.add_argument("--size", type=int, default=128, help="of a tile, px (default: 128)")
    parser.add_argument("--quality", type=int, default=85, help="of a JPEG (default: 85)")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix not in (".jpg", ".png") or arguments.size < 16:
        parser.error("OUT must end in .jpg or .png, --size must be at least 16")

    def work() -> int:
        page, lines = sheet(load(arguments.picture, arguments.size))
        options = [cv2.IMWRITE_JPEG_QUALITY, arguments.quality]
        done, data = cv2.imencode(arguments.out.suffix, page[..., ::-1], options)
        assert done
        write_bytes(arguments.out, data.tobytes())
        print("differences of uint8, in levels of 255:", *lines, sep="\n")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
