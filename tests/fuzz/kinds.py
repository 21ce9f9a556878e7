"""The kinds of input: a sound one, how it is damaged, who reads it, and what must have been read."""

import contextlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from xml.dom import minidom

import cv2
import numpy as np
import torch
import yaml
from PIL import Image, ImageOps

from common import checkpoints, pictures
from common.annotations.record import coco_content, read_set, write_annotations
from common.backbone import read_backbone
from common.config import dotted, read_settings, to_plain
from common.errors import UserError
from common.files import sha256_of
from detection.training import config as detection_config
from detection.training.run import is_finished, summarise
from pipeline import config as pipeline_config
from pipeline import results
from pipeline.report import report, runs
from pretrain import config as pretrain_config
from pretrain.data.cache import CacheOptions
from pretrain.data.decode import Sample, ViewWriter
from pretrain.data.remote import Patience
from pretrain.data.shard_info import format_info, gather_info, verify_shards
from pretrain.data.shards import ShardIndex
from pretrain.data.streaming import Reader, open_sources
from pretrain.data.policy import ViewPolicy
from pretrain.engine import checkpoint as own_checkpoint
from pretrain.evaluation.linear.config import LinearConfig
from tests.detection.tiny_detection import make_coco, make_voc
from tests.detection.tiny_weights import our_checkpoint, torchvision_state
from tests.fuzz import mutate
from tests.pipeline.report.run_fixture import ap50, make_run
from tools import convert_to_d2, make_shards
from tools import runs as runs_tool

ROOT = Path(__file__).parents[2]
cv2.setNumThreads(0)
torch.set_num_threads(1)


def picture(seed: int, suffix: str = "jpg", mode: str = "RGB", **options: Any) -> bytes:
    """A small picture in a file format."""
    stream, rng = io.BytesIO(), np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = coarse.resize((40 + seed % 8, 32), Image.Resampling.BICUBIC).convert(
        "L" if mode in ("F", "I", "I;16") else mode
    )
    if mode in ("F", "I", "I;16"):
        values = np.asarray(image) / 255 * {"F": 1.0, "I": 2**20, "I;16": 65535}[mode]
        kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        image = Image.fromarray(values.astype(kind))
    image.save(stream, Image.registered_extensions()[f".{suffix}"], **options)
    return stream.getvalue()


