"""The VOC devkit layout, as Detectron2's loader and evaluator read it unchanged."""

from collections.abc import Sequence
from pathlib import Path

import cv2

from common.annotations.canonical import YEAR_FOLDER, annotation_xml
from common.annotations.record import ObjectRecord
from common.annotations.voc import annotation_file
from pipeline.datasets.compose import Scene


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
