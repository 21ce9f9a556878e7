"""FFCV: decoding and random resized crops, flipped; it has no hue, grey, blur or solarisation.

So it is beside our crops, not the whole recipe. A field of FFCV gives one view for each decoding;
two views are two fields over the same JPEG. Its writer encodes anew, with quality 90.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from ffcv.fields import RGBImageField  # pyright: ignore[reportMissingImports]
from ffcv.fields.rgb_image import (  # pyright: ignore[reportMissingImports]
    RandomResizedCropRGBImageDecoder,
)
from ffcv.loader import Loader, OrderOption  # pyright: ignore[reportMissingImports]
from ffcv.transforms import (  # pyright: ignore[reportMissingImports]
    RandomHorizontalFlip,
    ToTensor,
)
from ffcv.writer import DatasetWriter  # pyright: ignore[reportMissingImports]

FIELDS = ("view1", "view2")
BATCH = 16


class _Pictures:
    """Each file decoded, once for each view."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        image = cv2.imread(self.files[number], cv2.IMREAD_COLOR_RGB)
        assert image is not None, self.files[number]
        return (image,) * len(FIELDS)


def crops(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and crop every file twice."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "pictures.beton")
    fields = {name: RGBImageField(write_mode="jpg", jpeg_quality=90) for name in FIELDS}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Pictures(files))
    pipelines = {
        name: [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
        for name in FIELDS
    }
    loader = Loader(
        str(path), batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, seed=0,
        pipelines=pipelines, drop_last=False,
    )  # fmt: skip

    def epoch(_: tempfile.TemporaryDirectory = folder) -> None:  # the folder lives as long as this
        for _batch in loader:
            pass

    return epoch


RECIPES = {"ffcv": {"FFCV, two crops": crops}}
