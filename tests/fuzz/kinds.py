"""The kinds of input: a sound one, how it is damaged, who reads it, what must have been read."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
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
from common.annotations.record import annotation_xml, coco_content, read_set
from common.backbone import read_backbone
from common.config import dotted, read_settings, to_plain
from common.files import sha256_of
from detection.training import config as detection_config
from detection.training.run import is_finished
from pipeline import config as pipeline_config
from pipeline import results
from pipeline.report import report, runs
from pretrain import config as pretrain_config
from pretrain.data.decode import Sample, ViewWriter
from pretrain.data.policy import ViewPolicy
from pretrain.data.remote import Patience
from pretrain.data.shard_info import format_info, gather_info, verify_shards
from pretrain.data.shards import ShardIndex
from pretrain.data.streaming import Reader, open_sources
from pretrain.engine import checkpoint as own_checkpoint
from pretrain.evaluation.linear.config import LinearConfig
from tests.detection.tiny_detection import make_coco, make_voc
from tests.detection.tiny_weights import our_checkpoint, torchvision_state
from tests.fuzz import mutate
from tests.pipeline.report.run_fixture import ap50, make_run
from tools import convert_to_d2, make_shards

CONFIGS = Path(__file__).parents[2] / "configs"
cv2.setNumThreads(0)
torch.set_num_threads(1)


class Kind:
    """One kind of input. Each case runs in a forked process, so that it may keep facts in `self`.

    Attributes:
        base: A folder with a sound input, from which each case starts.
    """

    name: ClassVar[str]

    def __init__(self, base: Path) -> None:
        self.base, self.file = base, base
        base.mkdir(parents=True)
        self.make(base)

    def make(self, folder: Path) -> None:
        """Write a sound input."""
        raise NotImplementedError

    def mutate(self, folder: Path, rng: Random) -> str:
        """Damage it; returns what was done."""
        raise NotImplementedError

    def read(self, folder: Path) -> list[str]:
        """Read it as the programs do; returns what an independent reader misses."""
        raise NotImplementedError

    def command(self, folder: Path, rng: Random) -> list[str]:
        """The module of a program and the words of a command line that reads it."""
        raise NotImplementedError


# -- shards ---------------------------------------------------------------------------------------

SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "ppm", "pgm", "pnm", "tif", "tiff"),
    *("gif", "avif", "jp2"),
)
Member = tuple[tarfile.TarInfo, bytes]


def picture(seed: int, suffix: str = "jpg", mode: str = "RGB", **options: Any) -> bytes:
    """A small picture in a file format."""
    stream, rng = io.BytesIO(), np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = coarse.resize((40 + seed % 8, 32), Image.Resampling.BICUBIC)
    if mode in ("F", "I", "I;16"):
        scale, kind = {"F": (1, "f4"), "I": (2**20, "i4"), "I;16": (65535, "u2")}[mode]
        values = np.asarray(image.convert("L")) / 255 * scale
        image = Image.fromarray(values.astype(kind))
    else:
        image = image.convert(mode)
    image.save(stream, Image.registered_extensions()[f".{suffix}"], **options)
    return stream.getvalue()


def member(name: str, data: bytes) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def write_tar(path: Path, members: list[Member], form: int) -> None:
    with tarfile.open(path, "w", format=form, encoding="utf-8") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))


class Tars(Kind):
    """Tars of other tools, which have no index."""

    name = "tar"

    def make(self, folder: Path) -> None:
        write_tar(folder / "a.tar", self.members(0), tarfile.PAX_FORMAT)
        write_tar(folder / "b.tar", self.members(10), tarfile.GNU_FORMAT)

    @staticmethod
    def members(first: int) -> list[Member]:
        pairs = (((f"d/p{i}.jpg", picture(i)), (f"d/p{i}.cls", b"%d" % (i % 3)))
                 for i in range(first, first + 5))  # fmt: skip
        return [member(*one) for pair in pairs for one in pair]

    def mutate(self, folder: Path, rng: Random) -> str:
        path, how = folder / "a.tar", rng.randrange(4)
        if how <= 1:
            return mutate.replace(path, rng) if how == 0 else mutate.damage(path, rng)
        data = path.read_bytes()
        if how == 2:  # as damage of a whole header, which tests/pretrain has one by one
            at = rng.randrange(len(data) // 512) * 512
            path.write_bytes(data[:at] + data[at + 512 * rng.choice((1, 2, 3)) :])
            return f"blocks left out at {at}"
        pack = rng.choice((gzip.compress, lzma.compress, bz2.compress))
        path.write_bytes(pack(data * rng.choice((1, 2))))
        return f"packed, {mutate.damage(path, rng) if rng.random() < 0.6 else 'whole'}"

    def read(self, folder: Path) -> list[str]:
        index = ShardIndex.open(folder)
        data = [bytes(one) for one in index.read_many(np.arange(index.num_samples))]
        keys = [index.key_name(i) for i in range(index.num_samples)]
        said = format_info(gather_info(index)) + json.dumps(index.skipped)
        faults = self.lost(folder, data, index.labels.tolist(), said)
        # Streaming gives the same pictures and labels.
        reader = Reader(open_sources(str(folder), Patience()), 0, 1, (1,), 0, 1, Patience())
        streamed = [one for one in islice(reader.samples(), 2 * len(data) + 8) if not one.repeat]
        seen = Counter((bytes(one.data), one.label) for one in streamed if one.data is not None)
        differences = seen - Counter(zip(data, index.labels.tolist(), strict=True))
        differences += Counter(zip(data, index.labels.tolist(), strict=True)) - seen
        named = dict(zip(data, keys, strict=True))
        return faults + [
            f"streaming differs at {named.get(one)} {label}" for one, label in differences
        ]

    @staticmethod
    def lost(folder: Path, data: list[bytes], labels: list[int], said: str) -> list[str]:
        """Pictures and labels that tarfile finds, and that are neither read nor reported."""
        there: list[tuple[str, bytes]] = []
        classes: dict[str, bytes] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path, ignore_zeros=True) as tar:  # joined tars too
                for info in tar:
                    stream = None
                    if not info.name.startswith("__"):
                        with contextlib.suppress(KeyError, RecursionError):  # links to nothing
                            stream = tar.extractfile(info)
                    stem, _, suffix = info.name.rpartition(".")
                    if stream is not None and stem and suffix.lower() in SUFFIXES:
                        there.append((info.name, stream.read()))
                    elif stream is not None and suffix == "cls":
                        classes[stem] = stream.read()

        def is_reported(name: str) -> bool:
            base = name.rpartition("/")[2]
            return any(json.dumps(x)[1:-1] in said for x in (name, base.rpartition(".")[0] or base))

        left, faults = Counter(data), []
        for name, content in there:
            if not left[content] and not is_reported(name):
                faults.append(f"{name!r} is lost")
            left[content] -= left[content] > 0
        for content, label in zip(data, labels, strict=True):
            own = [name for name, one in there if one == content]
            is_one = len(own) == data.count(content) == 1
            # A class file of one picture; of several with one beginning the reader chooses.
            of = {stem: [n for n, _ in there if n.startswith(f"{stem}.")] for stem in classes}
            stems = [stem for stem, named in of.items() if is_one and named == own]
            if len(stems) == 1 and not is_reported(f"{stems[0]}.cls"):
                text = classes[stems[0]].strip()
                is_number = re.fullmatch(rb"[+-]?[0-9]{1,10}", text) and -1 <= int(text) < 2**31
                if label != (int(text) if is_number else None):
                    faults.append(f"label {label} of {own[0]!r}, for {text[:20]!r}")
        # Of a reason that comes often the files are counted.
        counted = sum(int(number) - 1 for number in re.findall(r"\((\d+) such\)", said))
        invented = {*data} - {content for _, content in there}
        return faults[counted:] + ["pictures that are not in the tars"] * bool(invented)

    def command(self, folder: Path, rng: Random) -> list[str]:
        return ["tools.make_shards", str(folder), "--info"]


class Index(Kind):
    """A set with its index.json and samples.npy."""

    name = "index"

    def make(self, folder: Path) -> None:
        source, made = folder / "pictures", folder / "shards"
        for i in range(6):
            (source / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
            (source / f"class-{i % 2}" / f"{i}.jpg").write_bytes(picture(i))
        words = [str(source), str(made), "--num-workers", "0", "--max-samples-per-shard", "3"]
        if re.search(r"--labels \{[^}]*folders", make_shards.parser().format_help()):
            words += ["--labels", "folders"]
        assert make_shards.main(words) == 0
        index = ShardIndex.open(made)
        self.data = [bytes(one) for one in index.read_many(np.arange(6))]
        self.labels = index.labels.tolist()
        index.close()
        shutil.rmtree(source)

    def mutate(self, folder: Path, rng: Random) -> str:
        index, table = folder / "shards/index.json", folder / "shards/samples.npy"
        tar = rng.choice(sorted(folder.glob("shards/*.tar")))
        how, self.file = rng.randrange(10), rng.choice((table, tar))
        self.is_other = False
        if how == 0:
            self.file = rng.choice((index, table, tar))
            return f"{self.file.name}: {mutate.replace(self.file, rng)}"
        if how <= 5:
            return mutate.change_json(index, rng)
        what = mutate.damage(self.file, rng)
        if self.file == table and how > 6:  # one who changes the table changes its hash
            content = json.loads(index.read_bytes()) | {"samples_sha256": sha256_of(table)}
            index.write_text(json.dumps(content))
            what, self.is_other = f"{what}, with its hash", True
        return f"{self.file.name}: {what}"

    def read(self, folder: Path) -> list[str]:
        index = ShardIndex.open(folder / "shards")
        data = [bytes(one) for one in index.read_many(np.arange(index.num_samples))]
        for i in range(index.num_samples):
            index.key_name(i)
        format_info(gather_info(index))
        problems = verify_shards(folder / "shards")
        if self.is_other or (self.file.suffix == ".tar" and problems):
            return []
        faults = ["other pictures"] * (data != self.data)
        return faults + ["other labels"] * (index.labels.tolist() != self.labels)

    def command(self, folder: Path, rng: Random) -> list[str]:
        return ["tools.make_shards", str(folder / "shards"), rng.choice(("--info", "--verify"))]


# -- pictures -------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


class Pictures(Kind):
    """One picture of many formats and modes."""

    name = "picture"
    MODES = (
        ("jpg", "RGB", {}), ("jpg", "L", {}), ("jpg", "CMYK", {}), ("png", "RGB", {}),
        ("jpg", "RGB", {"progressive": 1}), ("png", "P", {}), ("png", "RGBA", {}),
        ("png", "I;16", {}), ("png", "1", {}), ("webp", "RGB", {}), ("tif", "RGB", {}),
        ("tif", "F", {}), ("tif", "I;16", {}), ("tif", "I", {}), ("bmp", "RGB", {}),
        ("gif", "P", {}),
        ("ppm", "RGB", {}), *(("jpg", "RGB", {"exif": exif(n)}) for n in (1, 3, 6, 8, 9)),
        ("png", "RGB", {"exif": exif(6)}),
    )  # fmt: skip

    def make(self, folder: Path) -> None:
        for number, (suffix, mode, options) in enumerate(self.MODES):
            data = picture(number, suffix, mode, **options)
            (folder / f"{number:02d}.{suffix}").write_bytes(data)

    def mutate(self, folder: Path, rng: Random) -> str:
        self.file, how = rng.choice(sorted(folder.glob("*.*"))), rng.randrange(8)
        what = "whole"
        if how == 0:
            what = mutate.replace(self.file, rng)
        elif how > 1:
            what = mutate.damage(self.file, rng)
        return f"{self.file.name}: {what}"

    def read(self, folder: Path) -> list[str]:
        with contextlib.suppress(pictures.BadPicture):
            shape = pictures.read_shape(self.file)
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
        sizes = {image.shape[:2], (header.height, header.width), (shape.height, shape.width)}
        if len(sizes) > 1:
            faults.append(f"decoded, its header, its file: {sizes}")
        for reduction in (1, 2, 4, 8):
            small, factor = pictures.decode_fast(data, header, reduction, where="picture")
            if small.shape[:2] != tuple(-(-side // factor) for side in header.stored_size):
                faults.append(f"{reduction} times smaller: {small.shape}")
        return faults + [f"has no views: {failed}"] * bool(failed) + self.unlike_pillow(data, image)

    @staticmethod
    def unlike_pillow(data: bytes, image: np.ndarray) -> list[str]:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                kind, mode, values = opened.format, opened.mode, np.asarray(opened)
                pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        except Exception as error:
            return [f"Pillow refuses it ({error!s:.80})"]
        if pixels.shape != image.shape:
            return [f"Pillow's upright picture is {pixels.shape}, ours {image.shape}"]
        if mode in ("RGB", "L", "P", "1") and np.abs(pixels.astype(int) - image).mean() > 3:
            return [f"other pixels than Pillow's ({kind} {mode})"]
        is_one_shade = np.ptp(image) < 20 and np.ptp(values) > 0
        return [f"a {mode} picture has become one shade"] * (mode in "FI;16" and bool(is_one_shade))

    def command(self, folder: Path, rng: Random) -> list[str]:
        out = str(folder.parent / "made")
        return ["tools.make_shards", str(folder), out, "--num-workers", "0", "--max-bad", "3"]


# -- annotations ----------------------------------------------------------------------------------

Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]
CODECS = ("gb2312", "utf-16", "iso-8859-1", "cp1252", "utf-8", "rot13", "hex", "utf-7")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
NUMBERS = ("0", "-1", "49", "1.5", "nan", "inf", "1e400", "2147483648", "１", "0x9", "<b/>", "")


class LabelledKind(Kind):
    """A set for detection."""

    def read(self, folder: Path) -> list[str]:
        found, faults = read_set(folder), []
        found.digest()
        for role, splits in (("train", found.train), ("test", (found.test,))):
            own: Boxes = {}
            right = self.boxes(folder, role)
            is_clipped = any("clipped" in note for note in found.notes)
            for split in splits:
                coco_content(split.pictures, found.classes)
                for one in split.pictures:
                    annotation_xml(one.file.name, one.width, one.height, one.objects)
                    own[one.file.stem] = sorted((o.class_name, o.box) for o in one.objects)
                    if is_clipped and one.file.stem in right:  # what is said to be cut off
                        most = (one.width, one.height, one.width, one.height)
                        rows = right[one.file.stem]
                        right[one.file.stem] = [
                            (name, tuple(np.clip(box, 0, most))) for name, box in rows
                        ]
            right = {name: sorted(rows) for name, rows in right.items()}
            if own.keys() != right.keys():
                faults.append(f"{role}: other pictures: {sorted(own.keys() ^ right.keys())[:4]}")
            for name in own.keys() & right.keys():
                near = len(own[name]) == len(right[name]) and all(
                    a[0] == b[0] and np.abs(np.subtract(a[1], b[1])).max() <= 1.01
                    for a, b in zip(own[name], right[name], strict=True)
                )
                faults += [] if near else [f"{name}: {own[name]} for {right[name]}"]
        return faults

    def boxes(self, folder: Path, role: str) -> Boxes:
        """Name of each picture, with class and box of its objects, by a small reader."""
        raise NotImplementedError

    def command(self, folder: Path, rng: Random) -> list[str]:
        config, out = CONFIGS / "detection/thin_R50_C4.yaml", folder.parent / "out"
        words = f"random --config {config} --data {folder} --out {out} --check"
        return ["tools.train_voc", *words.split()]


class Voc(LabelledKind):
    """A VOC set: XML, lists, dataset.json."""

    name = "voc"

    def make(self, folder: Path) -> None:
        make_voc(folder, num_train=3, num_test=2, size=48)
        for path in (*(folder / "VOC2007/Annotations").glob("*.xml"), folder / "dataset.json"):
            path.write_text(path.read_text().replace("bar", "猫"), encoding="utf-8")

    def mutate(self, folder: Path, rng: Random) -> str:
        names = ("Annotations/000002.xml",) * 6 + ("ImageSets/Main/train.txt",) * 3
        name = rng.choice((*names, "JPEGImages/000002.jpg", "../dataset.json", "../dataset.json"))
        path = folder / "VOC2007" / name
        change = {".xml": self.change_xml, ".txt": self.change_list, ".json": mutate.change_json}
        how = rng.choice(
            (mutate.replace, mutate.damage, *[change.get(path.suffix, mutate.damage)] * 6)
        )
        return f"{path.name}: {how(path, rng)}"

    @staticmethod
    def change_xml(path: Path, rng: Random) -> str:
        content, how = path.read_text(encoding="utf-8"), rng.randrange(4)
        if how == 0:
            return mutate.change_text(path, rng)
        if how == 1:  # what is no encoding of text too
            coding = rng.choice(CODECS)
            content = f"<?xml version='1.0' encoding='{coding}'?>\n{content}"
            data = content.encode()
            with contextlib.suppress(LookupError, UnicodeError):
                data = content.encode(coding, "xmlcharrefreplace")
            path.write_bytes(data)
            return coding
        match = rng.choice(list(re.finditer(r">([^<>\s]+)</", content)))
        value = rng.choice(rng.choice((mutate.TEXTS, NUMBERS)))
        text = content[: match.start(1)] + value + content[match.end(1) :]
        path.write_bytes(text.encode(errors="surrogatepass"))
        return f"{match[0]} is {value[:20]!r}"

    @staticmethod
    def change_list(path: Path, rng: Random) -> str:
        lines, how = path.read_text().split(), rng.randrange(3)
        if how == 0:
            return mutate.change_text(path, rng)
        end = rng.choice((" 1", " -1", "  0", " 1 1", "\t1", ".jpg"))
        more = rng.choice((lines[0], "no", "../JPEGImages/000002"))
        lines = [f"{line}{end}" for line in lines] if how == 1 else [*lines, more]
        path.write_text("\n".join(lines))
        return f"end {end!r}" if how == 1 else f"more {more}"

    def boxes(self, folder: Path, role: str) -> Boxes:
        data = (folder / f"VOC2007/ImageSets/Main/{role}.txt").read_bytes()
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
        names = [re.sub(r"(\s+-?1|\s+0)$|\.jpg$", "", line.strip()) for line in text.splitlines()]
        found: Boxes = {}
        for name in filter(None, names):
            data = (folder / f"VOC2007/Annotations/{name}.xml").read_bytes()
            declared = re.match(rb"[^>]*encoding=['\"]([\w-]+)", data.removeprefix(b"\xef\xbb\xbf"))
            coding = declared[1].decode() if declared else "utf-8"
            coding = "utf-16" if data[0] in (0xFE, 0xFF) else coding.replace("utf-8", "utf-8-sig")
            if data[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
                coding = "utf-32"
            text = re.sub(r"^\s*<\?xml[^>]*\?>", "", data.decode(coding))
            root = minidom.parseString(text.encode()).documentElement
            rows = []
            for item in (node for node in root.childNodes if node.nodeName == "object"):
                label, *box = (self.value(item, key) for key in ("name", *CORNERS))
                xmin, ymin, xmax, ymax = map(float, box)
                rows.append((label, (xmin - 1, ymin - 1, xmax, ymax)))
            found[name.rpartition("/")[2]] = rows
        return found

    @staticmethod
    def value(item: Any, key: str) -> str:
        node = item.getElementsByTagName(key)[0]
        return "".join(x.data for x in node.childNodes if x.nodeType in (3, 4)).strip()


class Coco(LabelledKind):
    """A COCO set."""

    name = "coco"

    def make(self, folder: Path) -> None:
        made = make_coco(folder.with_name("coco-made") / "set")
        shutil.copytree(made, folder, dirs_exist_ok=True)
        shutil.rmtree(made.parent)

    def mutate(self, folder: Path, rng: Random) -> str:
        path = folder / f"annotations/instances_{rng.choice(('train2017', 'val2017'))}.json"
        how = mutate.replace if rng.random() < 0.1 else mutate.change_json
        return f"{path.name}: {how(path, rng)}"

    def boxes(self, folder: Path, role: str) -> Boxes:
        name = {"train": "train2017", "test": "val2017"}[role]
        content = json.loads((folder / f"annotations/instances_{name}.json").read_bytes())
        labels = {row["id"]: row["name"].strip() for row in content["categories"]}
        names = {row["id"]: Path(row["file_name"]).stem for row in content["images"]}
        found: Boxes = {name: [] for name in names.values()}
        for row in content["annotations"]:
            x, y, w, h = map(float, row["bbox"])
            if role == "test" or not row.get("iscrowd"):
                found[names[row["image_id"]]].append(
                    (labels[row["category_id"]], (x, y, x + w, y + h))
                )
        return found


# -- weights --------------------------------------------------------------------------------------


class Weights(Kind):
    """Checkpoints of all kinds: ours, torch's zip and its older form, files with a card."""

    name = "checkpoint"

    def make(self, folder: Path) -> None:
        state = self.state = torchvision_state()
        ours = dict.fromkeys(own_checkpoint.FIELDS) | our_checkpoint(state)
        torch.save(ours | {"checksum": checkpoints.checksum(ours)}, folder / "ours.pth")
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "zip.pth")
        torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
        for name, to in (("d2.pkl", "detectron2"), ("back.pth", "torchvision")):
            words = [str(folder / "ours.pth"), str(folder / name), "--to", to, "--size", "64"]
            assert convert_to_d2.main(words) == 0
        header, body = {}, b""
        for key, value in state.items():
            kind, data = "F32" if value.is_floating_point() else "I64", value.numpy().tobytes()
            places = [len(body), len(body) + len(data)]
            header[key] = {"dtype": kind, "shape": [*value.shape], "data_offsets": places}
            body += data
        text = json.dumps(header).encode()
        (folder / "st.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)

    def mutate(self, folder: Path, rng: Random) -> str:
        names = ("ours.pth", "ours.pth", "zip.pth", "zip.pth", "d2.pkl", "back.pth", "old.pth")
        self.file = path = folder / rng.choice((*names, "st.safetensors"))
        how, card = rng.randrange(10), path.with_suffix(".json")
        # These have a checksum of some kind, so that no flipped bit may change a tensor.
        self.is_checked = how <= 4 and path.name not in ("old.pth", "st.safetensors")
        if how <= 4:
            return f"{path.name}: {(mutate.damage if how else mutate.replace)(path, rng)}"
        if how == 5 and card.exists():
            return f"{card.name}: {mutate.change_json(card, rng)}"
        if path.suffix == ".safetensors":
            data = path.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            what, text = mutate.change_tree(header, rng), json.dumps(header).encode()
            size = rng.choice((len(text), len(text), 2**63, 0, len(text) - 1, len(data) * 2))
            path.write_bytes(struct.pack("<Q", size) + text + data[start:])
        elif how <= 7 and zipfile.is_zipfile(path):
            what = self.pack_anew(rng)
        else:
            tree: Any = {"state_dict": dict(self.state), "epoch": 3, "more": [1, {"a": 2}]}
            what = mutate.change_tree(tree, rng)
            card.unlink(missing_ok=True)
            with contextlib.suppress(TypeError, ValueError, RuntimeError, NotImplementedError):
                if path.suffix == ".pkl":
                    path.write_bytes(pickle.dumps(tree, protocol=rng.choice((0, 2, 4, 5))))
                else:
                    torch.save(tree, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        return f"{path.name}: {what}"

    def pack_anew(self, rng: Random) -> str:
        """The same archive with records deflated, added to, doubled, or left out."""
        with zipfile.ZipFile(self.file) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        at, what = (
            rng.randrange(len(records)),
            rng.choice(("same", "large", "double", "name", "order")),
        )
        name, data = records[at]
        if what == "large":
            records[at] = name, data + bytes(rng.choice((1 << 20, 400 << 20)))
        elif what == "double":
            records.append((name, bytes(len(data))))
        elif what == "name":
            records[at] = f"../{mutate.OUTSIDE}/x", data
        elif what == "order":
            rng.shuffle(records)
        with zipfile.ZipFile(self.file, "w", kind, compresslevel=1) as archive:
            for record in records:
                archive.writestr(*record)
        return f"packed anew: {what} {name} {kind}"

    def read(self, folder: Path) -> list[str]:
        source = read_backbone(self.file)
        faults = {name for name, value in {**source.tensors, **source.counters}.items()
                  if not torch.equal(value, self.state[name])}  # fmt: skip
        if self.file.name == "ours.pth":
            state = own_checkpoint.load(self.file)["model"]
            faults |= {name for name, value in self.state.items()
                       if not torch.equal(state[f"backbone.{name}"], value)}  # fmt: skip
        return [f"{len(faults)} tensors changed"] * (self.is_checked and bool(faults))

    def command(self, folder: Path, rng: Random) -> list[str]:
        return [
            "tools.convert_to_d2",
            str(self.file),
            str(folder.parent / "made.pkl"),
            "--size",
            "64",
        ]


# -- settings -------------------------------------------------------------------------------------


class Settings(Kind):
    """YAML of all programs."""

    name = "yaml"

    def make(self, folder: Path) -> None:
        for name in ("pretrain", "detection", "pipeline", "linear"):
            shutil.copytree(CONFIGS / name, folder / name)

    def mutate(self, folder: Path, rng: Random) -> str:
        self.file, how = rng.choice(sorted(folder.rglob("*.yaml"))), rng.randrange(7)
        content = self.file.read_text()
        if how <= 2:
            what = (mutate.replace, mutate.damage, mutate.change_text)[how](self.file, rng)
        else:
            tree = yaml.safe_load(content)
            what, text = mutate.change_tree(tree, rng), ""
            with contextlib.suppress(yaml.YAMLError, ValueError):
                text = yaml.safe_dump(tree, allow_unicode=True)
            self.file.write_text(text or json.dumps(tree), errors="surrogatepass")
        return f"{self.file.relative_to(folder)}: {what:.80}"

    def read(self, folder: Path) -> list[str]:
        kind, path = self.file.relative_to(folder).parts[0], self.file
        if kind == "detection":
            cfg = detection_config.load_config(path)
            yaml.safe_load(cfg.dump())
            flat = dotted(cfg)
        else:
            load = {"pretrain": pretrain_config, "pipeline": pipeline_config}.get(kind)
            settings = load.load_config(path) if load else read_settings(LinearConfig, path)
            flat = dotted(to_plain(settings))
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
        faults = [f"{key}: {value!r} is read as {flat[key]!r}"
                  for key, value in dotted(yaml.safe_load(text)).items()
                  if isinstance(value, int | float) and isinstance(flat.get(key), int | float)
                  and value == value != flat[key]]  # fmt: skip
        keys = Counter(node[0].value for node in yaml.compose(text).value)
        return faults + [f"{key} is given twice" for key, count in keys.items() if count > 1]

    def command(self, folder: Path, rng: Random) -> list[str]:
        return ["pretrain.__main__", str(self.file), "--print-config"]


# -- what runs leave ------------------------------------------------------------------------------


class Runs(Kind):
    """The folder of a pipeline's run, as after a loss of power or by another hand."""

    name = "run"
    FILES = (
        "experiment.json", "stages/random/seed-0.json", "stages/pretrain.json",
        "pretrain/summary.json", "pretrain/config.yaml", "pretrain/environment.json",
        "pretrain/bad_samples.jsonl", "convert/backbone.json", "data/dataset.json",
        "shards/index.json", "pretrain/pictures/neighbours.json", "linear/linear.json",
        "pretrain/pictures/neighbours.jpg", "data/VOC2007/JPEGImages/000001.jpg",
        *("pretrain/metrics.jsonl",) * 4, *("detection/random/seed-0/result.json",) * 4,
        *(f"detection/random/seed-0/{name}" for name in
          ("run.json", "curve.jsonl", "pr.json", "detections.json", "errors.json", "labels.json")),
    )  # fmt: skip

    def make(self, folder: Path) -> None:
        make_run(folder, seeds=2)
        more = {"pretrain/bad_samples.jsonl": {"sample": 3, "reason": "does not decode"},
                "detection/random/seed-0/run.json": {"settings": {"a": 1}, "seed": 0},
                "linear/linear.json": {"top1": 0.5}}  # fmt: skip
        (folder / "linear").mkdir()
        for name, content in more.items():
            (folder / name).write_text(json.dumps(content) + "\n")
        plan = json.loads((folder / "experiment.json").read_text())
        plan["plan"].append("linear")
        (folder / "experiment.json").write_text(json.dumps(plan))
        shutil.copy(folder / "stages/pretrain.json", folder / "stages/linear.json")
        report.render(folder)  # else each case imports what draws

    def mutate(self, folder: Path, rng: Random) -> str:
        path, how = folder / rng.choice(self.FILES), rng.randrange(8)
        self.file, self.is_lost = path, how <= 2
        if how <= 2:
            what = mutate.replace(path, rng)
        elif how == 3 or path.suffix not in (".json", ".jsonl"):
            what = mutate.damage(path, rng)
        elif path.suffix == ".json":
            what = mutate.change_json(path, rng)
        else:
            lines = path.read_text().split("\n")
            at = rng.randrange(max(1, len(lines) - 2))
            row, self.is_lost = [json.loads(lines[at])], rng.random() < 0.4
            what = "torn line" if self.is_lost else mutate.change_tree(row, rng)
            lines[at] = lines[at][:-4] if self.is_lost else json.dumps(row)[1:-1]
            path.write_text("\n".join(lines))
        return f"{path.relative_to(folder)}: {what}"

    def read(self, folder: Path) -> list[str]:
        found, page = results.assemble(folder), report.render(folder)
        info = runs.read(folder / "pretrain")
        said = page + json.dumps(found["unfinished"]) + json.dumps([info.as_json(), info.reason])
        is_finished(folder / "detection/random/seed-0", {"a": 1}, overwrite=True)
        rows = {row["seed"]: row["AP50"] for row in found["detection"]["random"]}
        # A figure that is gone must be named: its file, or the stage that is to run again.
        gone = {
            "result.json": rows.get(0) != ap50("random", 0), "metrics.jsonl": len(info.rows) < 25,
            "summary.json": found["pretrain"]["knn_top1"] is None,
        }  # fmt: skip
        name = self.file.name
        is_named = name in said or (name == "result.json" and '"random/seed-0"' in said)
        faults = [f"{name} is not read, and not named"] * (
            self.is_lost and gone.get(name, False) and not is_named
        )
        return faults + ["the other seed is lost"] * (rows.get(1) != ap50("random", 1))

    def command(self, folder: Path, rng: Random) -> list[str]:
        program = rng.choice((["tools.runs", "list"], ["pipeline.report.report"]))
        return [*program, str(folder)]


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Tars, Index, Pictures, Voc, Coco, Weights, Settings, Runs)
}
