"""What tensors do not say: which pixels a network expects, and where its stride lies.

Known from the checkpoint, from the card beside it, from timm's config.json, or from the caller;
where nothing states it, a conversion from Detectron2 is refused and others assume ImageNet's
statistics, openly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256_of
from common.resnet import Arch


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


D2_CARD, TORCHVISION_CARD = "fa-d2-1", "fa-torchvision-1"
HUB_CONFIG = "pretrained_cfg of config.json"  # where `with_hub_config` puts it
_CARD_KEYS = {"arch", "preprocessing", "branch", "source", "weights_sha256"}
_ASSUMPTIONS = {
    "preprocessing": "pixel statistics are ImageNet's by assumption: nothing states them",
    "stride": "the stride is taken to lie in the 3x3 convolutions: nothing states it",
}


@dataclass(frozen=True)
class Conventions:
    """Pixels and stride of a network, and where both are known from; see `source.Source`."""

    preprocessing: Preprocessing
    stride_in_1x1: bool
    origins: dict[str, str]
    card: dict[str, Any] | None
    notes: tuple[str, ...]


def find(
    path: Path,
    layout: str,
    arch: Arch,
    contents: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None,
    stride_in_1x1: bool | None,
    assume: bool,
) -> Conventions:
    """Find a checkpoint's conventions.

    Args:
        path: The file; its card is looked for.
        layout: Its layout.
        arch: Its architecture.
        contents: The whole checkpoint.
        preprocessing: What the caller says.
        stride_in_1x1: What the caller says.
        assume: See `source.read_source`.

    Raises:
        UserError: If a Detectron2 file leaves something unsaid, or a card is another file's.
    """
    card, fault = read_own_card(path)
    if fault and not assume and preprocessing is None:
        raise UserError(f"{fault}; convert again, or remove the card and give --preprocessing")
    pixels, origin = _stated_pixels(layout, contents, card)
    if preprocessing is not None:
        pixels, origin = preprocessing, "option"
    stride, stride_origin = False, "layout"
    if card is not None and layout == "detectron2":
        stride, stride_origin = _card_stride(card), "card"
    elif layout == "detectron2" and arch.is_bottleneck:  # basic blocks know one place only
        stride, stride_origin = (
            bool(stride_in_1x1),
            "assumed" if stride_in_1x1 is None else "option",
        )
    origins = {"preprocessing": origin, "stride": stride_origin}
    assumed = [what for what, known_from in origins.items() if known_from == "assumed"]
    if layout == "detectron2" and assumed and card is None and not assume:
        raise _unsaid(path, assumed)
    notes = (*((fault,) if fault else ()), *(_ASSUMPTIONS[what] for what in assumed))
    return Conventions(pixels, stride, origins, card, notes)


def _stated_pixels(
    layout: str, contents: Mapping[str, Any], card: Mapping[str, Any] | None
) -> tuple[Preprocessing, str]:
    """Pixel statistics and where they come from."""
    if layout == "ours" and contents.get("preprocessing") is not None:
        return _pixels(contents["preprocessing"]), "checkpoint"
    if HUB_CONFIG in contents:
        return _pixels(contents[HUB_CONFIG]), "config"
    if card is None:
        return IMAGENET, "assumed"
    earlier = card.get("origins")
    is_assumed = isinstance(earlier, dict) and earlier.get("preprocessing") == "assumed"
    return _card_pixels(card), "assumed" if is_assumed else "card"


def _unsaid(path: Path, assumed: list[str]) -> UserError:
    options = {"preprocessing": "--preprocessing", "stride": "--stride-in 3x3"}
    return UserError(
        f"has no card beside it ({path.with_suffix('.json').name}), and a Detectron2 file itself "
        "does not say which pixels the network expects or where its bottlenecks have their "
        f"stride; give {' and '.join(options[what] for what in assumed)} if you know (RGB only)"
    )


def with_hub_config(path: Path, checkpoint: Any) -> Any:
    """Add what timm's `config.json` beside published weights says: architecture and pixels."""
    if path.suffix not in (".safetensors", ".bin") or not isinstance(checkpoint, Mapping):
        return checkpoint
    try:
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        name, stated = config["architecture"], config["pretrained_cfg"]
        pixels = {key: stated[key] for key in ("mean", "std")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return checkpoint
    return {"state_dict": checkpoint, "arch": str(name), HUB_CONFIG: pixels}


def read_own_card(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The card beside a weight file, if it is one of ours and describes this very file.

    Returns:
        (card, "") or (None, why there is none; "" if no such file lies there).
    """
    place = path.with_suffix(".json")
    card = read_any_card(place)
    if card is None:
        return None, ""
    if card["weights_sha256"] != sha256_of(path):
        return None, f"{place.name} beside it describes another file (sha256 differs)"
    return card, ""


def read_any_card(place: Path) -> dict[str, Any] | None:
    """A JSON file if it is a card of ours, whatever it describes."""
    try:
        card = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_card = isinstance(card, dict) and card.get("format") in (D2_CARD, TORCHVISION_CARD)
    if not is_card or not set(card) >= _CARD_KEYS or not isinstance(card["source"], dict):
        return None
    return card if {"file", "sha256", "layout"} <= card["source"].keys() else None


def _pixels(given: Any) -> Preprocessing:
    """Mean and deviation from a checkpoint or a card.

    Raises:
        UserError: If they are no three numbers each.
    """
    try:
        return from_checkpoint(given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"preprocessing {given!r:.120}: no mean and std ({error})") from error


def _card_pixels(card: Mapping[str, Any]) -> Preprocessing:
    """A card's pixel statistics, in [0, 1]."""
    given = card["preprocessing"]
    if not isinstance(given, Mapping):
        raise UserError("its card has no preprocessing; convert the checkpoint again")
    if card["format"] == TORCHVISION_CARD:
        return _pixels(given)
    try:
        if given["input_format"] != "RGB":
            raise UserError(f"input_format {given['input_format']!r}: only RGB networks convert")
        unit = {new: [round(value / 255, 8) for value in given[old]]
                for new, old in (("mean", "pixel_mean"), ("std", "pixel_std"))}  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"its card's preprocessing is incomplete ({error!r})") from error
    return _pixels(unit)


def _card_stride(card: Mapping[str, Any]) -> bool:
    """Whether a card puts the stride into the 1x1 convolutions."""
    stride = card["preprocessing"].get("stride_in_1x1", False)
    if type(stride) is not bool:
        raise UserError(f"its card's stride_in_1x1 is {stride!r:.40}, not true or false")
    return stride
