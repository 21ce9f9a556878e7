"""An evaluation whose pictures are spread over two processes gives what one process gives."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from detectron2.utils import comm

from common.annotations.record import read_set
from detection.evaluation.evaluate import Collector, coco_metric, detection_rows, voc_metric
from detection.training.trainer import share_buffers
from tests.detection.tiny_detection import instances_of, make_detections, make_voc
from tests.ranks import Rank, assert_well, ends_of

NUM_PROCESSES = 2


def evaluate(root: Path, rank: int, num_processes: int) -> dict[str, Any] | None:
    """Figures of every `num_processes`-th picture, from `rank` on, of all processes."""
    voc = read_set(root)
    collector = Collector(voc.test)
    collector.reset()
    rows = make_detections(voc)  # every score is another
    for picture in voc.test.pictures[rank::num_processes]:
        instances = instances_of(rows, picture.image_id)
        collector.process([{"image_id": picture.image_id}], [{"instances": instances}])
    result = collector.evaluate()
    if result is None:
        return None
    found = result["boxes"]
    return {
        "coco": coco_metric(voc.test, voc.classes, found)[0],
        "voc": voc_metric(voc.test, voc.classes, found, 2012)[0],
        "rows": detection_rows(
            voc.test, voc, found, ["x"] * len(found.score), num_saved=12, score_thresh=0.0
        ),
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


def shared_statistics(rank: int) -> tuple[float, int]:
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean.fill_(rank + 7.0)  # type: ignore[union-attr]
    norm.num_batches_tracked.fill_(rank + 3)  # type: ignore[union-attr]
    share_buffers(norm)
    return float(norm.running_mean), int(norm.num_batches_tracked)  # type: ignore[arg-type]


def second_process(root: Path, folder: Path) -> None:
    with process_group(1, folder):
        assert shared_statistics(1) == (7.0, 3)
        assert not evaluate(root, 1, NUM_PROCESSES)  # only the first process has the result


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_gather_what_one_has(tmp_path: Path, monkeypatch) -> None:
    """This process is the first of the two: only the second has to import everything."""
    root = make_voc(tmp_path / "data", num_train=2, num_test=12)
    alone = evaluate(root, 0, 1)
    assert alone is not None
    assert 0 < alone["coco"]["AP75"] < alone["coco"]["AP50"] < 100
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    other = Rank(second_process, (root, tmp_path))
    with process_group(0, tmp_path):
        assert shared_statistics(0) == (7.0, 3)
        both = evaluate(root, 0, NUM_PROCESSES)
    assert_well(ends_of([other]))
    assert both == alone
