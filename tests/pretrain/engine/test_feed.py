"""What the loop is fed: keys of `data`, bad samples through a resume, batches ahead on a GPU."""

import json
import shutil

import pytest
import torch

from pretrain.config import DataConfig
from pretrain.data.shards import ShardIndex
from pretrain.engine.feed import BAD_SAMPLES, Feed
from pretrain.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def make_feed(shards, tmp_path):
    """A factory: make_feed(batch_size=10, ..)."""

    def make(device=CPU, **options):
        options = {"shards": str(shards), "image_size": 32, "batch_size": 8, "num_workers": 0} | (
            options
        )
        return Feed(
            DataConfig(**options), seed=0, device=device, channels_last=False, folder=tmp_path
        )

    return make


def ids_of(feed, epoch=0, start_step=0):
    return torch.cat([fed.batch.sample_ids for fed in feed.epoch(epoch, start_step)]).tolist()


def test_last_batch_of_the_config_decides_the_steps(make_feed):
    assert make_feed(batch_size=12).num_steps == 3
    padded = make_feed(batch_size=12, last_batch="pad")
    assert padded.num_steps == 4
    assert sorted(ids_of(padded)[:40]) == list(range(40))


def test_shards_of_the_config_may_be_a_mixture(make_feed, shards, make_shards):
    other = str(make_shards("fewer", num=10))
    assert make_feed(shards=[str(shards), other]).samples.num_samples == 50
    weighted = make_feed(shards={str(shards): 0.5, other: 2.0}, batch_size=10)
    assert weighted.num_steps == 4
    counts = torch.bincount(torch.tensor(ids_of(weighted)), minlength=50)
    assert counts[:40].sum() == 20
    assert counts[40:].tolist() == [2] * 10


def test_no_shards_named(make_feed):
    with pytest.raises(UserError, match=r"data\.shards is not set"):
        make_feed(shards=None)


def damage(folder, number):
    """Overwrite one picture of a shard set with zeros."""
    index = ShardIndex.open(folder)
    row = index.samples[number]
    with open(folder / index.shard_names[int(row["shard"])], "r+b") as stream:
        stream.seek(int(row["offset"]))
        stream.write(bytes(int(row["size"])))


def test_bad_samples_are_listed_and_counted_through_a_resume(make_feed, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "bad")
    damage(folder, 13)
    options = {"shards": str(folder), "max_bad_samples": 1}
    assert 13 not in ids_of(make_feed(**options))
    rows = [json.loads(line) for line in (tmp_path / BAD_SAMPLES).read_text().splitlines()]
    assert [(row["sample"], row["rank"]) for row in rows] == [(13, 0)]
    assert "does not decode" in rows[0]["reason"] or "not a picture" in rows[0]["reason"]
    ids_of(make_feed(**options), epoch=1)  # a resumed run lists it once
    assert len((tmp_path / BAD_SAMPLES).read_text().splitlines()) == 1
    damage(folder, 14)
    with pytest.raises(UserError, match="2 bad samples, allowed are 1"):
        ids_of(make_feed(**options), epoch=2)


def test_a_line_cut_off_by_a_kill_is_left_out(make_feed, tmp_path):
    row = {"sample": 3, "reason": "does not decode", "rank": 0}
    (tmp_path / BAD_SAMPLES).write_text(json.dumps(row) + "\n" + '{"sample": 4, "rea')
    with pytest.raises(UserError, match="1 bad samples, allowed are 0"):
        ids_of(make_feed())
    ids_of(make_feed(max_bad_samples=1))


def test_waiting_is_the_time_until_the_pictures_are_there(make_feed):
    waits = [fed.waited for fed in make_feed().epoch(0)]
    assert len(waits) == 5
    assert all(0 < wait < 60 for wait in waits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_prepared_ahead_on_a_gpu_are_those_of_the_cpu(make_feed):
    options = {"photometric": "device", "num_workers": 1}
    expected = list(make_feed(**options).epoch(0))
    found = list(make_feed(torch.device("cuda", 0), **options).epoch(0))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.batch.sample_ids.cpu(), theirs.batch.sample_ids)
        torch.testing.assert_close(ours.views.cpu(), theirs.views, atol=2e-4, rtol=0)
