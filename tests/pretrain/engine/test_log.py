"""metrics.jsonl without a seam after a resume."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.files import read_json_lines
from pretrain.engine.run_folder import MetricLog


def rows(folder):
    return read_json_lines(folder / "metrics.jsonl")


def test_rows_and_scalars(tmp_path):
    log = MetricLog(tmp_path, -1, -1)
    log.write("train", 1, loss=0.5, epoch=0.25)
    log.write("event", 1, message="hello")
    log.write("knn", 2, knn_top1=0.75)
    log.close()
    assert rows(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 0.5, "epoch": 0.25},
        {"kind": "event", "step": 1, "message": "hello"},
        {"kind": "knn", "step": 2, "knn_top1": 0.75},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/epoch", "knn/knn_top1"}
    assert board.Scalars("knn/knn_top1")[0].value == 0.75
    assert board.Scalars("knn/knn_top1")[0].step == 2


def test_each_row_is_on_disk_at_once(tmp_path):
    log = MetricLog(tmp_path, -1, -1)
    log.write("train", 1, loss=0.5)
    assert rows(tmp_path)[0]["loss"] == 0.5
    log.close()


def fill(folder):
    log = MetricLog(folder, -1, -1)
    for step in (1, 2, 3, 4):
        log.write("train", step, loss=float(step))
        if step % 2 == 0:
            log.write("knn", step, knn_top1=step / 10)
    log.close()


@pytest.mark.parametrize(
    ("last", "last_probe", "train", "knn"),
    [
        (-1, -1, [], []),
        (4, 4, [1, 2, 3, 4], [2, 4]),
        (3, 3, [1, 2, 3], [2]),
        (2, 1, [1, 2], []),  # the probe of step 2 is due again
    ],
)
def test_rows_that_will_be_written_again_are_dropped(tmp_path, last, last_probe, train, knn):
    fill(tmp_path)
    MetricLog(tmp_path, last, last_probe).close()
    found = rows(tmp_path)
    assert [r["step"] for r in found if r["kind"] == "train"] == train
    assert [r["step"] for r in found if r["kind"] == "knn"] == knn


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    fill(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 5, "lo')
    assert len(rows(tmp_path)) == 6
    log = MetricLog(tmp_path, 4, 4)
    log.write("train", 5, loss=5.0)
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 5]


def test_not_a_number_is_valid_json(tmp_path):
    log = MetricLog(tmp_path, -1, -1)
    log.write("train", 1, loss=math.nan, lr=math.inf)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["loss"] == "nan"
    assert found["lr"] == "inf"


def test_no_file_has_no_rows(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []
