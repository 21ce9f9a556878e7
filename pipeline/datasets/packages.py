"""Fetches the Debian packages with the photographs and keeps the pictures that the sets use.

Nothing is installed: the .deb files are read as the archives they are (`ar` holding a `tar`), on
any system. Fetching them is left to `apt-get download`.
"""

import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from common.errors import UserError
from common.files import read_json, write_json

PACKAGES = ("tuxpaint-stamps-default", "gcompris-qt-data", "tuxpaint-data")
KNOWN_VERSIONS = ("2022.06.04-1", "3.1-2", "1:0.9.28-sdl2-1")
MAX_MISSING_SHARE = 0.05  # of the listed pictures, before a set is refused
_HERE = Path(__file__).parent
_STAMPS = "usr/share/tuxpaint/stamps/"
_TEMPLATES = "usr/share/tuxpaint/templates/"
_RCC = "usr/share/gcompris-qt/rcc/"
_LISTED_MB = 213
_ZLIB, _FOLDER, _ZSTD = 1, 2, 4  # flags of a resource file's entries
_MAX_ENTRIES = 100_000
_MAX_BYTES = 1 << 28  # of one unpacked file


@dataclass(frozen=True)
class Library:
    """The pictures on disk.

    Attributes:
        root: Folder with cutouts/, backgrounds/ and licences/.
        cutouts: Fine class -> groups of near duplicates -> file below cutouts/.
        backgrounds: Scene -> files below backgrounds/.
        packages: Package -> version.
        missing: Listed files that these versions of the packages do not hold.
    """

    root: Path
    cutouts: dict[str, list[list[str]]]
    backgrounds: dict[str, list[str]]
    packages: dict[str, str]
    missing: list[str]


def listed_cutouts() -> dict[str, list[list[str]]]:
    """Return the committed list of cut-outs: class -> groups of near duplicates -> files."""
    return read_json(_HERE / "photo_classes.json")


def listed_backgrounds() -> dict[str, list[str]]:
    """Return the committed list of backgrounds: scene -> files (name.rcc/.., templates/..)."""
    return read_json(_HERE / "photo_backgrounds.json")


def open_library(packages_dir: Path | None, cache: Path) -> Library:
    """Return the pictures, fetching and unpacking what is not in the cache yet.

    Args:
        packages_dir: Folder with the .deb files (or with their unpacked `usr` folder), or None to
            use the ones in the cache and fetch what is missing there.
        cache: Folder for packages and pictures.
    Raises:
        UserError: If packages cannot be had or do not hold the listed pictures.
    """
    # The packages: a folder they were unpacked to, or their files, fetched if need be.
    folder = packages_dir or cache
    sources = [folder]
    if packages_dir is None or not (packages_dir / "usr/share").is_dir():
        absent = [name for name in PACKAGES if newest(folder, name) is None]
        if absent and packages_dir is not None:
            raise UserError(
                f"--packages-dir {packages_dir}: no {absent[0]}_*.deb there; fetch it with "
                f"`apt-get download {' '.join(absent)}`"
            )
        if absent:
            download(absent, cache, f"up to {_LISTED_MB} MB")
        sources = [path for name in PACKAGES if (path := newest(folder, name))]

    # The library belongs to these packages and lists.
    cutouts, scenes = listed_cutouts(), listed_backgrounds()
    files = [("cutouts", f) for groups in cutouts.values() for group in groups for f in group]
    files += [("backgrounds", f) for group in scenes.values() for f in group]
    parts = [json.dumps([cutouts, scenes]), *(f"{p.name} {p.stat().st_size}" for p in sources)]
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()
    root = cache / f"library-{name}"
    if not (root / "library.json").exists():
        _make_library(sources, root, files)

    # What these versions of the packages hold of the lists.
    packages = read_json(root / "library.json")["packages"]
    missing = [f for folder, f in files if not (root / folder / f).is_file()]
    if len(missing) > MAX_MISSING_SHARE * len(files):
        known = ", ".join(f"{p} {v}" for p, v in zip(PACKAGES, KNOWN_VERSIONS, strict=True))
        versions = ", ".join(f"{p} {v}" for p, v in packages.items())
        raise UserError(
            f"{len(missing)} of {len(files)} listed pictures, e.g. {missing[0]}, are not in the "
            f"packages ({versions}); use the versions of Debian 12 ({known}) with --packages-dir"
        )

    def present(groups: list[list[str]]) -> list[list[str]]:
        kept = ([f for f in group if f not in missing] for group in groups)
        return [group for group in kept if group]

    return Library(
        root,
        {name: present(groups) for name, groups in cutouts.items()},
        {name: kept[0] for name, group in scenes.items() if (kept := present([group]))},
        packages,
        missing,
    )


