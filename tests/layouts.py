"""Folders of labelled pictures as annotation tools write them: six pictures, six boxes.

Of `MADE` each holds a red cat or a blue dog, boxes whole pixels of the upright picture.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (128, 96)
NAMES = [f"photo {i}" for i in range(6)]
BOXES = {name: (10 + 5 * i, 20, 51 + 5 * i, 61) for i, name in enumerate(NAMES)}
LABELS = {name: ("cat", "dog")[i % 2] for i, name in enumerate(NAMES)}
PARTS = {"train": NAMES[:4], "valid": NAMES[4:]}


def paint(path: Path, name: str, orientation: int = 1, size=SIZE, is_turned=True) -> None:
    """A picture with its box filled, stored as an EXIF orientation of 1 or 6 says, or as it is."""
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    x0, y0, x1, y1 = BOXES[name]
    pixels[y0:y1, x0:x1] = {"cat": (250, 20, 10), "dog": (10, 20, 250)}[LABELS[name]]
    if orientation == 6 and is_turned:
        pixels = np.rot90(pixels)
    exif = Image.Exif()
    exif[0x112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0, exif=exif.tobytes())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def voc_xml(label: str, corners: Iterable[object], size=SIZE, more="", filename="") -> str:
    """VOC's XML of one object; `more` stands behind its name."""
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    inner = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<annotation><folder>VOC2007</folder><filename>{filename}</filename><size><width>{size[0]}"
        f"</width><height>{size[1]}</height><depth>3</depth></size><object><name>{label}</name>"
        f"{more}<bndbox>{inner}</bndbox></object></annotation>"
    )


def xml(name: str, filename: str) -> str:
    x0, y0, x1, y1 = BOXES[name]
    return voc_xml(LABELS[name], (x0 + 1, y0 + 1, x1, y1), filename=filename)


def line(name: str) -> str:
    """YOLO's line."""
    x0, y0, x1, y1 = BOXES[name]
    shares = ((x0 + x1) / 2 / SIZE[0], (y0 + y1) / 2 / SIZE[1],
              (x1 - x0) / SIZE[0], (y1 - y0) / SIZE[1])  # fmt: skip
    return f"{['cat', 'dog'].index(LABELS[name])} {' '.join(f'{x:.6f}' for x in shares)}\n"


def coco(names: list[str], folder: str = "", first: int = 0) -> dict[str, Any]:
    """What COCO's JSON holds; with `first` 1 Roboflow's category 0 stands above the others."""
    rows = []
    for i, name in enumerate(names):
        x0, y0, x1, y1 = BOXES[name]
        rows.append({"id": i, "image_id": i, "category_id": first + (LABELS[name] == "dog"),
                     "bbox": [x0, y0, x1 - x0, y1 - y0]})  # fmt: skip
    categories = [{"id": first + i, "name": x, "supercategory": "pets"}
                  for i, x in enumerate(("cat", "dog"))]  # fmt: skip
    above = [{"id": 0, "name": "pets", "supercategory": "none"}][:first]
    images = [{"id": i, "file_name": f"{folder}{name}.jpg", "width": SIZE[0], "height": SIZE[1]}
              for i, name in enumerate(names)]  # fmt: skip
    return {"images": images, "categories": above + categories, "annotations": rows}


def parted(picture: str, label: str, text: Callable[[str], str]) -> Callable[[Path], None]:
    """Pictures and annotations of train and valid at places with {part} and {name}."""

    def make(root: Path) -> None:
        for part, names in PARTS.items():
            for name in names:
                paint(root / picture.format(part=part, name=name), name)
                write(root / label.format(part=part, name=name), text(name))

    return make


def also(make: Callable[[Path], None], files: dict[str, str]) -> Callable[[Path], None]:
    """Other files too, their text given."""

    def both(root: Path) -> None:
        make(root)
        for name, text in files.items():
            write(root / name, text)

    return both


def of_xml(name: str) -> str:
    return xml(name, f"{name}.jpg")


