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
from common.files import read_json

_ZLIB, _FOLDER, _ZSTD = 1, 2, 4
_MAX_ENTRIES = 100_000
_MAX_BYTES = 1 << 28  # of one unpacked file


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
        return _Reader(content).files()
    except (struct.error, zlib.error, zstandard.ZstdError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{name}: no readable Qt resource file ({error}); fetch it again"
        ) from error


class _Reader:
    def __init__(self, raw: bytes) -> None:
        magic, self.version, self.tree, self.data, self.names = struct.unpack_from(">4s4I", raw)
        if magic != b"qres" or not 1 <= self.version <= 3:
            raise ValueError(f"starts with {magic!r}, version {self.version}; known are 1 to 3")
        self.raw = raw
        self.entry_bytes = 14 if self.version == 1 else 22

    def files(self) -> dict[str, bytes]:
        """Walk the tree; entries are counted, so that a damaged tree cannot loop for ever."""
        found, waiting, seen = {}, [(0, "")], 0
        while waiting:
            index, folder = waiting.pop()
            seen += 1
            if seen > _MAX_ENTRIES:
                raise ValueError("its tree runs in circles")
            start = self.tree + index * self.entry_bytes
            name_offset, flags = struct.unpack_from(">IH", self.raw, start)
            path = folder + self._name(name_offset) if index else ""
            if flags & _FOLDER:
                count, first = struct.unpack_from(">II", self.raw, start + 6)
                if count > _MAX_ENTRIES:
                    raise ValueError("its tree is damaged")
                below = path + "/" if path else ""
                waiting += [(first + i, below) for i in range(count)]
            else:
                (offset,) = struct.unpack_from(">I", self.raw, start + 10)
                found[path] = self._content(self.data + offset, flags)
        return found

    def _name(self, offset: int) -> str:
        start = self.names + offset
        (length,) = struct.unpack_from(">H", self.raw, start)
        return self._slice(start + 6, 2 * length).decode("utf-16-be")

    def _content(self, start: int, flags: int) -> bytes:
        (length,) = struct.unpack_from(">I", self.raw, start)
        packed = self._slice(start + 4, length)
        if flags & _ZSTD:
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=_MAX_BYTES)
        if flags & _ZLIB:
            return zlib.decompressobj().decompress(packed[4:], _MAX_BYTES)
        return packed

    def _slice(self, start: int, length: int) -> bytes:
        piece = self.raw[start : start + length]
        if len(piece) < length:
            raise ValueError("it ends too early")
        return piece


PACKAGES = ("tuxpaint-stamps-default", "gcompris-qt-data", "tuxpaint-data")
KNOWN_VERSIONS = ("2022.06.04-1", "3.1-2", "1:0.9.28-sdl2-1")
MAX_MISSING_SHARE = 0.05  # of the listed pictures, before a set is refused
_HERE = Path(__file__).parent
_STAMPS = "usr/share/tuxpaint/stamps/"
_TEMPLATES = "usr/share/tuxpaint/templates/"
_RCC = "usr/share/gcompris-qt/rcc/"
_LISTED_MB = 213


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
    sources = _sources(packages_dir, cache)
    listing = json.dumps([listed_cutouts(), listed_backgrounds()])
    name = "\n".join([listing, *(f"{p.name} {p.stat().st_size}" for p in sources)])
    root = cache / f"library-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    if not (root / "library.json").exists():
        _make_library(sources, root)
    stored = read_json(root / "library.json")
    return _present(root, stored["packages"])


def _present(root: Path, packages: dict[str, str]) -> Library:
    """Return what the library holds of the lists; refuse it if much is missing."""
    missing: list[str] = []

    def keep(folder: str, files: list[str]) -> list[str]:
        there = [f for f in files if (root / folder / f).is_file()]
        missing.extend(sorted(set(files) - set(there)))
        return there

    cutouts = {
        name: [group for group in (keep("cutouts", g) for g in groups) if group]
        for name, groups in listed_cutouts().items()
    }
    scenes = {name: keep("backgrounds", files) for name, files in listed_backgrounds().items()}
    scenes = {name: files for name, files in scenes.items() if files}
    total = sum(len(g) for groups in listed_cutouts().values() for g in groups)
    total += sum(map(len, listed_backgrounds().values()))
    if len(missing) > MAX_MISSING_SHARE * total:
        known = ", ".join(f"{p} {v}" for p, v in zip(PACKAGES, KNOWN_VERSIONS, strict=True))
        found = ", ".join(f"{p} {v}" for p, v in packages.items())
        raise UserError(
            f"{len(missing)} of {total} listed pictures, e.g. {missing[0]}, are not in the "
            f"packages ({found}); use the versions of Debian 12 ({known}) with --packages-dir"
        )
    return Library(root, cutouts, scenes, packages, missing)


