"""Composites of real photographs: cut-outs on photographed scenes, out of Debian packages."""

import json
import struct
import zlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import zstandard

from common.errors import UserError, require
from common.files import read_json
from common.pictures import BadPicture, decode, read_file
from pipeline.datasets import scene, shapes
from pipeline.datasets.scene import Placed, Range, Scene, SceneSource, Sprite, generator
from pipeline.datasets.sets import packages_in, unpack_library

VERSION = 3  # raise it whenever the pictures of given options change
_MAMMALS = ("hoofed", "carnivore", "smallmammal")
_OTHERS = {"plant": ("flower", "fruit", "vegetable"), "artefact": ("vehicle", "instrument", "tool")}
CLASS_SETS = {  # and "fine", the classes of the list themselves
    "coarse": {"animal": ("bird", "fish", *_MAMMALS), **_OTHERS},
    "medium": {"bird": ("bird",), "mammal": _MAMMALS, "fish": ("fish",), **_OTHERS},
}
_MAX_TURN = 15.0  # degrees
_MAX_ENLARGE = 2.5  # small cut-outs are not blown up beyond this
_MIN_CROP = 0.6  # of a background, as a share of its largest crop
LICENCE = (
    "Pictures out of tuxpaint-stamps-default (GPL-2), tuxpaint-data (GPL-2) and gcompris-qt-data "
    "(GPL-3, Creative Commons, public domain, file by file); the packages' copyright files apply. "
    "Not part of this project."
)
PACKAGES = ("tuxpaint-stamps-default", "gcompris-qt-data", "tuxpaint-data")
MAX_MISSING_SHARE = 0.05  # of the listed pictures, before a set is refused
_ZLIB, _FOLDER, _ZSTD = 1, 2, 4  # flags of a resource file's entries
_MAX_ENTRIES = 100_000  # of a resource file
_MAX_BYTES = 1 << 28  # of one unpacked file

Files = tuple[str, ...]

# -- the pictures: what the packages hold of two committed lists ----------------------------------


@dataclass(frozen=True)
class Library:
    """The pictures on disk.

    Attributes:
        root: Folder with cutouts/, backgrounds/ and licences/.
        cutouts: Fine class -> groups of near duplicates -> file below cutouts/.
        backgrounds: For each scene its files below backgrounds/.
        packages: Package -> version.
        num_missing: Listed files that these versions of the packages do not hold.
    """

    root: Path
    cutouts: dict[str, list[list[str]]]
    backgrounds: list[list[str]]
    packages: dict[str, str]
    num_missing: int


def listed_cutouts() -> dict[str, list[list[str]]]:
    """Return the committed list of cut-outs: class -> groups of near duplicates -> files."""
    return read_json(Path(__file__).with_name("photo_classes.json"))


def listed_backgrounds() -> dict[str, list[str]]:
    """Return the committed list of backgrounds: scene -> files (name.rcc/.., templates/..)."""
    return read_json(Path(__file__).with_name("photo_backgrounds.json"))


def open_library(packages_dir: Path | None, cache: Path) -> Library:
    """Return the pictures, fetching and unpacking what is not in the cache yet.

    Args:
        packages_dir: Folder with the .deb files (or with their unpacked `usr` folder), or None to
            use the ones in the cache and fetch what is missing there.
        cache: Folder for packages and pictures.
    Raises:
        UserError: If packages cannot be had or do not hold the listed pictures.
    """
    sources = packages_in(PACKAGES, packages_dir, cache, "up to 213 MB")
    cutouts, scenes = listed_cutouts(), listed_backgrounds()
    files = [("cutouts", f) for groups in cutouts.values() for group in groups for f in group]
    files += [("backgrounds", f) for group in scenes.values() for f in group]
    root, versions = unpack_library(
        sources, cache, json.dumps([cutouts, scenes]), partial(_copy_listed, files=files)
    )

    # What these versions of the packages hold of the lists.
    present = {file for folder, file in files if (root / folder / file).is_file()}
    num_missing = len(files) - len(present)
    require(
        num_missing <= MAX_MISSING_SHARE * len(files),
        f"{num_missing} of {len(files)} listed pictures are not in the packages {versions}; use "
        "those of Debian 12 with --packages-dir",
    )
    groups = {
        name: [kept for group in groups if (kept := [f for f in group if f in present])]
        for name, groups in cutouts.items()
    }
    grounds = [kept for group in scenes.values() if (kept := [f for f in group if f in present])]
    return Library(root, groups, grounds, versions, num_missing)


