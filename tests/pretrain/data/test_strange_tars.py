"""Tars that other tools make or that are damaged: the same samples with an index and streaming.

Each tar is read through the index, from front to end as a file, and through a command, which cannot
go back. Independent references are webdataset's reader and Python's tarfile.
"""

import gc
import io
import itertools
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from webdataset import tariterators

from common.errors import UserError
from pretrain.config import EvalConfig
from pretrain.data.cache import CacheOptions
from pretrain.data.remote import Patience
from pretrain.data.shard_info import format_info, gather_info
from pretrain.data.shards import ShardIndex, open_labelled
from pretrain.data.streaming import Reader, open_sources
from pretrain.evaluation.probe import OnlineProbe
from tests.pretrain.data.picture_helpers import encode, smooth_picture

J = [encode(smooth_picture(i, 16, 16)) for i in range(12)]
PATIENCE = Patience(retries=0, timeout_seconds=3)
END = bytes(1024)


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def link(name: str, target: str) -> tarfile.TarInfo:
    return special(name, tarfile.LNKTYPE, target)


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return special(name, tarfile.SYMTYPE, target)


def raw(name: bytes, size: bytes | int, kind: bytes = b"0", data: bytes = b"") -> bytes:
    """A header with a right checksum, whatever it says, and data with its padding."""
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = b"%011o\0" % size if isinstance(size, int) else size
    header[148:157] = b" " * 8 + kind
    header[257:265] = b"ustar\00000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def jpg(name: bytes, number: int = 0) -> bytes:
    return raw(name, len(J[number]), data=J[number])


def pax(text: bytes) -> bytes:
    return raw(b"pax", len(text), b"x", text)


