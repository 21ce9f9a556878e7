"""The benchmark of large indexes at a small size: what it simulates opens, and resume is timed."""

import json

import numpy as np
import pytest

from benchmarks import index_scale
from common.errors import UserError
from pretrain.data.shards import ShardIndex

TINY = ["--shards", "7", "--samples", "1000", "--rounds", "1", "--pictures", "64",
        "--batch-size", "8", "--batches", "2"]  # fmt: skip


def test_simulated_shards_pass_all_checks_and_take_no_room(tmp_path):
    index_scale.simulate(tmp_path, num_shards=7, num_samples=1000)
    index = ShardIndex.open(str(tmp_path))
    assert index.num_samples == 1000
    assert sorted(index.shard_sizes) == [142, 143, 143, 143, 143, 143, 143]
    assert len(np.unique(index.samples["key"])) == 1000
    tars = sorted(tmp_path.glob("*.tar"))
    last = index.samples[index.samples["shard"] == 6][-1]
    assert int(last["offset"]) + int(last["size"]) <= tars[6].stat().st_size
    assert sum(path.stat().st_blocks * 512 for path in tars) < 0.01 * sum(
        path.stat().st_size for path in tars
    )
    tars[3].write_bytes(b"")  # the checks are the real ones
    with pytest.raises(UserError, match="cut short"):
        ShardIndex.open(str(tmp_path))


def test_figures(tmp_path):
    out = tmp_path / "scale.json"
    assert index_scale.main([*TINY, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_shards"], figures["num_samples"]) == (7, 1000)
    assert figures["open_seconds"] > 0 < figures["order_seconds"]
    assert 10 < figures["libraries_mebibytes"] <= figures["peak_mebibytes"] < 1024
    assert figures["within_limits"] is True
    first = figures["first_batch"]
    assert first["resume_step"] == 4  # of 8
    for clock in ("wall", "processor"):
        assert first["ratio"][clock] == pytest.approx(
            first["resume_ms"][clock] / first["start_ms"][clock]
        )


def test_memory_grows_with_the_index(tmp_path):
    """The peak is that of the fresh process and of what it opens."""
    peaks = []
    for number in (1000, 2_000_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        peaks.append(index_scale.scale(folder, 5, number, 1)["peak_mebibytes"])
    table = 2_000_000 * 28 / 2**20  # rows of samples.npy, mapped and hashed
    assert peaks[1] - peaks[0] > 0.25 * table
