"""From encoded pictures to uint8 views: decoding, random resized crops, changes in the worker.

Boxes and flips of many samples are drawn together, by counter: a box is a function of the seed, the
sample's hash and repeat index, the view and the picture's size. Its distribution is that of
torchvision's RandomResizedCrop.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional

from common.errors import require
from common.pictures import BadPicture, decode, decode_fast, read_header, upright
from pretrain.data.policy import Interpolation, SmallCrops, ViewPolicy, draw_parameters
from pretrain.data.random_numbers import draw_uniforms

REDUCTIONS = (8, 4, 2)  # by which libjpeg decodes smaller, in the domain of the cosine transform
_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
_NO_BLUR = 1.55  # shrinking by less: bilinear alone, nearly as close to an antialiased resize
_BLUR_TOO = 1.2  # by more than this the other axis is blurred too: closer, and faster than one
_CUBIC = 1.7  # below, a binomial blur is a little too much, and bicubic sharpens it back
_MAX_BINOMIAL = 2.6  # above, one binomial blur is too little


class Sample(NamedTuple):
    """A sample that is to be decoded.

    Attributes:
        sample_id: Its number.
        sample_hash: 64-bit hash of its name.
        repeat: How often it was due before.
        label: -1 if there is none.
        data: The encoded picture; None if the sample has none.
        name: What to call it in messages, if it was not looked up by its number.
    """

    sample_id: int
    sample_hash: int
    repeat: int
    label: int
    data: bytes | memoryview | None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ViewWriter:
    """Views of each picture: random resized crops with or without photometric changes, or one
    central crop.

    Attributes:
        image_size: Side of a view in pixels.
        views: Policy of each view: two for pretraining, one for linear training. "central": one
            central crop, decoded exactly, for features and pictures.
        seed: Seed of the run.
        with_colours: Whether the photometric changes are made here, on uint8; otherwise they are
            left to the device.
        small_crops: Further views; they come behind the others.
    Raises:
        UserError: If the size is impossible.
    """

    image_size: int
    views: tuple[ViewPolicy, ...] | Literal["central"]
    seed: int = 0
    with_colours: bool = False
    small_crops: SmallCrops = field(default_factory=SmallCrops)

    def __post_init__(self) -> None:
        size = self.image_size
        require(size >= 1, f"image size {size}: must be at least 1 pixel")

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """How many views of one size there are, and their side in pixels: the large ones first."""
        small = self.small_crops
        num = 1 if self.views == "central" else len(self.views)
        return [(num, self.image_size)] + [(small.num, small.image_size)] * (small.num > 0)

    def write(self, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> dict[int, str]:
        """Decode samples once each and write their views.

        Args:
            samples: n of them.
            out: uint8 [n, s, s, 3] of each view, written in place.
        Returns:
            {row: reason} of the pictures that do not decode.
        """
        # The headers of all come first: a picture's size decides its crops, and these how much
        # of it must be decoded.
        failed: dict[int, str] = {}
        rows, headers = [], []
        for row, sample in enumerate(samples):
            try:
                if sample.data is None:
                    raise BadPicture("holds no picture")
                if self.views == "central":
                    image = decode(sample.data, where="picture")
                    out[0][row] = center_crop(image, self.image_size)
                else:
                    headers.append(read_header(sample.data, where="picture"))
                    rows.append(row)
            except BadPicture as error:
                failed[row] = str(error)
        if not rows or self.views == "central":
            return failed

        # Crops and photometric changes of all samples are drawn together.
        sizes = np.array([(header.height, header.width) for header in headers], np.int64)
        hashes = np.array([samples[row].sample_hash for row in rows], np.uint64).view(np.int64)
        repeats = np.array([samples[row].repeat for row in rows], np.int64)
        policies = [*self.views, *[self.small_crops] * self.small_crops.num]
        view_sizes = [size for num, size in self.blocks for _ in range(num)]
        crops, steps = [], []
        for number, view in enumerate(policies):
            of_view: dict[str, Any] = {"seed": self.seed, "view_index": number}
            crops.append(draw_crops(view, sizes, hashes, repeats, **of_view))
            drawn = []
            if self.with_colours:
                drawn = draw_parameters(view, hashes, repeats, **of_view)
            made = [operation.picture_steps(own, view_sizes[number]) for operation, own in drawn]
            steps.append([[*chain(*(own[k] for own in made))] for k in range(len(rows))])

        # Crops are cut out of the pixels as stored, and turned alone.
        for k, header in enumerate(headers):
            if header.orientation != 1:
                for view in crops:
                    view.boxes[k] = header.stored_box(view.boxes[k].tolist())

        # Each picture is decoded once, down to its lowest crop, and no larger than its smallest one
        # (of each size of views) needs.
        needed, of_size = [], iter(crops)
        for num, size in self.blocks:
            sides = np.min([next(of_size).boxes[:, 2:] for _ in range(num)], axis=(0, 2))
            needed.append(reductions_for(sides, size))
        reductions = reduce(np.minimum, needed).tolist()
        bottoms = np.max([view.boxes[:, 0] + view.boxes[:, 2] for view in crops], axis=0).tolist()
        boxes = [view.boxes.tolist() for view in crops]
        flips = [view.flips.tolist() for view in crops]
        for k, row in enumerate(rows):
            data = samples[row].data
            assert data is not None
            try:
                image, reduction = decode_fast(
                    data, headers[k], reductions[k], where="picture", num_rows=bottoms[k]
                )
            except BadPicture as error:
                failed[row] = str(error)
                continue
            for view, targets in enumerate(out):
                crop(
                    image, boxes[view][k], view_sizes[view], is_flipped=flips[view][k],
                    reduction=reduction, orientation=headers[k].orientation, out=targets[row],
                    interpolation=policies[view].crop.interpolation,
                )  # fmt: skip

        # Colours change after all is decoded: between two decodings each of these functions would
        # have to come into the processor's caches again, which costs more than the pixels do.
        for view, targets in enumerate(out):
            for k, row in enumerate(rows):
                if row not in failed:
                    for step in steps[view][k]:
                        step(targets[row])
        return failed


@dataclass(frozen=True)
class Crops:
    """One view's crops of a batch.

    Attributes:
        boxes: int64 [n, 4], top, left, height, width in pixels of the whole picture.
        flips: bool [n], True where the view is turned left to right.
    """

    boxes: np.ndarray
    flips: np.ndarray


def draw_crops(
    view: ViewPolicy,
    sizes: np.ndarray,
    sample_hashes: np.ndarray,
    repeats: np.ndarray | int,
    *,
    seed: int,
    view_index: int,
) -> Crops:
    """Crops of one view of each picture: a function of (seed, repeat, hash, view) and its size.

    Args:
        view: The policy.
        sizes: int64 [n, 2], height and width in pixels.
        sample_hashes: int64 [n], the samples' hashed names.
        repeats: int64 [n], how often each sample was due before; or one number for all.
        seed: Seed of the run.
        view_index: Number of the view, from 0.
    """
    draws = draw_uniforms(
        "crop", sample_hashes, repeats, 1 + 4 * _ATTEMPTS, seed=seed, view_index=view_index
    )
    boxes = boxes_from_draws(draws[1:], sizes, view.crop.scale, view.crop.ratio)
    return Crops(boxes, draws[0] < view.flip.probability)


def boxes_from_draws(
    draws: np.ndarray, sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes as torchvision's RandomResizedCrop draws them: some attempts, then a central box.

    Args:
        draws: float64 [4 * attempts, n] in [0, 1): of each attempt area, ratio, top and left.
        sizes: int64 [n, 2], height and width in pixels.
        scale: Range of the area, as a share of the picture's.
        ratio: Range of width / height.
    Returns:
        int64 [n, 4], top, left, height, width, inside the picture.
    """
    area_draw, ratio_draw, top_draw, left_draw = draws.reshape(-1, 4, len(sizes)).swapaxes(0, 1)
    heights, widths = sizes[:, 0], sizes[:, 1]
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    area = heights * widths * (scale[0] + area_draw * (scale[1] - scale[0]))
    aspect = np.exp(log_low + ratio_draw * (log_high - log_low))
    crop_widths, crop_heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (crop_widths > 0) & (crop_widths <= widths)
    fits &= (crop_heights > 0) & (crop_heights <= heights)
    first = fits.argmax(axis=0), np.arange(len(sizes))  # of each picture, that fits
    crop_heights, crop_widths = crop_heights[first], crop_widths[first]
    tops = np.floor(top_draw[first] * (heights - crop_heights + 1))
    lefts = np.floor(left_draw[first] * (widths - crop_widths + 1))
    boxes = np.stack([tops, lefts, crop_heights, crop_widths], axis=1).astype(np.int64)
    is_central = ~fits.any(axis=0)
    boxes[is_central] = _central_boxes(heights[is_central], widths[is_central], ratio)
    return boxes


