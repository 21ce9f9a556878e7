"""Pictures of the page: within a bound of bytes, with boxes whose labels never cover each other."""

from __future__ import annotations

import base64
import io
import math
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common import files
from common.pictures import BadPicture, decode, read_file
from pipeline.config import FROZEN
from pipeline.results import arm_title

MOST_BYTES = 6_000_000  # of all pictures of a page; those beyond are left out, and counted
NUM_PICTURES, NUM_ARMS = 6, 3
MOST_BOXES = 30  # of an arm on a picture, the best-scored
MOST_SMALL = 8  # labels on a drawing that is not enlarged
_SIDE = 800  # pixels, of pictures that can be enlarged
_PICTURE = {"file_name": str, "width": files.NUMBER, "height": files.NUMBER, "ground_truth": list}
_TRUE_BOX = {"class": str, "box": list}
_LABELS = {"lists": list, "samples": list, "repaired": list}
_SMALL, _LARGE = 0.036, 0.022  # height of letters, as a share of the picture's width
_PRETRAINING = {
    "views.jpg": ("Augmented views", "In each row a picture, then its views; hope that people "
                  "could still tell what they show."),
    "neighbours_before.jpg": ("Neighbours before pretraining", "A query, then its nearest: by "
                              "colour, as a rule."),
    "neighbours.jpg": ("Neighbours after pretraining", "The same queries; hope that the nearest "
                       "now show the same kind of thing."),
    "feature_map.png": ("Features in two dimensions", "The probe; hope for one cloud a class. Only "
                        "near distances count."),
}  # fmt: skip
Arms = Mapping[str, Sequence[Path]]
"""Arm -> the folders of its finished seeds."""


class Album:
    """Makes pictures into data URIs until their room is used up.

    Attributes:
        num_left_out: Pictures that found no room.
    """

    def __init__(self, room: int = MOST_BYTES) -> None:
        """`room`: bytes of all URIs together."""
        self._room, self.num_left_out = room, 0

    def add(self, path: Path, max_side: int) -> str | None:
        """A JPEG, made smaller if need be; None if its file does not open, or without room."""
        try:
            picture = Image.fromarray(decode(read_file(path), where=str(path)))
        except BadPicture:
            return None
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=82, optimize=True)
        uri = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
        if len(uri) > self._room:
            self.num_left_out += 1
            return None
        self._room -= len(uri)
        return uri


def detection_pictures(arms: Arms, dataset: Path, album: Album) -> list[dict[str, Any]]:
    """The first test pictures with the boxes of up to three arms, all of the same seed.

    Args:
        arms: Frozen ones are shown where no others ran.
        dataset: Folder that names of pictures are relative to; nothing outside it is read.
        album: Takes the pictures.
    Returns:
        For each picture `name`, `picture` (a data URI), `width`, `height`, `objects` (those that
        count), `seed`, `truth` (boxes, see `marks`), and `arms`: for each `title`, `found` (boxes,
        best score first), `told` (a sentence).
    """
    chosen = ([arm for arm in arms if not arm.endswith(FROZEN)] or [*arms])[:NUM_ARMS]
    by_seed: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for arm in chosen:
        for folder in arms[arm]:
            entries = files.read_json_or_none(folder / "detections.json")
            if isinstance(entries, list):
                by_seed[folder.name][arm] = {
                    entry["file_name"]: entry for entry in entries if _is_drawable(entry, True)
                }
    # The seed that most arms have, the first of these.
    seed, by_arm = max(by_seed.items(), key=lambda pair: len(pair[1]), default=("", {}))
    found: list[dict[str, Any]] = []
    for name, item in next(iter(by_arm.values())).items() if by_arm else ():
        if len(found) == NUM_PICTURES:
            break
        is_shared = all(name in entries for entries in by_arm.values())
        if not is_shared or (about := _opened(item, dataset, album)) is None:
            continue
        shown = []
        for arm, entries in by_arm.items():
            boxes = [
                d for d in entries[name]["detections"] if d.get("kind", "ignored") != "ignored"
            ]
            boxes = sorted(boxes, key=lambda d: -d["score"])[:MOST_BOXES]
            drawn = marks(boxes, (item["width"], item["height"]), letters=_SMALL * len(by_arm))
            told = sentence(item["ground_truth"], boxes)
            shown.append({"title": arm_title(arm), "found": drawn, "told": told})
        found.append({**about, "seed": seed, "arms": shown})
    return found