def far(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


def gnu_tar(*options: str) -> Callable[[Path], bytes]:
    """What GNU tar makes of a folder with a sparse file, links and a pipe."""

    def make(folder: Path) -> bytes:
        with open(folder / "hole.jpg", "wb") as file:
            file.write(J[0])
            file.truncate(10**6)
        for i in range(2):
            (folder / f"p{i}.jpg").write_bytes(J[i])
        os.link(folder / "p0.jpg", folder / "q0.jpg")
        (folder / "a1.jpg").symlink_to("p1.jpg")
        os.mkfifo(folder / "pipe.jpg")
        command = ["tar", "--sort=name", *options, "-cf", "-", "-C", str(folder), "."]
        return subprocess.run(command, capture_output=True, check=True).stdout

    return make


THREE = [(f"{i}.jpg", J[i]) for i in range(3)]
MORE = [(f"m{i}.jpg", J[i + 3]) for i in range(2)]
NEGATIVE = b"\xff" * 12

# A tar; how many samples and left-out files it gives through the index; and, where it has links
# into itself, through a command.
WHOLE = {
    "dots": (tar_of(*((f"street.2024.{i:02d}.jpg", J[i]) for i in range(12))), 12, 0),
    "dots and labels": (tar_of(*(x for i in range(3) for x in (
        (f"s.2024.{i}.cls", b"3"), (f"s.2024.{i}.jpg", J[i])))), 3, 0),
    "dots beside a plain name": (tar_of(("a.2024.01.jpg", J[0]), ("a.2024.02.jpg", J[1]),
                                 ("a.jpg", J[2]), ("a.3.mask.jpg", J[3])), 4, 0),
    "dots in folders": (tar_of(*((f"v1.0/a.b/{i}.jpg", J[i]) for i in range(3))), 3, 0),
    "fields": (tar_of(*(x for i in range(3) for x in (
        (f"{i}.cls", b"1"), (f"{i}.jpg", J[i]), (f"{i}.seg.png", J[i + 3])))), 3, 0),
    "one field": (tar_of(("a.cls", b"2"), ("a.image.jpg", J[0]), ("b.image.jpg", J[1])), 2, 0),
    "pairs": (tar_of(("a.left.jpg", J[0]), ("a.right.jpg", J[1]), ("a.txt", b"x")), 2, 0),
    "many of one key": (tar_of(*((f"cam.f{i}.jpg", J[i % 12]) for i in range(600))), 600, 0),
    "two plain pictures": (tar_of(("a.jpg", J[0]), ("a.png", J[1]), ("b.jpg", J[2])), 2, 1),
    "twice in a row": (tar_of(("a.jpg", J[0]), ("a.jpg", J[1]), ("a.jpg", J[1]), *MORE), 3, 2),
    "twice apart": (tar_of(*THREE, THREE[0]), 4, 0),
    "hard links": (tar_of(*THREE, *(link(f"b{i}.jpg", f"{i}.jpg") for i in range(3))), 6, 0, 3, 3),
    "hard link of a label": (tar_of(("a.cls", b"5"), ("a.jpg", J[0]), link("b.cls", "a.cls"),
                             ("b.jpg", J[1])), 2, 0),
    "links to nothing": (tar_of(*THREE, link("x.jpg", "no.jpg"), link("y.jpg", "y.jpg"),
                         symlink("z.jpg", "../../etc/passwd"), symlink("f.jpg", "/0.jpg")), 3, 4),
    "links in a ring": (tar_of(*THREE, link("a.jpg", "b.jpg"), link("b.jpg", "a.jpg")), 3, 2),
    "symbolic links": (tar_of(symlink("a.jpg", "2.jpg"), *THREE, symlink("d/b.jpg", "../a.jpg")),
                       5, 0, 3, 2),
    "pipes and devices": (tar_of(*THREE, special("f.jpg", tarfile.FIFOTYPE),
                          special("c.jpg", tarfile.CHRTYPE), special("d.jpg", tarfile.DIRTYPE)),
                          3, 2),
    "outside": (tar_of(("/tmp/x.jpg", J[0]), ("../../y.jpg", J[1])), 2, 0),
    "latin-1": (tar_of(("caf\udce9.jpg", J[0]), ("caf\udce8.jpg", J[1])), 2, 0),
    "latin-1 in pax": (tar_of(("caf\udce9.jpg", J[0]), kind=tarfile.PAX_FORMAT), 1, 0),
    "line ends in names": (tar_of(("a\nb.jpg", J[0]), kind=tarfile.PAX_FORMAT), 1, 0),
    "empty files": (tar_of(("a.jpg", b""), ("b.jpg", J[0]), ("b.cls", b"")), 2, 0),
    "no suffix, no picture": (tar_of(("README", b""), ("._a.jpg", b""), ("a.json", b"{}"), *THREE),
                              3, 3),
    "joined": (tar_of(*THREE) + tar_of(*MORE) + tar_of(), 5, 0),
    "joined with links": (tar_of(*THREE) + tar_of(MORE[0], link("x.jpg", "m0.jpg")), 5, 0, 4, 1),
    "a block of zeros inside": (jpg(b"a.jpg") + bytes(512) + jpg(b"b.jpg", 1) + END, 2, 0),
    "one block at the end": (jpg(b"a.jpg") + bytes(512), 1, 0),
    "zeros behind": (tar_of(*THREE) + bytes(70_001), 3, 0),
    "unknown kind": (jpg(b"a.jpg") + raw(b"x.jpg", 9, b"Q", b"x") + END, 1, 1),
    "broken sparse": (jpg(b"a.jpg") + raw(b"x.jpg", len(J[0]), b"S", J[0]) + END, 1, 1),
    "gnu sparse": (gnu_tar("--sparse", "--format=gnu"), 4, 2, 2, 4),
    "pax sparse": (gnu_tar("--sparse", "--format=posix"), 4, 2, 2, 4),
    "not sparse": (gnu_tar("--format=posix"), 5, 1, 3, 3),
}  # fmt: skip
AS_WEBDATASET = ("dots in folders", "fields", "one field", "outside", "latin-1", "empty files",
                 "line ends in names")  # fmt: skip

REFUSED = {
    "garbage behind": (tar_of(*THREE) + b"garbage", r"bytes after its end, at 10,240"),
    "joined and cut": (tar_of(*THREE) + tar_of(*MORE)[:900], r"cut short or damaged"),
    "cut in a file": (tar_of(*THREE)[:700], r"cut short or damaged"),
    "cut between files": (jpg(b"a.jpg"), r"no end mark"),
    "negative size": (jpg(b"a.jpg") + raw(b"b.jpg", NEGATIVE) + END, r"a file of -1 bytes"),
    "negative header": (jpg(b"a.jpg") + raw(b"p", NEGATIVE, b"x") + END, r"damaged"),
    "negative in pax": (jpg(b"a.jpg") + pax(b"15 size=-99999\n") + jpg(b"b.jpg") + END, r"-99,999"),
    "wrong in pax": (pax(b"9 size=5\n") + jpg(b"b.jpg") + END, r"a damaged header"),
    "no number in pax": (pax(b"12 size=abc\n") + jpg(b"b.jpg") + END, r"a damaged header"),
    "file of 2^60": (jpg(b"a.jpg") + raw(b"b.mp4", far(2**60)) + END, r"damaged"),
    "label of 2^34": (jpg(b"a.jpg") + raw(b"a.cls", far(2**34)) + END, r"damaged"),
    "name of 2^40": (jpg(b"a.jpg") + raw(b"n", far(2**40), b"L") + END, r"a header of 1,099,511,"),
    "digits in pax": (pax(b"1" * 200_000) + jpg(b"b.jpg") + END, r"a number of 300 digits"),
    "nonsense in sparse": (pax(b"25 GNU.sparse.map=1,2,x\n") + jpg(b"b.jpg") + END, r"damaged"),
    "3000 headers in a row": (
        pax(b"12 comment=x\n") * 3000 + jpg(b"b.jpg") + END,
        r"recursion" if sys.version_info < (3, 13) else r"\(invalid header\)",
    ),
    "no number": (jpg(b"a.jpg") + raw(b"b.jpg", b"zzzzzzzzzzz\0") + END, r"a damaged header"),
}  # fmt: skip


def streamed(spec: str) -> tuple[list[tuple[int, int, bytes]], int]:
    """Hash, label and picture of the samples of a pass, and how many files were left out."""
    reader = Reader(
        open_sources(spec, PATIENCE), number=0, num_readers=1, seed=(1,), first_repeat=0,
        shuffle_buffer=1, patience=PATIENCE,
    )  # fmt: skip
    first = list(itertools.takewhile(lambda sample: sample.repeat == 0, reader.samples()))
    found = [(x.sample_hash, x.label, bytes(x.data)) for x in first if x.data is not None]
    numbers = {x.sample_id for x in first if x.data is None}
    assert len(numbers) == len(first) - len(found)  # each counts
    return sorted(found), len(numbers)


def indexed(path: Path) -> ShardIndex:
    return ShardIndex.open(path, CacheOptions(path.parent / "cache"))


def contents(index: ShardIndex) -> list[tuple[int, int, bytes]]:
    keys, labels = index.samples["key"].tolist(), index.labels.tolist()
    return sorted((keys[i], labels[i], index.read_bytes(i)) for i in range(index.num_samples))


@pytest.mark.parametrize("name", WHOLE)
def test_same_samples_everywhere(name: str, tmp_path: Path) -> None:
    data, num, num_left, *piped = WHOLE[name]
    path = tmp_path / "a.tar"
    (tmp_path / "folder").mkdir()
    path.write_bytes(data(tmp_path / "folder") if callable(data) else data)
    index = indexed(path)
    assert (index.num_samples, len(index.left_out)) == (num, num_left)
    info = gather_info(index)
    assert (info["num_samples"], info["num_left_out"]) == (num, num_left)
    assert format_info(info).count("a.tar/") == min(30, len(index.skipped))
    assert streamed(str(path)) == (contents(index), num_left)
    found, left = streamed(f"pipe:cat {path}")
    assert (len(found), left) == tuple(piped or (num, num_left))
    assert not {x[::2] for x in found} - {x[::2] for x in contents(index)}
    # With tarfile: the bytes of every picture that it finds too are those of a sample or left out.
    with tarfile.open(path) as tar:
        pictures = [m for m in tar if m.isfile() and m.name.endswith("jpg") and not m.issparse()]
        there = {bytes(tar.extractfile(member).read()) for member in pictures}  # type: ignore
    assert len(there - {data for _, _, data in contents(index)}) <= num_left


@pytest.mark.parametrize("name", AS_WEBDATASET)
def test_same_groups_as_webdataset(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE[name][0])
    expected = {}
    with open(tmp_path / "a.tar", "rb") as file:
        files = tariterators.tar_file_expander([{"url": "a.tar", "stream": file}])
        for sample in tariterators.group_by_keys(files):
            picture = next(v for k, v in sample.items() if k.endswith("jpg"))
            expected[sample["__key__"]] = picture
    index = indexed(tmp_path / "a.tar")
    names = [index.key_name(i).removesuffix(".image") for i in range(index.num_samples)]
    found = {name: index.read_bytes(i) for i, name in enumerate(names)}
    assert found == expected


@pytest.fixture
def without_gc() -> Iterator[None]:
    """No collection: finalisers of other tests' objects fail where the stack is nearly full."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, message = REFUSED[name]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    started = time.monotonic()
    for read in (indexed, lambda path: streamed(str(path))):
        with pytest.raises(UserError, match=rf"a\.tar: .*{message}"):
            read(path)
    with pytest.raises(UserError, match=r"a\.tar: .*cut short or damaged"):
        streamed(f"pipe:cat {path}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        (b" 7\n", 7, ""), (b"-1", -1, ""), (b"2147483647", 2**31 - 1, ""),
        (b"2147483648", -1, "label 2147483648 is no class number"),
        (b"-5", -1, "label -5 is no class number"), (b"1_0", -1, "is not an integer"),
        (b"9" * 5000, -1, "is not an integer"), (b"1.0", -1, "is not an integer"),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_counted(text, label, reason, tmp_path, capfd):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(("a.jpg", J[0]), ("a.cls", text), ("b.jpg", J[1]), ("b.cls", text)))
    index = indexed(path)
    assert index.labels.tolist() == [label] * 2
    assert index.left_out == []
    capfd.readouterr()
    assert streamed(str(path)) == (contents(index), 0)
    said = capfd.readouterr().err
    for where in (said, format_info(gather_info(index))):
        assert ("kept without a label (2 such)" in where) == bool(reason)
        assert reason in where
    if label > 10_000:  # nothing of that size is made of them
        message = "label 2147483647 among 2 samples: labels are class numbers"
        probe = EvalConfig(online_probe=True)
        with pytest.raises(UserError, match=f"data.shards: {message}"):
            OnlineProbe.open(probe, index, torch.nn.Identity(), torch.device("cpu"))
        with pytest.raises(UserError, match=rf"--val .*a\.tar: {message}"):
            open_labelled({"--val": str(path)}, CacheOptions(tmp_path / "cache"))


def test_what_a_labelled_set_leaves_out_is_said(tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(("a.jpg", J[0]), ("a.cls", b"1"), ("README", b"")))
    (index,) = open_labelled({"--val": str(path)}, CacheOptions(tmp_path / "cache"))
    assert index.labels.tolist() == [1]
    assert "1 files of its tars are no samples, as a.tar/README" in capsys.readouterr().err


def test_named_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for read in (indexed, lambda path: streamed(str(path))):
        with pytest.raises(UserError, match=r"a\.tar: .*is a named pipe .*name a pipe as pipe:cat"):
            read(tmp_path / "a.tar")
