"""Golden gate: what `tools/make_shards.py` makes of a folder, class folders and a VOC devkit."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.data.shards import ShardIndex
from tests.golden.gate import check, digest
from tests.golden.pictures import encode, pixels, png, write_tar
from tools.make_shards import main


def write(files: dict[Path, bytes]) -> None:
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def numbered_png(i: int) -> bytes:
    return png(pixels(i, 20 + 3 * i % 17, 30 - 5 * i % 13))


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A folder, class folders, a devkit: all PNGs with the same bytes on every machine."""
    folder, classes, devkit = tmp_path / "folder", tmp_path / "classes", tmp_path / "VOCdevkit"
    names = ["b.png", "a.png", "deep/er/c.png", "with space é.png", "A.png", "dots.in.name.png"]
    write({folder / name: numbered_png(i) for i, name in enumerate(names)})
    write({folder / "twice.png": numbered_png(20), folder / "twice.PNG": numbered_png(21)})
    write({folder / "notes.txt": b"no picture", folder / ".hidden.png": b"left out"})
    write({classes / f"class {i % 3}" / f"{i:02d}.png": numbered_png(i) for i in range(14)})
    for year, num in (("VOC2007", 6), ("VOC2012", 4)):
        ids = [f"{year[3:]}_{i:06d}" for i in range(num)]
        write({devkit / year / "JPEGImages" / f"{name}.png": numbered_png(i + 30)
               for i, name in enumerate(ids)})  # fmt: skip
        listed = "\n".join(ids[::2]) + "\n"
        write({devkit / year / "ImageSets" / "Main" / "trainval.txt": listed.encode()})
        (devkit / year / "Annotations").mkdir()
    return {"folder": folder, "classes": classes, "devkit": devkit}


def packed(source: Path, out: Path, *arguments: str) -> ShardIndex:
    assert main([str(source), str(out), "--num-workers", "1", *arguments]) == 0
    return ShardIndex.open(out)


def members(out: Path) -> list[tuple[str, str, bytes]]:
    """Tar, name and bytes of every member, in their order."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                found.append((path.name, member.name, stream.read()))
    return found


def samples_of(index: ShardIndex) -> list[list[Any]]:
    return [
        [index.key_name(i), int(index.labels[i]), f"{int(index.samples['key'][i]):016x}"]
        for i in range(index.num_samples)
    ]


LABELS = ("--labels", "folders")
CASES = {
    "folder": ("folder", "--max-samples-per-shard", "3"),
    "folder_in_order": ("folder", "--no-shuffle"),
    "classes": ("classes", *LABELS, "--max-samples-per-shard", "5", "--shuffle-seed", "4"),
    "classes_without_labels": ("classes", "--labels", "none", "--shard-size-mb", "0.02"),
    "devkit": ("devkit", "--split", "trainval"),
}


@pytest.mark.parametrize("name", CASES)
def test_pictures_kept_as_they_are(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Every byte: tars, samples.npy, index.json."""
    source, *arguments = CASES[name]
    out = tmp_path / "shards"
    index = packed(sources[source], out, *arguments)
    measured = {
        "samples": samples_of(index),
        "members": [[tar, member, len(data)] for tar, member, data in members(out)],
        "sha256 of members": [digest(data) for _, _, data in members(out)],
        "sha256 of tars": {path.name: digest(path.read_bytes()) for path in out.glob("*.tar")},
        "samples.npy": np.load(out / "samples.npy").tolist(),
        "index.json": json.loads((out / "index.json").read_text()),
        "files": sorted(path.name for path in out.iterdir()),
    }
    check(f"shards_{name}", measured)


@pytest.mark.parametrize("resize_short", [None, 32])
def test_other_formats_and_shrunk_pictures(
    resize_short: int | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is kept as it is; the size of what is encoded anew, whose bytes are the library's."""
    image = pixels(3, 48, 60)
    files = {
        "jpeg.jpg": encode(image, "JPEG", quality=90),
        "small.jpg": encode(image[:30, :40], "JPEG", quality=90),
        "wrong-suffix.png": encode(image[::-1], "JPEG", quality=90),
        "webp.webp": encode(image, "WEBP", lossless=True),
        "bitmap.bmp": encode(image, "BMP"),
        "moving.gif": encode(image, "GIF"),
        "pages.tif": encode(image, "TIFF"),
        "grey.png": encode(image[..., 0], "PNG"),
        "cut.jpg": encode(image, "JPEG", quality=90)[:900],
        "empty.jpg": b"",
    }
    source, out = tmp_path / "source", tmp_path / "shards"
    write({source / name: data for name, data in files.items()})
    options = [] if resize_short is None else ["--resize-short", str(resize_short)]
    packed(source, out, "--no-shuffle", "--max-bad", "2", *options)
    kept = {data: name for name, data in files.items()}
    measured = []
    for _, name, data in members(out):
        with Image.open(io.BytesIO(data)) as picture:
            about = [picture.format, *picture.size, picture.mode]
        measured.append([name, f"the bytes of {kept[data]}" if data in kept else "encoded", *about])
    skipped = json.loads((out / "index.json").read_text())["skipped"]
    check(
        f"shards_formats_{resize_short or 'kept'}",
        {
            "members": measured,
            "skipped": [item["file"] for item in skipped],
            "printed lines": len(capfd.readouterr().out.splitlines()),
        },
        bits=[[name, digest(data)] for _, name, data in members(out)],
    )


def test_index_of_tars_that_another_tool_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table, labels and keys from the members alone, without our index.json."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {}
    for i in range(5):
        files[f"train/{i:03d}.cls"] = str(i % 2).encode()
        files[f"train/{i:03d}.png"] = numbered_png(i)
    write_tar(tmp_path / "data-0.tar", files)
    index = ShardIndex.open(tmp_path)
    measured = {
        "samples": samples_of(index),
        "table": index.samples.tolist(),
        "sha256 of pictures": [digest(index.read_bytes(i)) for i in range(index.num_samples)],
        "fingerprint": index.fingerprint,
    }
    check("shards_foreign", measured)
