"""PASCAL VOC and Fashion-MNIST, from archives made here: in the official layout, few pictures."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from common.annotations.formats import voc
from common.annotations.formats.voc import VOC_CLASSES
from common.annotations.record import read_set
from common.errors import UserError
from pipeline.datasets import importers
from pretrain.data.pack import SourcePicture, write_shards
from tests.layouts import voc_xml
from tests.pipeline.datasets.package_fixture import run as run_command
from tests.pipeline.datasets.package_fixture import write_tree

TRAINVAL07, TEST07, TRAINVAL12 = importers.OFFICIAL_TARS


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def annotation(name: str, difficult: int = 0, box: tuple[object, ...] = (1, 1, 60, 40)) -> bytes:
    flags = f"<truncated>0</truncated><difficult>{difficult}</difficult>"
    return voc_xml(name, box, (60, 40), flags).encode()


def official_files(year: str, split: str, ids: range) -> dict[str, bytes]:
    """Files of an official archive: each third object is difficult."""
    base = f"VOCdevkit/VOC{year}"
    listed = [f"{year}_{i:06d}" for i in ids]
    files = {f"{base}/ImageSets/Main/{split}.txt": "\n".join(listed).encode() + b"\n"}
    files[f"{base}/SegmentationClass/{listed[0]}.png"] = b"not needed"
    for i, image_id in zip(ids, listed, strict=True):
        files[f"{base}/JPEGImages/{image_id}.jpg"] = jpeg(i)
        xml = annotation(VOC_CLASSES[i], difficult=int(i % 3 == 0))
        files[f"{base}/Annotations/{image_id}.xml"] = xml
    return files


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


PARTS = {
    TRAINVAL07: official_files("2007", "trainval", range(6)),
    TEST07: official_files("2007", "test", range(6, 10)),
    TRAINVAL12: official_files("2012", "trainval", range(10, 15)),
}
ALL = {name: content for files in PARTS.values() for name, content in files.items()}


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    (tmp_path / "downloads").mkdir()
    return [write_tar(tmp_path / "downloads" / name, files) for name, files in PARTS.items()]


def run(out: Path, *arguments: object) -> int:
    return run_command("voc", out, *arguments, "--num-workers", 1)


@pytest.fixture(autouse=True)
def small_is_official(monkeypatch: pytest.MonkeyPatch, tars: list[Path]) -> None:
    """Take the archives made here for the official ones."""
    counts = {"VOC2007/trainval": 6, "VOC2012/trainval": 5, "VOC2007/test": 4}
    monkeypatch.setattr(voc, "OFFICIAL_COUNTS", counts)
    for path in tars:
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(importers.OFFICIAL_TARS, path.name, md5)


def test_archives_become_the_07_12_protocol(tmp_path: Path, tars: list[Path], capsys) -> None:
    out = tmp_path / "voc"
    assert run(out, *tars) == 0
    card = json.loads((out / "dataset.json").read_text())
    assert (card["kind"], card["metric_year"]) == ("voc", 2007)
    assert card["splits"] == {
        "voc_2007_trainval": 6, "voc_2012_trainval": 5, "voc_2007_test": 4,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(card)
    assert not (out / "VOC2007/SegmentationClass").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "voc"]
    data = read_set(out)
    assert [(part.folder.name, part.name) for part in (*data.train, data.test)] == [
        ("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"),
    ]  # fmt: skip
    assert (data.num_train, data.metric_year, list(data.classes)) == (11, 2007, list(VOC_CLASSES))
    assert sum(item.difficult for p in data.test.pictures for item in p.objects) == 2
    assert run(out, *tars) == 0
    assert "is there with these options" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["devkit", "nested", "mixed"])
def test_folders_of_every_usual_shape(tmp_path: Path, tars: list[Path], layout: str) -> None:
    place, out, sources = tmp_path / "place", tmp_path / "voc", [tmp_path / "place"]
    if layout == "nested":  # one folder that holds a folder an archive
        for name, files in PARTS.items():
            write_tree(place / name.removesuffix(".tar"), files)
    elif layout == "devkit":  # all unpacked into one VOCdevkit
        write_tree(place, ALL)
    else:  # archives, and a folder with a part of them again
        sources = [write_tree(place, PARTS[TRAINVAL07]) / "VOCdevkit/VOC2007", *tars]
    assert run(out, *sources) == 0
    assert read_set(out).num_train == 11
    if layout != "nested":
        name = "VOC2007/JPEGImages/2007_000000.jpg"
        assert os.path.samefile(place / "VOCdevkit" / name, out / name), "linked, not copied"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.tar", "no such file or folder; give VOCtrainval_06-Nov-2007.tar"),
        (lambda p: write_tree(p, {"a/b.txt": b""}), "the sources hold none of the lists"),
        (lambda p: write_tree(p, {"x.tar": b"<html>"}) / "x.tar", "none of the official archives"),
        (lambda p: write_tree(p, PARTS[TEST07]), "the sources hold VOC2007/test; VOC2007/test and"),
    ],
    ids=["missing", "other", "no tar", "no training list"],
)
def test_wrong_sources_are_explained(tmp_path: Path, capsys, make, message: str) -> None:
    (tmp_path / "in").mkdir()
    assert run(tmp_path / "out", make(tmp_path / "in")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("JPEGImages/2007_000002.jpg", jpeg(2)[:-400], "does not decode"),
        ("JPEGImages/2007_000002.jpg", None, "2007_000002.jpg: no such picture"),
        ("ImageSets/Main/trainval.txt", b"2007_000002\n", "1 pictures, the official list 6"),
        ("Annotations/2007_000002.xml", annotation("unicorn"), "unknown class 'unicorn'"),
        ("Annotations/2007_000002.xml", annotation("cat", box=(0, 1, 61, "39.5")), None),
    ],
    ids=["picture", "no picture", "count", "class", "box one pixel too far, as in official sets"],
)
def test_damage_inside_is_found(tmp_path: Path, capsys, name, content, message) -> None:
    place = write_tree(tmp_path / "place", ALL)
    file = place / "VOCdevkit/VOC2007" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert run(tmp_path / "out", place) == (2 if message else 0)
    assert (message or "") in capsys.readouterr().err
    if not message:
        picture = read_set(tmp_path / "out").train[0].pictures[2]
        assert picture.objects[0].voc_box == (0, 1, 61, 39.5)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("VOCdevkit/VOC2007/JPEGImages/../../../../escaped.jpg", ""),
        ("VOCdevkit/VOC2007/JPEGImages/a.jpg", "/etc/passwd"),
    ],
)
def test_archive_cannot_write_elsewhere_nor_link(
    tmp_path: Path, capsys, monkeypatch, name: str, link: str
) -> None:
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE if link else tarfile.REGTYPE, link
        archive.addfile(member)
    md5 = hashlib.md5(evil.read_bytes()).hexdigest()
    monkeypatch.setitem(importers.OFFICIAL_TARS, "evil.tar", md5)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path / "deep/er/out", evil) == 2
    assert "evil.tar: cannot be unpacked" in capsys.readouterr().err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


# -- Fashion-MNIST ---------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim])
    return gzip.compress(header + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def test_fashion_mnist_as_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up package of 60 and 20 pictures; picture i has i in its corner, and class i % 10."""
    arrays, files = {}, {}
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        arrays[part] = images
        labels = (np.arange(count) % 10).astype(np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    write_tree(tmp_path / "usr/share/datasets/fashion-mnist", files)
    monkeypatch.setattr(importers, "SYSTEM", tmp_path)
    out = tmp_path / "pictures"
    words = ["--num-pool", 50, "--num-probe-train", 30, "--num-probe-val", 20]
    assert run_command("fashion", out, *words) == 0
    card = json.loads((out / "dataset.json").read_text())
    assert (card["pool"], card["probe"]) == (50, {"train": 30, "val": 20})
    pool = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in (out / "pool").iterdir()]
    corners = [int(image[0, 0]) for image in pool]
    assert len(set(corners)) == 50
    for corner, image in zip(corners, pool, strict=True):
        assert (image == arrays["train"][corner]).all()
    for part, source, count in (("train", "train", 30), ("val", "t10k", 20)):
        found = list((out / "probe" / part).rglob("*.png"))
        assert len(found) == count
        for path in found:
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            assert (image == arrays[source][image[0, 0]]).all()
            assert path.parent.name == importers.FASHION_CLASSES[image[0, 0] % 10]
        folders = (out / "probe" / part).iterdir()
        assert [len(list(folder.iterdir())) for folder in folders] == [count // 10] * 10


def test_more_than_there_is_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_command("fashion", tmp_path / "p", "--num-pool", 60001, "--check") == 2
    assert "--num-pool is 60001: give 10 to 60,000" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [slice(0, -3), slice(1, None), slice(0, 3)])
