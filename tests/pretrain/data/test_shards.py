import gc
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from common.errors import UserError
from common.pictures import decode
from pretrain.data.cache import CacheOptions
from pretrain.data.index import sample_hash
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import NUM_PICTURES, encode, smooth_picture, write_tar


def test_index_gives_every_picture(index: ShardIndex, picture_folder: Path) -> None:
    assert index.num_samples == NUM_PICTURES
    assert index.shard_sizes == [10] * 4
    assert index.classes == ["class-0", "class-1"]
    assert (index.labels >= 0).all()
    for i in range(index.num_samples):
        name = index.key_name(i)
        assert index.read_bytes(i) == (picture_folder / f"{name}.jpg").read_bytes()
        assert index.labels[i] == int(name[6])
        assert int(index.samples["key"][i]) == sample_hash(name)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the collector
def test_webdataset_reads_our_shards(shard_folder: Path, index: ShardIndex) -> None:
    urls = sorted(str(path) for path in shard_folder.glob("*.tar"))
    samples = list(WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [index.key_name(i) for i in range(40)]
    assert [int(sample["cls"]) for sample in samples] == index.labels.tolist()
    assert samples[3]["jpg"] == index.read_bytes(3)
    gc.collect()


def write_external(folder: Path, num: int = 12) -> None:
    folder.mkdir(exist_ok=True)
    pattern = str(folder / "part-%03d.tar")
    with ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for i in range(num):
            picture = encode(smooth_picture(i))
            sample = {"__key__": f"n{i % 3}/x{i}", "jpg": picture, "cls": i % 3, "json": {"i": i}}
            writer.write(sample)


def test_shards_of_webdataset_are_indexed_on_first_use(tmp_path, capfd):
    write_external(tmp_path / "set")
    index = ShardIndex.open(tmp_path / "set")
    assert "indexing " in capfd.readouterr().err
    assert index.shard_sizes == [5, 5, 2]
    assert index.labels.tolist() == [i % 3 for i in range(12)]
    assert index.read_bytes(11) == encode(smooth_picture(11))
    assert index.key_name(11) == "n2/x11"
    assert ShardIndex.open(tmp_path / "set").num_samples == 12
    assert "indexing" not in capfd.readouterr().err
    assert not (tmp_path / "set" / "index.json").exists()
    write_external(tmp_path / "set", num=14)  # other tars get another index
    assert ShardIndex.open(tmp_path / "set").num_samples == 14


@pytest.mark.parametrize(
    "tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_tar_formats_and_long_names(tmp_path: Path, tar_format: int) -> None:
    length = 90 if tar_format == tarfile.USTAR_FORMAT else 300
    names = [f"{'d' * 60}/{'k' * length}{i}" for i in range(4)] + ["ünï/cödé"]
    files = {}
    for i, name in enumerate(names):
        files |= {f"{name}.PNG": encode(smooth_picture(i), "PNG"), f"{name}.cls": b" 5\n"}
    write_tar(tmp_path / "a.tar", files, tar_format)
    index = ShardIndex.open(tmp_path)
    assert [index.key_name(i) for i in range(5)] == names
    assert index.labels.tolist() == [5] * 5
    for i in range(5):
        np.testing.assert_array_equal(decode(index.read_bytes(i), where=""), smooth_picture(i))


def test_what_is_no_sample_is_listed(tmp_path: Path) -> None:
    good = {"good.jpg": encode(smooth_picture(0)), "good.cls": b"cat"}
    write_tar(tmp_path / "a.tar", {"README": b"hello", "only.cls": b"1", **good})
    index = ShardIndex.open(tmp_path)
    assert index.num_samples == 1
    assert index.labels.tolist() == [-1]
    reasons = {item["file"]: item["reason"] for item in index.skipped}
    assert reasons["a.tar/README"] == "a name without a suffix"
    assert reasons["a.tar/only"] == "no picture"
    assert "b'cat' is not an integer" in reasons["a.tar/good.cls"]


@pytest.mark.parametrize("pattern", ["shard-{000000..000003}.tar", "*.tar", "shard-?????[0-3].tar"])
def test_local_patterns_are_indexed_in_the_cache(index, tmp_path, capfd, pattern):
    spec = f"{index.folder}/{pattern}"
    options = CacheOptions(tmp_path / "cache")
    found = ShardIndex.open(spec, options)
    assert not found.is_remote
    assert found.folder == index.folder
    assert "indexing" in capfd.readouterr().err
    assert found.fingerprint == index.fingerprint
    ids = list(range(index.num_samples))
    assert found.read_many(ids) == index.read_many(ids)
    found.fetch(ids)  # nothing to do
    assert not (tmp_path / "cache" / "shards").exists()
    assert ShardIndex.open(spec, options).num_samples == index.num_samples
    assert "indexing" not in capfd.readouterr().err


def test_changed_tar_of_a_pattern_is_indexed_again(index: ShardIndex, tmp_path: Path) -> None:
    options = CacheOptions(tmp_path / "cache")
    spec = f"{index.folder}/shard-00000[01].tar"
    first = ShardIndex.open(spec, options)
    shutil.copy(index.folder / "shard-000003.tar", index.folder / "shard-000001.tar")
    second = ShardIndex.open(spec, options)
    assert second.fingerprint != first.fingerprint
    assert second.read_bytes(12) == index.read_bytes(32)
    (index.folder / "shard-000001.tar").unlink()
    with pytest.raises(
        UserError, match=r"shard-000001.tar: no shard is there .*correct the pattern"
    ):
        ShardIndex.open(f"{index.folder}/shard-{{000000..000001}}.tar", options)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_commands_are_shards(index: ShardIndex, tmp_path: Path, num_shards: int) -> None:
    ran = tmp_path / "ran"
    spec = f"pipe:echo x >>{ran}; cat {index.folder}/shard-{{000000..00000{num_shards - 1}}}.tar"
    spec = spec if num_shards > 1 else spec.replace("{000000..000000}", "000000")
    options = CacheOptions(tmp_path / "cache")
    for _ in range(2):
        found = ShardIndex.open(spec, options)
        assert found.is_remote
        assert found.shard_sizes == [10] * num_shards
        ids = list(range(found.num_samples))
        found.fetch(ids)
        assert found.read_many(ids) == index.read_many(ids)
        assert found.key_name(7) == index.key_name(7)
        assert ran.read_text() == "x\n" * num_shards  # each ran once
    other = pickle.loads(pickle.dumps(found))
    assert other.read_bytes(7) == index.read_bytes(7)


def test_command_that_gives_other_bytes_later(index: ShardIndex, tmp_path: Path) -> None:
    link = tmp_path / "link.tar"
    link.symlink_to(index.folder / "shard-000000.tar")
    found = ShardIndex.open(f"pipe:cat {link}", CacheOptions(tmp_path / "cache"))
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    link.unlink()
    shutil.copy(index.folder / "shard-000000.tar", link)
    with open(link, "r+b") as stream:
        stream.write(b"y")
    with pytest.raises(
        UserError, match=r"^pipe:cat .*SHA-256.*stale; run again.*\(or delete /.*\)"
    ):
        found.read_bytes(3)


def test_fingerprint_hears_of_bytes_but_not_of_places(index: ShardIndex, tmp_path: Path) -> None:
    shutil.copytree(index.folder, tmp_path / "moved")
    names = json.loads((tmp_path / "moved" / "index.json").read_text())
    for i, shard in enumerate(names["shards"]):
        (tmp_path / "moved" / shard["name"]).rename(tmp_path / "moved" / f"{i}.tar")
        shard["name"] = f"{i}.tar"
    (tmp_path / "moved" / "index.json").write_text(json.dumps(names))
    assert ShardIndex.open(tmp_path / "moved").fingerprint == index.fingerprint
    names["shards"][2]["sha256"] = "0" * 64
    (tmp_path / "moved" / "index.json").write_text(json.dumps(names))
    assert ShardIndex.open(tmp_path / "moved").fingerprint != index.fingerprint


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder of shards.*make_shards"):
        ShardIndex.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither index.json nor .tar files.*make_shards"):
        ShardIndex.open(tmp_path)


def test_truncated_shard(shard_folder: Path) -> None:
    _truncate(shard_folder / "shard-000001.tar")
    with pytest.raises(UserError, match=r"shard-000001.tar: shard is cut short.*make it again"):
        ShardIndex.open(shard_folder)


def test_stale_index(shard_folder: Path) -> None:
    shutil.copy(shard_folder / "shard-000001.tar", shard_folder / "shard-000009.tar")
    with pytest.raises(UserError, match=r"000009.tar: a shard that the index does not know.*stale"):
        ShardIndex.open(shard_folder)
    (shard_folder / "shard-000009.tar").rename(shard_folder / "shard-000001.tar")
    with open(shard_folder / "shard-000001.tar", "ab") as stream:
        stream.write(b"\0" * 1024)
    with pytest.raises(UserError, match=r"000001.tar: .* bytes instead of .*stale; delete .*index"):
        ShardIndex.open(shard_folder)


def test_shard_cut_short_or_gone_while_running(shard_folder: Path, index: ShardIndex) -> None:
    _truncate(shard_folder / "shard-000001.tar")
    with pytest.raises(UserError, match=r"shard-000001.tar .*changed or cut short"):
        index.read_bytes(19)
    (shard_folder / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar .*cannot be read"):
        index.read_bytes(25)


def test_missing_table(shard_folder: Path) -> None:
    (shard_folder / "samples.npy").unlink()
    with pytest.raises(UserError, match=r"samples.npy: missing; delete index.json"):
        ShardIndex.open(shard_folder)


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
