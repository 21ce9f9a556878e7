"""Show each photometric operation three times: torchvision on Pillow, ours on uint8, ours in float.

A row per operation and one for all of them; the last two columns are the differences of ours on
uint8 to the other two, 16 times as large. The same figures, in levels of 255, are printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image, ImageDraw, ImageOps

from common.errors import UserError, require, run_command
from common.pictures import BadPicture, decode
from pretrain.data.augmentations.blur import Blur, blur_kernel_size
from pretrain.data.augmentations.grey import Grey
from pretrain.data.augmentations.jitter import Jitter
from pretrain.data.augmentations.operation import Operation
from pretrain.data.augmentations.solarize import Solarize
from pretrain.data.input_pipeline import augment
from pretrain.data.policy import Drawn

_EXAMPLE = """example:
  .venv/bin/python tools/augmentation_sheet.py photo.jpg docs/images/augmentation.jpg --size 128
"""
_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "order": 0.0}
Row = list[tuple[Operation, dict[str, float]]]  # operations in their order, with parameters


def _jitter(**values: float) -> Row:
    return [(Jitter(), _NEUTRAL | values)]


ROWS: dict[str, Row] = {
    "brightness 1.4": _jitter(brightness=1.4),
    "contrast 0.6": _jitter(contrast=0.6),
    "saturation 1.8": _jitter(saturation=1.8),
    "hue 0.1": _jitter(hue=0.1),
    "grey": [(Grey(), {"is_grey": 1.0})],
    "blur, sigma 2": [(Blur(), {"sigma": 2.0})],
    "solarise": [(Solarize(), {"is_solarized": 1.0})],
    "jitter, blur, solarise": [
        *_jitter(brightness=1.3, contrast=0.7, saturation=1.4, hue=0.1),
        (Blur(), {"sigma": 1.0}),
        (Solarize(), {"is_solarized": 1.0}),
    ],
}
COLUMNS = ("torchvision on Pillow", "uint8", "float", "uint8 - Pillow, x 16", "uint8 - float, x 16")
_GAIN = 16
_GAP = 4  # pixels between pictures
_LABELS, _HEAD = 150, 24  # pixels for the names of rows and of columns


def in_pillow(image: np.ndarray, row: Row) -> np.ndarray:
    """The operations of a row by torchvision on a Pillow picture."""
    picture = Image.fromarray(image)
    kernel = [blur_kernel_size(len(image))] * 2
    functions = {
        "brightness": reference.adjust_brightness,
        "contrast": reference.adjust_contrast,
        "saturation": reference.adjust_saturation,
        "hue": reference.adjust_hue,
        "is_grey": lambda x, _: reference.rgb_to_grayscale(x, 3),
        "sigma": lambda x, sigma: reference.gaussian_blur(x, kernel, [sigma, sigma]),
        "is_solarized": lambda x, _: reference.solarize(x, 128),
    }
    for _, parameters in row:
        for name, value in parameters.items():
            if value != _NEUTRAL.get(name):
                picture = functions[name](picture, value)
    return np.asarray(picture).astype(np.float32)


def _drawn(row: Row) -> Drawn:
    """The parameters of a batch of one picture."""
    return [
        (operation, {name: np.array([value], np.float32) for name, value in parameters.items()})
        for operation, parameters in row
    ]


def in_uint8(image: np.ndarray, row: Row) -> np.ndarray:
    """The same as the loader's workers do it."""
    out = image.copy()
    for operation, parameters in _drawn(row):
        for step in operation.picture_steps(parameters, len(image))[0]:
            step(out)
    return out.astype(np.float32)


def in_float(image: np.ndarray, row: Row) -> np.ndarray:
    """The same as a device does it, in levels of 255."""
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = augment(batch, _drawn(row), (0.0,) * 3, (1.0,) * 3)
    return out[0].permute(1, 2, 0).numpy() * 255


def sheet(image: np.ndarray) -> tuple[Image.Image, list[str]]:
    """All rows.

    Args:
        image: uint8 [s, s, 3], RGB.
    Returns:
        The sheet with labels, and a line of figures per row.
    """
    step = len(image) + _GAP
    page = Image.new("RGB", (_LABELS + len(COLUMNS) * step, _HEAD + len(ROWS) * step), "white")
    draw = ImageDraw.Draw(page)
    for number, name in enumerate(COLUMNS):
        draw.text((_LABELS + number * step, 8), name, fill="black")
    lines = []
    for number, (name, row) in enumerate(ROWS.items()):
        top = _HEAD + number * step
        draw.text((4, top + len(image) // 2), name, fill="black")
        pillow, ours, exact = (f(image, row) for f in (in_pillow, in_uint8, in_float))
        differences = [np.abs(ours - other) for other in (pillow, exact)]
        tiles = [pillow, ours, exact, *(_GAIN * difference for difference in differences)]
        for column, tile in enumerate(tiles):
            pixels = np.clip(np.rint(tile), 0, 255).astype(np.uint8)
            page.paste(Image.fromarray(pixels), (_LABELS + column * step, top))
        means = [f"mean {one.mean():.2f}, largest {one.max():.1f}" for one in differences]
        lines.append(f"{name:24} to Pillow: {means[0]:26} to float: {means[1]}")
    return page, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 (it went wrong) or 2 (wrong arguments or input)."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("picture", type=Path, metavar="PICTURE", help="any picture")
    add("out", type=Path, metavar="OUT", help="sheet to write (.jpg or .png)")
    add("--size", type=int, default=128, help="of a tile, px (default: 128)")
    add("--quality", type=int, default=85, help="of a JPEG (default: 85)")
    options = parser.parse_args(arguments)

    def work() -> int:
        path, out, size = options.picture, options.out, options.size
        require(out.suffix in (".jpg", ".png"), f"{out}: give a name that ends in .jpg or .png")
        require(size >= 16, f"--size {size}: give at least 16")
        try:
            picture = Image.fromarray(decode(path.read_bytes(), where=str(path)))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give the path of a picture") from None
        except BadPicture as error:
            raise UserError(f"{error}; give another picture") from error
        page, lines = sheet(np.array(ImageOps.fit(picture, (size, size))))
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out, quality=options.quality)
        print("differences of uint8, in levels of 255:", *lines, sep="\n")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
