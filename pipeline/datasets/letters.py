"""Capital letters of many fonts: the same 26 classes in shapes that no data augmentation makes.

Pool and probe show a letter, white on black. Labelled pictures are grey scenes with several.
Families of fonts are divided between the pool, the training side and the test.
"""

from __future__ import annotations

import hashlib
import shutil
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from PIL import ImageFont
from tqdm import tqdm

from common.errors import require
from common.files import read_json, read_record_or_none, write_json
from pipeline.datasets import procedural, scene
from pipeline.datasets.procedural import Light, ProceduralSource
from pipeline.datasets.scene import Scene, Sprite, generator
from pipeline.datasets.sets import packages_in, unpack_library

VERSION = 1  # raise it whenever the pictures of given options change
CLASSES = tuple(string.ascii_uppercase)
LICENCE = (
    "Glyphs of fonts under their own licences (OFL, GPL with font exception, Apache, public domain "
    "and others), see the copyright files of the packages. Not part of this project."
)
_SUFFIXES = (".ttf", ".otf", ".pfb", ".t1")
_MIN_FAMILIES = 5
_POOL_SHARE = 0.7  # of the families
_CHECK_PX = 48  # size of the glyphs that fonts are judged by
_CHECKED = "ABGQRSW"  # letters that tell two fonts apart
_ALIKE_PX = 16  # side of the thumbnails that are compared with the letters' means
_MIN_ALIKE = 0.25  # of a font's letters must look most like that letter; chance is 1 / 26
_FILL = 0.7  # of a picture's side: the longest side of a font's letters
_MOVE = 3 / 40  # of a picture's side: the largest shift from the middle
_SCENE_PX = 112  # size of the glyphs that are warped into scenes
_MAX_TURN = 25.0  # degrees, in scenes

# -- the fonts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fonts:
    """Fonts whose capitals are all there and differ from those of the others.

    Attributes:
        root: Their folder.
        files: (path below `root`, family): the family is the first word of its name.
        left_out: Reason -> number of font files.
        digest: Of the files' names and sizes.
    """

    root: Path
    files: tuple[tuple[str, str], ...]
    left_out: dict[str, int]
    digest: str


def listed_packages() -> dict[str, str]:
    """Return the committed list of Debian packages: name -> version that was looked at."""
    return read_json(Path(__file__).with_name("letter_packages.json"))


def open_fonts(fonts_dir: Path | None, packages_dir: Path | None, cache: Path) -> Fonts:
    """Find and check the fonts; packages are fetched and unpacked where none are given.

    Args:
        fonts_dir: Any folder of fonts, as that of this machine; None: Debian's packages.
        packages_dir: See `packages_in`.
        cache: Folder for packages, fonts and what the check found.
    Raises:
        UserError: If packages cannot be had, or fewer than 5 families are left.
    """
    if fonts_dir is None:
        listed = listed_packages()
        sources = packages_in(tuple(listed), packages_dir, cache, "111 MB")
        root, versions = unpack_library(sources, cache, f"fonts-{VERSION}", _copy_fonts)
        if sources[0].is_file():
            other = [name for name, version in versions.items() if version != listed[name]]
            if other:
                print(f"{len(other)} of {len(listed)} packages have other versions than those "
                      f"listed ({', '.join(other[:3])}): some letters may differ")  # fmt: skip
    else:
        root = fonts_dir
        require(root.is_dir(), f"--fonts-dir {root}: no such folder; give one that holds fonts")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES)
    names = [f"{path.relative_to(root)} {path.stat().st_size}" for path in paths]
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    record = cache / f"fonts-{VERSION}-{digest}.json"
    found = read_record_or_none(record, {"files": list, "left_out": dict})
    if found is None:
        files, left_out = check_fonts(paths)
        rows = [[str(path.relative_to(root)), family] for path, family in files]
        found = {"files": rows, "left_out": left_out}
        cache.mkdir(parents=True, exist_ok=True)
        write_json(record, found)
    families, left_out = {family for _, family in found["files"]}, found["left_out"]
    require(
        len(families) >= _MIN_FAMILIES,
        f"{root}: {len(paths)} font files, left out {left_out}; the others are of {len(families)} "
        f"families, {_MIN_FAMILIES} are needed",
    )
    rows = tuple((str(name), str(family)) for name, family in found["files"])
    return Fonts(root, rows, left_out, digest)


