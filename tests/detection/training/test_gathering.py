"""An evaluation whose pictures are spread over two processes gives what one process gives."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch.multiprocessing.spawn import spawn

from common.annotations.record import LabelledSet, read_set
from detection.evaluation.error_analysis import ALL_KINDS, error_table, judge, objects_of
from detection.evaluation.evaluate import Collector, detection_rows
from detection.evaluation.metrics import coco_metric, voc_metric
from tests.detection.tiny_detection import make_voc

NUM_PROCESSES = 2


def detections(voc: LabelledSet, number: int) -> Instances:
    """Moved objects, some of another class, of one picture; every score is another."""
    draw = np.random.default_rng(number)
    picture = voc.test.pictures[number]
    boxes, labels = [], []
    for item in picture.objects * 6:
        boxes.append(np.array(item.box) + draw.normal(0, 8, 4))
        labels.append((voc.classes.index(item.class_name) + int(draw.random() < 0.3)) % 3)
    found = Instances((picture.height, picture.width))
    found.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
    found.scores = torch.tensor((draw.permutation(6) * 12 + number + 1) / 100)
    found.pred_classes = torch.tensor(labels)
    return found


def evaluate(root: Path, rank: int, num_processes: int) -> dict[str, Any] | None:
    """Figures of every `num_processes`-th picture, from `rank` on, of all processes."""
    voc = read_set(root)
    names = [picture.image_id for picture in voc.test.pictures]
    collector = Collector(voc.test)
    collector.reset()
    for number in range(rank, len(names), num_processes):
        collector.process([{"image_id": names[number]}], [{"instances": detections(voc, number)}])
    result = collector.evaluate()
    if result is None:
        return None
    found = result["boxes"]
    objects, in_voc = objects_of(voc.test, voc.classes), found.in_voc()
    verdicts = judge(objects, in_voc)
    kinds = [ALL_KINDS[kind] for kind in verdicts.kind]
    return {
        "coco": coco_metric(voc.test, voc.classes, found)[0],
        "voc": voc_metric(voc.test, voc.classes, found, 2012),
        "errors": error_table(objects, in_voc, verdicts, voc.classes, len(names), 2012),
        "rows": detection_rows(voc.test, voc, found, kinds, num_saved=12, score_thresh=0.0),
    }


@contextlib.contextmanager
def process_group(rank: int, folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(minutes=5),
    )
    try:
        yield
    finally:
        comm._get_global_gloo_group.cache_clear()  # this process may go on without the group
        torch.distributed.destroy_process_group()


def second_process(_: int, root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(1, folder):
        assert not evaluate(root, 1, NUM_PROCESSES)  # only the first process has the result


@pytest.mark.ddp
def test_two_processes_gather_what_one_has(tmp_path: Path, monkeypatch) -> None:
    """This process is the first of the two: only the second has to import everything."""
    root = make_voc(tmp_path / "data", num_train=2, num_test=12)
    alone = evaluate(root, 0, 1)
    assert alone is not None
    assert 0 < alone["coco"]["AP75"] < alone["coco"]["AP50"] < 100
    assert min(alone["errors"]["all"][kind] for kind in ("correct", "confusion")) > 0
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    other = spawn(second_process, (root, tmp_path), 1, join=False)
    assert other is not None
    with process_group(0, tmp_path):
        both = evaluate(root, 0, NUM_PROCESSES)
    while not other.join():
        pass
    assert both == alone
