"""Import labelled pictures of any format that we read: a devkit with upright pictures."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm.contrib.concurrent import process_map

from common.annotations.record import (
    YEAR_FOLDER,
    LabelledSet,
    LabelledSplit,
    PictureRecord,
    SetChoice,
    make_folders,
    read_set,
    whole_box,
    write_list,
)
from common.annotations.write import safe_name, upright_copy, write_voc_picture
from common.errors import RunFailed, UserError
from common.files import write_bytes
from common.pictures import BadPicture, decode, read_file
from pipeline.datasets.sets import Card, make_set

ROUNDED = "boxes rounded to whole pixels"
ENCODED = "pictures turned upright, or of a rare format: encoded again"
_NOISE = 0.01  # pixels, of the digits of shares
SHEET_PICTURES, _COLUMNS, _CELL = 24, 4, 480  # of --show; pixels


def import_labelled(
    source: Path, data: LabelledSet, choice: SetChoice, out: Path, num_workers: int, overwrite: bool
) -> bool:
    """Write a set that was read as a devkit with a dataset.json.

    Args:
        source: Where it is.
        data: Every list of it, all pictures decoded.
        choice: What it was read with.
        out: Folder to make.
        num_workers: Processes that decode and copy.
        overwrite: Whether a set made with other options or labels is replaced.
    Returns:
        False if the set was there already and was kept.
    """
    options: dict[str, object] = {
        "source": source.resolve().name,
        "labels_sha256": data.digest(),
        "others_sha256": replace(data, train=data.others).digest(),
        "exif": choice.exif,
        "val_share": choice.val_share,
        "seed": choice.split_seed,
        "max_left_out": choice.max_left_out,
    }
    card = Card(out.name, "import", options, "That of the pictures' owner.", "Imported labels.")

    def fill(root: Path) -> None:
        lists = _named_lists(data)
        names: dict[Path, str] = {}
        records: dict[Path, PictureRecord] = {}
        taken: set[str] = set()
        for split in lists.values():
            for picture in split.pictures:
                if picture.file not in names:
                    names[picture.file] = safe_name(picture.file.stem, taken)
                    taken.add(names[picture.file].lower())
                    records[picture.file] = picture
        folder = root / YEAR_FOLDER
        make_folders(folder)
        jobs = [(records[file], folder, names[file]) for file in names]
        done = process_map(
            _copy, jobs, max_workers=num_workers, chunksize=16, desc="pictures", disable=None
        )
        repaired = Counter(data.repaired)
        for file, is_encoded in zip(names, done, strict=True):
            sizes = records[file].width, records[file].height
            boxes = [item.box for item in records[file].objects]
            repaired[ROUNDED] += sum(
                max(abs(a - b) for a, b in zip(whole_box(box, *sizes), box, strict=True)) > _NOISE
                for box in boxes
            )
            repaired[ENCODED] += is_encoded
        for name, split in lists.items():
            write_list(folder, name, [names[x.file] for x in split.pictures])
        card.write(
            root,
            classes=data.classes,
            metric_year=data.metric_year or 2012,
            splits={name: len(split.pictures) for name, split in lists.items()},
            train_split="+".join([*lists][: len(data.train)]),
            test_split=[*lists][len(data.train)],
            pool=0,
            probe={"train": 0, "val": 0},
            repaired=dict(+repaired),
            left_out=dict(data.left_out),
        )
        _check(root, sum(len(record.objects) for record in records.values()))

    return make_set(card, out, overwrite, fill)


def _named_lists(data: LabelledSet) -> dict[str, LabelledSplit]:
    """Lists of training, the test list, and others under names of their own, in this order."""
    found: dict[str, LabelledSplit] = {}
    for split in (*data.train, data.test, *data.others):
        name = safe_name(split.name, ())
        found[name if name not in found else f"{split.folder.name}_{name}"] = split
    return found


def _copy(job: tuple[PictureRecord, Path, str]) -> bool:
    """Write a picture and its annotation; whether it was encoded."""
    picture, folder, name = job
    try:
        data = read_file(picture.file)
        pixels = decode(data, where=str(picture.file))
    except BadPicture as error:  # it has changed since the set was read
        raise UserError(f"{error}; run the command again") from error
    suffix, upright = upright_copy(data, pixels, picture.file.suffix)
    write_voc_picture(folder, f"{name}{suffix}", upright, picture)
    return upright is not data


def _check(root: Path, num_objects: int) -> None:
    """Read what was written.

    Raises:
        RunFailed: If objects are missing: a fault of this program.
    """
    data = read_set(root, SetChoice("voc", all_lists=True))
    splits = (*data.train, data.test, *data.others)
    there = {x.file: len(x.objects) for split in splits for x in split.pictures}
    if sum(there.values()) != num_objects:
        raise RunFailed(f"{root}: holds {sum(there.values())} of {num_objects} objects; report it")


def describe(data: LabelledSet) -> list[str]:
    """Lines on lists, classes, repairs and what was left out, for people."""
    lines = []
    splits = (*data.train, data.test, *data.others)
    for split in splits:
        num_objects = sum(len(picture.objects) for picture in split.pictures)
        lines.append(f"list {split.name}: {len(split.pictures)} pictures, {num_objects} objects")
    count = Counter(x.class_name for split in splits for y in split.pictures for x in y.objects)
    lines.append("classes: " + ", ".join(f"{name} {count[name]}" for name in data.classes))
    return [*lines, *data.notes]


# -- the sheet ------------------------------------------------------------------------------------


def write_sheet(data: LabelledSet, out: Path) -> int:
    """Draw pictures with their boxes and names, of every class some.

    Args:
        data: A set of ours or another.
        out: The JPEG to write.
    Returns:
        How many pictures are on it, at most `SHEET_PICTURES`.
    """
    from common.drawing import draw_boxes  # matplotlib's font

    splits = (*data.train, data.test, *data.others)
    pictures = list(
        {picture.file: picture for split in splits for picture in split.pictures}.values()
    )
    chosen = spread(pictures, data.classes)
    cells = []
    for picture in chosen:
        pixels = decode(read_file(picture.file), where=str(picture.file))
        cell = draw_boxes(pixels, picture.objects, data.classes)
        cell.thumbnail((_CELL, _CELL))
        cells.append(cell)
    columns = min(_COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * _CELL, -(-len(cells) // columns) * _CELL), "white")
    for place, cell in enumerate(cells):
        left = place % columns * _CELL + (_CELL - cell.width) // 2
        sheet.paste(cell, (left, place // columns * _CELL + (_CELL - cell.height) // 2))
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=90)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, encoded.getvalue())
    return len(cells)


def spread(pictures: Sequence[PictureRecord], classes: Sequence[str]) -> list[PictureRecord]:
    """Up to `SHEET_PICTURES` pictures: class by class in turn, spread over the set."""
    step = max(1, len(pictures) // SHEET_PICTURES)
    order = sorted(range(len(pictures)), key=lambda i: (i % step, i))
    waiting = {
        name: [i for i in order if any(x.class_name == name for x in pictures[i].objects)]
        for name in classes
    }
    waiting[""] = [i for i in order if not pictures[i].objects]
    chosen: dict[int, None] = {}
    while any(waiting.values()) and len(chosen) < SHEET_PICTURES:
        for own in waiting.values():
            while own and own[0] in chosen:
                own.pop(0)
            if own and len(chosen) < SHEET_PICTURES:
                chosen[own.pop(0)] = None
    return [pictures[i] for i in sorted(chosen)]
