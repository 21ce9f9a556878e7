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
from pretrain.data import augment_uint8
from pretrain.data.augment import augment, blur_kernel_size

_EXAMPLE = """example:
  .venv/bin/python tools/augmentation_sheet.py photo.jpg docs/images/augmentation.jpg --size 128
"""
_NEUTRAL = dict.fromkeys(("brightness", "contrast", "saturation"), 1.0) | dict.fromkeys(
    ("hue", "jitter_order", "gray", "blur_sigma", "solarize"), 0.0
)
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
_LABELS, _HEAD = 150, 24  # pixels for the names of rows and of columns


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


def parameters(values: dict[str, float]) -> dict[str, torch.Tensor]:
    """The parameters of a batch of one picture; what is not given changes nothing."""
    return {name: torch.tensor([value]) for name, value in (_NEUTRAL | values).items()}


def in_uint8(image: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """The same by `pretrain.data.augment_uint8`."""
    out = image.copy()
    augment_uint8.apply(out, augment_uint8.changes_of(parameters(values), len(image))[0])
    return out.astype(np.float32)


def in_float(image: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """The same by `pretrain.data.augment`, in levels of 255."""
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = augment(batch, parameters(values), (0.0,) * 3, (1.0,) * 3)
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
    for number, (name, values) in enumerate(ROWS.items()):
        top = _HEAD + number * step
        draw.text((4, top + len(image) // 2), name, fill="black")
        pillow, ours, exact = (f(image, values) for f in (in_pillow, in_uint8, in_float))
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
