"""A small set by the command line; stand-ins for the Debian packages, with small pictures."""

import hashlib
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import zstandard

from pipeline.datasets import packages
from tools import make_dataset

Files = dict[str, bytes]
COUNTS = {"pool": 12, "train": 9, "test": 7, "probe-train": 11, "probe-val": 10}
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


def make_deb(path: Path, files: Files, packing: str = "xz") -> None:
    """Write a Debian package that holds the given files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packers: dict[str, Callable[[bytes], bytes]] = {
        "xz": lambda raw: lzma.compress(raw, preset=0),
        "zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
    }
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", lzma.compress(b"odd"))]
    parts.append((f"data.tar.{packing}", packers[packing](tar.getvalue())))
    raw = b"!<arch>\n"
    for name, content in parts:
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)


def _picture(name: str, alpha: bool) -> np.ndarray:
    """Return a small picture whose colours follow from its name; cut-outs are ellipses."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 40, 2)
    coarse = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (int(width), int(height)))
    if not alpha:
        return image
    mask = np.zeros((height, width), dtype=np.uint8)
    cv2.ellipse(
        mask, (width // 2, height // 2), (width // 2 - 1, height // 2 - 1), 0, 0, 360, 255, -1
    )
    return np.dstack([image, mask])


def encode(name: str, alpha: bool, ending: str = ".png") -> bytes:
    """Return a small encoded picture."""
    done, data = cv2.imencode(ending, _picture(name, alpha))
    assert done
    return data.tobytes()


def package_files(leave_out: Iterable[str] = ()) -> dict[str, Files]:
    """Return the contents of the three packages: everything listed but `leave_out`."""
    gone = set(leave_out)
    stamps: Files = {}
    for groups in packages.listed_cutouts().values():
        for file in (f for group in groups for f in group if f not in gone):
            stamps["usr/share/tuxpaint/stamps/" + file] = encode(file, True)
    templates: Files = {"usr/share/tuxpaint/templates/unlisted.jpg": b"not read"}
    resources: dict[str, Files] = {}
    for files in packages.listed_backgrounds().values():
        for file in (f for f in files if f not in gone):
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
    return dict(zip(packages.PACKAGES, (stamps, gcompris, templates), strict=True))


def make_packages(folder: Path, leave_out: Iterable[str] = (), version: str = "1.0-1") -> Path:
    """Write the three packages into a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, files) in enumerate(package_files(leave_out).items()):
        files[f"usr/share/doc/{name}/copyright"] = b"terms"
        make_deb(folder / f"{name}_{version}_all.deb", files, ("xz", "zst")[i % 2])
    return folder
