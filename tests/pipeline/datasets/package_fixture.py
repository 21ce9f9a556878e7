"""A small set by the command line; stand-ins for the Debian packages, with small pictures."""

import hashlib
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import zstandard

from pipeline.datasets import photos
from tools import make_dataset

Files = dict[str, bytes]
COUNTS = {"pool": 5, "train": 5, "test": 3, "probe-train": 7, "probe-val": 6}
SIZES = [word for name, count in COUNTS.items() for word in (f"--num-{name}", str(count))]
SIZES += ["--image-size", "48", "--num-workers", "1"]


def run(*arguments: object) -> int:
    """Run make_dataset.py in this process; return its exit status."""
    try:
        return make_dataset.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def tree(folder: Path) -> Files:
    """Return all files of a folder by relative path."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def write_tree(root: Path, files: Files) -> Path:
    """Write files by relative path; return the folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_rcc(
    files: Files, version: int, packing: str, pack: Callable[[bytes], bytes] | None = None
) -> bytes:
    """Write a Qt resource file: breadth first, entries of a folder side by side."""
    packers = {"plain": bytes, "zstd": zstandard.ZstdCompressor().compress}
    packers["zlib"] = lambda raw: struct.pack(">I", len(raw)) + zlib.compress(raw)
    pack, flag = pack or packers[packing], {"plain": 0, "zlib": 1, "zstd": 4}[packing]
    tree: dict = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = content
    names, data, entries, queue = b"", b"", b"", [("", tree)]
    stamp = struct.pack(">Q", 0) if version > 1 else b""
    next_index = 1
    while queue:
        name, node = queue.pop(0)
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(node, dict):
            entries += struct.pack(">IHII", offset, 2, len(node), next_index) + stamp
            next_index += len(node)
            queue += list(node.items())
        else:
            packed = pack(node)
            entries += struct.pack(">IHHHI", offset, flag, 0, 0, len(data)) + stamp
            data += struct.pack(">I", len(packed)) + packed
    head = 20 + (4 if version > 2 else 0)
    places = (head, head + len(entries), head + len(entries) + len(data))
    header = b"qres" + struct.pack(">4I", version, *places) + (b"\0" * 4 if version > 2 else b"")
    return header + entries + data + names


def make_deb(path: Path, files: Files) -> None:
    """Write a Debian package that holds the given files."""
    control = b"Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a\n"
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder), files | {"DEBIAN/control": control})
        Path(folder).chmod(0o755)
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", folder, str(path)]
        subprocess.run(command, check=True, capture_output=True)


@cache
def encode(name: str, alpha: bool, ending: str = ".png") -> bytes:
    """Return a small picture whose colours follow from its name; cut-outs are ellipses."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 40, 2)
    coarse = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (int(width), int(height)))
    if alpha:
        mask = np.zeros((height, width), dtype=np.uint8)
        middle = (width // 2, height // 2)
        cv2.ellipse(mask, middle, (width // 2 - 1, height // 2 - 1), 0, 0, 360, 255, -1)
        image = np.dstack([image, mask])
    done, data = cv2.imencode(ending, image)
    assert done
    return data.tobytes()


def package_files() -> dict[str, Files]:
    """Return the contents of the three packages: everything that is listed."""
    stamps: Files = {}
    for groups in photos.listed_cutouts().values():
        for file in (f for group in groups for f in group):
            stamps["usr/share/tuxpaint/stamps/" + file] = encode(file, True)
    templates: Files = {"usr/share/tuxpaint/templates/unlisted.jpg": b"not read"}
    resources: dict[str, Files] = {}
    for files in photos.listed_backgrounds().values():
        for file in files:
            holder, _, inside = file.partition("/")
            if holder == "templates":
                templates["usr/share/tuxpaint/templates/" + inside] = encode(file, False, ".jpg")
            else:
                place = f"gcompris/src/activities/{holder}/resource/{inside}"
                resources.setdefault(holder, {})[place] = encode(file, False, ".webp")
    packings = ["plain", "zlib", "zstd"]
    gcompris = {
        f"usr/share/gcompris-qt/rcc/{holder}": make_rcc(files, 3, packings[i % 3])
        for i, (holder, files) in enumerate(sorted(resources.items()))
    }
    return dict(zip(photos.PACKAGES, (stamps, gcompris, templates), strict=True))


def make_packages(folder: Path, version: str = "1.0-1") -> Path:
    """Write the three packages into a folder, which is returned."""
    for name, files in package_files().items():
        files[f"usr/share/doc/{name}/copyright"] = b"terms"
        make_deb(folder / f"{name}_{version}_all.deb", files)
    return folder
