"""Augmentation policies: how the views of a picture are made, as settings.

A policy says for each of two views, and for further small ones (multi-crop), the crop, the flip and
every photometric operation with its probability and ranges. Presets are named policies. Nothing
here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from common.config import overlaid, with_sections
from common.errors import UserError, at_least, require, unknown, within_0_and_1
from pretrain.data.augmentations.operation import Operation, Parameters
from pretrain.data.random_numbers import draw_uniforms

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Crop:
    """A random part of the picture, resized to the view (torchvision's RandomResizedCrop).

    Attributes:
        scale: Range of its area, as a share of the picture's.
        ratio: Range of width / height, drawn uniformly in its logarithm.
        interpolation: How it is resized, antialiased: bilinear, approximated for speed, or bicubic,
            exact as Pillow's. Bicubic is sharper, and slower.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        low, high = self.scale
        require(0 < low <= high <= 1, f"crop.scale {self.scale}: must satisfy 0 < low <= high <= 1")
        low, high = self.ratio
        require(0 < low <= high, f"crop.ratio {self.ratio}: must satisfy 0 < low <= high")


@dataclass(frozen=True)
class Flip:
    """A turn left to right."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        within_0_and_1(self, "flip", "probability")


@with_sections(Operation.registry)
@dataclass(frozen=True)
class ViewPolicy:
    """How one view is made; one more section for each registered operation, off by default."""

    crop: Crop = field(default_factory=Crop)
    flip: Flip = field(default_factory=Flip)

    @property
    def operations(self) -> list[Operation]:
        """The operations that ever act, in their order."""
        every = [value for value in vars(self).values() if isinstance(value, Operation)]
        return sorted((one for one in every if one.probability), key=lambda one: one.position)


@dataclass(frozen=True)
class SmallCrops(ViewPolicy):
    """Views of a small part of the picture beside the two large ones: multi-crop (SwAV).

    All are made in the same way, by default as view 1 but for the crop's scale.
    """

    num: int = 0  # per picture; SwAV: 6
    image_size: int = 96  # side, pixels

    def __post_init__(self) -> None:
        at_least(self, "data.augmentation.small_crops", num=0, image_size=16)


DEFAULT_PRESET = "asymmetric"
_SMALL_SCALE = (0.05, 0.14)  # SwAV, arXiv 2006.09882
_WEAK = {
    "crop": {"scale": (0.2, 1.0)},
    "jitter": {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
               "hue": 0.1},
    "grey": {"probability": 0.2},
}  # fmt: skip
_STRONG = {
    "crop": {"scale": (0.08, 1.0)},
    "jitter": {"probability": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8,
               "hue": 0.2},
    "grey": {"probability": 0.2},
    "blur": {"probability": 0.5, "sigma": (0.1, 2.0)},
}  # fmt: skip
# BYOL: arXiv 2006.07733, appendix B.
_BYOL = _WEAK | {"crop": {"scale": (0.08, 1.0)}, "blur": {"probability": 1.0, "sigma": (0.1, 2.0)}}
_BYOL["jitter"] = _WEAK["jitter"] | {"saturation": 0.2}
_SOLARIZE = {"solarize": {"probability": 0.2}}
# moco/loader.py and main_moco.py (--aug-plus) of facebookresearch/moco; SimSiam's is the same.
_MOCO_V2 = _WEAK | {"blur": {"probability": 0.5, "sigma": (0.1, 2.0)}}
_WHOLE, _CROPS = {"crop": {"scale": (1.0, 1.0)}}, {"crop": {"scale": (0.2, 1.0)}}
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": (_WHOLE, _WHOLE),  # flips alone
    "crops": (_CROPS, _CROPS),  # and flips
    "symmetric_weak": (_WEAK, _WEAK),
    "symmetric_strong": (_STRONG, _STRONG),
    "moco_v2": (_MOCO_V2, _MOCO_V2),
    "asymmetric": (_BYOL, _BYOL | {"blur": {"probability": 0.1, "sigma": (0.1, 2.0)}} | _SOLARIZE),
    "asymmetric_strong": (_WEAK, _STRONG | _SOLARIZE),
}


_View = TypeVar("_View", bound=ViewPolicy)


def _built(cls: type[_View], settings: dict[str, Any]) -> _View:
    sections = {item.name: item.default_factory for item in fields(cls)}
    return cls(**{name: sections[name](**values) for name, values in settings.items()})  # type: ignore[misc]


def preset_view(number: int, preset: str = DEFAULT_PRESET) -> ViewPolicy:
    """View 0 or 1 of a preset."""
    return _built(ViewPolicy, PRESETS[preset][number])


def _small_as(view1: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of small crops that follow from those of view 1."""
    return overlaid(view1, {"crop": {"scale": _SMALL_SCALE}})


def preset_small_crops(preset: str = DEFAULT_PRESET, num: int = 0, **options: Any) -> SmallCrops:
    """Small crops that go with a preset."""
    return replace(_built(SmallCrops, _small_as(PRESETS[preset][0])), num=num, **options)


@dataclass(frozen=True)
class AugmentationPolicy:
    """Two views, perhaps small crops beside: a preset, or one with some settings changed.

    In YAML the preset's name alone will do: ``augmentation: moco_v2``.
    """

    short_key: ClassVar[str] = "preset"

    preset: str = DEFAULT_PRESET
    view1: ViewPolicy = field(default_factory=partial(preset_view, 0))
    view2: ViewPolicy = field(default_factory=partial(preset_view, 1))
    small_crops: SmallCrops = field(default_factory=preset_small_crops)

    @staticmethod
    def defaults_for(raw: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the preset that `raw` names (``common.config``)."""
        name = raw.get("preset", DEFAULT_PRESET)
        if name not in PRESETS:
            raise UserError(unknown(f"preset {name!r}", str(name), PRESETS))
        view1, view2 = PRESETS[name]
        small = _small_as(overlaid(view1, raw.get("view1", {})))
        return {"view1": view1, "view2": view2, "small_crops": small}

    @classmethod
    def of(cls, preset: str) -> AugmentationPolicy:
        """A preset as it is."""
        views = preset_view(0, preset), preset_view(1, preset)
        return cls(preset, *views, preset_small_crops(preset))

    @property
    def views(self) -> tuple[ViewPolicy, ViewPolicy]:
        """Both large views."""
        return self.view1, self.view2


Drawn = list[tuple[Operation, Parameters]]


def draw_parameters(
    view: ViewPolicy,
    sample_hashes: np.ndarray,
    repeats: np.ndarray | int,
    *,
    seed: int,
    view_index: int,
) -> Drawn:
    """The operations of a view, in their order, with the parameters of each sample of a batch.

    Args:
        view: The policy.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], how often each sample was due before; or one number for all.
        seed: Seed of the run.
        view_index: Number of the view, from 0.
    """
    drawn = []
    for operation in view.operations:
        purpose, first = operation.stream
        numbers = draw_uniforms(
            purpose, sample_hashes, repeats, first + operation.num_draws, seed=seed,
            view_index=view_index,
        )  # fmt: skip
        drawn.append((operation, operation.draw(numbers[first:])))
    return drawn
