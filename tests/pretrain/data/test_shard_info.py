import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.files import sha256_of
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from pretrain.data.shard_info import MAX_SHARDS_LOOKED_AT, format_info, gather_info, verify_shards
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import encode, smooth_picture, write_tar
from tools import make_shards


def test_figures_are_those_of_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ten pictures of known formats, sizes and labels, and one more that does not decode."""
    (tmp_path / "in").mkdir()
    pictures, stored = [], []
    for i in range(10):
        kind = "PNG" if i < 3 else "JPEG"
        stored.append(encode(smooth_picture(i, 20 + i, 100 + 10 * i), kind))
        file = tmp_path / "in" / f"{i}.{kind.lower()}"
        file.write_bytes(stored[-1])
        pictures.append(SourcePicture(str(file), file.name, 0 if i < 7 else 1))
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    pictures.append(SourcePicture(str(tmp_path / "in" / "bad.jpg"), "bad.jpg", 1))
    options = ShardOptions(max_samples_per_shard=4)
    classes = ["crane", "dog", "crane"]
    folder = tmp_path / "set"
    write_shards(pictures, folder, options=options, classes=classes, max_bad=1)
    sizes = [len(data) for data in stored]
    words = [str(folder), "--info", "--json", str(tmp_path / "a/info.json")]
    assert make_shards.main(words) == 0
    info = json.loads((tmp_path / "a/info.json").read_text())
    assert (info["num_samples"], info["num_shards"], info["num_looked_at"]) == (10, 3, 10)
    assert info["num_bytes"] == sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    assert info["picture_bytes"] == [min(sizes), np.median(sizes), max(sizes)]
    assert (info["widths"], info["heights"]) == ([100, 145, 190], [20, 24.5, 29])
    assert info["num_unreadable"] == 0
    assert info["class_counts"] == {"crane (0)": 7, "dog (1)": 3, "crane (2)": 0}
    assert [item["file"] for item in info["skipped"]] == ["bad.jpg"]
    said = capsys.readouterr().out
    for part in (
        "num samples: 10",
        "class counts: crane (0) 7, dog (1) 3, crane (2) 0",
        f"skipped: {tmp_path / 'in' / 'bad.jpg'}: does not decode",
        "options: max_samples_per_shard 4, shard_size_mb 256.0",
    ):
        assert part in said


def external_set(folder: Path, labels: list[int | None]) -> ShardIndex:
    """A tar by another tool's hand: no index, labels without names, one picture unreadable."""
    folder.mkdir()
    files = {}
    for i, label in enumerate(labels):
        files[f"{i:04d}.jpg"] = b"x" * 600 if i == 1 else encode(smooth_picture(i))
        if label is not None:
            files[f"{i:04d}.cls"] = str(label).encode()
    write_tar(folder / "a.tar", files)
    return ShardIndex.open(folder)


def test_external_tars(tmp_path: Path) -> None:
    text = format_info(gather_info(external_set(tmp_path / "set", [5, 5, 7, None])))
    for part in (
        "class counts: 5 2, 7 1\nnum unlabelled: 1",
        "skipped: none",
        "num unreadable: 1",
        "options: external True",
    ):
        assert part in text
    labels: list[int | None] = [label for label in range(40) for _ in range(1 + (label == 33))]
    text = format_info(gather_info(external_set(tmp_path / "many", labels)))
    assert "class counts: 33 2, 0 1, 1 1," in text
    assert "and 10 more" in text
    assert "class counts: none" in format_info(
        gather_info(external_set(tmp_path / "plain", [None] * 3))
    )


def test_some_shards_are_looked_at_by_a_seed(picture_folder: Path, tmp_path: Path) -> None:
    files = sorted(picture_folder.rglob("*.jpg"))
    pictures = [SourcePicture(str(file), file.name) for file in files]
    write_shards(pictures, tmp_path, options=ShardOptions(max_samples_per_shard=2))
    index = ShardIndex.open(tmp_path)
    first, again, other = (gather_info(index, seed=seed) for seed in (0, 0, 1))
    assert first["num_looked_at"] == 2 * MAX_SHARDS_LOOKED_AT
    assert first == again
    assert (first["widths"], first["heights"]) != (other["widths"], other["heights"])


def test_a_damaged_shard_is_an_error(shard_folder: Path, index: ShardIndex) -> None:
    tar = shard_folder / "shard-000001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(UserError, match=r"shard-000001.tar"):
        gather_info(index)


def test_verify_finds_each_fault(shard_folder: Path) -> None:
    assert verify_shards(shard_folder) == []
    shards = [shard_folder / f"shard-00000{i}.tar" for i in range(4)]
    flipped = bytearray(shards[0].read_bytes())
    flipped[2000] ^= 1
    shards[0].write_bytes(flipped)
    shards[1].write_bytes(shards[1].read_bytes()[:5000])
    shards[2].unlink()
    (shard_folder / "more.tar").write_bytes(b"")
    problems = "\n".join(verify_shards(shard_folder))
    assert "shard-000000.tar: its SHA-256 is not the one in the index" in problems
    assert "shard-000001.tar: 5,000 bytes, the index says" in problems
    assert "shard-000002.tar: missing" in problems
    assert "more.tar: not in the index" in problems
    assert "shard-000003" not in problems


def test_verify_finds_a_wrong_table(shard_folder: Path) -> None:
    index = json.loads((shard_folder / "index.json").read_text())
    table = np.load(shard_folder / "samples.npy")
    table["size"][12] += 1
    np.save(shard_folder / "samples.npy", table)
    assert "samples.npy: its SHA-256 is not" in verify_shards(shard_folder)[0]
    index["samples_sha256"] = sha256_of(shard_folder / "samples.npy")
    (shard_folder / "index.json").write_text(json.dumps(index))
    (problem,) = verify_shards(shard_folder)
    assert "shard-000001.tar: samples lie elsewhere" in problem
    (shard_folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"index.json: cannot be read as an index"):
        verify_shards(shard_folder)
