import errno
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import UserError
from common.files import DiskFullError
from common.pictures import decode
from pretrain.data import pack as writer
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from pretrain.data.shard_info import verify_shards
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import (
    contents,
    encode,
    smooth_picture,
    sources,
    write_pictures,
)
from tools import make_shards

ROOT = Path(__file__).parents[3]
TEN = ShardOptions(max_samples_per_shard=10)


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "png")])
@pytest.mark.parametrize("resize_short", [None, 30])
def test_turned_pictures_are_upright_once(kind, suffix, resize_short, tmp_path):
    """Whether a shard holds the file's bytes, a smaller picture or another format."""
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "x").write_bytes(encode(smooth_picture(1, 60, 80), kind, exif=exif))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x")).convert("RGB")
    packed, data = writer.prepare(str(tmp_path / "x"), resize_short, 95)
    assert packed == ("jpg" if resize_short else suffix)
    image = decode(data, where="")
    assert image.shape == ((40, 30, 3) if resize_short else (80, 60, 3))
    expected = np.asarray(upright.resize(image.shape[1::-1], Image.Resampling.BOX), np.float32)
    assert np.abs(image - expected).mean() < np.abs(image[:, ::-1] - expected).mean() / 5


def test_bytes_do_not_depend_on_workers_or_list_order(picture_folder: Path, tmp_path: Path) -> None:
    pictures = sources(picture_folder)
    write_shards(pictures, tmp_path / "one", options=TEN)
    report = write_shards(pictures[::-1], tmp_path / "two", options=TEN, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (report.num_samples, report.num_shards, report.num_shards_kept) == (40, 4, 0)


def test_finished_set_is_left_alone(picture_folder: Path, tmp_path: Path) -> None:
    write_shards(sources(picture_folder), tmp_path, options=TEN)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    report = write_shards(sources(picture_folder), tmp_path, options=TEN)
    assert report.num_shards_kept == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_stopped_run_goes_on(picture_folder, tmp_path, monkeypatch):
    pictures = sources(picture_folder)
    write_shards(pictures, tmp_path / "whole", options=TEN)
    made, real = [], writer.write_shard

    def stop_at_third(plan, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(plan.name)
        return real(plan, *rest)

    monkeypatch.setattr(writer, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_shards(pictures, tmp_path / "parts", options=TEN)
    assert not (tmp_path / "parts" / "index.json").exists()
    monkeypatch.undo()
    report = write_shards(pictures, tmp_path / "parts", options=TEN)
    assert report.num_shards_kept == 2
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_bad_pictures_are_named_and_bounded(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "in", 12)
    files[3].write_bytes(files[3].read_bytes()[:300])
    files[7].write_bytes(b"no picture")
    pictures = sources(tmp_path / "in")
    with pytest.raises(
        UserError, match=r"(?s)1 pictures cannot be used, allowed are 0:.*--max-bad"
    ):
        write_shards(pictures, tmp_path / "out")
    with pytest.raises(UserError, match=r"2 pictures cannot be used, allowed are 1"):
        write_shards(pictures, tmp_path / "out", max_bad=1)
    report = write_shards(pictures, tmp_path / "out", max_bad=2)
    assert report.num_samples == 10
    assert {item["file"] for item in report.skipped} == {
        "class-1/picture-003.jpg",
        "class-1/picture-007.jpg",
    }
    index = ShardIndex.open(tmp_path / "out")
    assert index.skipped == report.skipped
    with pytest.raises(UserError, match="allowed are 0"):
        write_shards(pictures, tmp_path / "out")


def test_other_shards_are_not_mixed_in(picture_folder: Path, tmp_path: Path) -> None:
    pictures = sources(picture_folder)
    write_shards(pictures, tmp_path, options=TEN)
    with pytest.raises(UserError, match="holds shards of another source or of other options"):
        write_shards(pictures[:30], tmp_path, options=TEN)
    with pytest.raises(
        UserError, match="another source or of other options; choose another folder"
    ):
        write_shards(pictures, tmp_path, options=ShardOptions(max_samples_per_shard=9))
    report = write_shards(pictures[:30], tmp_path, options=TEN, overwrite=True)
    assert report.num_shards == 3
    assert not verify_shards(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar: a tar that this run did not make"):
        write_shards(pictures, tmp_path, options=TEN)


def test_unfinished_run_with_other_options(picture_folder, tmp_path, monkeypatch):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources(picture_folder), tmp_path, options=TEN)
    monkeypatch.undo()
    with pytest.raises(UserError, match="an unfinished run with another source or other options"):
        write_shards(sources(picture_folder)[:5], tmp_path, options=TEN)


def test_changed_shard_of_a_finished_set(picture_folder: Path, tmp_path: Path) -> None:
    write_shards(sources(picture_folder), tmp_path, options=TEN)
    (tmp_path / "shard-000003.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000003.tar: missing or changed .*--overwrite"):
        write_shards(sources(picture_folder), tmp_path, options=TEN)


def test_full_disk_while_writing(picture_folder, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DiskFullError, match=r"disk full while writing .*; free some space and run"):
        write_shards(sources(picture_folder), tmp_path, options=TEN)
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    assert write_shards(sources(picture_folder), tmp_path, options=TEN).num_samples == 40


def bomb() -> bytes:
    """A PNG header that announces 60,000 x 60,000 pixels, and next to nothing behind it."""
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_files_that_cannot_be_used_are_each_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    good = encode(smooth_picture(1))
    (source / "good.jpg").write_bytes(good)
    (source / "bomb.png").write_bytes(bomb())
    (source / "cut.jpg").write_bytes(good[: len(good) // 2])
    (source / "empty.jpg").touch()
    (source / "folder.jpg").mkdir()
    os.mkfifo(source / "pipe.jpg")
    (source / "loop.jpg").symlink_to(source / "loop.jpg")
    (source / "huge.jpg").touch()
    os.truncate(source / "huge.jpg", 2**30 + 1)  # sparse: takes no room
    names = sorted(path.name for path in source.iterdir())
    pictures = [SourcePicture(str(source / name), name) for name in [*names, "gone.jpg"]]
    with pytest.raises(UserError, match=r"\d pictures cannot be used, allowed are 5:"):
        write_shards(pictures, tmp_path / "out", options=TEN, max_bad=5)
    report = write_shards(pictures, tmp_path / "out", options=TEN, max_bad=8)
    assert report.num_samples == 1
    reasons = {item["file"]: item["reason"] for item in report.skipped}
    for name, words in {
        "bomb.png": "3600000000 pixels",
        "cut.jpg": "does not decode",
        "empty.jpg": "is empty (0 bytes)",
        "folder.jpg": "is a folder",
        "gone.jpg": "cannot be read (No such file",
        "huge.jpg": "1,073,741,825 bytes, at most",
        "loop.jpg": "cannot be read (Too many levels of symbolic links)",
        "pipe.jpg": "is a named pipe",
    }.items():
        assert words in reasons.pop(name)
    assert not reasons


def test_odd_names_become_samples(tmp_path: Path) -> None:
    source = tmp_path / "in"
    deep = source / "/".join(["d" * 200] * 4)
    deep.mkdir(parents=True)
    (source / "x.jpg").mkdir()
    raw = os.fsdecode(b"caf\xe9.jpg")  # Latin-1: no UTF-8
    names = [
        "a.jpg",
        "A.jpg",
        "A.JPG",
        "Zoë 猫.jpg",
        raw,
        "n" * 251 + ".jpg",
        ".. .jpg",
        "x.jpg/1.jpg",
    ]
    names.append((deep / ("e" * 250 + ".jpg")).relative_to(source).as_posix())
    data = {name: encode(smooth_picture(i)) for i, name in enumerate(names)}
    for name, content in data.items():
        (source / name).write_bytes(content)
    pictures = [SourcePicture(str(source / name), name) for name in names]
    write_shards(pictures, tmp_path / "out", options=ShardOptions(shuffle_seed=None))
    assert not verify_shards(tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    assert [index.read_bytes(i) for i in range(9)] == [data[name] for name in sorted(names)]
    assert len({index.key_name(i).lower() for i in range(9)}) == 9


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_run_goes_on_with_what_is_whole(tmp_path, capsys):
    write_pictures(tmp_path / "in", 300)
    out = tmp_path / "out"
    words = [str(tmp_path / "in"), str(out), "--max-samples-per-shard", "5", "--labels", "folders"]
    command = [sys.executable, "-m", "tools.make_shards", *words, "--num-workers", "2"]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=null, stderr=null, start_new_session=True, cwd=ROOT)
    while len(list((out / ".parts").glob("shard-*.tar.json"))) < 8:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    kept = {path.name: path.read_bytes() for path in out.glob("shard-*.tar")}
    assert make_shards.main([*words, "--num-workers", "1"]) == 0
    assert "were finished before" in capsys.readouterr().out
    options = ShardOptions(max_samples_per_shard=5)
    classes = ["class-0", "class-1"]
    write_shards(sources(tmp_path / "in"), tmp_path / "whole", options=options, classes=classes)
    whole = contents(tmp_path / "whole")
    assert contents(out) == whole
    assert len(kept) >= 8
    assert all(whole[name] == data for name, data in kept.items())