class Kind(ABC):
    """One kind of input. Each case runs in a forked process, so that it may keep facts in `self`.

    Attributes:
        base: A folder with a sound input, from which each case starts.
    """

    name: ClassVar[str]

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(parents=True)
        self.make(base)

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write a sound input."""

    @abstractmethod
    def mutate(self, folder: Path, rng: Random) -> str:
        """Damage it; returns what was done."""

    @abstractmethod
    def read(self, folder: Path) -> list[str]:
        """Read it as the programs do; returns what an independent reader misses."""

    @abstractmethod
    def command(self, folder: Path, rng: Random) -> list[str]:
        """The words of a command line that reads it."""

    @abstractmethod
    def run(self, words: list[str]) -> int:
        """Run that command in this process."""


# -- shards ---------------------------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def write_tar(members: Iterable[Member], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


class Tars(Kind):
    """Tars of other tools, which have no index."""

    name = "tar"

    def make(self, folder: Path) -> None:
        (folder / "a.tar").write_bytes(write_tar(self.members(0), tarfile.PAX_FORMAT))
        (folder / "b.tar").write_bytes(write_tar(self.members(10), tarfile.GNU_FORMAT))

    @staticmethod
    def members(first: int) -> list[Member]:
        found = []
        for i in range(first, first + 5):
            found += [member(f"d/p{i}.jpg", picture(i)), member(f"d/p{i}.cls", str(i % 3).encode())]
        return found

    def mutate(self, folder: Path, rng: Random) -> str:
        path = folder / "a.tar"
        how = rng.randrange(10)
        if how == 0:
            return mutate.replace(path, rng)
        if how <= 2:
            data, what = mutate.damage(path.read_bytes(), rng)
            path.write_bytes(data)
            return what
        members, told = self.members(0), []
        for _ in range(rng.choice((1, 1, 2, 3))):
            told.append(self.change(members, rng))
        form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
        try:
            data = write_tar(members, form)
        except (ValueError, UnicodeError):
            data = write_tar(members, tarfile.GNU_FORMAT)
        if how == 9:
            ending = rng.choice(("one block", "none", "twice", "gzip", "xz", "bz2"))
            told.append(f"end: {ending}")
            end = len(data.rstrip(b"\0")) + 511 & ~511
            data = {
                "one block": data[:end] + bytes(512),
                "none": data[:end],
                "twice": data * 2,
            }.get(ending, data)
            if ending in ("gzip", "xz", "bz2"):
                module = __import__({"xz": "lzma"}.get(ending, ending))
                data = module.compress(data)
                if rng.random() < 0.5:
                    data, what = mutate.damage(data, rng)
                    told.append(what)
        path.write_bytes(data)
        return "; ".join(told)

    @staticmethod
    def change(members: list[Member], rng: Random) -> str:
        at = rng.randrange(len(members))
        info, data = members[at]
        new = picture(rng.randrange(100, 1000))
        key, _, suffix = info.name.rpartition(".")
        names = (
            f"{key}.v1.{suffix}", f"{key}.{suffix.upper()}", key, f"{key}.jfif", f"{key}.left.png",
            f"__meta__/{suffix}", f"._p.{suffix}", f"../{mutate.OUTSIDE}/x.{suffix}", f"/x.{suffix}",
            f"{'n' * 300}.{suffix}", f"d/\udcff\udcfe.{suffix}", f"d/a\nb.{suffix}", f"é.{suffix}",
            f".{suffix}", f"d.x/p.{suffix}", f"p q.{suffix}", f"{key}.{suffix} ", "d/p3.jpg",
        )  # fmt: skip
        labels = (b"4294967296", b"-5", b"9" * 30, b"1.0", b"", b"\xff", b"1_000", b" 2\n", b"2\0",
                  "２".encode(), b"1 2", b"+1", b"0x1", b"-1", b"1" * 5000, b"3000000")  # fmt: skip
        targets = ("d/p1.jpg", "p1.jpg", "../d/p1.jpg", "d/p4.jpg", "no.jpg", "/etc/hostname",
                   info.name, f"../{mutate.OUTSIDE}/x")  # fmt: skip
        how = rng.choice(("name", "name", "label", "label", "link", "link", "double", "second",
                          "order", "special", "empty", "not a picture", "size"))  # fmt: skip
        if how == "name":
            info.name = rng.choice(names)
            return f"name {info.name[:40]!r}"
        if how == "label":
            label = rng.choice(labels)
            members[at] = member(f"{key}.cls", label)
            return f"label {label[:20]!r} at {key}"
        if how == "link":
            kind, to = rng.choice((tarfile.LNKTYPE, tarfile.SYMTYPE)), rng.choice(targets)
            members[at] = member(f"d/link{at}.jpg", kind=kind, link=to)
            return f"{'hard' if kind == tarfile.LNKTYPE else 'symbolic'} link to {to}"
        if how == "double":
            members.insert(rng.randrange(len(members)), member(info.name, rng.choice((data, new))))
        elif how == "second":
            members.insert(at, member(f"{key}.{rng.choice(('png', 'left.jpg', 'JPG'))}", new))
        elif how == "order":
            rng.shuffle(members)
        elif how == "special":
            kind = rng.choice((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"))
            members[at] = member(info.name, kind=kind)
        elif how in ("empty", "not a picture"):
            members[at] = member(info.name, b"" if how == "empty" else b"no picture")
        elif how == "size":
            info.pax_headers = {"size": rng.choice(("-1", "9" * 25, "x", "0", "1e3"))}
        return f"{how} {info.name[:30]!r}"

    def read(self, folder: Path) -> list[str]:
        index = ShardIndex.open(folder)
        data = [bytes(one) for one in index.read_many(np.arange(index.num_samples))]
        keys = [index.key_name(i) for i in range(index.num_samples)]
        said = format_info(gather_info(index)) + json.dumps(index.skipped)
        faults = self.lost(folder, data, index.labels.tolist(), said)
        if len(keys) != len(data):
            faults.append("keys and pictures differ in number")
        reader = Reader(open_sources(str(folder), Patience()), 0, 1, (1,), 0, 1, Patience())
        streamed = [one for one in islice(reader.samples(), 2 * len(data) + 8) if not one.repeat]
        seen = Counter(bytes(one.data) for one in streamed if one.data is not None)
        if seen != Counter(data):
            faults.append(f"streaming: {sum(seen.values())} of {len(data)} pictures, or others")
        labels = {bytes(one.data): one.label for one in streamed if one.data is not None}
        if seen == Counter(data) and max(seen.values(), default=0) == 1:
            wrong = [i for i, one in enumerate(data) if labels[one] != index.labels[i]]
            faults += [f"streaming: another label of {keys[i]}" for i in wrong[:3]]
        return faults

    @staticmethod
    def lost(folder: Path, data: list[bytes], labels: list[int], said: str) -> list[str]:
        """Pictures and labels that tarfile finds, and that are neither read nor reported."""
        pictures_there: list[tuple[str, bytes]] = []
        classes: dict[str, bytes] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for info in tar:
                    if info.name.startswith("__") or not (
                        info.isfile() or info.islnk() or info.issym()
                    ):
                        continue
                    try:
                        stream = tar.extractfile(info)
                    except (KeyError, RecursionError):
                        stream = None
                    content = None if stream is None else stream.read()
                    suffix = info.name.rpartition(".")[2].lower()
                    if content is not None and suffix in SUFFIXES and "." in info.name:
                        pictures_there.append((info.name, content))
                    elif content is not None and suffix == "cls":
                        classes[info.name[:-4]] = content
        left, faults = Counter(data), []

        def is_reported(name: str) -> bool:
            base = name.rpartition("/")[2]
            return any(json.dumps(x)[1:-1] in said for x in (name, base.rpartition(".")[0] or base))

        for name, content in pictures_there:
            if left[content]:
                left[content] -= 1
            elif not is_reported(name):
                faults.append(f"{name!r} is lost")
        if sum(left.values()):
            faults.append("pictures that are not in the tars")
        names: dict[bytes, list[str]] = {}
        for name, content in pictures_there:
            names.setdefault(content, []).append(name)
        for content, label in zip(data, labels, strict=True):
            own = names.get(content, [])
            stems = [stem for stem in classes if len(own) == 1 and own[0].startswith(f"{stem}.")]
            if len(stems) == 1:
                text = classes[stems[0]].strip()
                is_number = re.fullmatch(rb"[+-]?[0-9]{1,10}", text) is not None
                expected = int(text) if is_number and -1 <= int(text) < 2**31 else -1
                if label != expected and not is_reported(stems[0]):
                    faults.append(f"{own[0]!r} has label {label} for {classes[stems[0]][:20]!r}")
                if not is_number and label == expected and not is_reported(f"{stems[0]}.cls"):
                    faults.append(
                        f"label {classes[stems[0]][:20]!r} of {own[0]!r} left out silently"
                    )
        return faults

    def command(self, folder: Path, rng: Random) -> list[str]:
        return [str(folder), rng.choice(("--info", "--verify"))]

    def run(self, words: list[str]) -> int:
        return make_shards.main(words)


class Index(Kind):
    """A set with its index.json and samples.npy."""

    name = "index"

    def make(self, folder: Path) -> None:
        source, made = folder / "pictures", folder / "shards"
        for i in range(6):
            (source / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
            (source / f"class-{i % 2}" / f"{i}.jpg").write_bytes(picture(i))
        words = [str(source), str(made), "--num-workers", "0", "--max-samples-per-shard", "3"]
        assert make_shards.main([*words, *make_shards_labels()]) == 0
        index = ShardIndex.open(made)
        self.data = [bytes(one) for one in index.read_many(np.arange(6))]
        self.labels = index.labels.tolist()
        index.close()
        shutil.rmtree(source)

    def mutate(self, folder: Path, rng: Random) -> str:
        folder /= "shards"
        self.is_tar = False
        how = rng.randrange(10)
        names = ["index.json", "samples.npy", *(p.name for p in sorted(folder.glob("*.tar")))]
        if how == 0:
            name = rng.choice(names)
            return f"{name}: {mutate.replace(folder / name, rng)}"
        if how <= 5:
            return mutate.change_json(folder / "index.json", rng)
        name = rng.choice(names[1:])
        self.is_tar = name.endswith(".tar")
        data, what = mutate.damage((folder / name).read_bytes(), rng)
        (folder / name).write_bytes(data)
        if not self.is_tar and rng.random() < 0.7:  # one who changes the table changes its hash
            index = json.loads((folder / "index.json").read_bytes())
            index["samples_sha256"] = sha256_of(folder / name)
            (folder / "index.json").write_text(json.dumps(index))
            what += ", hash too"
            self.labels = []
        return f"{name}: {what}"

    def read(self, folder: Path) -> list[str]:
        folder /= "shards"
        index = ShardIndex.open(folder)
        data = [bytes(one) for one in index.read_many(np.arange(index.num_samples))]
        [index.key_name(i) for i in range(index.num_samples)]
        format_info(gather_info(index))
        problems = verify_shards(folder)
        if not self.labels or (self.is_tar and problems):
            return []
        faults = (
            [] if data == self.data else [f"{len(data)} of {len(self.data)} pictures, or others"]
        )
        return faults + ["other labels"] * (index.labels.tolist() != self.labels)

    def command(self, folder: Path, rng: Random) -> list[str]:
        return [str(folder / "shards"), rng.choice(("--info", "--verify"))]

    def run(self, words: list[str]) -> int:
        return make_shards.main(words)


def make_shards_labels() -> list[str]:
    """The option that takes folders for classes, where it must be asked for."""
    is_there = re.search(r"--labels \{[^}]*folders", make_shards.parser().format_help())
    return ["--labels", "folders"] if is_there else []


# -- pictures -------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


class Pictures(Kind):
    """One picture of many formats and modes."""

    name = "picture"
    MODES = (
        ("jpg", "RGB", {}), ("jpg", "L", {}), ("jpg", "CMYK", {}), ("jpg", "RGB", {"progressive": 1}),
        ("png", "RGB", {}), ("png", "P", {}), ("png", "RGBA", {}), ("png", "I;16", {}), ("png", "1", {}),
        ("webp", "RGB", {}), ("tif", "RGB", {}), ("tif", "F", {}), ("tif", "I;16", {}), ("tif", "I", {}),
        ("bmp", "RGB", {}), ("gif", "P", {}), ("ppm", "RGB", {}),
        *(("jpg", "RGB", {"exif": exif(n)}) for n in (1, 3, 6, 8, 9)),
        ("png", "RGB", {"exif": exif(6)}),
    )  # fmt: skip

    def make(self, folder: Path) -> None:
        for number, (suffix, mode, options) in enumerate(self.MODES):
            data = picture(number, suffix, mode, **options)
            (folder / f"{number:02d}.{suffix}").write_bytes(data)

    def mutate(self, folder: Path, rng: Random) -> str:
        self.file = rng.choice(sorted(folder.glob("*.*")))
        data, what = self.file.read_bytes(), "whole"
        how = rng.randrange(8)
        if how == 0:
            return f"{self.file.name}: {mutate.replace(self.file, rng)}"
        if how == 1:
            data = self.bomb(rng)
            what = "bomb"
        elif how > 2:
            data, what = mutate.damage(data, rng)
            if how == 7:
                data, more = mutate.damage(data, rng)
                what += f", {more}"
        self.file.write_bytes(data)
        return f"{self.file.name}: {what}"

    @staticmethod
    def bomb(rng: Random) -> bytes:
        import struct
        import zlib

        def chunk(kind: bytes, body: bytes) -> bytes:
            return (
                struct.pack(">I", len(body))
                + kind
                + body
                + struct.pack(">I", zlib.crc32(kind + body))
            )

        side = rng.choice((60_000, 9_000, 2**31 - 1, 0))
        text = b"a\0\0" + zlib.compress(bytes(rng.choice((10, 300 << 20))), 1)
        head = struct.pack(">IIBBBBB", side, side, 8, rng.choice((0, 2, 3)), 0, 0, 0)
        rows = zlib.compress(bytes(rng.choice((100, 64 << 20))), 1)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(
            (chunk(b"zTXt", text), chunk(b"iTXt", b"a\0\1\0\0\0" + text[3:]), chunk(b"IDAT", rows),
             chunk(b"IEND", b""))
        )  # fmt: skip

    def read(self, folder: Path) -> list[str]:
        with contextlib.suppress(pictures.BadPicture):
            pictures.picture_size(self.file)
        if not self.file.is_file() or self.file.is_symlink():
            return []
        data, faults = self.file.read_bytes(), []
        views = ViewWriter(image_size=16, views=(ViewPolicy(), ViewPolicy()))
        failed = views.write([Sample(0, 1, 0, -1, data)], np.empty((2, 1, 16, 16, 3), np.uint8))
        try:
            image = pictures.decode(data, where="picture")
        except pictures.BadPicture:
            return []
        header = pictures.read_header(data, where="picture")
        if image.shape != (header.height, header.width, 3) or image.dtype != np.uint8:
            faults.append(f"{image.shape} {image.dtype}, its header says {header}")
        if pictures.picture_size(self.file) != (header.width, header.height):
            faults.append("picture_size differs from the header")
        for reduction in (1, 2, 4, 8):
            small, factor = pictures.decode_fast(data, header, reduction, where="picture")
            if small.shape[:2] != (-(-header.height // factor), -(-header.width // factor)):
                faults.append(f"{reduction} times smaller: {small.shape}")
        if failed:
            faults.append(f"decodes, but has no views: {failed}")
        return faults + self.unlike_pillow(data, image)

    @staticmethod
    def unlike_pillow(data: bytes, image: np.ndarray) -> list[str]:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                kind, mode = opened.format, opened.mode
                upright = ImageOps.exif_transpose(opened)
                pixels = np.asarray(upright.convert("RGB"))
        except Exception as error:
            return [f"Pillow refuses it ({error!s:.80})"]
        if pixels.shape != image.shape:
            return [f"Pillow's upright picture is {pixels.shape}, ours {image.shape}"]
        if mode in ("RGB", "L", "P", "1") and np.abs(pixels.astype(int) - image).mean() > 3:
            return [f"other pixels than Pillow's ({kind} {mode})"]
        if mode in ("F", "I", "I;16") and image.max() - image.min() < 20 < np.ptp(
            np.asarray(opened)
        ):
            return [f"a {mode} picture has become one shade"]
        return []

    def command(self, folder: Path, rng: Random) -> list[str]:
        return [str(folder), str(folder.parent / "made"), "--num-workers", "0", "--max-bad", "3"]

    def run(self, words: list[str]) -> int:
        return make_shards.main(words)


# -- annotations ----------------------------------------------------------------------------------

Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]


def compare_boxes(found: Any, expected: dict[str, Boxes], slack: float) -> list[str]:
    """What a set that was read lacks of a reader's lists."""
    faults = []
    lists = {"test": [found.test], "train": found.train}
    for role, boxes in expected.items():
        own: Boxes = {p.file.stem: [(o.class_name, o.box) for o in p.objects]
                      for split in lists[role] for p in split.pictures}  # fmt: skip
        if own.keys() != boxes.keys():
            faults.append(f"{role}: other pictures: {sorted(own.keys() ^ boxes.keys())[:4]}")
        for name in own.keys() & boxes.keys():
            left, right = sorted(own[name]), sorted(boxes[name])
            if [one[0] for one in left] != [one[0] for one in right]:
                faults.append(f"{name}: {left} for {right}")
            elif any(abs(a - b) > slack for x, y in zip(left, right, strict=True)
                     for a, b in zip(x[1], y[1], strict=True)):  # fmt: skip
                faults.append(f"{name}: boxes {left} for {right}")
    return faults


