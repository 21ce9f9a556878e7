"""The benchmark of the workers' memory at a small size; it sees a leak and a large buffer."""

import json

import numpy as np
import pytest
import torch

from benchmarks import worker_memory
from benchmarks.harness import VIEWS, encoded_photos, open_as_shards, write_files
from benchmarks.worker_memory import Watched
from pretrain.data.loader import ViewDataset
from pretrain.data.shards import ShardIndex

TINY = ["--epochs", "3", "--num-samples", "16", "--batch-size", "8", "--image-size", "32",
        "--workers", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    files = write_files(encoded_photos(2), folder / "files")
    with_shards = open_as_shards(files, folder / "shards", 32)
    yield with_shards
    with_shards.close()


class Leaking(ViewDataset):
    """Keeps MiB with every batch; and holds some from the beginning."""

    def __init__(self, index: ShardIndex, leaked: int, held: int) -> None:
        super().__init__(index, image_size=32, views=VIEWS, seed=0, with_colours=True)
        self.leaked, self.held, self.kept = leaked, held, []

    def __getitem__(self, request):
        if not self.kept:
            self.kept.append(np.ones(self.held << 20, np.uint8))
        self.kept.append(np.ones(self.leaked << 20, np.uint8))
        return super().__getitem__(request)


def watched(dataset, num_workers=1):
    return worker_memory.summary(worker_memory.watch(dataset, 5, 8, num_workers))


def test_a_leak_is_seen_and_a_buffer_is_not_taken_for_one(index):
    sound = watched(Leaking(index, leaked=0, held=0))
    large = watched(Leaking(index, leaked=0, held=64))
    leaking = watched(Leaking(index, leaked=2, held=0))
    assert large["largest_mebibytes"] - sound["largest_mebibytes"] == pytest.approx(64, abs=12)
    assert abs(sound["growth_mebibytes_per_epoch"]) < 4  # what a heap does by itself
    assert abs(large["growth_mebibytes_per_epoch"]) < 4
    leaked = leaking["growth_mebibytes_per_epoch"] - sound["growth_mebibytes_per_epoch"]
    assert leaked == pytest.approx(8, abs=4)  # 4 batches of 2 MiB
    assert len(leaking["at_rest_mebibytes"]) == 5


def test_growth_is_the_worst_worker_from_the_second_epoch_on():
    found = worker_memory.summary({
        1: Watched([5.0, 20.0, 20.0, 20.0], largest=30.0),  # the first epoch does not count
        2: Watched([5.0, 10.0, 13.0, 16.0], largest=17.0),
    })  # fmt: skip
    assert found["growth_mebibytes_per_epoch"] == pytest.approx(3)
    assert found["largest_mebibytes"] == 30
    assert found["at_rest_mebibytes"] == [5, 20, 20, 20]
    assert found["num_workers"] == 2


@pytest.mark.parametrize("limit", [400, 1])
def test_figures(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(worker_memory, "LIMIT_MEBIBYTES", limit)
    out = tmp_path / "memory.json"
    assert worker_memory.main([*TINY, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["modes"]) == {"device", "workers"}
    for found in figures["modes"].values():
        assert found["num_workers"] == 2
        assert len(found["at_rest_mebibytes"]) == 3
        assert 1 < found["largest_mebibytes"] < 400
    assert figures["within_limit"] is (limit == 400)
    assert figures["largest_mebibytes"] == max(
        found["largest_mebibytes"] for found in figures["modes"].values()
    )