def _make_library(sources: list[Path], root: Path, files: list[tuple[str, str]]) -> None:
    """Copy the listed (folder, file) out of the packages; the library appears when complete."""
    print("unpacking the pictures (once, about 20 s)", flush=True)

    # What to read: paths in a package -> in the library; resource files -> paths inside them.
    copies = {f"usr/share/doc/{name}/copyright": f"licences/{name}.txt" for name in PACKAGES}
    resources: dict[str, list[str]] = {}
    for folder, file in files:
        holder, _, inside = file.partition("/")
        if folder == "cutouts":
            copies[_STAMPS + file] = f"cutouts/{file}"
        elif holder == "templates":
            copies[_TEMPLATES + inside] = f"backgrounds/{file}"
        else:
            resources.setdefault(_RCC + holder, []).append(inside)

    # Versions are taken from the file names.
    versions = {}
    for path in sources:
        name, _, rest = path.name.partition("_")
        version = rest.partition("_")[0].replace("%3a", ":")
        versions[name if rest else "unpacked"] = version or "folder"

    partial = root.with_name(root.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for source in sources:
            for name, content in members(source, {*copies, *resources}):
                pieces = {}
                if name in copies:
                    pieces[copies[name]] = content
                else:
                    for path, data in read_rcc(name, content).items():
                        inside = path.partition("/resource/")[2]
                        if inside in resources[name]:
                            pieces[f"backgrounds/{Path(name).name}/{inside}"] = data
                for path, data in pieces.items():
                    (partial / path).parent.mkdir(parents=True, exist_ok=True)
                    (partial / path).write_bytes(data)
        write_json(partial / "library.json", {"packages": versions})
        if not root.exists():
            partial.rename(root)
    except OSError as error:
        raise UserError(
            f"{root.parent}: cannot be written ({error}); free space or give --cache"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def newest(folder: Path, name: str) -> Path | None:
    """Return a package's .deb in a folder, the youngest if there are several."""
    return max(folder.glob(f"{name}_*.deb"), key=lambda p: p.stat().st_mtime, default=None)


def download(names: list[str], cache: Path, size: str) -> None:
    """Fetch packages into the cache with apt-get.

    Args:
        names: Of the packages.
        cache: Folder for the .deb files.
        size: How much it is, for people.
    Raises:
        UserError: If apt-get is absent or fails.
    """
    by_hand = "fetch the packages on a Debian or Ubuntu machine and give --packages-dir"
    if shutil.which("apt-get") is None:
        raise UserError(f"apt-get is not on this system: {by_hand}, or use the procedural set")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {', '.join(names)} ({size}) into {cache}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["apt-get", "download", "-q", *names]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        fetched = [path for name in names if (path := newest(Path(folder), name))]
        if done.returncode or len(fetched) < len(names):
            reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise UserError(
                f"apt-get download {' '.join(names)} failed ({reasons[-1] if reasons else '?'}); "
                f"run `apt-get update` as root and try again, or {by_hand}"
            )
        for path in fetched:
            os.replace(path, cache / path.name)


def members(source: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the named files of a .deb, or of a folder it was unpacked to."""
    if source.is_dir():
        for name in sorted(names):
            if (source / name).is_file():
                yield name, (source / name).read_bytes()
        return
    try:
        with open(source, "rb") as deb, _data_archive(deb) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in names and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, content.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, zstandard.ZstdError) as error:
        raise UserError(
            f"{source}: damaged package ({error}); delete it and fetch it again"
        ) from error


def _data_archive(deb: io.BufferedReader) -> tarfile.TarFile:
    """Return the tar inside a .deb, opened as a stream."""
    if deb.read(8) != b"!<arch>\n":
        raise ValueError("no Debian package")
    while header := deb.read(60):
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name == "data.tar.zst":
            stream = zstandard.ZstdDecompressor().stream_reader(deb)
            return tarfile.open(fileobj=stream, mode="r|")
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=deb, mode="r|*")
        deb.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data in it")


# -- Qt resource files ----------------------------------------------------------------------------


def read_rcc(name: str, content: bytes) -> dict[str, bytes]:
    """Read all files of a resource file.

    Args:
        name: What to call it in messages.
        content: The bytes of the .rcc file.
    Returns:
        Contents by path inside the resource, e.g. "gcompris/src/.../sea1.webp".
    Raises:
        UserError: If it is no resource file, damaged, or of an unknown format.
    """
    try:
        return _read_rcc(content)
    except (struct.error, zlib.error, zstandard.ZstdError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{name}: no readable Qt resource file ({error}); fetch it again"
        ) from error


def _read_rcc(raw: bytes) -> dict[str, bytes]:
    magic, version, tree, data, names = struct.unpack_from(">4s4I", raw)
    if magic != b"qres" or not 1 <= version <= 3:
        raise ValueError(f"starts with {magic!r}, version {version}; known are 1 to 3")

    def piece(start: int, length: int) -> bytes:
        if start + length > len(raw):
            raise ValueError("it ends too early")
        return raw[start : start + length]

    # Walk the tree; entries are counted, so that a damaged tree cannot loop for ever.
    files, waiting, num_entries = {}, [(0, "")], 0
    while waiting:
        index, folder = waiting.pop()
        num_entries += 1
        if num_entries > _MAX_ENTRIES:
            raise ValueError("its tree runs in circles")
        entry = tree + index * (14 if version == 1 else 22)
        name_offset, flags = struct.unpack_from(">IH", raw, entry)
        path = ""
        if index:  # the root has no name
            (length,) = struct.unpack_from(">H", raw, names + name_offset)
            path = folder + piece(names + name_offset + 6, 2 * length).decode("utf-16-be")
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", raw, entry + 6)
            if count > _MAX_ENTRIES:
                raise ValueError("its tree is damaged")
            below = path + "/" if path else ""
            waiting += [(first + i, below) for i in range(count)]
            continue
        (offset,) = struct.unpack_from(">I", raw, entry + 10)
        (length,) = struct.unpack_from(">I", raw, data + offset)
        content = piece(data + offset + 4, length)
        if flags & _ZSTD:
            unpacker = zstandard.ZstdDecompressor()
            content = unpacker.decompress(content, max_output_size=_MAX_BYTES)
        elif flags & _ZLIB:
            content = zlib.decompressobj().decompress(content[4:], _MAX_BYTES)
        files[path] = content
    return files
