"""Show pictures of a data set side by side, with their labelled boxes."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from common.annotations.record import PictureRecord
from common.annotations.voc import list_file, read_list, read_picture
from common.errors import UserError, run_command
from common.files import read_json

_EXAMPLE = """example:
  .venv/bin/python tools/contact_sheet.py data/scenes docs/images/procedural.jpg --count 24
"""
_GAP = 4  # pixels between pictures
_HUE_STEP = 0.618  # of the colour circle between two classes: the golden section keeps them apart


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong arguments or input."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("out", type=Path, metavar="OUT", help="picture to write (.jpg or .png)")
    parser.add_argument(
        "--part",
        default="train",
        choices=("train", "test", "pool", "probe/train", "probe/val"),
        help="which pictures (default: train)",
    )
    parser.add_argument("--count", type=int, default=24, help="at most so many (default: 24)")
    parser.add_argument("--width", type=int, default=960, help="of the sheet, px (default: 960)")
    parser.add_argument("--height", type=int, default=150, help="of a row, px (default: 150)")
    parser.add_argument("--quality", type=int, default=82, help="of a JPEG (default: 82)")
    arguments = parser.parse_args(argv)

    def work() -> int:
        tiles = list(_tiles(arguments.data, arguments.part, arguments.count, arguments.height))
        if not tiles:
            raise UserError(f"{arguments.data}: no {arguments.part} pictures there; make the set")
        _write(arguments.out, arrange(tiles, arguments.width), arguments.quality)
        return 0

    return run_command(work)


def _write(path: Path, sheet: np.ndarray, quality: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (".jpg", ".png"):
        raise UserError(f"{path}: give a name that ends in .jpg or .png")
    done, data = cv2.imencode(path.suffix, sheet, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    path.write_bytes(data.tobytes())


def _tiles(data: Path, part: str, count: int, height: int) -> Iterator[np.ndarray]:
    """Yield up to `count` pictures scaled to `height` pixels, with boxes where they are known."""
    voc = data / "VOC2007"
    pictures: list[tuple[Path, PictureRecord | None]]
    if part in ("train", "test"):
        names = read_list(voc, part)[:count] if list_file(voc, part).exists() else []
        records = [read_picture(voc, name, None) for name in names]
        pictures = [(record.file, record) for record in records]
    else:
        files = sorted((data / part).rglob("*.jpg"), key=lambda p: p.name)[:count]
        pictures = [(path, None) for path in files]
    card = data / "dataset.json"
    classes = read_json(card)["classes"] if card.exists() else []
    for path, record in pictures:
        image = cv2.imread(str(path))
        if image is None:
            raise UserError(f"{path}: does not decode; make the set again")
        scale = height / image.shape[0]
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        tile = cv2.resize(image, (round(image.shape[1] * scale), height), interpolation=how)
        if record is not None:
            _draw_boxes(tile, record, scale, classes)
        yield tile


def _colour(number: int) -> tuple[int, int, int]:
    """Return a bright BGR colour for a class number."""
    hue = int(180 * (number * _HUE_STEP % 1))
    pixel = cv2.cvtColor(np.array([[[hue, 190, 255]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    return int(pixel[0]), int(pixel[1]), int(pixel[2])


def _draw_boxes(
    tile: np.ndarray, picture: PictureRecord, scale: float, classes: Sequence[str]
) -> None:
    """Draw the objects of a picture on a tile, in place; difficult ones in thin lines."""
    for item in picture.objects:
        name = item.class_name
        colour = _colour(classes.index(name) if name in classes else len(name))
        x0, y0, x1, y1 = (round(scale * value) for value in item.voc_box)
        x1, y1 = min(x1, tile.shape[1] - 1), min(y1, tile.shape[0] - 1)
        thickness = 1 if item.difficult else 2
        cv2.rectangle(tile, (x0, y0), (x1, y1), colour, thickness)
        (width, height), _ = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.36, 1)
        top = y0 - height - 5 if y0 > height + 5 else y0
        cv2.rectangle(tile, (x0, top), (x0 + width + 3, top + height + 5), colour, -1)
        spot = (x0 + 2, top + height + 2)
        cv2.putText(tile, name, spot, cv2.FONT_HERSHEY_SIMPLEX, 0.36, 0, 1, cv2.LINE_AA)


def arrange(tiles: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Lay tiles of one height in rows on white, each row stretched to the full width.

    Args:
        tiles: uint8 pictures of the same height.
        width: Pixels of a row.
    Returns:
        uint8 (height, width, 3); a last row that is less than full is left out unless it is alone.
    """
    rows: list[list[np.ndarray]] = [[]]
    for tile in tiles:
        if sum(t.shape[1] + _GAP for t in rows[-1]) + tile.shape[1] / 2 > width:
            rows.append([])
        rows[-1].append(tile)
    filled = sum(t.shape[1] + _GAP for t in rows[-1])
    if len(rows) > 1 and filled < 0.8 * width:
        rows.pop()
    return np.concatenate([_row(row, width) for row in rows])


def _row(row: Sequence[np.ndarray], width: int) -> np.ndarray:
    gap = np.full((row[0].shape[0], _GAP, 3), 255, np.uint8)
    strip = np.concatenate([piece for tile in row for piece in (tile, gap)][:-1], axis=1)
    height = round(strip.shape[0] * width / strip.shape[1])
    if height < 2 * strip.shape[0]:  # a single narrow picture is not blown up
        strip = cv2.resize(strip, (width, height), interpolation=cv2.INTER_AREA)
    else:
        strip = np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)
    return np.pad(strip, ((0, _GAP), (0, 0), (0, 0)), constant_values=255)


if __name__ == "__main__":
    sys.exit(main())