def test_damaged_files_are_refused(
    cut: slice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importers, "_MAX_IDX_BYTES", 1000)
    raw = gzip.decompress(idx(np.zeros((4, 5, 6), np.uint8)))
    wrong_sum = bytearray(gzip.compress(raw))
    wrong_sum[-6] ^= 0xFF
    bomb = gzip.compress(bytes(1001))
    for content in (gzip.compress(raw[cut]), raw, gzip.compress(raw)[:-9], wrong_sum, bomb):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.gz: no readable IDX file"):
            importers.read_idx(tmp_path / "a.gz")


def test_pictures_are_known_by_content_where_the_suffix_says_nothing(tmp_path: Path) -> None:
    folder, picture = tmp_path / "in", Image.new("RGB", (20, 16))
    folder.mkdir()
    for name, kind in {
        "a.jfif": "JPEG", "b.avif": "AVIF", "c": "JPEG", "d": "AVIF", "e": "TIFF", "f": "PPM",
        "g": "BMP", "h": "JPEG2000", "photo.png_large": "PNG", "photo.webp@2x": "WEBP",
        "i.v2": "GIF",
    }.items():  # fmt: skip
        picture.save(folder / name, kind)
    names = sorted(path.name for path in folder.iterdir())
    for name, content in {
        "j": b"BM Co.",
        "k.heic": b"\0\0\0\x18ftypheic",
        "l.xml": b"\xff\xd8\xff",
    }.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe")
    source = importers.open_source(folder)
    assert [name for _, name, _ in source.pictures] == names
    assert source.num_ignored == 4
    report = write_shards([SourcePicture(*one) for one in source.pictures], tmp_path / "out")
    assert report.num_samples == len(names)
