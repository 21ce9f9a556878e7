"""Makes a set on disk: whole or not at all, never over somebody's files, by one run at a time.

`make_set` does so for every kind of set; `build` fills the folder with generated pictures.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common.annotations.record import (
    YEAR_FOLDER,
    ObjectRecord,
    annotation_file,
    annotation_xml,
    make_folders,
    write_list,
)
from common.errors import RunFailed, UserError, require
from common.files import locked, read_json_or_none, write_json
from common.parent_death import exit_with_parent
from pipeline.datasets.scene import Scene, SceneSource

FORMAT = "fa-dataset-1"
METRIC_YEAR = 2012  # area under the precision-recall curve, not VOC2007's 11 points
LOCK_WAIT_SECONDS = 5.0  # the workers of a killed run hold its lock until they notice
_CHUNK = 32  # pictures per task


@dataclass(frozen=True)
class Card:
    """What dataset.json says of every set.

    Attributes:
        name: Name of the set.
        kind: "procedural", "photos" or "voc".
        options: Everything that determines the pictures.
        licence: Terms of the pictures.
        notes: Honest limits.
    """

    name: str
    kind: str
    options: dict[str, object]
    licence: str
    notes: str

    def write(self, root: Path, **content: object) -> None:
        """Write dataset.json; `content` are classes, lists and counts."""
        head = {"format": FORMAT, "name": self.name, "kind": self.kind}
        tail = {"options": self.options, "licence": self.licence, "notes": self.notes}
        write_json(root / "dataset.json", head | content | tail)


def make_set(card: Card, out: Path, overwrite: bool, fill: Callable[[Path], None]) -> bool:
    """Make a set in a folder of its own, which gets its name when it is complete.

    Args:
        card: Its options decide whether `out` holds this very set.
        out: Folder to make; while unfinished it is called `out`.partial.
        overwrite: Whether a set made with other options is replaced.
        fill: Writes everything below a folder.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If `out` holds something else, or another run is writing it.
        RunFailed: If the disk does not take it.
    """
    unfinished, lock = (out.with_name(out.name + ending) for ending in (".partial", ".lock"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(
            f"{out.parent}: cannot be written ({error}); give another folder"
        ) from error
    with locked(lock, patience=LOCK_WAIT_SECONDS) as is_mine:
        require(is_mine, f"{out}: another run is writing it; wait for it or give another folder")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            if _is_finished(card, out, overwrite):
                return False
            fill(unfinished)
            if out.exists():
                shutil.rmtree(out)
            unfinished.rename(out)
        except OSError as error:
            raise RunFailed(
                f"{out}: writing failed ({error}); free some space, run again"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _is_finished(card: Card, out: Path, overwrite: bool) -> bool:
    """Whether `out` holds this very set; refuse to touch anything else.

    Raises:
        UserError: If `out` is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    old = read_json_or_none(out / "dataset.json")
    if not isinstance(old, dict) or old.get("format") != FORMAT:
        raise UserError(
            f"{out}: is there and is no data set made by this tool; give another folder"
        )
    there = {"kind": old.get("kind"), **old.get("options", {})}
    requested = {"kind": card.kind, **card.options}
    if overwrite or there == requested:
        return not overwrite
    names = sorted(name for name in {*there, *requested} if there.get(name) != requested.get(name))
    differing = [f"{x}: {there.get(x)} there, {requested.get(x)} requested" for x in names]
    raise UserError(
        f"{out}: holds a set made with other options ({', '.join(differing[:4])}); give another "
        "folder, or --overwrite to replace it"
    )


# -- generated sets -------------------------------------------------------------------------------