def cvat_voc(root: Path) -> None:
    parted("JPEGImages/{name}.jpg", "Annotations/{name}.xml", of_xml)(root)
    quoted = "".join(f'"{name}"\n' for name in NAMES)
    write(root / "ImageSets/Main/default.txt", quoted)
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\ncat:1,0,0::\ndog:0,1,0::\n")


def coco_of(picture: str, table: str, parts: dict[str, list[str]], **more) -> Callable:
    def make(root: Path) -> None:
        for part, names in parts.items():
            for name in names:
                paint(root / picture.format(part=part, name=name), name)
            write(root / table.format(part=part), json.dumps(coco(names, **more)))

    return make


ALL = {"default": NAMES}
YAML = (
    "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: [cat, dog]\n"
)
APART = ("{part}/images/{name}.jpg", "{part}/labels/{name}.txt")
# name -> (format, what writes it, whether it has lists of its own)
LAYOUTS: dict[str, tuple[str, Callable[[Path], None], bool]] = {
    "LabelImg": ("xml_folder", parted("{name}.jpg", "{name}.xml", of_xml), False),
    "LabelImg, deep": ("xml_folder", parted("a/{part} 1/{name}.jpg", "a/{part} 1/{name}.xml",
                                               of_xml), False),
    "Roboflow VOC": ("xml_folder", parted("{part}/{name}.jpg", "{part}/{name}.xml", of_xml), True),
    "Label Studio VOC": ("xml_folder", parted("images/{name}.jpg", "Annotations/{name}.xml",
                                              lambda name: xml(name, name)), False),
    "XML renamed": ("xml_folder", parted("{name}.jpg", "xml/{part}_{name}.xml", of_xml), False),
    "CVAT VOC": ("voc", cvat_voc, False),
    "CVAT COCO": ("coco", coco_of("images/{part}/{name}.jpg", "annotations/instances_{part}.json",
                                  ALL), False),
    "Roboflow COCO": ("coco", coco_of("{part}/{name}.jpg", "{part}/_annotations.coco.json", PARTS,
                                      first=1), True),
    "Label Studio COCO": ("coco", coco_of("images/{name}.jpg", "result.json", ALL,
                                          folder="images/"), False),
    "COCO, dataset.json": ("coco", coco_of("{name}.jpg", "dataset.json", ALL), False),
    "COCO of a server": ("coco", coco_of("images/{name}.jpg", "export.json", ALL,
                                         folder="..\\..\\media\\upload\\3\\"), False),
    "Roboflow YOLO": ("yolo", also(parted(*APART, line), {"data.yaml": YAML}), True),
    "Ultralytics": ("yolo", also(parted("images/{part}/{name}.jpg", "labels/{part}/{name}.txt",
                                        line),
                                 {"pets.yaml": "path: ../datasets/pets\ntrain: [images/train]\n"
                                  "val: images/valid\nnames: {0: cat, 1: dog}\n"}), True),
    "CVAT Ultralytics": ("yolo", also(parted("images/train/{name}.jpg", "labels/train/{name}.txt",
                                             line),
                                      {"data.yaml": "path: ./\ntrain: train.txt\nnames:\n  0: cat\n"
                                       "  1: dog\n",
                                       "train.txt": "".join(f"images/train/{x}.jpg\n"
                                                            for x in NAMES)}), False),
    "CVAT YOLO": ("yolo", also(parted("obj_{part}_data/{name}.jpg",
                                      "obj_{part}_data/{name}.txt", line),
                               {"obj.names": "cat\ndog\n", "obj.data": "classes = 2\n"}
                               | {f"{part}.txt": "".join(f"data/obj_{part}_data/{x}.jpg\n"
                                                         for x in names)
                                  for part, names in PARTS.items()}), True),
    "LabelImg YOLO": ("yolo", also(parted("{name}.jpg", "{name}.txt", line),
                                   {"classes.txt": "cat\ndog\n"}), False),
    "Label Studio YOLO": ("yolo", also(parted("images/{name}.jpg", "labels/{name}.txt", line),
                                       {"classes.txt": "cat\ndog\n",
                                        "notes.json": '{"categories": [], "info": {}}'}), False),
}  # fmt: skip
