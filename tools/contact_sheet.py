"""Show pictures of a data set side by side, with their labelled boxes."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from common.annotations.formats.voc import read_list, read_picture
from common.annotations.record import ObjectRecord, list_file
from common.errors import UserError, require, run_command
from common.files import read_json
from common.pictures import BadPicture, decode

_EXAMPLE = """example:
  .venv/bin/python tools/contact_sheet.py data/scenes docs/images/procedural.jpg --count 24
"""
_GAP = 4  # pixels between pictures
_HUE_STEP = 0.618  # of the colour circle between two classes: the golden section keeps them apart


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 (it went wrong) or 2 (wrong arguments or input)."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder of the data set")
    add("out", type=Path, metavar="OUT", help="picture to write (.jpg or .png)")
    parts = ("train", "test", "pool", "probe/train", "probe/val")
    add("--part", default="train", choices=parts, help="which pictures (default: train)")
    add("--count", type=int, default=24, help="at most so many (default: 24)")
    add("--width", type=int, default=960, help="of the sheet, px (default: 960)")
    add("--height", type=int, default=150, help="of a row, px (default: 150)")
    add("--quality", type=int, default=82, help="of a JPEG (default: 82)")
    options = parser.parse_args(arguments)

    def work() -> int:
        out, part = options.out, options.part
        require(out.suffix in (".jpg", ".png"), f"{out}: give a name that ends in .jpg or .png")
        tiles = list(_tiles(options.data, part, options.count, options.height))
        require(len(tiles) > 0, f"{options.data}: no {part} pictures there; make the set")
        out.parent.mkdir(parents=True, exist_ok=True)
        arrange(tiles, options.width).save(out, quality=options.quality)
        return 0

    return run_command(work)


def _tiles(data: Path, part: str, count: int, height: int) -> Iterator[Image.Image]:
    """Yield up to `count` pictures scaled to `height` pixels, with boxes where they are known."""
    voc, card = data / "VOC2007", data / "dataset.json"
    classes = read_json(card)["classes"] if card.exists() else []
    pictures: list[tuple[Path, Sequence[ObjectRecord]]]
    if part in ("train", "test"):
        names = read_list(voc, part)[:count] if list_file(voc, part).exists() else []
        records = [read_picture(voc, name, None) for name in names]
        pictures = [(record.file, record.objects) for record in records]
    else:
        files = sorted((data / part).rglob("*.jpg"), key=lambda p: p.name)[:count]
        pictures = [(path, ()) for path in files]
    for path, objects in pictures:
        try:
            picture = Image.fromarray(decode(path.read_bytes(), where=str(path)))
        except BadPicture as error:
            raise UserError(f"{error}; make the set again") from error
        scale = height / picture.height
        tile = picture.resize((round(picture.width * scale), height))
        draw = ImageDraw.Draw(tile)
        for item in objects:
            name = item.class_name
            number = classes.index(name) if name in classes else len(name)
            colour = f"hsv({360 * (number * _HUE_STEP % 1):.0f}, 75%, 100%)"
            x0, y0, x1, y1 = (round(scale * value) for value in item.voc_box)
            box = (x0, y0, min(x1, tile.width - 1), min(y1, tile.height - 1))
            draw.rectangle(box, outline=colour, width=1 if item.difficult else 2)
            # The name stands above the box, or inside it where there is no room.
            _, _, width, text_height = draw.textbbox((0, 0), name)
            top = y0 - text_height - 2 if y0 > text_height + 2 else y0
            draw.rectangle((x0, top, x0 + width + 3, top + text_height + 2), fill=colour)
            draw.text((x0 + 2, top), name, fill="black")
        yield tile


def arrange(tiles: Sequence[Image.Image], width: int) -> Image.Image:
    """Lay tiles of one height in rows on white.

    Args:
        tiles: Pictures of the same height.
        width: Of the sheet, pixels; a wider tile is shrunk to it.
    Returns:
        The sheet; a last row that is less than 0.8 full is left out unless it is alone.
    """
    places: list[tuple[int, int]] = []
    x, y = 0, 0
    for tile in tiles:
        tile.thumbnail((width, tile.height))
        if x and x + tile.width > width:
            x, y = 0, y + tiles[0].height + _GAP
        places.append((x, y))
        x += tile.width + _GAP
    if y and x < 0.8 * width:
        places = [place for place in places if place[1] < y]
    sheet = Image.new("RGB", (width, places[-1][1] + tiles[0].height + _GAP), "white")
    for tile, place in zip(tiles, places, strict=False):
        sheet.paste(tile, place)
    return sheet


if __name__ == "__main__":
    sys.exit(main())
