"""A trained backbone as a torch module, with its preprocessing.

from pretrain.load import load_backbone

backbone = load_backbone("runs/first/checkpoint.pth")
picture = backbone.preprocessing("street.jpg")  # float32 [3, size, size]
features = backbone(picture[None])  # float32 [1, d]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from common.backbone import BackboneCheckpoint, Preprocessing, parse_preprocessing, read_backbone
from common.errors import UserError, require
from common.network import ResNet, shapes_alone
from common.pictures import decode, from_pillow, read_file
from common.resnet import COUNTER
from pretrain.data.decode import center_crop

DEFAULT_SIZE = 224  # pixels; where neither checkpoint nor card says it
_SMALLEST, _LARGEST = 16, 4096

Picture = np.ndarray | Image.Image | str | os.PathLike


@dataclass(frozen=True)
class PicturePreprocessing(Preprocessing):
    """From a picture to what the network takes: the central square, resized, normalised.

    Attributes:
        image_size: Side of the square in pixels. It is cut out of 7/8 of the short side.
    """

    image_size: int = DEFAULT_SIZE

    def __call__(self, picture: Picture) -> Float[Tensor, "3 s s"]:
        """Prepare one picture.

        Args:
            picture: uint8 RGB [h, w, 3], a Pillow picture, or the path of a file; the last two are
                turned upright.

        Raises:
            BadPicture: If a file or a Pillow picture does not decode.
            UserError: If an array is of another kind.
        """
        crop = center_crop(pixels_of(picture), self.image_size)
        return self.normalise(torch.from_numpy(crop).permute(2, 0, 1)[None])[0].contiguous()


def pixels_of(picture: Picture) -> np.ndarray:
    """uint8 RGB [h, w, 3], upright; raises as `PicturePreprocessing`."""
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        return decode(read_file(path), where=str(path))
    if isinstance(picture, Image.Image):
        return from_pillow(picture, where="picture")
    is_array = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    if not is_array or picture.shape[2] != 3 or not picture.size:
        is_other = isinstance(picture, np.ndarray)
        kind = f"{picture.dtype} {picture.shape}" if is_other else type(picture).__name__
        raise UserError(f"a picture is {kind}; give uint8 [height, width, 3], RGB, or a file")
    return picture


class LoadedBackbone(ResNet):
    """A ResNet with trained weights, in evaluation mode.

    Attributes:
        preprocessing: What it expects of its pictures.
        notes: What a reader should know of the file, in sentences.
    """

    def __init__(self, file: BackboneCheckpoint, image_size: int) -> None:
        with shapes_alone():
            super().__init__(file.arch)
        counters = {name: torch.tensor(0) for name in self.state_dict() if name.endswith(COUNTER)}
        self.load_state_dict({**counters, **file.counters, **file.tensors}, assign=True)
        pixels = file.preprocessing
        self.preprocessing = PicturePreprocessing(pixels.mean, pixels.std, image_size)
        self.notes = file.notes
        self.eval()


def load_backbone(
    path: str | os.PathLike,
    *,
    branch: str = "online",
    image_size: int | None = None,
    preprocessing: Preprocessing | str | None = None,
    **reading: Any,
) -> LoadedBackbone:
    """Load a ResNet.

    Args:
        path: A checkpoint of ours, or the folder with it; converted weights; or another project's,
            in any layout that `common.backbone.read_backbone` knows.
        branch: "online" or "ema".
        image_size: Side of the pictures in pixels; None: what the checkpoint or its card says, or
            224.
        preprocessing: Mean and std, or "imagenet", "half", "R,G,B/R,G,B"; None: what the
            checkpoint or its card says.
        reading: ``layout`` and ``stride_in_1x1``, as `read_backbone` takes them.

    Returns:
        [n, 3, h, w] -> pooled features [n, d], with torchvision's names. ``fc`` is the identity,
        for a layer of your own.

    Raises:
        UserError: If there is no such file, or it holds no complete ResNet.
    """
    path = checkpoint_of(Path(path))
    if isinstance(preprocessing, str):
        preprocessing = parse_preprocessing(preprocessing)
    file = read_backbone(path, branch=branch, preprocessing=preprocessing, **reading)
    return from_checkpoint(file, image_size)


def checkpoint_of(path: Path) -> Path:
    """The file that is meant by a file, or by a run's folder."""
    return path / "checkpoint.pth" if path.is_dir() else path


def from_checkpoint(file: BackboneCheckpoint, image_size: int | None = None) -> LoadedBackbone:
    """The network of a checkpoint that was read; ``image_size`` as in `load_backbone`."""
    size = stated_size(file) if image_size is None else image_size
    require(
        _SMALLEST <= size <= _LARGEST,
        f"image size {size}: give a number of pixels from {_SMALLEST} to {_LARGEST}",
    )
    return LoadedBackbone(file, size)


def stated_size(file: BackboneCheckpoint) -> int:
    """Side of the crops that a network was trained on in pixels, or 224 where nothing says it."""
    value: Any = file.contents if file.card is None else file.card.get("pretraining")
    for key in ("config", "data", "image_size"):
        value = value.get(key) if isinstance(value, Mapping) else None
    is_size = type(value) is int and _SMALLEST <= value <= _LARGEST
    return value if is_size else DEFAULT_SIZE
