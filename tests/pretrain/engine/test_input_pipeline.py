"""The input pipeline: keys of `data`, bad samples through a resume, batches ahead on a GPU."""

import json
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from pretrain.config import DataConfig
from pretrain.data.input_pipeline import BAD_SAMPLES, InputPipeline, in_workers
from pretrain.data.policy import AugmentationPolicy, preset_small_crops
from tests.pretrain.data.picture_helpers import damage
from tests.pretrain.data.servers import faulty

CPU = torch.device("cpu")


@pytest.fixture
def make_pipeline(shards, tmp_path):
    """A factory: make_pipeline(batch_size=10, ..)."""

    def make(device=CPU, **options):
        options = {"shards": str(shards), "image_size": 32, "batch_size": 8, "num_workers": 0} | (
            options
        )
        return InputPipeline(
            DataConfig(**options), seed=0, device=device, channels_last=False, folder=tmp_path
        )

    return make


def ids_of(pipeline, epoch=0, start_step=0):
    return torch.cat([one.samples.sample_ids for one in pipeline.epoch(epoch, start_step)]).tolist()


def test_last_batch_of_the_config_decides_the_steps(make_pipeline):
    assert make_pipeline(batch_size=12).num_steps == 3
    padded = make_pipeline(batch_size=12, last_batch="pad")
    assert padded.num_steps == 4
    assert sorted(ids_of(padded)[:40]) == list(range(40))


def test_shards_of_the_config_may_be_a_mixture(make_pipeline, shards, make_shards):
    other = str(make_shards("fewer", num=10))
    assert make_pipeline(shards=[str(shards), other]).samples.num_samples == 50
    weighted = make_pipeline(shards={str(shards): 0.5, other: 2.0}, batch_size=10)
    assert weighted.num_steps == 4
    counts = torch.bincount(torch.tensor(ids_of(weighted)), minlength=50)
    assert counts[:40].sum() == 20
    assert counts[40:].tolist() == [2] * 10