def labelled_set(arms: Arms, dataset: Path, album: Album) -> dict[str, Any] | None:
    """What `labels.json` of the first seed that has one tells, `samples` as drawn; else None."""
    for folder in (folder for folders in arms.values() for folder in folders):
        content = files.read_record_or_none(folder / "labels.json", _LABELS)
        form = {"use": str, "num_pictures": int, "sizes": list, "objects": dict, "pictures": dict}
        if content and all(files.has_form(row, form) for row in content["lists"]):
            break
    else:
        return None
    samples = []
    for item in filter(_is_drawable, content["samples"]):
        about = _opened(item, dataset, album)
        if about is not None:
            size = (item["width"], item["height"])
            drawn = marks(item["ground_truth"], size, letters=2 * _SMALL)
            told = f"Labelled: {', '.join(_names(item['ground_truth'])) or 'nothing'}."
            samples.append({**about, "arms": [{"title": "", "found": drawn, "told": told}]})
    names = {name for row in content["lists"] for name in row["objects"]}
    return {**content, "samples": samples, "names": sorted(names)}


def _opened(item: Mapping[str, Any], dataset: Path, album: Album) -> dict[str, Any] | None:
    """A picture below the data set's folder, and its objects; None if it does not open."""
    path = dataset / item["file_name"]
    if not files.is_below(path, dataset):
        return None
    uri = album.add(path, _SIDE)
    if uri is None:
        return None
    truth = item["ground_truth"]
    return {
        "name": path.name,
        "picture": uri,
        "width": item["width"],
        "height": item["height"],
        "objects": _names([one for one in truth if not one.get("difficult")]),
        "truth": [{"class": one["class"], "box": _corner(one["box"])} for one in truth],
    }


def _names(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["class"] for one in objects]


def _is_drawable(entry: Any, is_detected: bool = False) -> bool:
    """Whether an entry of detections.json (labels.json) has what the page draws."""
    if not files.has_form(entry, {**_PICTURE, **({"detections": list} if is_detected else {})}):
        return False
    truth, found = entry["ground_truth"], entry["detections"] if is_detected else []
    has_size = entry["width"] > 0 and entry["height"] > 0
    has_forms = all(files.has_form(one, _TRUE_BOX) for one in truth) and all(
        files.has_form(one, {**_TRUE_BOX, "score": files.NUMBER}) for one in found
    )
    return has_size and has_forms and all(
        len(one["box"]) == 4 and all(map(files.is_number, one["box"])) for one in (*truth, *found)
    )  # fmt: skip


def sentence(truth: Sequence[Mapping[str, Any]], boxes: Sequence[Mapping[str, Any]]) -> str:
    """What a picture shows, for those who do not see it: as many boxes as objects."""
    best = boxes[: max(1, len(truth))]
    found = ", ".join(f"{box['class']} {box['score']:.2f} {box['kind']}" for box in best)
    return f"Labelled: {', '.join(_names(truth)) or 'nothing'}. Best: {found or 'nothing'}."


def _corner(box: Sequence[float]) -> tuple[float, float, float, float]:
    """x, y, width, height."""
    x0, y0, x1, y1 = box
    return x0, y0, max(0.0, x1 - x0), max(0.0, y1 - y0)