def build(source: SceneSource, card: Card, out: Path, num_workers: int, overwrite: bool) -> bool:
    """Write a generated set to `out`.

    Args:
        source: Makes the pictures.
        card: Goes into dataset.json.
        out: Folder to make.
        num_workers: Processes; 1 works in this one.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If `out` holds something else.
        RunFailed: If there is too little space.
        RuntimeError: If a worker was killed.
    """

    def fill(root: Path) -> None:
        options = source.options
        free, needed = shutil.disk_usage(out.parent).free, options.num_bytes()
        if needed > free:
            raise RunFailed(
                f"{out.parent}: {free / 1e6:.0f} MB are free, the set may need "
                f"{needed / 1e6:.0f} MB; free some space, or make fewer or smaller pictures"
            )
        make_folders(root / YEAR_FOLDER)
        (root / "pool").mkdir()
        for split, name in product(("train", "val"), source.class_names):
            (root / "probe" / split / name).mkdir(parents=True)
        _render_all(source, root, num_workers)
        splits = {"train": options.num_train, "test": options.num_test}
        for split, count in splits.items():
            names = [_picture_name(split, index) for index in range(count)]
            write_list(root / YEAR_FOLDER, split, names)
        probe = {"train": options.num_probe_train, "val": options.num_probe_val}
        content = {"splits": splits, "pool": options.num_pool, "probe": probe}
        card.write(root, classes=list(source.class_names), metric_year=METRIC_YEAR, **content)

    return make_set(card, out, overwrite, fill)


def _render_all(source: SceneSource, root: Path, num_workers: int) -> None:
    counts = source.options.counts()
    tasks = [
        (part, range(start, min(start + _CHUNK, count)))
        for part, count in counts.items()
        for start in range(0, count, _CHUNK)
    ]
    render = partial(_render_chunk, source, root)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads: a forked worker would wait for them for ever
    try:
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=sum(counts.values()), unit="img", desc=root.stem))
            done = starmap(render, tasks)
            if num_workers > 1:
                pool = ProcessPoolExecutor(num_workers, initializer=exit_with_parent)
                done = stack.enter_context(pool).map(render, *zip(*tasks, strict=True))
            for num_done in done:
                bar.update(num_done)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed (out of memory?): run again, with a smaller --num-workers"
        ) from error
    finally:
        cv2.setNumThreads(threads)


def _render_chunk(source: SceneSource, root: Path, part: str, indices: range) -> int:
    """Make pictures and write each where its part belongs; return how many."""
    classes, quality = source.class_names, source.options.quality
    for index in indices:
        scene = source.scene(part, index)
        if part in ("train", "test"):
            write_scene(root, _picture_name(part, index), scene, classes, quality)
        elif part == "pool":
            write_picture(root / part / f"{index:07d}.jpg", scene.image, quality)
        else:
            name = classes[source.probe_label(index)]
            write_picture(root / part / name / f"{index:06d}.jpg", scene.image, quality)
    return len(indices)


def _picture_name(split: str, index: int) -> str:
    """The name of a labelled picture, without ending; unique over both splits."""
    return f"{split}_{index:06d}"


def write_scene(root: Path, name: str, scene: Scene, classes: Sequence[str], quality: int) -> None:
    """Write one labelled picture below a devkit's root.

    Args:
        root: Folder that holds VOC2007.
        name: Picture name without ending.
        scene: Picture and objects.
        classes: Class names in label order.
        quality: JPEG quality, 1..100.
    Raises:
        OSError: If the disk does not take it.
    """
    folder = root / YEAR_FOLDER
    write_picture(folder / "JPEGImages" / f"{name}.jpg", scene.image, quality)
    height, width = scene.image.shape[:2]
    objects = []
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= width, (name, item)
        assert 0 <= y0 < y1 <= height, (name, item)
        marks = {"difficult": item.difficult, "truncated": item.truncated}
        objects.append(ObjectRecord(classes[item.label], item.box, **marks))
    xml = annotation_xml(f"{name}.jpg", width, height, objects)
    annotation_file(folder, name).write_bytes(xml)


def write_picture(path: Path, image: np.ndarray, quality: int = 100) -> None:
    """Write a picture, uint8 [h, w, 3] BGR or [h, w], in the format that its name ends in."""
    done, data = cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, path
    path.write_bytes(data.tobytes())