def test_no_shards_named(make_pipeline):
    with pytest.raises(UserError, match=r"data\.shards is not set"):
        make_pipeline(shards=None)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_tars_leave_out_is_bounded_and_listed(make_pipeline, shards, tmp_path, streaming):
    """Of tars that another tool made: a file without a suffix, and a link that names nothing."""
    folder = shutil.copytree(shards, tmp_path / "external")
    for name in ("index.json", "samples.npy"):
        (folder / name).unlink()
    with tarfile.open(folder / "z.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "b.jpg"
        tar.addfile(link)
    options = {"shards": str(folder), "cache_dir": str(tmp_path / "cache")}
    if streaming:
        options |= {"streaming": True, "samples_per_epoch": 120}
    with pytest.raises(UserError, match=r"(?s)2 (files of|bad).*max_bad_samples") as caught:
        ids_of(make_pipeline(**options, max_bad_samples=1))
    assert "README" in str(caught.value) or "a.jpg" in str(caught.value)
    (tmp_path / BAD_SAMPLES).unlink(missing_ok=True)
    for epoch in range(2):  # a resumed run lists them once
        ids_of(make_pipeline(**options, max_bad_samples=2), epoch)
    rows = [json.loads(line) for line in (tmp_path / BAD_SAMPLES).read_text().splitlines()]
    texts = " ".join(f"{row['sample']} {row['reason']}" for row in rows)
    assert len(rows) == 2
    assert "without a suffix" in texts
    assert "link to 'b.jpg'" in texts


def test_bad_samples_are_listed_and_counted_through_a_resume(make_pipeline, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "bad")
    damage(folder, 13)
    options = {"shards": str(folder), "max_bad_samples": 1}
    assert 13 not in ids_of(make_pipeline(**options))
    rows = [json.loads(line) for line in (tmp_path / BAD_SAMPLES).read_text().splitlines()]
    assert [(row["sample"], row["rank"]) for row in rows] == [(13, 0)]
    assert "does not decode" in rows[0]["reason"] or "not a picture" in rows[0]["reason"]
    ids_of(make_pipeline(**options), epoch=1)  # a resumed run lists it once
    assert len((tmp_path / BAD_SAMPLES).read_text().splitlines()) == 1
    damage(folder, 14)
    with pytest.raises(UserError, match="2 bad samples, allowed are 1"):
        ids_of(make_pipeline(**options), epoch=2)


def test_the_bound_of_bad_samples_is_of_each_process_after_a_resume_too(
    make_pipeline, shards, tmp_path, monkeypatch
):
    folder = shutil.copytree(shards, tmp_path / "bad")
    damage(folder, 13)
    row = {"sample": 40, "reason": "found by another process", "rank": 1}
    (tmp_path / BAD_SAMPLES).write_text(json.dumps(row) + "\n")
    options = {"shards": str(folder), "max_bad_samples": 1}
    ids_of(make_pipeline(**options))
    damage(folder, 14)
    with pytest.raises(UserError, match="3 bad samples, allowed are 2"):
        ids_of(make_pipeline(**options), epoch=1)


def test_photometric_decides_who_makes_the_changes(make_pipeline):
    """The workers change uint8 pixels, the device floats; both by the same parameters."""
    seen = {}
    for place in ("workers", "device", "auto"):
        one = next(iter(make_pipeline(photometric=place).epoch(0)))
        seen[place] = one
        assert one.samples.is_augmented == (place != "device")
        assert one.views.shape == (2, 8, 3, 32, 32)
    assert torch.equal(seen["auto"].views, seen["workers"].views)
    difference = (seen["workers"].views - seen["device"].views).abs() * 0.225 * 255  # in levels
    assert 0 < difference.mean() < 2
    crops = next(
        iter(
            make_pipeline(photometric="device", augmentation=AugmentationPolicy.of("none")).epoch(0)
        )
    )
    changed = (crops.views - seen["workers"].views).abs() * 0.225 * 255
    assert changed.mean() > 10  # so that agreeing within 2 levels means something


@pytest.mark.parametrize("streaming", [False, True])
def test_small_crops_come_behind_the_large_views_from_both_places(make_pipeline, streaming):
    stream = {"streaming": True, "samples_per_epoch": 16} if streaming else {}
    seen = {}
    for place in ("workers", "device"):
        for num in (0, 3):
            small = preset_small_crops(num=num, image_size=16)
            policy = replace(AugmentationPolicy.of("crops"), small_crops=small)
            made = make_pipeline(photometric=place, augmentation=policy, **stream)
            seen[place, num] = next(iter(made.epoch(0))).views
    for place in ("workers", "device"):
        two, five = seen[place, 0], seen[place, 3]
        assert isinstance(two, torch.Tensor)
        assert [view.shape[-1] for view in five] == [32, 32, 16, 16, 16]
        assert all(torch.equal(a, b) for a, b in zip(two, five[:2], strict=True))
    for a, b in zip(seen["workers", 3], seen["device", 3], strict=True):
        difference = (a - b).abs() * 0.225 * 255  # in levels
        assert difference.mean() < 2
    small = torch.stack(seen["device", 3][2:])
    greys = (small * 0.225).std(dim=2).flatten(2).amax(dim=2)  # about 0 where a view is grey
    assert 0 < (greys < 0.05).float().mean() < 1
    assert not torch.equal(small[0], small[1])


def test_auto_takes_the_device_where_there_is_a_gpu():
    assert in_workers("auto", CPU)
    assert not in_workers("auto", torch.device("cuda"))
    assert in_workers("workers", torch.device("cuda"))
    assert not in_workers("device", CPU)


def test_streaming_reads_the_same_pictures_without_an_index(make_pipeline, shards, tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in sorted(shards.glob("*.tar")):
        shutil.copy(tar, folder)
    spec = f"{folder}/shard-{{000000..000003}}.tar"
    pipeline = make_pipeline(shards=spec, streaming=True, samples_per_epoch=120, shuffle_window=16)
    assert pipeline.samples is None
    assert pipeline.fingerprint is None
    assert (pipeline.num_steps, pipeline.num_samples) == (15, 120)
    streamed = [one.samples for one in pipeline.epoch(0)]
    exact = [one.samples for one in make_pipeline().epoch(0)]
    keys = [set(torch.cat([b.sample_hashes for b in part]).tolist()) for part in (streamed, exact)]
    assert keys[0] == keys[1]  # passes run into each other, but three of them show all
    assert not list(folder.glob("*.json"))
    assert make_pipeline(shards=spec, streaming=True, samples_per_epoch=16).num_steps == 2


def test_remote_shards_are_cached_where_the_config_says(make_pipeline, shards, tmp_path):
    with faulty(shards) as server:
        options = {"shards": f"{server.url}/", "cache_dir": str(tmp_path / "cache")}
        assert ids_of(make_pipeline(**options)) == ids_of(make_pipeline())
        assert len(list((tmp_path / "cache").rglob("*.tar"))) == 4
        with pytest.raises(UserError, match=r"data\.cache_gb: 1e-06 is too small"):
            make_pipeline(**options | {"cache_gb": 1e-6, "cache_dir": str(tmp_path / "small")})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_prepared_ahead_on_a_gpu_are_those_of_the_cpu(make_pipeline):
    options = {"photometric": "device", "num_workers": 1}
    expected = list(make_pipeline(**options).epoch(0))
    pipeline = make_pipeline(torch.device("cuda", 0), **options)
    found = list(pipeline.epoch(0))
    stream = pipeline._side
    next(pipeline.epoch(1))
    assert pipeline._side is stream  # another one could not use the memory that this one has freed
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.samples.sample_ids.cpu(), theirs.samples.sample_ids)
        torch.testing.assert_close(ours.views.cpu(), theirs.views, atol=2e-4, rtol=0)