class LabelledKind(Kind):
    """Sets for detection."""

    def read(self, folder: Path) -> list[str]:
        found = read_set(folder)
        found.digest()
        for split in (*found.train, found.test):
            coco_content(split.pictures, found.classes)
            write_annotations(folder.parent / split.name, "list", split.pictures)
        return self.compare(folder, found)

    @abstractmethod
    def compare(self, folder: Path, found: Any) -> list[str]:
        """What was read beside what a small reader finds."""

    def command(self, folder: Path, rng: Random) -> list[str]:
        return ["random", "--config", str(ROOT / "configs/detection/thin_R50_C4.yaml"), "--data",
                str(folder), "--out", str(folder.parent / "out"), "--check"]  # fmt: skip

    def run(self, words: list[str]) -> int:
        from tools.train_voc import main

        return main(words)


class Voc(LabelledKind):
    """A VOC set: XML, lists, dataset.json."""

    name = "voc"

    def make(self, folder: Path) -> None:
        make_voc(folder, num_train=3, num_test=2, size=48)
        for path in (folder / "VOC2007/Annotations").glob("*.xml"):
            path.write_text(path.read_text().replace("bar", "&#29483;"))
        about = folder / "dataset.json"
        about.write_text(about.read_text().replace("bar", "\\u732b"))

    def mutate(self, folder: Path, rng: Random) -> str:
        names = ("VOC2007/Annotations/000003.xml",) * 6 + ("VOC2007/ImageSets/Main/train.txt",) * 3
        name = rng.choice((*names, "VOC2007/JPEGImages/000003.jpg", "dataset.json", "dataset.json"))
        path, how = folder / name, rng.randrange(8)
        if how == 0:
            return f"{path.name}: {mutate.replace(path, rng)}"
        if how == 1:
            data, what = mutate.damage(path.read_bytes(), rng)
            path.write_bytes(data)
        elif path.suffix == ".json":
            what = mutate.change_json(path, rng)
        elif path.suffix == ".xml":
            what = self.change_xml(path, rng)
        elif path.suffix == ".txt":
            what = self.change_list(path, rng)
        else:
            path.write_bytes(picture(5))
            what = "another picture"
        return f"{path.name}: {what}"

    @staticmethod
    def change_xml(path: Path, rng: Random) -> str:
        content, what = path.read_text(), []
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(("xmin", "ymin", "xmax", "ymax", "name", "name", "width", "difficult",
                               "truncated", "object", "bndbox", "filename", "size"))  # fmt: skip
            match = re.search(f"\\s*<{name}>(.*?)</{name}>", content, re.DOTALL)
            how, value = rng.choice(("set", "set", "remove", "double", "space", "comment")), ""
            if match is None:
                continue
            if how == "set":
                numbers = (
                    "0",
                    "-1",
                    "49",
                    "48",
                    "1.5",
                    "nan",
                    "inf",
                    "1e400",
                    "2147483648",
                    "１",
                    "0x9",
                )
                value = rng.choice((mutate.text(rng), rng.choice(numbers), "&amp;", "&#0;", "<b/>"))
            piece = {"set": match[0].replace(match[1], value) if match[1] else match[0], "remove": "",
                     "double": match[0] * 2, "space": match[0].replace(match[1], f"\n {match[1]}\t"),
                     "comment": match[0].replace(match[1], f"<!-- 1 -->{match[1]}")}[how]  # fmt: skip
            content = content[: match.start()] + piece + content[match.end() :]
            what.append(f"{how} {name} {value[:20]!r}")
        how = rng.randrange(5)
        if how == 0:
            entities = "".join(
                f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "x"}">' for i in range(9)
            )
            head = rng.choice((
                f"<!DOCTYPE a [{entities}]>", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
                "<!-- <object> -->", "<a>" * 50_000, "<?xml version='1.0' encoding='utf-7'?>",
            ))  # fmt: skip
            content = head + content.replace(
                "<name>", f"<name>{rng.choice(('&e8;', '&x;', ''))}", 1
            )
            what.append(head[:30])
        data = content.encode(errors="surrogatepass")
        if how == 1:
            coding = rng.choice(("gb2312", "utf-16", "iso-8859-1", "cp1252", "utf-8-sig", "rot13", "hex",
                                 "base64", "idna", "unicode_escape", "zlib", "big5", "shift_jis"))  # fmt: skip
            said = f"<?xml version='1.0' encoding='{coding.removesuffix('-sig')}'?>\n"
            plain = content.replace("&#29483;", "猫") if rng.random() < 0.5 else content
            with contextlib.suppress(LookupError, UnicodeError):
                data = (said + plain).encode(coding, "xmlcharrefreplace")
            data = data if data[:5] != content[:5].encode() else (said + plain).encode()
            what.append(coding)
        path.write_bytes(data)
        return "; ".join(what) or "whole"

    @staticmethod
    def change_list(path: Path, rng: Random) -> str:
        lines = path.read_text().split()
        how = rng.choice(("columns", "suffix", "double", "missing", "up", "text"))
        if how == "columns":
            ending = rng.choice((" 1", " -1", "  0", " 1 1", "\t1"))
            lines = [line + ending for line in lines]
        elif how == "text":
            data, what = mutate.change_text(path.read_text(), rng)
            path.write_bytes(data)
            return what
        else:
            lines.append({"suffix": "000003.jpg", "double": lines[0], "missing": "no",
                          "up": "../JPEGImages/000003"}[how])  # fmt: skip
        path.write_text("\n".join(lines), encoding="utf-8")
        return how

    def compare(self, folder: Path, found: Any) -> list[str]:
        voc, expected = folder / "VOC2007", {}
        for role in ("train", "test"):
            data = (voc / f"ImageSets/Main/{role}.txt").read_bytes()
            is_wide = b"\0" in data[:50]
            text = data.decode("utf-16" if is_wide else "utf-8-sig", "replace")
            names = [re.sub(r"(\s+-?1|\s+0)$", "", line.strip()) for line in text.splitlines()]
            expected[role] = {
                name.rpartition("/")[2]: self.boxes(voc, name) for name in names if name
            }
        return compare_boxes(found, expected, slack=1.01)

    @staticmethod
    def boxes(voc: Path, name: str) -> list[tuple[str, tuple[float, ...]]]:
        data = (voc / f"Annotations/{name.removesuffix('.jpg')}.xml").read_bytes()
        declared = re.match(rb"[^>]*encoding=['\"]([\w-]+)", data.removeprefix(b"\xef\xbb\xbf"))
        coding = declared[1].decode() if declared and data[0] not in (0xFE, 0xFF) else "utf-8-sig"
        coding = "utf-16" if data[0] in (0xFE, 0xFF) else coding
        coding = "utf-8-sig" if coding == "utf-8" else coding
        text = re.sub(r"^\s*<\?xml[^>]*\?>", "", data.decode(coding))
        root = minidom.parseString(text.encode()).documentElement

        def child(node: Any, key: str) -> Any:
            return next((x for x in node.childNodes if x.nodeName == key), None)

        def value(node: Any) -> str:
            return "".join(x.data for x in node.childNodes if x.nodeType in (3, 4)).strip()

        found = []
        for item in (node for node in root.childNodes if node.nodeName == "object"):
            box = child(item, "bndbox")
            xmin, ymin, xmax, ymax = (
                float(value(child(box, key))) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            found.append((value(child(item, "name")), (xmin - 1, ymin - 1, xmax, ymax)))
        return found


class Coco(LabelledKind):
    """A COCO set; its train list alone is damaged."""

    name = "coco"

    def make(self, folder: Path) -> None:
        made = folder.with_name("coco-made")
        make_coco(made)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        shutil.rmtree(made)
        shutil.rmtree(folder.with_name("as_voc"))

    def mutate(self, folder: Path, rng: Random) -> str:
        name = rng.choice(("train2017", "val2017"))
        path = folder / f"annotations/instances_{name}.json"
        if rng.random() < 0.1:
            return f"{name}: {mutate.replace(path, rng)}"
        return f"{name}: {mutate.change_json(path, rng)}"

    def compare(self, folder: Path, found: Any) -> list[str]:
        expected: dict[str, Boxes] = {}
        for role, name in (("train", "train2017"), ("test", "val2017")):
            data = (folder / f"annotations/instances_{name}.json").read_bytes()
            content = json.loads(data.decode(json.detect_encoding(data)))
            labels = {row["id"]: row["name"].strip() for row in content["categories"]}
            names = {row["id"]: Path(row["file_name"]).stem for row in content["images"]}
            boxes: Boxes = {name: [] for name in names.values()}
            for row in content["annotations"]:
                x, y, w, h = map(float, row["bbox"])
                if role == "test" or not row.get("iscrowd"):
                    box = labels[row["category_id"]], (x, y, x + w, y + h)
                    boxes[names[row["image_id"]]].append(box)
            expected[role] = boxes
        return compare_boxes(found, expected, slack=1.01)


# -- weights --------------------------------------------------------------------------------------


class Call:
    """Pickled as a call of a function that leaves a trace, or of one that takes memory."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Weights(Kind):
    """Checkpoints with a checksum of some kind: ours, torch's zip, files with a card."""

    name = "checkpoint"

    def make(self, folder: Path) -> None:
        state = torchvision_state()
        self.state = {k: v.clone() for k, v in state.items()}
        ours = our_checkpoint(state)
        ours |= {key: None for key in own_checkpoint.FIELDS if key not in ours}
        ours["checksum"] = checkpoints.checksum(ours)
        torch.save(ours, folder / "ours.pth")
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "zip.pth")
        torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
        for name, to in (("d2.pkl", "detectron2"), ("back.pth", "torchvision")):
            words = [str(folder / "ours.pth"), str(folder / name), "--to", to, "--size", "64"]
            assert convert_to_d2.main(words) == 0
        header, body = {}, b""
        for key, value in state.items():
            data = value.numpy().tobytes()
            kind = "F32" if value.dtype == torch.float32 else "I64"
            places = [len(body), len(body) + len(data)]
            header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": places}
            body += data
        text = json.dumps(header).encode()
        (folder / "st.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)

    def mutate(self, folder: Path, rng: Random) -> str:
        names = ("ours.pth", "ours.pth", "zip.pth", "zip.pth", "d2.pkl", "back.pth", "old.pth",
                 "st.safetensors")  # fmt: skip
        self.file = folder / rng.choice(names)
        name, how = self.file.name, rng.randrange(10)
        self.must_agree = name not in ("old.pth", "st.safetensors")
        if how == 0:
            return f"{name}: {mutate.replace(self.file, rng)}"
        if how <= 4:
            data, what = mutate.damage(self.file.read_bytes(), rng)
            self.file.write_bytes(data)
            return f"{name}: {what}"
        if how == 5 and (card := self.file.with_suffix(".json")).exists():
            self.must_agree = False
            return f"{card.name}: {mutate.change_json(card, rng)}"
        self.must_agree = False
        if name == "st.safetensors":
            data = self.file.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            what = mutate.change_tree(header, rng)
            text = json.dumps(header).encode()
            size = rng.choice((len(text), len(text), 2**63, 0, len(text) - 1, len(data) * 2))
            self.file.write_bytes(size.to_bytes(8, "little") + text + data[start:])
            return f"{name}: {what}, length {size}"
        if how <= 7 and zipfile.is_zipfile(self.file):
            return f"{name}: {self.rezip(rng)}"
        tree = {"state_dict": dict(self.state), "epoch": 3, "more": [1, {"a": 2}]}
        what = mutate.change_tree(tree, rng)
        if rng.random() < 0.6:
            value, what = self.trap(rng)
            tree[rng.choice(("state_dict", "epoch"))] = value
        if self.file.suffix == ".pkl":
            import pickle

            self.file.with_suffix(".json").unlink(missing_ok=True)
            with contextlib.suppress(Exception):
                self.file.write_bytes(pickle.dumps(tree, protocol=rng.choice((0, 2, 4, 5))))
        else:
            with contextlib.suppress(Exception):
                torch.save(tree, self.file, _use_new_zipfile_serialization=rng.random() < 0.7)
        return f"{name}: {what}"

    def rezip(self, rng: Random) -> str:
        """The same archive packed anew: deflated, with records added, doubled, or left out."""
        with zipfile.ZipFile(self.file) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        kind, what = (
            rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)),
            rng.choice(("same", "large", "double", "less", "names", "order")),
        )
        at = rng.randrange(len(records))
        if what == "large":
            records[at] = (records[at][0], records[at][1] + bytes(rng.choice((1 << 20, 400 << 20))))
        elif what == "double":
            records.append((records[at][0], bytes(len(records[at][1]))))
        elif what == "less":
            del records[at]
        elif what == "names":
            records[at] = (f"../{mutate.OUTSIDE}/x", records[at][1])
        elif what == "order":
            rng.shuffle(records)
        with zipfile.ZipFile(self.file, "w", kind, compresslevel=1) as archive:
            for name, data in records:
                archive.writestr(name, data)
        return f"packed anew: {what} {records[min(at, len(records) - 1)][0]} {kind}"

    def trap(self, rng: Random) -> tuple[Any, str]:
        import os

        trace = os.path.join(os.getcwd(), mutate.OUTSIDE, "trace")
        huge = torch.empty(1).expand(1 << 15, 1 << 17)
        odd = [np.zeros(3, "O"), np.zeros(3, "V8"), np.zeros(3, "M8[s]"), np.zeros(2, "i4,f8")]
        return rng.choice((
            (Call(os.system, f"touch {trace}"), "os.system"), (Call(open, trace, "w"), "open"),
            (Call(eval, f"open({trace!r}, 'w')"), "eval"), (Call(bytearray, 5 << 30), "bytearray"),
            (Call(np.zeros, 1 << 33), "zeros"), (Call(np.dtype, "O8", False, True), "dtype"),
            (huge, "stride 0"), (rng.choice(odd), "odd array"), (torch.nn.Linear(2, 2), "a module"),
            (Call(np.ndarray, (1 << 33,)), "ndarray"), (Call(np.frombuffer, b"12345678", "O"), "frombuffer"),
            ({"conv1.weight": torch.full((3, 3, 7, 7), float("nan"))}, "nan"), (mutate.deep(3000), "deep"),
            (Call(complex, "1" * 10), "complex"), (Call(set, range(3)), "set"), (range(10**9), "range"),
        ))  # fmt: skip

    def read(self, folder: Path) -> list[str]:
        faults, refusals = [], []
        try:
            source = read_backbone(self.file)
        except UserError as error:
            refusals.append(error)
        else:
            if self.must_agree and "describes another" not in " ".join(source.notes):
                wrong = [name for name, value in source.tensors.items()
                         if not torch.equal(value, self.state[name])]  # fmt: skip
                wrong += [
                    name for name, value in source.counters.items() if value != self.state[name]
                ]
                faults += [f"{len(wrong)} tensors changed, first {name}" for name in wrong[:1]]
        if self.file.name == "ours.pth":
            try:
                state = own_checkpoint.load(self.file)
            except UserError as error:
                refusals.append(error)
            else:
                wrong = [name for name, value in self.state.items()
                         if not torch.equal(state["model"][f"backbone.{name}"], value)]  # fmt: skip
                faults += [f"resume: {name} changed" for name in wrong[:1] if self.must_agree]
        if refusals and not faults:
            raise refusals[0]
        return faults

    def command(self, folder: Path, rng: Random) -> list[str]:
        return [str(self.file), str(folder.parent / "made.pkl"), "--size", "64"]

    def run(self, words: list[str]) -> int:
        return convert_to_d2.main(words)


