"""The VOC devkit layout, as Detectron2's loader and evaluator read it unchanged."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2

from tools.datasets.compose import Annotation, Scene

YEAR_FOLDER = "VOC2007"


def make_folders(root: Path) -> None:
    """Make the empty folders of a devkit below `root`."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / YEAR_FOLDER / name).mkdir(parents=True, exist_ok=True)


def annotation_xml(
    picture: str, width: int, height: int, objects: Sequence[Annotation], classes: Sequence[str]
) -> bytes:
    """Return the annotation of one picture.

    Args:
        picture: File name with its ending.
        width: Columns of the picture.
        height: Rows of the picture.
        objects: Boxes in 0-based pixels, the far edges exclusive.
        classes: Class names in label order.
    Returns:
        XML with 1-based boxes, both edges included.
    """
    root = ElementTree.Element("annotation")
    _add(root, folder=YEAR_FOLDER, filename=picture)
    _add(ElementTree.SubElement(root, "source"), database="generated")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for item in objects:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= width, (picture, item)
        assert 0 <= y0 < y1 <= height, (picture, item)
        node = ElementTree.SubElement(root, "object")
        _add(
            node,
            name=classes[item.label],
            pose="Unspecified",
            truncated=int(item.truncated),
            difficult=int(item.difficult),
        )
        box = ElementTree.SubElement(node, "bndbox")
        _add(box, xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **values: object) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


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
    xml = annotation_xml(f"{name}.jpg", width, height, scene.objects, classes)
    (folder / "Annotations" / f"{name}.xml").write_bytes(xml)


def write_jpeg(path: Path, scene: Scene, quality: int) -> None:
    """Write the picture of a scene as JPEG."""
    done, data = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, path
    path.write_bytes(data.tobytes())


def write_image_set(root: Path, split: str, names: Sequence[str]) -> None:
    """Write the list of a split's pictures, one name a line."""
    path = root / YEAR_FOLDER / "ImageSets" / "Main" / f"{split}.txt"
    path.write_text("".join(f"{name}\n" for name in names))
