"""Pictures of the report: data URIs, and detections drawn over test pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

MIN_IOU = 0.5
_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """A picture that travels inside the page."""

    uri: str
    width: int
    height: int


def embed(path: Path, max_side: int, max_bytes: int = 1_200_000) -> Picture | None:
    """Return the picture as a JPEG data URI, made smaller if need be; None if it does not open.

    Args:
        path: Any picture that Pillow reads.
        max_side: Longest side in pixels.
        max_bytes: Size at which the picture is made smaller still.
    """
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return embed_image(picture, max_side, max_bytes)


def embed_image(picture: Image.Image, max_side: int, max_bytes: int = 1_200_000) -> Picture:
    """Return an opened picture as `embed` does."""
    picture = picture.copy()
    while True:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
        if stream.tell() <= max_bytes or max_side < 200:
            break
        max_side = int(max_side * 0.8)
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/jpeg;base64,{text}", picture.width, picture.height)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes x0, y0, x1, y1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def judged(picture: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the best-scored detections of a picture, as many as it shows objects that count.

    Each has `correct`, and `kind` as detections.json has it; those on difficult objects are passed
    over. In files of older versions without kinds a detection is correct if an object of its class
    that no better detection has taken overlaps it by an intersection over union of 0.5.
    """
    truth = list(picture.get("ground_truth") or [])
    wanted = max(1, sum(not item.get("difficult") for item in truth))
    found = sorted(picture.get("detections") or [], key=lambda d: -d["score"])
    if all("kind" in detection for detection in found):
        counted = [detection for detection in found if detection["kind"] != "ignored"]
        return [{**d, "correct": d["kind"] == "correct"} for d in counted[:wanted]]
    taken: set[int] = set()
    shown = []
    for detection in found[:wanted]:
        overlaps = [
            (iou(detection["box"], item["box"]), index)
            for index, item in enumerate(truth)
            if item["class"] == detection["class"] and index not in taken
        ]
        overlap, index = max(overlaps, default=(0.0, -1))
        correct = overlap >= MIN_IOU
        if correct:
            taken.add(index)
        shown.append({**detection, "correct": correct, "kind": "correct" if correct else ""})
    return shown


Arms = Mapping[str, Sequence[Mapping[str, Any]]]
"""Contents of each arm's detections.json, by arm."""


def shared(arms: Arms) -> list[dict[str, Any]]:
    """Return the test pictures that every arm's file has, in the first one's order.

    Each has `item` (its row in the first arm's file) and `arms`: what each arm finds in it.
    """
    by_name = [{item["file_name"]: item for item in items} for items in arms.values()]
    return [
        {
            "item": item,
            "arms": {arm: judged(found[name]) for arm, found in zip(arms, by_name, strict=True)},
        }
        for name, item in (by_name[0] if by_name else {}).items()
        if all(name in found for found in by_name)
    ]


def rows(shared_pictures: Iterable[dict[str, Any]], dataset: Path, count: int) -> list[dict]:
    """Return the first `count` pictures that can be opened, each with `picture` and `name`.

    Args:
        shared_pictures: What `shared` gives, in any order.
        dataset: Folder that the file names are relative to.
        count: Number of pictures.
    """
    shown: list[dict] = []
    for row in shared_pictures:
        if len(shown) == count:
            break
        path = dataset / row["item"]["file_name"]
        picture = embed(path, 480) if _is_below(path, dataset) else None
        if picture is not None:
            shown.append({**row, "name": path.name, "picture": picture})
    return shown


def sentence(item: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Return what a picture shows, for those who do not see it."""
    truth = ", ".join(obj["class"] for obj in item.get("ground_truth") or []) or "nothing"
    boxes = ", ".join(f"{d['class']} {d['score']:.2f} {_verdict(d)}" for d in found)
    return f"Labelled: {truth}. Detected: {boxes or 'nothing'}."


def _verdict(detection: Mapping[str, Any]) -> str:
    if detection["correct"]:
        return "correct"
    return f"wrong ({detection['kind']})" if detection.get("kind") else "wrong"


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