# -- settings -------------------------------------------------------------------------------------


class Settings(Kind):
    """YAML of all programs."""

    name = "yaml"
    FOLDERS = ("pretrain", "detection", "pipeline", "linear")

    def make(self, folder: Path) -> None:
        for name in self.FOLDERS:
            shutil.copytree(ROOT / "configs" / name, folder / name)

    def mutate(self, folder: Path, rng: Random) -> str:
        self.file = rng.choice(sorted(folder.rglob("*.yaml")))
        content, how = self.file.read_text(), rng.randrange(8)
        name = self.file.relative_to(folder)
        if how == 0:
            return f"{name}: {mutate.replace(self.file, rng)}"
        if how == 1:
            data, what = mutate.damage(content.encode(), rng)
        elif how == 2:
            data, what = mutate.change_text(content, rng)
        elif how == 3:
            what = self.trap(rng)
            data = (content + "\n" + what).encode()
        else:
            tree = yaml.safe_load(content)
            what = mutate.change_tree(tree, rng)
            try:
                data = yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass")
            except (yaml.YAMLError, ValueError):
                data = json.dumps(tree).encode()
        self.file.write_bytes(data)
        return f"{name}: {what[:80]}"

    @staticmethod
    def trap(rng: Random) -> str:
        import os

        trace = os.path.join(os.getcwd(), mutate.OUTSIDE, "trace")
        levels = [
            f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10) if i else 'x'}]" for i in range(11)
        ]
        return rng.choice((
            f"x: !!python/object/apply:os.system ['touch {trace}']", "x: &a [*a]", "x: &a {b: *a}",
            f"x: !!python/object/new:io.FileIO ['{trace}', w]", "x: !!python/name:os.system ''",
            "\n".join(levels), "x: !!binary abc", "x: !!timestamp 99999-99-99", "x: 2001-99-99",
            "_BASE_: /dev/zero", "_BASE_: nowhere.yaml", "<<: [1, 2]", "? [1, 2]\n: 3", "x: !!set {a}",
            "x: !!int 1:99:99", "--- {}\n--- {}", "%TAG ! tag:x,1:\n", "x: !!float .nan", "1: 2",
            "seed: 1\nseed: 2", "data: {}\ndata: {batch_size: 4}", "MODEL: {}\nMODEL: {DEPTH: 1}",
            "x: " + "9" * 5000, "x: 0x" + "f" * 5000, "null: 1", "x: \"\\ud800\"", "[" * 2000,
        ))  # fmt: skip

    def read(self, folder: Path) -> list[str]:
        kind = self.file.relative_to(folder).parts[0]
        if kind == "pretrain":
            flat = dotted(to_plain(pretrain_config.load_config(self.file)))
        elif kind == "detection":
            cfg = detection_config.load_config(self.file)
            yaml.safe_load(cfg.dump())
            flat = dotted(cfg)
        elif kind == "linear":
            flat = dotted(to_plain(read_settings(LinearConfig, self.file)))
        else:
            flat = dotted(to_plain(pipeline_config.load_config(self.file)))
        raw = yaml.safe_load(self.file.read_bytes())
        faults = []
        for key, value in dotted(raw).items():
            if key in flat and isinstance(value, bool | int | float) and isinstance(
                flat[key], bool | int | float
            ) and not value == flat[key] and value == value:  # fmt: skip
                faults.append(f"{key}: {value!r} is read as {flat[key]!r}")
        root = yaml.compose(self.file.read_bytes())
        keys = [node[0].value for node in root.value] if root else []
        faults += [f"{key} is given twice" for key in keys if keys.count(key) > 1][:1]
        return faults

    def command(self, folder: Path, rng: Random) -> list[str]:
        kind = self.file.relative_to(folder).parts[0]
        if kind == "detection":
            return [kind, "random", "--config", str(self.file), "--data", str(folder), "--out",
                    str(folder.parent / "out"), "--check"]  # fmt: skip
        if kind == "pipeline":
            return [kind, str(self.file), "--out", str(folder.parent / "out"), "--dry-run"]
        return ["pretrain", str(self.file), "--print-config"]

    def run(self, words: list[str]) -> int:
        from pretrain.__main__ import main as pretrain_main
        from tools.run_pipeline import main as pipeline_main
        from tools.train_voc import main as train_main

        program = {"detection": train_main, "pipeline": pipeline_main, "pretrain": pretrain_main}
        return program[words[0]](words[1:])


