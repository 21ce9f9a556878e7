"""BYOL's two views by lightly, with its own default settings."""

from collections.abc import Callable, Sequence

import lightly  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
from lightly.transforms.byol_transform import (  # pyright: ignore[reportMissingImports]
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)
from PIL import Image

VERSION = lightly.__version__


def byol(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and make both views of every file."""
    transform = BYOLTransform(
        BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    )

    def epoch() -> None:
        for path in files:
            with Image.open(path) as picture:
                transform(picture.convert("RGB"))

    return epoch


RECIPES = {"lightly": byol}