def _central_boxes(
    heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]
) -> np.ndarray:
    """The largest centred boxes [n, 4] whose aspect ratio is within `ratio`."""
    narrow, wide = widths / heights < ratio[0], widths / heights > ratio[1]
    crop_heights = np.where(narrow, np.clip(np.rint(widths / ratio[0]), 1, heights), heights)
    crop_widths = np.where(wide, np.clip(np.rint(heights * ratio[1]), 1, widths), widths)
    tops, lefts = (heights - crop_heights) // 2, (widths - crop_widths) // 2
    return np.stack([tops, lefts, crop_heights, crop_widths], axis=1).astype(np.int64)


def reductions_for(sides: np.ndarray, size: int) -> np.ndarray:
    """How much smaller each picture may be decoded: its crops stay larger than the view.

    Args:
        sides: int64 [n], the shortest side of any crop of the picture, in pixels.
        size: Side of the view in pixels.
    Returns:
        int64 [n] of 8, 4, 2 or 1.
    """
    reductions = np.ones(len(sides), np.int64)
    for reduction in reversed(REDUCTIONS):
        reductions[sides >= reduction * (size + 1)] = reduction
    return reductions


def crop(
    image: np.ndarray,
    box: Sequence[int],
    size: int,
    *,
    is_flipped: bool = False,
    reduction: int = 1,
    orientation: int = 1,
    out: np.ndarray | None = None,
    interpolation: Interpolation = "bilinear",
) -> np.ndarray:
    """Cut a box out of a picture, turn it upright, and resize it to a view.

    Args:
        image: uint8 [height, width, 3], the picture as stored, decoded `reduction` times smaller.
        box: Top, left, height and width in pixels of the whole stored picture. Its edges are
            rounded to whole pixels of the reduced one.
        size: Side of the view in pixels.
        is_flipped: Turn the view left to right.
        reduction: 1, 2, 4 or 8.
        orientation: EXIF's: how the stored pixels are to be turned.
        out: Where to write the view, contiguous; a new array if none.
        interpolation: See `resize`.
    Returns:
        uint8 [size, size, 3].
    """
    top, left, bottom, right = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if reduction > 1:
        half = reduction // 2
        top, left = (top + half) // reduction, (left + half) // reduction
        bottom, right = (bottom + half) // reduction, (right + half) // reduction
    part = upright(image[top:bottom, left:right], orientation)
    view = resize(part, size, size, out, interpolation)
    return cv2.flip(view, 1, dst=view) if is_flipped else view


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    out: np.ndarray | None = None,
    interpolation: Interpolation = "bilinear",
) -> np.ndarray:
    """Resize with little aliasing at little more than the cost of bilinear interpolation.

    Up to a factor of 1.55 bilinear; up to 2.6 a binomial blur first (1 2 1, along the axes that
    shrink by more than 1.2), then bicubic or bilinear, whichever is closer to a tent as wide as the
    factor; above 2.6 that tent itself, exact, as Pillow's and torch's antialiased bilinear. Bicubic
    is exact for every factor, as theirs.

    Args:
        image: uint8 [h, w, 3]; a slice is fine.
        height: New height in pixels.
        width: New width in pixels.
        out: Where to write the result, contiguous; a new array if none.
        interpolation: bilinear or bicubic.
    Returns:
        uint8 [height, width, 3].
    """
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    fy, fx = image.shape[0] / height, image.shape[1] / width
    if interpolation == "bicubic" or fy > _MAX_BINOMIAL or fx > _MAX_BINOMIAL:
        whole = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        small = functional.interpolate(whole, (height, width), mode=interpolation, antialias=True)
        out[:] = small[0].permute(1, 2, 0).numpy()
        return out
    if fy <= _NO_BLUR and fx <= _NO_BLUR:
        return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    taps = (3 if fx > _BLUR_TOO else 1, 3 if fy > _BLUR_TOO else 1)
    kind = cv2.INTER_CUBIC if fy * fx < _CUBIC**2 else cv2.INTER_LINEAR
    blurred = cv2.GaussianBlur(image, taps, 0)
    return cv2.resize(blurred, (width, height), dst=out, interpolation=kind)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Central square of 7/8 of the short side (256 -> 224 in the usual protocol), resized.

    Args:
        image: uint8 [height, width, 3].
        size: Side of the result in pixels.
    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * 7 / 8))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)
