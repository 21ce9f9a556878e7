import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pipeline.datasets.importers import open_source
from pretrain.data.shards import ShardIndex
from tools import make_shards


def jpeg(path: Path, seed: int = 0, height: int = 30, width: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Three pictures; train lists two, test the third."""
    year = tmp_path / "devkit" / "VOC2007"
    for i in range(3):
        jpeg(year / "JPEGImages" / f"00{i}.jpg", i)
    lists = {"train": "000\n001\n", "test": "002\n", "dog_train": "000  1\n001 -1\n"}
    for name, text in lists.items():
        (year / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (year / f"ImageSets/Main/{name}.txt").write_text(text)
    return tmp_path / "devkit"


def test_pack_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(12):
        jpeg(tmp_path / "in" / f"c{i % 3}" / f"a b{i}.jpg", i)
    (tmp_path / "in" / "c0" / "notes.txt").write_text("x")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--max-samples-per-shard", "5"]
    arguments += ["--labels", "folders"]
    assert make_shards.main([*arguments, "--num-workers", "1", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "folder, 12 pictures, 1 other files; labels: 3 classes, the first folders (c0, c1" in out
    assert "12 samples in 3 shards" in out
    assert "all as the index says" in out
    index = ShardIndex.open(tmp_path / "out")
    assert index.classes == ["c0", "c1", "c2"]
    assert sorted(index.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert make_shards.main([*arguments, "--num-workers", "1"]) == 0
    assert "(3 shards were finished before)" in capsys.readouterr().out
    for words, message in (
        (["inn", "out"], "inn: no such folder; did you mean {}/in?"),
        (["shards", "in"], "give the pictures first, then the folder for the shards: make_shards"),
        (["oout", "--verify"], "oout: no such folder; did you mean {}/out?"),
        (["in", "--verify"], "has no index.json to verify"),
    ):
        words = [x if x.startswith("-") else str(tmp_path / x) for x in words]
        assert make_shards.main(words) == 2
        assert message.format(tmp_path) in capsys.readouterr().err
    shard = tmp_path / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert make_shards.main([str(tmp_path / "out"), "--verify"]) == 1
    captured = capsys.readouterr()
    assert "shard-000001.tar" in captured.err
    assert "1 faults" in captured.out


def test_options_reach_the_shards(tmp_path: Path) -> None:
    for i in range(3):
        jpeg(tmp_path / "in" / f"{i}.jpg", i, 100, 200)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--resize-short", "50"]
    assert (
        make_shards.main([*arguments, "--quality", "70", "--no-shuffle", "--labels", "none"]) == 0
    )
    options = json.loads((tmp_path / "out" / "index.json").read_text())["options"]
    assert (options["resize_short"], options["quality"], options["shuffle_seed"]) == (50, 70, None)
    index = ShardIndex.open(tmp_path / "out")
    assert [index.key_name(i) for i in range(3)] == ["0", "1", "2"]
    assert index.classes is None


def test_kinds_of_sources(devkit: Path, tmp_path: Path) -> None:
    for name in ("train/cat/1.JPEG", "train/dog/deep/2.png", "val/cat/3.jpg", "val/dog/4.webp"):
        jpeg(tmp_path / "tree" / name)
    tree = open_source(tmp_path / "tree", split="train", labels="folders")
    assert tree.classes == ("cat", "dog")
    assert [picture[1:] for picture in tree.pictures] == [("cat/1.JPEG", 0), ("dog/deep/2.png", 1)]
    plain = open_source(tmp_path / "tree" / "train")
    assert (plain.kind, plain.classes, plain.pictures[1][2]) == ("folder", None, -1)
    for root in (devkit, devkit / "VOC2007"):
        voc = open_source(root, split="test")
        assert voc.kind == "voc"
        assert [name for _, name, _ in voc.pictures] == ["VOC2007/002.jpg"]


def test_hidden_files_and_loops_of_links(tmp_path: Path) -> None:
    jpeg(tmp_path / "in" / "a.jpg")
    jpeg(tmp_path / "in" / ".hidden" / "b.jpg")
    jpeg(tmp_path / "elsewhere" / "c.jpg")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    names = [name for _, name, _ in open_source(tmp_path / "in").pictures]
    assert names == ["a.jpg", "link/c.jpg"]


def test_date_folders_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(4):
        jpeg(tmp_path / f"in/{('2024-05', '2024-06 Holiday')[i % 2]}/IMG_{i}.jpg", i)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--num-workers", "0"]
    assert make_shards.main(words) == 0
    said = "no labels: its 2 first folders (2024-05, 2024-06 Holiday) are not taken for classes"
    assert said in capsys.readouterr().out
    index = ShardIndex.open(tmp_path / "out")
    assert (index.classes, index.labels.tolist()) == (None, [-1] * 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b/1.jpg cat\n./a b/2 dog\n", [("cat", "dog"), 0, 1, -1]),
        ("a b/1.jpg,big cat\r\n\r\na b/2.jpg,dog\r\n3.png,dog", [("big cat", "dog"), 0, 1, 1]),
        ("a b/1.jpg\t7\na b/2.jpg\t10", [None, 7, 10, -1]),
        ("a b/1.jpg cat\nc.jpg dog", "1 of 2 names are no pictures of the source, as ['c.jpg']"),
        ("a b/1.jpg cat\na b/1.jpg dog", "has class 'cat' in a line above"),
        ("1.jpg", "line 1: '1.jpg': write NAME CLASS"),
        ("a b/1.jpg 3000000000", "no class has such a number"),
        ("\n", "lists no picture"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_labels_from_a_list(tmp_path: Path, text: str, expected: list | str, encoding: str) -> None:
    for name in ("a b/1.jpg", "a b/2.jpg", "3.png"):
        jpeg(tmp_path / "in" / name)
    (tmp_path / "list").write_bytes(text.encode(encoding))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            open_source(tmp_path / "in", labels=str(tmp_path / "list"))
        return
    source = open_source(tmp_path / "in", labels=str(tmp_path / "list"))
    label = {name: label for _, name, label in source.pictures}
    found = [source.classes, *(label[name] for name in ("a b/1.jpg", "a b/2.jpg", "3.png"))]
    assert found == expected
    assert ("1 pictures are not in it" in source.about_labels) == (expected[-1] == -1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("devkit", {}, r"choose a part with --split, one of: test, train$"),
        ("devkit", {"split": "val"}, r"val.txt: no such list; lists there: .*test, train"),
        ("devkit", {"split": "test", "labels": "folders"}, r"a VOC devkit has no class folders"),
        ("empty", {}, r"holds no pictures \(1 other files\)"),
        ("empty", {"split": "train"}, r"empty/train: no such folder"),
        ("tree", {}, r"train, val look like splits; choose one with --split"),
        ("loose", {"labels": "folders"}, r"1 pictures lie in no folder, as \['2.jpg'\]"),
        ("loose", {"labels": "auto"}, r"--labels auto: no such file; give folders, none or a list"),
        ("devkti", {}, r"devkti: no such folder; did you mean \S*/devkit\?"),
        ("tree", {"split": "trian"}, r"no VOC devkit above it; did you mean \S*/tree/train\?"),
    ],
)
def test_sources_that_cannot_be_used(devkit: Path, source, options, message) -> None:
    root = devkit.parent
    for name in ("tree/train/x/1.jpg", "tree/val/x/2.jpg", "loose/x/1.jpg", "loose/2.jpg"):
        jpeg(root / name)
    (root / "empty").mkdir()
    (root / "empty/a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(root / source, **options)


def test_the_check_counts_the_bytes_of_shrunk_pictures_and_passes_over_broken_links(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in range(20):
        jpeg(tmp_path / f"in/{number:02d}.jpg", number, 480, 640)
    (tmp_path / "in/broken.jpg").symlink_to("nowhere.jpg")
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--max-bad", "1", "--num-workers", "0"]
    planned = []
    for options in ([], ["--resize-short", "32"]):
        assert make_shards.main([*words, *options, "--check", "--json"]) == 0
        planned.append(json.loads(capsys.readouterr().out)["disk_bytes"])
    assert make_shards.main([*words, "--resize-short", "32"]) == 0
    (tar,) = (tmp_path / "out").glob("*.tar")
    assert 0.7 < planned[1] / tar.stat().st_size < 2
    assert planned[0] > 2 * planned[1]


def test_parts_hold_each_picture_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(40):
        jpeg(tmp_path / f"in/{number:02d}.jpg", number)
    counts = []
    for part in ("0:0.25", "0.25:1"):
        out = tmp_path / part.replace(":", "-")
        words = [str(tmp_path / "in"), str(out), "--part", part, "--num-workers", "0"]
        assert make_shards.main([*words, "--check", "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["num_pictures"])
        assert not out.exists()
        assert make_shards.main(words) == 0
        assert json.loads((out / "index.json").read_text())["num_samples"] == counts[-1]
        capsys.readouterr()
    assert sum(counts) == 40
    assert 4 <= counts[0] <= 16
