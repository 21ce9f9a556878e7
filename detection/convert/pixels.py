"""What a network expects of its pixels, and how Detectron2 is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """Mean and standard deviation of red, green, blue for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, picture: Tensor) -> Tensor:
        """uint8 RGB (H, W, 3) -> float32 (1, 3, H, W)."""
        pixels = picture.permute(2, 0, 1)[None].to(torch.float32) / 255
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / std

    def for_detectron2(self) -> dict[str, Any]:
        """The card's entry; Detectron2 counts pixels from 0 to 255."""
        return {
            "pixel_mean": [round(255 * value, 6) for value in self.mean],
            "pixel_std": [round(255 * value, 6) for value in self.std],
            "input_format": "RGB",
            "stride_in_1x1": False,
        }


# Statistics of ImageNet, used by torchvision and nearly every self-supervised code.
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMED = {"imagenet": IMAGENET, "half": Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def parse_preprocessing(text: str) -> Preprocessing:
    """Read "imagenet", "half", or "R,G,B/R,G,B" (mean/std in [0, 1]).

    Raises:
        UserError: If it is none of these.
    """
    if text in NAMED:
        return NAMED[text]
    try:
        mean, std = (tuple(float(part) for part in half.split(",")) for half in text.split("/"))
    except ValueError:
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3:
        raise UserError(
            f"--preprocessing {text!r}: give imagenet, half, or mean/std in [0, 1] as "
            "0.485,0.456,0.406/0.229,0.224,0.225"
        )
    return _checked(mean, std)


def from_checkpoint(given: Any) -> Preprocessing:
    """Our checkpoint's `preprocessing`; ImageNet's statistics if there is none.

    Raises:
        UserError: If it is incomplete or the channels are not RGB.
    """
    if given is None:
        return IMAGENET
    if not isinstance(given, Mapping) or not {"mean", "std"} <= set(given):
        raise UserError(f"preprocessing {given!r}: expected mean, std and order")
    order = str(given.get("order", "RGB")).upper()
    if order != "RGB":
        raise UserError(f"preprocessing order {order!r}: only RGB networks convert")
    return _checked(tuple(map(float, given["mean"])), tuple(map(float, given["std"])))


def _checked(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or max(*mean, *std) > 1 or min(mean) < 0:
        raise UserError(
            f"mean {mean} / std {std}: give three numbers each, for pixels in [0, 1], std above 0"
        )
    return Preprocessing((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
