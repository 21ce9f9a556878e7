"""Writes a generated set to disk: in parallel, to a partial folder, renamed when complete."""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
from tqdm import tqdm

from common.annotations.canonical import YEAR_FOLDER, annotation_xml, make_folders, write_list
from common.annotations.record import ObjectRecord
from common.annotations.voc import annotation_file
from common.errors import UserError
from common.files import locked, read_json, write_json
from pipeline.datasets.compose import Scene
from pipeline.datasets.options import SetOptions


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
    write_jpeg(folder / "JPEGImages" / f"{name}.jpg", scene, quality)
    height, width = scene.image.shape[:2]
    objects = []
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= width, (name, item)
        assert 0 <= y0 < y1 <= height, (name, item)
        box = (float(x0), float(y0), float(x1), float(y1))
        label, marks = classes[item.label], (item.difficult, item.truncated)
        objects.append(ObjectRecord(label, box, difficult=marks[0], truncated=marks[1]))
    xml = annotation_xml(f"{name}.jpg", width, height, objects)
    annotation_file(folder, name).write_bytes(xml)


def write_jpeg(path: Path, scene: Scene, quality: int) -> None:
    """Write the picture of a scene as JPEG."""
    done, data = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, path
    path.write_bytes(data.tobytes())


FORMAT = "fa-dataset-1"
METRIC_YEAR = 2012  # area under the precision-recall curve, not VOC2007's 11 points
LOCK_WAIT_SECONDS = 5.0  # the workers of a killed run hold its lock until they notice
_CHUNK = 32  # pictures per task
_BLOCK = 4096  # bytes a small file takes at least


class Source(Protocol):
    """Makes pictures: each is a function of the options, the part and the index alone."""

    @property
    def options(self) -> SetOptions:
        """Sizes and statistics."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes in label order."""
        ...

    def scene(self, part: str, index: int) -> Scene:
        """Make one picture."""
        ...

    def probe_label(self, index: int) -> int:
        """Return the class of a probe picture."""
        ...


@dataclass(frozen=True)
class Card:
    """What dataset.json says beside counts and classes.

    Attributes:
        name: Name of the set.
        kind: "procedural" or "photos".
        options: Everything that determines the pictures.
        licence: Terms of the pictures.
        notes: Honest limits.
    """

    name: str
    kind: str
    options: dict[str, object]
    licence: str
    notes: str


class DiskError(OSError):
    """The disk does not take the set; the message is for the user."""


