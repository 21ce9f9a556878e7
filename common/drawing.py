"""Boxes with labels on a picture, readable at any size."""

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 400  # longest side in pixels below which the drawn picture is enlarged
_GOLDEN = 0.618034  # turns of the colour circle from one class to the next
# Comes with matplotlib: Latin, Greek, Cyrillic, Arabic letters.
_FONT = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
Rectangle = tuple[float, float, float, float]


class Labelled(Protocol):
    """A box x0, y0, x1, y1 in pixels with its class, an object's or a detection's.

    A detection has a `score`, too.
    """

    @property
    def class_name(self) -> str:
        """Of the class."""
        ...

    @property
    def box(self) -> Rectangle:
        """In continuous pixels of the upright picture."""
        ...


def draw_boxes(image: np.ndarray, found: Sequence[Labelled], classes: Sequence[str]) -> Image.Image:
    """Draw boxes and labels.

    Widths and letters grow with the picture. A label stands at its box where it covers no other
    label, else as near as it can; the better its score, the earlier it is placed. Where the picture
    is full of labels, the others are left out.

    Args:
        image: uint8 [height, width, 3], RGB.
        found: What to draw.
        classes: All names in order; a class has the same colour in every picture.
    """
    picture = Image.fromarray(image)
    scale = max(1, -(-_SMALLEST // max(picture.size)))
    if scale > 1:
        picture = picture.resize(
            (scale * picture.width, scale * picture.height), Image.Resampling.BICUBIC
        )
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(width, height) / 250))
    font = _font(max(12, round(min(width, height) / 32)))
    ordered = sorted(found, key=lambda one: getattr(one, "score", 0.0))
    for one in ordered:  # the best on top
        box = [scale * value for value in one.box]
        corners = (box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1))
        draw.rectangle(corners, outline=colour(classes.index(one.class_name)), width=line)
    plates: list[Rectangle] = []
    for one in reversed(ordered):
        name = drawable_name(one.class_name, classes)
        score = getattr(one, "score", None)
        end = "" if score is None else f" {score:.2f}"
        text, size = _label(name, end, draw, font, width / 2)
        plate = place_plate([scale * value for value in one.box], size, plates, (width, height))
        if plate is None:
            continue
        plates.append(plate)
        back = colour(classes.index(one.class_name))
        is_light = 0.3 * back[0] + 0.59 * back[1] + 0.11 * back[2] > 140
        draw.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=back)
        middle = ((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2)
        draw.text(middle, text, fill="black" if is_light else "white", font=font, anchor="mm")
    return picture


def place_plate(
    box: Sequence[float], size: tuple[float, float], plates: Sequence[Rectangle],
    picture: tuple[int, int],
) -> Rectangle | None:  # fmt: skip
    """Where a label goes: above the box, in it, below it, beside it, or near.

    Args:
        box: x0, y0, x1, y1.
        size: Width and height of the label.
        plates: Those that stand already.
        picture: Width and height.

    Returns:
        x0, y0, x1, y1 within the picture that overlaps no other; None if there is no room.
    """
    x0, y0, x1, y1 = box
    width, height = size
    places = [(x0, y0 - height), (x0, y0), (x0, y1), (x0, y1 - height), (x1, y0), (x0 - width, y0)]
    # Then free spots of the whole picture, the nearest first: beside or below another label.
    edges = [(x, y) for a in plates for x, y in ((a[0], a[3]), (a[0], a[1] - height),
                                                 (a[2], a[1]), (x0, a[3]))]  # fmt: skip
    places += sorted(edges, key=lambda at: abs(at[0] - x0) + abs(at[1] - y0))
    for x, y in places:
        left = min(max(x, 0), picture[0] - width)
        top = min(max(y, 0), picture[1] - height)
        plate = (left, top, left + width, top + height)
        if min(left, top) >= 0 and not any(_overlap(plate, other) for other in plates):
            return plate
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _label(
    name: str, end: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, room: float
) -> tuple[str, tuple[float, float]]:
    """Name and end of a label, no wider than `room`, and the size of its plate."""
    top, bottom = font.getbbox("Åg")[1::2]
    while True:
        text = f"{name}{end}"
        width = draw.textlength(text, font) + font.size / 2
        if width <= room or len(name) < 3:
            return text, (float(round(width)), float(round(bottom - top + font.size / 4)))
        name = f"{name.removesuffix('…')[:-1]}…"


def drawable_name(name: str, classes: Sequence[str]) -> str:
    """A class's name, or "class N" (its place) if the font lacks a letter of it."""
    has_all = all(_glyphs().get_char_index(ord(letter)) for letter in name)
    return name if has_all else f"class {classes.index(name)}"


def colour(label: int) -> tuple[int, int, int]:
    """Of a class: bright, and far from those before it."""
    red, green, blue = colorsys.hsv_to_rgb((0.33 + label * _GOLDEN) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


@cache
def _glyphs() -> FT2Font:
    return FT2Font(_FONT)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, size)