def marks(
    boxes: Sequence[Mapping[str, Any]], size: tuple[int, int], *, letters: float
) -> list[dict[str, Any]]:
    """Boxes as the page draws them, with a place for each label.

    Labels are placed best score first, so that those above any score cover no other. Of one class
    alone it is the same: they are a part of them.

    Args:
        boxes: Labelled objects, or detections with `score` and `kind`, best score first.
        size: Width and height of the picture.
        letters: Height of the small letters, as a share of the picture's width.
    Returns:
        For each box `class`, `box` (x, y, width, height), `score`, `about` (a sentence), `look`
        (truth, good or bad), and `labels`: (name, text, x, y, width, height, letters) of the
        `small` and the `large` one; one without room is left out.
    """
    from common.drawing import place_plate  # loads matplotlib's fonts, which --help needs not

    plates: dict[str, list[Any]] = {"small": [], "large": []}
    heights = {"small": letters * size[0], "large": _LARGE * max(size[0], 0.8 * size[1])}
    found = []
    for one in boxes:
        score, kind = one.get("score"), one.get("kind")
        head, tail, look, about = one["class"], "", "label", one["class"]
        if score is not None:
            look = "good" if kind == "correct" else "bad"
            head, tail = ("\u2713 " if look == "good" else "\u2717 ") + head, f" {score:.2f}"
            about = f"{one['class']} {score:.2f}: {kind}"
        labels = []
        for name, there in plates.items():
            if name == "small" and len(there) == MOST_SMALL:
                continue
            height = heights[name]
            shown, width = _fitted(head, tail, 0.9 * size[0] / height)
            plate = place_plate(one["box"], (width * height, 1.35 * height), there, size)
            if plate is not None:
                there.append(plate)
                x0, y0, x1, y1 = plate
                labels.append((name, shown, x0, y0, x1 - x0, y1 - y0, height))
        found.append({"class": one["class"], "box": _corner(one["box"]), "score": score,
                      "about": about, "look": look, "labels": labels})  # fmt: skip
    return found


def _fitted(head: str, tail: str, room: float) -> tuple[str, float]:
    """Head and tail, the head cut to fit, and the width of their plate; in heights of a letter."""
    while (width := sum(map(_width, head + tail)) + 0.5) > room and len(head) > 3:
        head = head.removesuffix("\u2026")[:-1] + "\u2026"
    return head + tail, min(width, room)


def _width(letter: str) -> float:
    return 1.05 if unicodedata.east_asian_width(letter) in "WF" else 0.6


def usual_score(pictures: Sequence[Mapping[str, Any]]) -> float:
    """The score at which half of the drawings show as many boxes as their picture has objects.

    What the page shows at first: in steps of 0.01, from 0.05 to 0.95.
    """
    scores = [
        arm["found"][min(max(1, len(row["objects"])), len(arm["found"])) - 1]["score"]
        for row in pictures for arm in row["arms"] if arm["found"]
    ]  # fmt: skip
    middle = statistics.median_low(scores) if scores else 0.5
    return min(0.95, max(0.05, math.floor(100 * middle + 1e-6) / 100))


def pretraining_pictures(folder: Path, album: Album) -> list[tuple[str, str, str]]:
    """(title, what it shows, picture) of those that a pretraining run left."""
    found = []
    for name, (title, about) in _PRETRAINING.items():
        path = folder / "pictures" / name
        picture = album.add(path, 1200)
        if picture is None:
            continue
        described = files.read_record_or_none(path.with_suffix(".json"), {"rows": list}) or {}
        known = [(row["query_label"], row["neighbour_labels"]) for row in described.get("rows", ())
                 if files.has_form(row, {"neighbour_labels": list})
                 and row.get("query_label") is not None]  # fmt: skip
        if known:
            same = sum(labels.count(query) for query, labels in known)
            count = sum(len(labels) for _, labels in known)
            about += f" {same} of {count} neighbours shown have their query's class."
        found.append((title, about, picture))
    return found
