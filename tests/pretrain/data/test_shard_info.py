import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pretrain.data.pack import write_shards
from pretrain.data.pack_plan import ShardOptions, SourcePicture
from pretrain.data.shard_info import (
    MAX_REMOTE_SHARDS,
    choose_samples,
    format_info,
    gather_info,
    save_pictures,
)
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import encode, smooth_picture
from tools import make_shards


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[int]]:
    """Ten pictures of known formats, sizes and labels, one more that does not decode; and sizes."""
    pictures, stored = [], []
    for i in range(10):
        kind = "PNG" if i < 3 else "JPEG"
        data = encode(smooth_picture(i, 20 + i, 100 + 10 * i), kind)
        file = tmp_path / "in" / f"{i}.{kind.lower()}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        stored.append(len(data))
        pictures.append(SourcePicture(str(file), file.name, 0 if i < 7 else 1))
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    pictures.append(SourcePicture(str(tmp_path / "in" / "bad.jpg"), "bad.jpg", 1))
    options = ShardOptions(max_samples_per_shard=4)
    classes = ["cat", "dog", "fish"]
    write_shards(pictures, tmp_path / "set", options=options, classes=classes, max_bad=1)
    return tmp_path / "set", stored


def test_figures_are_those_of_the_pictures(mixed: tuple[Path, list[int]]) -> None:
    folder, stored = mixed
    info = gather_info(ShardIndex.open(folder))
    tars = [tar.stat().st_size for tar in folder.glob("*.tar")]
    assert (info.num_samples, info.num_shards, info.num_bytes) == (10, 3, sum(tars))
    assert info.shard_bytes == (type(info.shard_bytes))(min(tars), sorted(tars)[1], max(tars))
    assert info.picture_bytes_median == np.median(stored)
    assert info.picture_bytes_p95 == pytest.approx(np.percentile(stored, 95))
    assert (info.num_looked_at, info.num_shards_looked_at) == (10, 3)
    assert dataclasses.astuple(info.widths) == (100, 145, 190)
    assert dataclasses.astuple(info.heights) == (20, 24.5, 29)
    assert info.megapixels.max == 29 * 190 / 1e6
    assert info.formats == {"JPEG RGB": 7, "PNG RGB": 3}
    assert info.class_counts == {"cat": 7, "dog": 3, "fish": 0}
    assert info.num_unlabelled == 0
    assert [item["file"] for item in info.skipped] == ["bad.jpg"]
    assert info.options["max_samples_per_shard"] == 4