def _copy_fonts(package: Path, out: Path) -> None:
    """Copy the font files and terms of an unpacked package."""
    for terms in package.glob("usr/share/doc/*/copyright"):
        (out / "licences").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(terms, out / f"licences/{terms.parent.name}.txt")
    for path in sorted(package.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.is_symlink():
            place = out / "fonts" / path.relative_to(package / "usr/share")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def check_fonts(paths: Sequence[Path]) -> tuple[list[tuple[Path, str]], dict[str, int]]:
    """Choose the fonts whose capitals can be told apart and are letters.

    Args:
        paths: Font files; of two with the same glyphs the first is kept.
    Returns:
        (file, family) of those kept; reason -> number of those left out.
    """
    left_out: Counter[str] = Counter()
    kept: list[tuple[Path, str]] = []
    thumbnails: list[np.ndarray] = []  # float32 [26, side, side] of each font kept
    seen: set[bytes] = set()
    for path in tqdm(paths, desc="checking fonts", unit="font"):
        try:
            family = str(ImageFont.truetype(path, _CHECK_PX).getname()[0]).split()[0].lower()
            glyphs = [draw_glyph(path, letter, _CHECK_PX) for letter in CLASSES]
        except (OSError, ValueError, IndexError):  # no outlines, damaged, no name
            left_out["cannot be drawn"] += 1
            continue
        if any(min(glyph.shape) == 0 for glyph in glyphs):
            left_out["a letter is empty"] += 1
            continue
        if len({glyph.tobytes() for glyph in glyphs}) < len(glyphs):
            left_out["two letters are the same"] += 1
            continue
        look = b"".join(glyphs[CLASSES.index(letter)].tobytes() for letter in _CHECKED)
        if look in seen:
            left_out["the same as another"] += 1
            continue
        seen.add(look)
        kept.append((path, family))
        small = [cv2.resize(x, (_ALIKE_PX, _ALIKE_PX), interpolation=cv2.INTER_AREA)
                 for x in glyphs]  # fmt: skip
        thumbnails.append(np.stack(small).astype(np.float32))
    if not kept:
        return [], dict(left_out)

    # Symbols and other scripts: letters that do not look like what that letter is in other fonts.
    looks = np.stack(thumbnails).reshape(len(kept), len(CLASSES), -1)
    looks -= looks.mean(axis=2, keepdims=True)
    looks /= np.linalg.norm(looks, axis=2, keepdims=True) + 1e-6
    means = np.median(looks, axis=0)
    nearest = np.argmax(looks @ means.T, axis=2)  # [fonts, 26]
    shares = (nearest == np.arange(len(CLASSES))).mean(axis=1)
    good = [font for font, share in zip(kept, shares, strict=True) if share >= _MIN_ALIKE]
    if len(good) < len(kept):
        left_out["no Latin letters"] = len(kept) - len(good)
    return good, dict(left_out)


def draw_glyph(path: Path, letter: str, size: int) -> np.ndarray:
    """Draw a letter: uint8 [h, w], opacity, trimmed to what is not empty.

    Args:
        path: A font file.
        letter: One character.
        size: Of the font's em in pixels.
    Raises:
        OSError: If the font cannot be drawn at this size.
    """
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    mask = font.getmask(letter, mode="L")
    glyph = np.array(mask, dtype=np.uint8).reshape(mask.size[::-1])
    x, y, width, height = cv2.boundingRect(glyph)
    return glyph[y : y + height, x : x + width]


def split(fonts: Fonts, seed: int) -> dict[str, tuple[str, ...]]:
    """Divide the families: 70 % to the pool, of the others every second one to the test.

    Returns:
        "pool", "train", "test" -> font files, those of the train and test side also of the probe.
    """
    families = sorted({family for _, family in fonts.files})
    order = [families[i] for i in generator("letters", seed, "families").permutation(len(families))]
    num_pool = round(_POOL_SHARE * len(order))
    side = dict.fromkeys(order[:num_pool], "pool")
    side |= {family: ("train", "test")[i % 2] for i, family in enumerate(order[num_pool:])}
    parts: dict[str, list[str]] = {"pool": [], "train": [], "test": []}
    for file, family in fonts.files:
        parts[side[family]].append(file)
    # In a drawn order, so that the first pictures show many families.
    return {
        part: tuple(files[i] for i in generator("letters", seed, part).permutation(len(files)))
        for part, files in parts.items()
    }


# -- the pictures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LetterSource(ProceduralSource):
    """Makes the pictures of a set of letters.

    Attributes:
        root: Folder of the fonts.
        files: See `split`.
        picture_side: Of pool and probe, in pixels.
    """

    kind: ClassVar[str] = "letters"
    class_names: tuple[str, ...] = CLASSES
    root: Path = Path()
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    picture_side: int = 40

    def _fonts(self, part: str) -> tuple[str, ...]:
        name = {"probe/train": "train", "probe/val": "test"}.get(part, part)
        return self.files[name]

    def _attempt(self, rng: np.random.Generator, part: str, index: int) -> Scene:
        if part in ("train", "test"):
            made = super()._attempt(rng, part, index)
            grey = cv2.cvtColor(made.image, cv2.COLOR_BGR2GRAY)
            return Scene(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), made.objects, made.masks)
        # One letter: those of a font one after another, a letter again when all fonts had it.
        files, num = self._fonts(part), len(self.class_names)
        label, side = index % num, self.picture_side
        path = self.root / files[index // num % len(files)]
        glyph = draw_glyph(path, self.class_names[label], em_size(path, _FILL * side))
        move = rng.integers(-round(_MOVE * side), round(_MOVE * side), 2, endpoint=True)
        canvas = np.zeros((side, side), dtype=np.uint8)
        top, left = (np.array(canvas.shape) - glyph.shape) // 2 + move
        height, width = glyph.shape
        canvas[top : top + height, left : left + width] = glyph
        box = (int(left), int(top), int(left) + width, int(top) + height)
        found = scene.Annotation(label, box, truncated=False, difficult=False, visible=1.0)
        return Scene(cv2.cvtColor(canvas, cv2.COLOR_GRAY2BGR), [found])

    def _object(
        self, rng: np.random.Generator, part: str, label: int, size: float, light: Light
    ) -> Sprite:
        files = self._fonts(part)
        path = self.root / files[int(rng.integers(len(files)))]
        glyph = _large_glyph(path, self.class_names[label])
        turn = np.deg2rad(rng.uniform(-_MAX_TURN, _MAX_TURN))
        sheared = np.array([[1, rng.uniform(-0.15, 0.15)], [0, 1]])
        matrix = scene.rotation(turn) @ sheared * (size / max(glyph.shape))
        moved = scene.warped(glyph, matrix, cv2.INTER_AREA)
        alpha = moved.astype(np.float32) * np.float32(1 / 255)
        height, width = moved.shape
        return Sprite(procedural.surface(rng, height, width, size), alpha)


@lru_cache(maxsize=8192)
def em_size(path: Path, longest: float) -> int:
    """The size of a font at which the longest side of its capitals is about `longest` pixels."""
    glyphs = (draw_glyph(path, letter, _CHECK_PX) for letter in CLASSES)
    size = int(_CHECK_PX * longest / max(max(glyph.shape) for glyph in glyphs))
    # Hinting may make a letter a pixel longer.
    while size > 1 and any(max(draw_glyph(path, x, size).shape) > longest for x in CLASSES):
        size -= 1
    return size


@lru_cache(maxsize=4096)
def _large_glyph(path: Path, letter: str) -> np.ndarray:
    return draw_glyph(path, letter, _SCENE_PX)