def _copy_listed(package: Path, out: Path, files: list[tuple[str, str]]) -> None:
    """Copy what an unpacked package holds of the listed (folder, file), and its terms."""
    share = package / "usr/share"
    pieces = {f"licences/{name}.txt": share / f"doc/{name}/copyright" for name in PACKAGES}
    resources: dict[Path, dict[str, str]] = {}  # resource file -> path inside it -> in the library
    for folder, file in files:
        holder, _, inside = file.partition("/")
        if folder == "cutouts":
            pieces[f"cutouts/{file}"] = share / "tuxpaint/stamps" / file
        elif holder == "templates":
            pieces[f"backgrounds/{file}"] = share / "tuxpaint" / file
        else:
            path = share / "gcompris-qt/rcc" / holder
            resources.setdefault(path, {})[inside] = f"backgrounds/{file}"
    contents = {name: path.read_bytes() for name, path in pieces.items() if path.is_file()}
    for path, names in resources.items():
        for place, data in read_rcc(path).items() if path.is_file() else ():
            if name := names.get(place.partition("/resource/")[2]):
                contents[name] = data
    for name, data in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


def read_rcc(file: Path) -> dict[str, bytes]:
    """Read all files of a Qt resource file, version 1 to 3.

    Returns:
        Contents by path inside the resource, e.g. "gcompris/src/.../sea1.webp".
    Raises:
        UserError: If it is no resource file, or damaged.
    """
    try:
        return _read_rcc(file.read_bytes())
    except (struct.error, zlib.error, zstandard.ZstdError, ValueError) as error:
        raise UserError(f"{file}: damaged Qt resource file ({error}); fetch it again") from error


def _read_rcc(raw: bytes) -> dict[str, bytes]:
    magic, version, tree, data, names = struct.unpack_from(">4s4I", raw)
    if magic != b"qres" or not 1 <= version <= 3:
        raise ValueError(f"starts with {magic!r}, version {version}; known are 1 to 3")

    # Walk the tree; entries are counted, so that a damaged tree cannot loop for ever.
    files, waiting, num_entries = {}, [(0, "")], 0
    while waiting:
        index, path = waiting.pop()
        num_entries += 1
        entry = tree + index * (14 if version == 1 else 22)
        name_offset, flags, count, first = struct.unpack_from(">IHII", raw, entry)
        if num_entries > _MAX_ENTRIES or (flags & _FOLDER and count > _MAX_ENTRIES):
            raise ValueError("its tree is damaged")
        if index:  # the root has no name
            (length,) = struct.unpack_from(">H", raw, names + name_offset)
            start = names + name_offset + 6
            path += raw[start : start + 2 * length].decode("utf-16-be")
        if flags & _FOLDER:
            waiting += [(first + i, f"{path}/" if path else "") for i in range(count)]
            continue
        (offset,) = struct.unpack_from(">I", raw, entry + 10)
        (length,) = struct.unpack_from(">I", raw, data + offset)
        (content,) = struct.unpack_from(f"{length}s", raw, data + offset + 4)
        if flags & _ZSTD:
            unpacker = zstandard.ZstdDecompressor()
            content = unpacker.decompress(content, max_output_size=_MAX_BYTES)
        elif flags & _ZLIB:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(content[4:], _MAX_BYTES)
            if not unpacker.eof:  # where the checksum is
                raise ValueError(f"{path} is cut short or larger than {_MAX_BYTES:,} bytes")
        files[path] = content
    return files


