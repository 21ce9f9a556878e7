import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pipeline.datasets.importers import open_source
from pretrain.data.shards import ShardIndex
from tools import make_shards

ROOT = Path(__file__).parents[2]


def jpeg(path: Path, seed: int = 0, height: int = 30, width: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


def xml(objects: str, width: int = 40, height: int = 30) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>x.jpg</filename>{size}{objects}</annotation>"


def object_xml(name: str = "dog", box: tuple = (1, 1, 40, 30), flags: str = "") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    flags = flags or "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
    return f"<object><name>{name}</name>{flags}<bndbox>{inner}</bndbox></object>"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Three pictures; train lists two, test the third."""
    year = tmp_path / "devkit" / "VOC2007"
    for i in range(3):
        jpeg(year / "JPEGImages" / f"00{i}.jpg", i)
        (year / "Annotations").mkdir(exist_ok=True)
        (year / "Annotations" / f"00{i}.xml").write_text(xml(object_xml() + object_xml("cat")))
    lists = year / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("000\n001\n")
    (lists / "test.txt").write_text("002\n")
    (lists / "dog_train.txt").write_text("000  1\n001 -1\n")
    return tmp_path / "devkit"


# -- the command line -----------------------------------------------------------------------------


def test_help_shows_an_example() -> None:
    command = [sys.executable, ROOT / "tools/make_shards.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ".venv/bin/python tools/make_shards.py data/scenes/pool data/shards" in done.stdout
    assert "--resize-short" in done.stdout


def test_wrong_argument_is_status_2() -> None:
    command = [sys.executable, ROOT / "tools/make_shards.py", "--no-such-thing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_pack_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(12):
        jpeg(tmp_path / "in" / f"c{i % 3}" / f"a b{i}.jpg", i)
    (tmp_path / "in" / "c0" / "notes.txt").write_text("x")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--max-samples-per-shard", "5"]
    assert make_shards.main([*arguments, "--num-workers", "1", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "class folders, 12 pictures, 3 classes; other files ignored: 1 .txt" in out
    assert "12 samples in 3 shards" in out
    assert "all as the index says" in out
    index = ShardIndex.open(tmp_path / "out")
    assert index.classes == ["c0", "c1", "c2"]
    assert sorted(index.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert make_shards.main([*arguments, "--num-workers", "1"]) == 0
    assert "(3 shards were finished before)" in capsys.readouterr().out
    shard = tmp_path / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert make_shards.main([str(tmp_path / "out"), "--verify"]) == 1
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert "shard-000001.tar" in captured.err
    assert "1 faults" in captured.out


def test_bad_picture_is_status_2_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(4):
        jpeg(tmp_path / "in" / f"{i}.jpg", i)
    (tmp_path / "in" / "2.jpg").write_bytes(b"nothing")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--num-workers", "1"]
    assert make_shards.main(arguments) == 2
    message = capsys.readouterr().err
    assert "2.jpg: " in message
    assert "(no known format)" in message
    assert "--max-bad N" in message
    assert make_shards.main([*arguments, "--max-bad", "1"]) == 0
    assert "left out 1 pictures" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [item["file"] for item in index["skipped"]] == ["2.jpg"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: no such folder"),
        (["nowhere"], "OUT is missing"),
        (["nowhere", "--verify"], "index.json: missing"),
        (["http://localhost/set", "--verify"], "--verify reads every byte of a local folder"),
        (["nowhere", "out", "--quality", "0"], "JPEG quality 0"),
        (["nowhere", "out", "--num-workers", "-1"], "must not be negative"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert make_shards.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_full_disk_is_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.data.pack import job as shard_job

    def full(self: object, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_job._HashingStream, "write", full)
    jpeg(tmp_path / "in" / "0.jpg")
    assert make_shards.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "disk full while writing" in capsys.readouterr().err


def test_voc_split_becomes_shards(devkit: Path, tmp_path: Path) -> None:
    assert make_shards.main([str(devkit), str(tmp_path / "out"), "--split", "train"]) == 0
    index = ShardIndex.open(tmp_path / "out")
    assert sorted(index.key_name(i) for i in range(2)) == ["VOC2007/000", "VOC2007/001"]
    assert not index.has_labels


# -- what a source is -----------------------------------------------------------------------------


def test_kinds_of_sources(devkit: Path, tmp_path: Path) -> None:
    for name in ("train/cat/1.JPEG", "train/dog/deep/2.png", "val/cat/3.jpg", "val/dog/4.webp"):
        jpeg(tmp_path / "tree" / name)
    tree = open_source(tmp_path / "tree", split="train")
    assert (tree.kind, tree.classes) == ("classes", ("cat", "dog"))
    assert [(p.name, p.label) for p in tree.pictures] == [("cat/1.JPEG", 0), ("dog/deep/2.png", 1)]
    plain = open_source(tmp_path / "tree" / "train", labels="none")
    assert (plain.kind, plain.classes, plain.pictures[1].label) == ("folder", None, -1)
    assert open_source(tmp_path / "tree" / "val" / "cat").kind == "folder"
    jpeg(tmp_path / "tree" / "train" / "loose.jpg")
    assert open_source(tmp_path / "tree" / "train").kind == "folder"
    for root in (devkit, devkit / "VOC2007"):
        voc = open_source(root, split="test")
        assert voc.kind == "voc"
        assert [picture.name for picture in voc.pictures] == ["VOC2007/002.jpg"]


def test_hidden_files_and_loops_of_links(tmp_path: Path) -> None:
    jpeg(tmp_path / "in" / "a.jpg")
    jpeg(tmp_path / "in" / ".hidden" / "b.jpg")
    jpeg(tmp_path / "elsewhere" / "c.jpg")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    names = [picture.name for picture in open_source(tmp_path / "in").pictures]
    assert names == ["a.jpg", "link/c.jpg"]


def test_sources_that_cannot_be_used(devkit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"choose a part with --split, one of: test, train$"):
        open_source(devkit)
    with pytest.raises(UserError, match=r"val.txt: no such list; lists there: .*test, train"):
        open_source(devkit, split="val")
    (devkit / "VOC2007/ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val.txt: the list is empty"):
        open_source(devkit, split="val")
    (devkit / "VOC2007/JPEGImages/001.jpg").unlink()
    with pytest.raises(UserError, match=r"001.jpg: no such picture, but a list names it"):
        open_source(devkit, split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no pictures \(found nothing at all\)"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no pictures \(found 1 .txt\)"):
        open_source(tmp_path / "empty")
    with pytest.raises(UserError, match="has no folder 'train' and is no VOC devkit"):
        open_source(tmp_path / "empty", split="train")
    for name in ("train/x/1.jpg", "val/x/2.jpg"):
        jpeg(tmp_path / "tree" / name)
    with pytest.raises(UserError, match="train, val look like splits; choose one with --split"):
        open_source(tmp_path / "tree")


def test_parts_hold_each_picture_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(40):
        jpeg(tmp_path / f"in/{number:02d}.jpg", number)
    counts = []
    for number, part in enumerate(("0:0.25", "0.25:1")):
        words = [
            str(tmp_path / "in"),
            str(tmp_path / str(number)),
            "--part",
            part,
            "--num-workers",
            "0",
        ]
        assert make_shards.main([*words, "--check", "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["num_pictures"])
        assert not (tmp_path / str(number)).exists()
        assert make_shards.main(words) == 0
        index = json.loads((tmp_path / str(number) / "index.json").read_text())
        assert index["num_samples"] == counts[-1]
        capsys.readouterr()
    assert sum(counts) == 40
    assert 4 <= counts[0] <= 16
