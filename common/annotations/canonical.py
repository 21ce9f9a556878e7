"""Annotations as this project writes them: a VOC devkit with whole boxes, COCO's JSON unrounded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common.annotations.record import ObjectRecord, PictureRecord

YEAR_FOLDER = "VOC2007"


def annotation_file(folder: Path, image_id: str) -> Path:
    """Where the annotation of a picture is in a VOC folder."""
    return folder / "Annotations" / f"{image_id}.xml"


def list_file(folder: Path, name: str) -> Path:
    """Where the list NAME of a VOC folder is."""
    return folder / "ImageSets" / "Main" / f"{name}.txt"


def make_folders(folder: Path) -> None:
    """Make the empty folders of a VOC folder."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def annotation_xml(picture: str, width: int, height: int, objects: Sequence[ObjectRecord]) -> bytes:
    """The annotation of one picture, with every field that Detectron2's evaluator needs.

    Args:
        picture: File name with its suffix.
        width: Columns of the picture.
        height: Rows of the picture.
        objects: Their boxes are rounded to whole pixels.
    Returns:
        XML in ASCII, other characters as numbers; boxes 1-based, both ends included.
    """
    root = ElementTree.Element("annotation")
    _add(root, folder=YEAR_FOLDER, filename=picture)
    _add(ElementTree.SubElement(root, "source"), database="generated")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for item in objects:
        xmin, ymin, xmax, ymax = (round(value) for value in item.voc_box)
        node = ElementTree.SubElement(root, "object")
        _add(
            node,
            name=item.class_name,
            pose="Unspecified",
            truncated=int(item.truncated),
            difficult=int(item.is_ignored),
        )
        box = ElementTree.SubElement(node, "bndbox")
        _add(box, xmin=xmin, ymin=ymin, xmax=max(xmin, xmax), ymax=max(ymin, ymax))
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **values: object) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


def write_list(folder: Path, name: str, image_ids: Sequence[str]) -> None:
    """Write the list of a VOC folder, one picture name a line."""
    text = "".join(f"{image_id}\n" for image_id in image_ids)
    list_file(folder, name).write_text(text, encoding="utf-8")


def write_annotations(folder: Path, list_name: str, pictures: Sequence[PictureRecord]) -> None:
    """Write a VOC folder without pictures: Annotations/0.xml, 1.xml, .. and their list.

    The pictures are named by their place, since VOC's evaluator takes no name with a space.
    """
    make_folders(folder)
    for number, picture in enumerate(pictures):
        xml = annotation_xml(picture.file.name, picture.width, picture.height, picture.objects)
        annotation_file(folder, str(number)).write_bytes(xml)
    write_list(folder, list_name, [str(number) for number in range(len(pictures))])


def coco_content(pictures: Sequence[PictureRecord], classes: Sequence[str]) -> dict[str, Any]:
    """Ground truth as COCO's JSON holds it: boxes not rounded, ignored objects as crowds.

    All ids count from 1, since pycocotools takes 0 for "no match". Images and categories are
    numbered by their place.
    """
    annotations = []
    for image, picture in enumerate(pictures, start=1):
        for item in picture.objects:
            x0, y0, x1, y1 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": classes.index(item.class_name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) if item.area is None else item.area,
                    "iscrowd": int(item.is_ignored),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": item.file.name, "width": item.width, "height": item.height}
            for i, item in enumerate(pictures, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
