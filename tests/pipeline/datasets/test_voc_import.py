"""PASCAL VOC from archives and folders: what fits becomes a set that detection takes.

The archives are made here, in the official layout and with few pictures.
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.annotations.formats.voc import VOC_CLASSES
from common.annotations.record import SetChoice, read_set
from pipeline.datasets import voc_import
from tests.pipeline.datasets.package_fixture import run as run_command

TRAINVAL07, TEST07, TRAINVAL12 = voc_import.OFFICIAL_TARS


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def annotation(name: str, difficult: int = 0, box: tuple[object, ...] = (1, 1, 60, 40)) -> bytes:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    text = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners)
    return (
        "<annotation><size><width>60</width><height>40</height><depth>3</depth></size><object>"
        f"<name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}"
        f"</difficult><bndbox>{text}</bndbox></object></annotation>"
    ).encode()


def official_files(year: str, split: str, ids: range, names: list[str]) -> dict[str, bytes]:
    """Files of an official archive: each third object is difficult."""
    base = f"VOCdevkit/VOC{year}"
    listed = [f"{year}_{i:06d}" for i in ids]
    files = {f"{base}/ImageSets/Main/{split}.txt": "\n".join(listed).encode() + b"\n"}
    files[f"{base}/ImageSets/Main/aeroplane_{split}.txt"] = b"".join(
        f"{image_id} -1\n".encode() for image_id in listed
    )
    files[f"{base}/SegmentationClass/{listed[0]}.png"] = b"not needed"
    for i, image_id in zip(ids, listed, strict=True):
        files[f"{base}/JPEGImages/{image_id}.jpg"] = jpeg(i)
        files[f"{base}/Annotations/{image_id}.xml"] = annotation(
            names[i % len(names)], difficult=int(i % 3 == 0)
        )
    return files


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


PARTS = {
    TRAINVAL07: official_files("2007", "trainval", range(6), VOC_CLASSES),
    TEST07: official_files("2007", "test", range(6, 10), VOC_CLASSES),
    TRAINVAL12: official_files("2012", "trainval", range(10, 15), VOC_CLASSES),
}


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    (tmp_path / "downloads").mkdir()
    return [write_tar(tmp_path / "downloads" / name, files) for name, files in PARTS.items()]


def run(out: Path, *arguments: object) -> int:
    return run_command("voc", out, *arguments, "--num-workers", 1)


@pytest.fixture
def small_is_official(monkeypatch: pytest.MonkeyPatch, tars: list[Path]) -> None:
    """Take the archives made here for the official ones."""
    counts = {"VOC2007/trainval": (6, 4), "VOC2007/test": (4, 2), "VOC2012/trainval": (5, 4)}
    monkeypatch.setattr(voc_import, "OFFICIAL_COUNTS", counts)
    for path in tars:
        digest = voc_import.hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(voc_import.OFFICIAL_TARS, path.name, digest)


@pytest.mark.usefixtures("small_is_official")
def test_archives_become_the_07_12_protocol(tmp_path: Path, tars: list[Path], capsys) -> None:
    out = tmp_path / "voc"
    assert run(out, *tars) == 0
    card = json.loads((out / "dataset.json").read_text())
    assert (card["kind"], card["metric_year"], card["official_counts"]) == ("voc", 2007, True)
    assert card["splits"] == {
        "voc_2007_trainval": 6, "voc_2012_trainval": 5, "voc_2007_test": 4,
    }  # fmt: skip
    assert card["objects"]["VOC2007/test"] == {"pictures": 4, "objects": 2, "difficult": 2}
    assert str(tmp_path) not in json.dumps(card)
    assert not (out / "VOC2007/SegmentationClass").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "voc"]
    captured = capsys.readouterr()
    assert "VOC2012/trainval" in captured.out
    assert "WARNING" not in captured.err
    voc = read_set(out)
    assert [(part.folder.name, part.name) for part in (*voc.train, voc.test)] == [
        ("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"),
    ]  # fmt: skip
    assert (voc.num_train, voc.metric_year, list(voc.classes)) == (11, 2007, list(VOC_CLASSES))
    assert sum(item.difficult for p in voc.test.pictures for item in p.objects) == 2
    assert run(out, *tars) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.usefixtures("small_is_official")
@pytest.mark.parametrize("layout", ["devkit", "separate", "nested", "years", "mixed"])
def test_folders_of_every_usual_shape(tmp_path: Path, tars: list[Path], layout: str) -> None:
    place = tmp_path / "place"
    if layout == "devkit":  # all unpacked into one VOCdevkit
        sources = [place]
        for files in PARTS.values():
            write_folder(place, files)
    elif layout == "separate":
        sources = [write_folder(place / str(i), part) for i, part in enumerate(PARTS.values())]
    elif layout == "nested":  # one folder that holds a folder an archive
        sources = [place]
        for name, files in PARTS.items():
            write_folder(place / name.removesuffix(".tar"), files)
    elif layout == "years":
        for files in PARTS.values():
            write_folder(place, files)
        sources = [place / "VOCdevkit/VOC2007", place / "VOCdevkit/VOC2012"]
    else:  # an archive, and a folder with a part of it again
        sources = [write_folder(place, PARTS[TRAINVAL07]), *tars]
    out = tmp_path / "voc"
    assert run(out, *sources) == 0
    assert read_set(out).num_train == 11
    if layout == "devkit":
        name = "VOC2007/JPEGImages/2007_000000.jpg"
        assert os.path.samefile(place / "VOCdevkit" / name, out / name), "linked, not copied"


def test_counts_that_are_not_official_are_refused_or_said_loudly(
    tmp_path: Path, tars: list[Path], capsys, monkeypatch
) -> None:
    out = tmp_path / "voc"
    assert run(out, *tars) == 2
    message = capsys.readouterr().err
    assert f"{TRAINVAL07}: is not the official archive of that name (MD5 " in message
    assert "or give --any-count, and compare with no published figure" in message
    renamed = [path.rename(path.with_name(f"{i}.tar")) for i, path in enumerate(tars)]
    assert run(out, *renamed) == 2
    message = capsys.readouterr().err
    assert "VOC2007/trainval has 6 pictures, the official list 5011" in message
    assert not out.exists()
    assert not list(tmp_path.glob("voc.*"))
    assert run(out, *renamed, "--any-count") == 0
    message = capsys.readouterr().err
    assert message.count("NOT comparable with published figures") == 3
    assert json.loads((out / "dataset.json").read_text())["official_counts"] is False
    counts = {"VOC2007/trainval": (6, 5), "VOC2007/test": (4, 2), "VOC2012/trainval": (5, 4)}
    monkeypatch.setattr(voc_import, "OFFICIAL_COUNTS", counts)
    assert run(out, *renamed, "--overwrite") == 0
    assert "has 4 objects that count, the challenge's page says 5" in capsys.readouterr().err


def own_set(root: Path, names: list[str]) -> Path:
    files = {
        name.replace("VOCdevkit/VOC2007/", ""): content
        for split, ids in (("train", range(5)), ("test", range(5, 9)))
        for name, content in official_files("2007", split, ids, names).items()
    }
    return write_folder(root, files)


def test_own_lists_of_pascals_classes_are_not_official(tmp_path: Path) -> None:
    source, classes = own_set(tmp_path / "mine", list(VOC_CLASSES)), ",".join(VOC_CLASSES)
    assert run(tmp_path / "out", source, "--classes", classes) == 0
    card = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (card["official_counts"], card["splits"]) == (False, {"train": 5, "test": 4})


def test_set_of_ones_own_needs_one_option(tmp_path: Path, capsys) -> None:
    names = ["bolt", "traffic light"]
    source, out = own_set(tmp_path / "mine", names), tmp_path / "out"
    assert run(out, source) == 2
    message = "the sources hold VOC2007/test, but VOC2007/trainval or VOC2012/trainval is needed"
    assert message in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    assert run(out, source, "--classes", "bolt") == 2
    message = capsys.readouterr().err
    assert "unknown class" in message
    assert "give all names with --classes" in message
    assert run(out, source, "--classes", tmp_path / "names.txt") == 0
    voc = read_set(out)
    assert (list(voc.classes), voc.metric_year, voc.num_train) == (names, 2012, 5)
    other = tmp_path / "other"
    assert run(other, source, "--classes", "bolt,traffic light", "--test-split", "val") == 2
    message = "val.txt: no such list; lists there: VOC2007/aeroplane_test"
    assert message in capsys.readouterr().err
    # Detection takes it as it is, too.
    assert read_set(source, SetChoice(classes=tuple(names))).num_train == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.tar", "no such file or folder; give VOCtrainval_06-Nov-2007.tar"),
        (lambda p: write_folder(p, {"a/b.txt": b""}), "holds no VOC set (found a)"),
        (lambda p: write_tar(p / "x.tar", {"VOCdevkit/VOCcode/VOCap.m": b""}), "program code"),
        (lambda p: write_folder(p, {"annotations/instances_val2017.json": b""}), "COCO set"),
        (lambda p: write_folder(p, {TEST07: b"x"}), "holds archives, not an unpacked set"),
        (lambda p: write_folder(p, {"x.zip": b"PK"}) / "x.zip", "is a zip; unpack it"),
        (lambda p: write_folder(p, {"x.tar": b"<html>"}) / "x.tar", "cannot be read to its end"),
    ],
    ids=["missing", "other", "code", "coco", "archives", "zip", "no tar"],
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
        ("Annotations/2007_000002.xml", None, "2007_000002.xml: no such annotation"),
        ("Annotations/2007_000002.xml", b"<annotation>", "not readable as XML"),
        ("Annotations/2007_000002.xml", annotation("cat", box=(1, 1, 63, 40)), "outside the pict"),
        ("Annotations/2007_000002.xml", annotation("unicorn"), "unknown class 'unicorn'"),
        ("ImageSets/Main/test.txt", None, "VOC2007/test is needed too"),
    ],
)
def test_damage_inside_is_found(
    tmp_path: Path, capsys, name: str, content: bytes | None, message: str
) -> None:
    place = tmp_path / "place"
    for files in PARTS.values():
        write_folder(place, files)
    file = place / "VOCdevkit/VOC2007" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert run(tmp_path / "out", place, "--any-count") == 2
    assert message in capsys.readouterr().err


def test_one_pixel_too_far_and_fractions_are_official(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for files in PARTS.values():
        write_folder(place, files)
    odd = annotation("cat", box=(0, 1, 61, "39.5")).replace(b"<pose>Left</pose>", b"")
    (place / "VOCdevkit/VOC2012/Annotations/2012_000010.xml").write_bytes(odd)
    assert run(tmp_path / "out", place, "--any-count") == 0
    assert read_set(tmp_path / "out").train[1].pictures[0].objects[0].voc_box == (0, 1, 61, 39.5)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("VOCdevkit/VOC2007/JPEGImages/../../../../escaped.jpg", ""),
        ("/VOC2007/JPEGImages/../../../e.jpg", ""),
        ("VOCdevkit/VOC2007/JPEGImages/a.jpg", "/etc/passwd"),
    ],
)
def test_archive_cannot_write_elsewhere_nor_link(tmp_path: Path, capsys, name: str, link: str):
    (tmp_path / "in").mkdir()
    evil = tmp_path / "in/evil.tar"
    with tarfile.open(evil, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE if link else tarfile.REGTYPE, link
        archive.addfile(member)
    assert run(tmp_path / "deep/er/out", evil, "--any-count") == 2
    assert "is a link or a device, or points outside the archive" in capsys.readouterr().err
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"evil.tar"}


def test_sources_that_disagree(tmp_path: Path, tars: list[Path], capsys) -> None:
    other = write_folder(tmp_path / "other", PARTS[TRAINVAL07])
    (other / "VOCdevkit/VOC2007/JPEGImages/2007_000001.jpg").write_bytes(jpeg(99))
    shutil.rmtree(other / "VOCdevkit/VOC2007/ImageSets")
    assert run(tmp_path / "out", *tars, other, "--any-count") == 2
    assert "its VOC2007/JPEGImages/2007_000001.jpg differs" in capsys.readouterr().err