def test_text_and_json_and_sheet(
    mixed: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = mixed
    words = ["--info", "--json", str(tmp_path / "a/info.json"), "--pictures"]
    assert make_shards.main([str(folder), *words, str(tmp_path / "b/sheet.png")]) == 0
    said = capsys.readouterr().out
    for part in (
        "10 samples in 3 shards",
        "10 of 10 pictures looked at, from 3 of 3 shards",
        "JPEG RGB 70.0%, PNG RGB 30.0%",
        "3 classes, largest first:",
        "left out when the set was made: 1\n  bad.jpg: ",
        "made with: max_samples_per_shard 4, shard_size_mb 256.0",
        "sheet.png: 10 pictures",
    ):
        assert part in said
    bars = {line.split()[0]: line.count("#") for line in said.splitlines() if "#" in line}
    assert bars == {"cat": 40, "dog": 18}
    written = json.loads((tmp_path / "a/info.json").read_text())
    assert written["class_counts"] == {"cat": 7, "dog": 3, "fish": 0}
    assert written["widths"] == {"min": 100, "median": 145, "max": 190}
    with Image.open(tmp_path / "b/sheet.png") as sheet:
        assert sheet.width == 8 * 164 + 4


def test_pictures_of_the_sheet_are_those_of_the_set(tmp_path: Path) -> None:
    """Plain colours: each tile must show its own sample, in order, with a caption below."""
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    pictures = []
    for i, colour in enumerate(colours):
        file = tmp_path / f"{i}.png"
        file.write_bytes(encode(np.full((160, 160, 3), colour, np.uint8), "PNG"))
        pictures.append(SourcePicture(str(file), file.name))
    options = ShardOptions(shuffle_seed=None)
    write_shards(pictures, tmp_path / "set", options=options)
    assert save_pictures(ShardIndex.open(tmp_path / "set"), tmp_path / "sheet.png") == 3
    with Image.open(tmp_path / "sheet.png") as opened:
        sheet = np.asarray(opened.convert("RGB"))
    for i, colour in enumerate(colours):
        x = 4 + 164 * i
        assert (sheet[4:164, x : x + 160] == colour).all()
        assert (sheet[165:180, x : x + 40] < 100).any(), "no caption"


def test_the_choice_is_seeded(index: ShardIndex) -> None:
    first = choose_samples(index, 7, seed=1)
    assert (first == choose_samples(index, 7, seed=1)).all()
    assert (first != choose_samples(index, 7, seed=2)).any()
    assert len(np.unique(first)) == 7
    assert (choose_samples(index, 99, seed=1) == np.arange(40)).all()


def test_few_shards_of_a_remote_set_are_touched(picture_folder: Path, tmp_path: Path) -> None:
    files = sorted(picture_folder.rglob("*.jpg"))
    pictures = [SourcePicture(str(file), file.name) for file in files]
    write_shards(pictures, tmp_path, options=ShardOptions(max_samples_per_shard=2))
    index = ShardIndex.open(tmp_path)
    index.is_remote = True
    chosen = choose_samples(index, 1000, seed=0)
    assert len(np.unique(index.samples["shard"][chosen])) == MAX_REMOTE_SHARDS == 16
    assert len(chosen) == 32


def external_set(folder: Path, labels: list[int | None]) -> None:
    """A tar by another tool's hand: no index, labels without names, one picture cut short."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, label in enumerate(labels):
            data = encode(smooth_picture(i))
            members = [(f"{i:04d}.jpg", data[:400] if i == 1 else data)]
            if label is not None:
                members.append((f"{i:04d}.cls", str(label).encode()))
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_external_tars(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    external_set(tmp_path / "set", [5, 5, 7, None])
    words = [str(tmp_path / "set"), "--info", "--pictures", str(tmp_path / "sheet.jpg")]
    assert make_shards.main(words) == 0
    said = capsys.readouterr().out
    assert "made by another tool" in said
    rows = [line.split() for line in said.splitlines() if line.endswith("#")]
    assert rows == [["5", "2", "#" * 40], ["7", "1", "#" * 20]]
    assert "without a label: 1" in said
    assert "nothing was left out" in said
    assert (tmp_path / "sheet.jpg").exists()  # with a grey tile for the picture that is cut short


def test_many_classes_are_cut_to_the_largest(tmp_path: Path) -> None:
    labels: list[int | None] = [label for label in range(40) for _ in range(1 + (label == 33))]
    external_set(tmp_path / "set", labels)
    lines = format_info(gather_info(ShardIndex.open(tmp_path / "set"))).splitlines()
    start = lines.index("40 classes, largest first:")
    assert lines[start + 1].split()[:2] == ["33", "2"]
    assert lines[start + 31] == "  and 10 more, 10 samples"


def test_set_without_labels_and_unreadable_pictures(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        member.size = 600
        tar.addfile(member, io.BytesIO(bytes(600)))
    info = gather_info(ShardIndex.open(tmp_path / "set"))
    assert (info.formats, info.widths) == ({"unreadable": 1}, None)
    text = format_info(info)
    assert "no labels" in text
    assert "unreadable 100.0%" in text
    assert "width" not in text


def test_classes_of_the_same_name_are_told_apart(picture_folder: Path, tmp_path: Path) -> None:
    files = sorted(picture_folder.rglob("*.jpg"))[:6]
    pictures = [SourcePicture(str(p), p.name, i % 3) for i, p in enumerate(files)]
    write_shards(pictures, tmp_path, classes=["crane", "crane", "tree"])
    info = gather_info(ShardIndex.open(tmp_path))
    assert info.class_counts == {"crane (0)": 2, "crane (1)": 2, "tree": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--info", "--pictures", "sheet.gif"], "sheet.gif: give a name that ends in .jpg or .png"),
        (["--json", "x.json"], "--json and --pictures need --info"),
        (["out", "--pictures", "x.jpg"], "--json and --pictures need --info"),
    ],
)
def test_wrong_options(
    shard_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert make_shards.main([str(shard_folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_shards_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert make_shards.main([str(tmp_path / "nowhere"), "--info"]) == 2
    assert "nowhere: no such" in capsys.readouterr().err


def test_a_set_behind_a_url(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert make_shards.main([f"file://{shard_folder}", "--info"]) == 0
    assert "40 samples in 4 shards" in capsys.readouterr().out


def test_a_damaged_shard_is_an_error(mixed: tuple[Path, list[int]]) -> None:
    folder, _ = mixed
    index = ShardIndex.open(folder)
    tar = folder / "shard-000001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(UserError, match=r"shard-000001.tar"):
        gather_info(index)