# -- what runs leave ------------------------------------------------------------------------------


class Runs(Kind):
    """The folder of a pipeline's run, as after a loss of power or by another hand."""

    name = "run"
    STRICT = ("empty", "zeros", "cut", "folder", "nowhere", "loop", "fifo", "/dev/zero")

    def make(self, folder: Path) -> None:
        make_run(folder, seeds=2)
        row = {"sample": 3, "reason": "does not decode", "name": "x"}
        (folder / "pretrain/bad_samples.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "detection/random/seed-0/run.json").write_text(
            '{"settings": {"a": 1}, "seed": 0}'
        )
        (folder / "linear").mkdir()
        (folder / "linear/linear.json").write_text('{"top1": 0.5, "format": "fa-linear-1"}')

    def mutate(self, folder: Path, rng: Random) -> str:
        names = ("experiment.json", "stages/random/seed-0.json", "stages/pretrain.json",
                 "pretrain/summary.json", "pretrain/config.yaml", "pretrain/environment.json",
                 "pretrain/bad_samples.jsonl", "convert/backbone.json", "data/dataset.json",
                 "shards/index.json", "pretrain/pictures/neighbours.json",
                 "pretrain/pictures/neighbours.jpg", "data/VOC2007/JPEGImages/000001.jpg",
                 *("pretrain/metrics.jsonl",) * 4, *(f"detection/random/seed-0/{name}" for name in
                 ("result.json", "result.json", "result.json", "run.json", "curve.jsonl", "pr.json",
                  "detections.json", "errors.json")))  # fmt: skip
        name = rng.choice(names)
        path, how = folder / name, rng.randrange(8)
        self.file, self.is_strict = name, False
        if how <= 1:
            what = mutate.replace(path, rng)
            self.is_strict = not what.startswith(
                ("jpeg", "zip", "gzip", "xz", "npy", "json", "text")
            )
        elif how == 2:
            data = path.read_bytes()
            path.write_bytes(data[: rng.randrange(len(data))])
            what, self.is_strict = "cut", True
        elif how == 3 or path.suffix not in (".json", ".jsonl"):
            data, what = mutate.damage(path.read_bytes(), rng)
            path.write_bytes(data)
        elif path.suffix == ".jsonl":
            lines = path.read_text().split("\n")
            at = rng.randrange(max(1, len(lines) - 2))
            row = [json.loads(lines[at])]
            what = mutate.change_tree(row, rng) if rng.random() < 0.6 else "torn line"
            lines[at] = json.dumps(row)[1:-1] if what != "torn line" else lines[at][:-4]
            path.write_text("\n".join(lines))
            self.is_strict = what == "torn line"
        else:
            what = mutate.change_json(path, rng)
        return f"{name}: {what}"

    def read(self, folder: Path) -> list[str]:
        found = results.assemble(folder)
        page = report.render(folder)
        info = runs.read(folder / "pretrain")
        json.dumps(info.as_json())
        runs.skipped(info, "pretrain")
        one = folder / "detection/random/seed-0"
        is_finished(one, {"a": 1}, overwrite=True)
        faults = []
        rows = {row["seed"]: row["AP50"] for row in found["detection"]["random"]}
        if self.is_strict and self.file.endswith("seed-0/result.json"):
            place = "random/seed-0"
            is_named = any(place in str(x) for x in found["unfinished"]) or "result.json" in page
            if rows.get(0) != ap50("random", 0) and not is_named:
                faults.append("a seed is missing without a word")
        if rows.get(1) != ap50("random", 1):
            faults.append("the other seed is lost")
        if self.is_strict and self.file == "pretrain/metrics.jsonl":
            if len(info.rows) < 25 and not any("metrics" in problem for problem in info.problems):
                is_cut = (folder / self.file).is_file() and (folder / self.file).stat().st_size
                if not is_cut or (folder / self.file).read_bytes().count(b"\n") > len(info.rows):
                    faults.append(f"{25 - len(info.rows)} rows lost without a word")
        return faults

    def command(self, folder: Path, rng: Random) -> list[str]:
        return rng.choice((["list", str(folder)], ["list", str(folder), "--json"], [str(folder)]))

    def run(self, words: list[str]) -> int:
        return runs_tool.main(words) if words[0] == "list" else report.main(words)


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Tars, Index, Pictures, Voc, Coco, Weights, Settings, Runs)
}
