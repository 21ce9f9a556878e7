"""Records as Detectron2 takes them."""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances

from common.annotations.record import read_set
from detection.training.data import register, to_detectron2
from tests.detection.tiny_detection import CLASSES


def test_same_annotations_as_detectron2_reads(voc_root: Path) -> None:
    voc = read_set(voc_root)
    ours = to_detectron2(voc.train[0], voc.classes)
    theirs = load_voc_instances(str(voc_root / "VOC2007"), "train", CLASSES)
    assert [{**row, "image_id": str(row["image_id"])} for row in theirs] == ours


def test_registered_with_its_own_classes(voc_root: Path) -> None:
    voc = read_set(voc_root)
    for _ in range(2):  # a second time in the same process changes nothing
        train, test = register(voc)
    assert len(DatasetCatalog.get(train[0])) == 8
    assert MetadataCatalog.get(test).thing_classes == list(CLASSES)