def _sources(packages_dir: Path | None, cache: Path) -> list[Path]:
    """Return the .deb files, or the folder that holds an unpacked `usr`."""
    if packages_dir is not None:
        if (packages_dir / "usr" / "share").is_dir():
            return [packages_dir]
        absent = [name for name in PACKAGES if newest(packages_dir, name) is None]
        if absent:
            raise UserError(
                f"--packages-dir {packages_dir}: no {absent[0]}_*.deb there; fetch it with "
                f"`apt-get download {' '.join(absent)}`"
            )
    else:
        packages_dir = cache
        absent = [name for name in PACKAGES if newest(cache, name) is None]
        if absent:
            download(absent, cache, f"up to {_LISTED_MB} MB")
    return [path for name in PACKAGES if (path := newest(packages_dir, name))]


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
        fetched = {name: newest(Path(folder), name) for name in names}
        if done.returncode or not all(fetched.values()):
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")][-1:]
            raise UserError(
                f"apt-get download {' '.join(names)} failed ({' '.join(said) or 'no reason'}); "
                f"run `apt-get update` as root and try again, or {by_hand}"
            )
        for path in fetched.values():
            assert path is not None
            os.replace(path, cache / path.name)


def _wanted() -> dict[str, list[str]]:
    """Return the members to read: path in a package -> what to take from it."""
    wanted = {_STAMPS + f: [] for gs in listed_cutouts().values() for g in gs for f in g}
    for files in listed_backgrounds().values():
        for file in files:
            holder, _, inside = file.partition("/")
            if holder == "templates":
                wanted[_TEMPLATES + inside] = []
            else:
                wanted.setdefault(_RCC + holder, []).append(inside)
    return wanted | {f"usr/share/doc/{name}/copyright": [] for name in PACKAGES}


def _make_library(sources: list[Path], root: Path) -> None:
    """Copy the listed pictures out of the packages; the folder appears when complete."""
    print("unpacking the pictures (once, about 20 s)", flush=True)
    wanted = _wanted()
    partial = root.with_name(root.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for source in sources:
            for name, content in members(source, set(wanted)):
                _store(partial, name, content, wanted[name])
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "library.json").write_text(json.dumps({"packages": _versions(sources)}))
        if not root.exists():
            partial.rename(root)
    except OSError as error:
        raise UserError(
            f"{root.parent}: cannot be written ({error}); free space or give --cache"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _store(root: Path, name: str, content: bytes, inside: list[str]) -> None:
    """Write one member's pictures where the library keeps them."""
    pieces: dict[str, bytes] = {}
    if name.startswith(_STAMPS):
        pieces["cutouts/" + name.removeprefix(_STAMPS)] = content
    elif name.startswith(_TEMPLATES):
        pieces["backgrounds/templates/" + name.removeprefix(_TEMPLATES)] = content
    elif name.startswith(_RCC):
        holder = name.removeprefix(_RCC)
        files = {k.partition("/resource/")[2]: v for k, v in read_rcc(name, content).items()}
        pieces = {f"backgrounds/{holder}/{f}": files[f] for f in inside if f in files}
    else:
        pieces[f"licences/{name.split('/')[-2]}.txt"] = content
    for path, data in pieces.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def _versions(sources: list[Path]) -> dict[str, str]:
    """Return the packages' versions, taken from the file names."""
    found = {}
    for path in sources:
        name, _, rest = path.name.partition("_")
        found[name if rest else "unpacked"] = rest.partition("_")[0].replace("%3a", ":") or "folder"
    return found


def members(source: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the wanted files of a .deb, or of a folder it was unpacked to."""
    if source.is_dir():
        for name in sorted(wanted):
            if (source / name).is_file():
                yield name, (source / name).read_bytes()
        return
    try:
        with open(source, "rb") as deb, _data_archive(deb) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in wanted and member.isfile():
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