def build(source: Source, card: Card, out: Path, num_workers: int, overwrite: bool) -> bool:
    """Write a set to `out`.

    Args:
        source: Makes the pictures.
        card: Goes into dataset.json.
        out: Folder to make; while unfinished it is called `out`.partial.
        num_workers: Processes; 1 works in this one.
        overwrite: Whether a set made with other options is replaced.
    Returns:
        False if the set was there already and was kept.
    Raises:
        UserError: If `out` holds something else.
        DiskError: If there is too little space.
    """
    partial = out.with_name(out.name + ".partial")
    with only_one(out):
        if is_finished(card, out, overwrite):
            shutil.rmtree(partial, ignore_errors=True)
            return False
        shutil.rmtree(partial, ignore_errors=True)
        _check_space(source.options, out.parent)
        try:
            _make_folders(source, partial)
            _render_all(source, partial, num_workers)
            _write_lists(source, card, partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise DiskError(
                f"{out}: writing failed ({error}); free some space, run again"
            ) from error
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return True


def is_finished(card: Card, out: Path, overwrite: bool) -> bool:
    """Tell whether `out` holds this very set; refuse to touch anything else.

    Raises:
        UserError: If `out` is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_json(out / "dataset.json")
        ours = found["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{out}: is there and is no data set made by this tool; give another folder"
        )
    if found.get("kind") == card.kind and found.get("options") == card.options:
        return not overwrite
    if overwrite:
        return False
    differing = _differences(found.get("options", {}), card.options)
    raise UserError(
        f"{out}: holds a set made with other options ({differing}); "
        "give another folder, or --overwrite to replace it"
    )


def _differences(old: dict[str, object], new: dict[str, object]) -> str:
    names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return ", ".join(f"{k}: {old.get(k)} there, {new.get(k)} asked" for k in names[:4]) or "kind"


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold a lock beside `out`, so that two runs never write the same set."""
    path = out.with_name(out.name + ".lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(
            f"{out.parent}: cannot be written ({error}); give another folder"
        ) from error
    with locked(path, patience=LOCK_WAIT_SECONDS) as is_mine:
        if not is_mine:
            raise UserError(f"{out}: another run is writing it; wait for it or give another folder")
        yield


def bytes_needed(options: SetOptions) -> int:
    """Estimate a set's size in bytes, on the high side."""
    per_pixel = 0.25 + 0.75 * (options.quality / 100) ** 4
    picture = max(_BLOCK, options.short_side * options.long_side * per_pixel)
    labelled = options.num_train + options.num_test
    return int(options.total() * (picture + _BLOCK / 2) + labelled * _BLOCK)


def _check_space(options: SetOptions, folder: Path) -> None:
    free, needed = shutil.disk_usage(folder).free, bytes_needed(options)
    if needed > free:
        raise DiskError(
            f"{folder}: {free / 1e6:.0f} MB are free, the set may need {needed / 1e6:.0f} MB; "
            "free some space, give another folder, or ask for fewer or smaller pictures"
        )


def _make_folders(source: Source, root: Path) -> None:
    make_folders(root / YEAR_FOLDER)
    (root / "pool").mkdir()
    for split in ("train", "val"):
        for name in source.class_names:
            (root / "probe" / split / name).mkdir(parents=True)


def write_picture(source: Source, root: Path, part: str, index: int) -> None:
    """Make one picture and write it where its part belongs."""
    scene = source.scene(part, index)
    quality = source.options.quality
    if part in ("train", "test"):
        write_scene(root, picture_name(part, index), scene, source.class_names, quality)
    elif part == "pool":
        write_jpeg(root / "pool" / f"{index:07d}.jpg", scene, quality)
    else:
        name = source.class_names[source.probe_label(index)]
        write_jpeg(root / part / name / f"{index:06d}.jpg", scene, quality)


def picture_name(split: str, index: int) -> str:
    """Return the name of a labelled picture, without ending; unique over both splits."""
    return f"{split}_{index:06d}"


def _write_lists(source: Source, card: Card, root: Path) -> None:
    options = source.options
    splits = {"train": options.num_train, "test": options.num_test}
    for split, count in splits.items():
        names = [picture_name(split, i) for i in range(count)]
        write_list(root / YEAR_FOLDER, split, names)
    content = {
        "format": FORMAT,
        "name": card.name,
        "kind": card.kind,
        "classes": list(source.class_names),
        "metric_year": METRIC_YEAR,
        "splits": splits,
        "pool": options.num_pool,
        "probe": {"train": options.num_probe_train, "val": options.num_probe_val},
        "options": card.options,
        "licence": card.licence,
        "notes": card.notes,
    }
    write_json(root / "dataset.json", content)


def _tasks(options: SetOptions) -> Iterator[tuple[str, int, int]]:
    """Yield (part, first index, one past the last) of every task."""
    for part, count in options.counts().items():
        for start in range(0, count, _CHUNK):
            yield part, start, min(start + _CHUNK, count)


def _render_all(source: Source, root: Path, num_workers: int) -> None:
    with tqdm(total=source.options.total(), unit="img", desc=root.stem) as bar:
        if num_workers <= 1:
            threads = cv2.getNumThreads()
            cv2.setNumThreads(1)
            for task in _tasks(source.options):
                bar.update(_render_chunk(source, root, *task))
            cv2.setNumThreads(threads)
            return
        cv2.setNumThreads(1)  # ends OpenCV's threads: a forked worker would wait for them for ever
        with ProcessPoolExecutor(
            num_workers, initializer=_start_worker, initargs=(os.getpid(),)
        ) as pool:
            try:
                _feed(pool, source, root, 2 * num_workers, bar)
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a worker process was killed (out of memory?): run again, "
                    "with a smaller --num-workers"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _feed(pool: ProcessPoolExecutor, source: Source, root: Path, window: int, bar: tqdm) -> None:
    """Keep at most `window` tasks under way, so that memory stays bounded."""
    running: set[Future[int]] = set()
    for task in _tasks(source.options):
        running.add(pool.submit(_render_chunk, source, root, *task))
        if len(running) >= window:
            running = _collect(running, bar)
    while running:
        running = _collect(running, bar)


def _collect(running: set[Future[int]], bar: tqdm) -> set[Future[int]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        bar.update(future.result())
    return set(rest)


def _render_chunk(source: Source, root: Path, part: str, start: int, stop: int) -> int:
    for index in range(start, stop):
        write_picture(source, root, part, index)
    return stop - start


def _start_worker(parent: int) -> None:
    """Use one thread, and end with the parent even if it is killed."""
    cv2.setNumThreads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