# -- the pictures of a set ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The pictures that one side of the split may use.

    Attributes:
        cutouts: Per label: per fine class: files below cutouts/.
        backgrounds: Files below backgrounds/.
    """

    cutouts: tuple[tuple[Files, ...], ...]
    backgrounds: Files

    def num_cutouts(self) -> int:
        """Return the number of cut-outs."""
        return sum(len(files) for kinds in self.cutouts for files in kinds)


def split(library: Library, classes: str, split_seed: int) -> tuple[tuple[str, ...], Part, Part]:
    """Divide cut-outs and backgrounds between training and test.

    About a third of the cut-outs of every fine class and a quarter of the scenes go to the test;
    near duplicates and pictures of one scene stay together.

    Args:
        library: The pictures.
        classes: "coarse", "medium" or "fine".
        split_seed: Chooses the split.
    Returns:
        Class names in label order, the training part, the test part.
    """
    table = CLASS_SETS.get(classes) or {name: (name,) for name in library.cutouts}
    divided = {
        name: _divide(groups, 1 / 3, generator("photos", split_seed, name))
        for name, groups in library.cutouts.items()
    }
    grounds = _divide(library.backgrounds, 1 / 4, generator("photos", split_seed, "backgrounds"))
    seen, unseen = (
        Part(
            tuple(tuple(divided[k][side] for k in kinds) for kinds in table.values()), grounds[side]
        )
        for side in (0, 1)
    )
    return tuple(table), seen, unseen


def _divide(groups: list[list[str]], share: float, rng: np.random.Generator) -> tuple[Files, Files]:
    """Divide groups so that about `share` of their files lands on the second side."""
    goal = share * sum(map(len, groups))
    sides: tuple[list[str], list[str]] = ([], [])
    for i in rng.permutation(len(groups)):
        room = goal - len(sides[1])
        sides[1 if room >= len(groups[i]) / 2 and room > 0 else 0].extend(groups[i])
    return tuple(sorted(sides[0])), tuple(sorted(sides[1]))


@dataclass(frozen=True)
class PhotoSource(SceneSource):
    """Makes the pictures of a photo set.

    Attributes:
        options: Sizes and statistics.
        class_names: Classes in label order.
        root: Folder of the picture library.
        seen: Pictures for train, pool and probe/train.
        unseen: Pictures for test and probe/val.
    """

    kind: ClassVar[str] = "photos"
    root: Path
    seen: Part
    unseen: Part

    def _attempt(self, rng: np.random.Generator, part: str, index: int) -> Scene:
        pictures = self.unseen if scene.is_held_out(part) else self.seen
        shape = scene.draw_shape(rng, self.options)
        ground = self._background(rng, pictures, shape)
        tone = ground.mean(axis=(0, 1))

        def draw(label: int, sizes: Range) -> Sprite:
            kinds = pictures.cutouts[label]
            files = kinds[int(rng.integers(len(kinds)))]
            name = files[int(rng.integers(len(files)))]
            size = min(shape) * scene.log_uniform(rng, *sizes)
            levels = _load_cutout(self.root, name, self.options.long_side)
            return _cut_out(rng, levels, size, tone)

        items = self.place_objects(rng, shape, part, index, draw)
        # Soft-edged pieces of other scenes lie in front of the objects.
        for _ in range(min(int(rng.poisson(0.3 * self.options.clutter)), 6)):
            side = max(8, round(min(shape) * scene.log_uniform(rng, 0.12, 0.35)))
            outline = shapes.blob(rng, int(rng.integers(4, 8)), 0.6) * (side * 0.45) + side / 2
            mask = cv2.blur(scene.filled((side, side), [outline]), (3, 3))
            piece = self._background(rng, pictures, (side, side))
            sprite = Sprite(piece, mask.astype(np.float32) / 255)
            x, y = scene.draw_place(rng, (side, side), shape, [], 0.5)
            items.append(Placed(sprite, x, y))
        items, objects, masks = scene.settle(items, shape)
        shadow = (rng.uniform(-0.06, 0.06), rng.uniform(0.0, 0.06), rng.uniform(0.1, 0.45))
        image = scene.paint(ground, items, shadow)
        return Scene(scene.finish(rng, image, cast=0.05), objects, masks)

    def _background(
        self, rng: np.random.Generator, pictures: Part, shape: tuple[int, int]
    ) -> np.ndarray:
        """Return a random crop of a random background, float32 (h, w, 3)."""
        name = pictures.backgrounds[int(rng.integers(len(pictures.backgrounds)))]
        whole = _load_background(self.root, name, round(self.options.short_side / _MIN_CROP))
        scale = min(whole.shape[0] / shape[0], whole.shape[1] / shape[1])
        scale *= rng.uniform(_MIN_CROP, 1.0)
        height, width = (max(1, int(side * scale)) for side in shape)
        top = int(rng.integers(whole.shape[0] - height + 1))
        left = int(rng.integers(whole.shape[1] - width + 1))
        crop = whole[top : top + height, left : left + width]
        how = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        image = cv2.resize(crop, shape[::-1], interpolation=how).astype(np.float32)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return np.clip(_jitter(rng, np.ascontiguousarray(image), 0.15), 0, 255)


def _jitter(rng: np.random.Generator, image: np.ndarray, amount: float) -> np.ndarray:
    """Change brightness, contrast and saturation by up to `amount`."""
    grey = image.mean(axis=2, keepdims=True)
    saturation = np.float32(rng.uniform(1 - 2 * amount, 1 + amount))
    image = (image - grey) * saturation + grey
    level = np.float32(image.mean())
    contrast, gain = rng.uniform(1 - amount, 1 + amount, 2).astype(np.float32)
    return ((image - level) * contrast + level) * gain


def _cut_out(
    rng: np.random.Generator, levels: list[np.ndarray], size: float, tone: np.ndarray
) -> Sprite:
    """Scale, turn, mirror and tint one cut-out.

    Args:
        rng: Source of random numbers.
        levels: The cut-out, premultiplied BGRA uint8, at full, half, quarter .. size.
        size: Longer side of the result in pixels, before turning.
        tone: Mean colour of the background, BGR 0..255, to which the cut-out is drawn a little.
    """
    size = min(size, _MAX_ENLARGE * max(levels[0].shape[:2]))
    level = next((m for m in reversed(levels) if max(m.shape[:2]) >= size), levels[0])
    scale = size / max(level.shape[:2])
    turn = np.deg2rad(rng.uniform(-_MAX_TURN, _MAX_TURN))
    mirror = -1 if rng.random() < 0.5 else 1
    matrix = scale * scene.rotation(turn) @ np.diag([mirror, 1])
    moved = scene.warped(level, matrix, cv2.INTER_LINEAR).astype(np.float32)
    alpha = moved[:, :, 3] * np.float32(1 / 255)
    image = moved[:, :, :3] / np.maximum(alpha, 0.02)[:, :, None]
    image = _jitter(rng, image, 0.2)
    tint = (tone + 10) / (float(tone.mean()) + 10)
    image *= tint.astype(np.float32) ** np.float32(0.25)
    soft = cv2.blur(alpha, (3, 3))
    return Sprite(image, np.minimum(alpha, 1.3 * soft) if rng.random() < 0.5 else alpha)


@cache
def _load_cutout(root: Path, name: str, max_side: int) -> list[np.ndarray]:
    """Read a cut-out as a pyramid of premultiplied BGRA pictures (uint8), trimmed to its mask.

    Raises:
        UserError: If it does not decode or has no transparency.
    """
    path = root / "cutouts" / name
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 4:
        raise UserError(
            f"{path}: no cut-out (8 bits, with transparency); delete the cache, run again"
        )
    x, y, width, height = cv2.boundingRect((image[:, :, 3] > 20).astype(np.uint8))
    require(width > 0, f"{path}: fully transparent; delete the cache, run again")
    image = image[y : y + height, x : x + width].astype(np.float32)
    image[:, :, :3] *= image[:, :, 3:] / 255
    levels = [_shrink(image, min(1.0, max_side / max(image.shape[:2])))]
    while min(levels[-1].shape[:2]) >= 16:
        levels.append(_shrink(levels[-1], 0.5))
    return [np.round(level).astype(np.uint8) for level in levels]


@cache
def _load_background(root: Path, name: str, short_side: int) -> np.ndarray:
    """Read a background, uint8 BGR, reduced to a shorter side of `short_side` pixels."""
    path = root / "backgrounds" / name
    try:
        image = np.ascontiguousarray(decode(read_file(path), where=str(path))[:, :, ::-1])
    except BadPicture as error:
        raise UserError(f"{error}; delete the cache, run again") from error
    return _shrink(image, min(1.0, short_side / min(image.shape[:2])))


def _shrink(image: np.ndarray, scale: float) -> np.ndarray:
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
