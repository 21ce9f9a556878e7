"""What a user may name as one source of shards, and how it is opened: its index and its tars.

docs/shards.md lists the forms. A source is a folder (`/data/shards`, `s3://bucket/shards/`) or a
row of tars: one tar, braces (`train-{000..099}.tar`), a glob, or `pipe:` commands. Shards that
another tool made have no index: they are scanned on first use, and the index is kept in the cache's
folder, as that of remote shards is.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from braceexpand import braceexpand
from tqdm import tqdm

from common.errors import UserError, no_such_file, require
from common.files import MAX_JSON_BYTES, locked, read_or_refuse, require_regular, write_bytes
from pretrain.data import remote
from pretrain.data.cache import NUM_FETCHERS, CacheOptions, RemoteShard, ShardCache, make_folder
from pretrain.data.index import (
    RULES,
    SAMPLE_DTYPE,
    ShardPart,
    load_table,
    parse_index,
    read_index,
    scan_file,
    scan_shard,
    write_index,
)
from pretrain.data.random_numbers import stable_hash

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BRACES = re.compile(r"\{[^{}]*(,|\.\.)[^{}]*\}")
_GLOB = re.compile(r"[*?\[]")
_COMPRESSED = re.compile(r"\.(tgz|tar\.[a-z0-9]+)$")
_MAX_SHARDS = 1_000_000
_BRACES_REMEDY = (
    "a web server cannot be searched; name the tars with braces, as in train-{000000..000099}.tar"
)


# -- what is named --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """One source of shards, as a user named it.

    Attributes:
        scheme: "file", "http", "https", "s3", "gs" or "pipe".
        is_folder: True for a folder, false for a row of tars.
        text: Path, URL, or ``pipe:`` with its command; braces not yet expanded.
    """

    scheme: str
    is_folder: bool
    text: str


def parse(spec: str | Path) -> Location:
    """Tell what a user named; looks at the local disk only.

    Raises:
        UserError: If the scheme is unknown, or the form is impossible.
    """
    text = str(spec)
    if text.startswith("file:///"):
        text = unquote(text.removeprefix("file://"))
    path = text
    if text.startswith("pipe:"):
        require(text[5:].strip() != "", f"{text}: pipe: needs a command that writes a tar")
        return Location("pipe", False, text)
    name, match = remote.displayed(text), _SCHEME.match(text)
    scheme = match[1].lower() if match else "file"
    is_web = scheme in ("http", "https")
    if match:
        known = ", ".join(f"{one}://" for one in remote.PACKAGES)
        require(scheme in remote.PACKAGES, f"{name}: give a local path, {known} or pipe:COMMAND")
        text = scheme + text[len(scheme) :]
        rest = text.split("://", 1)[1]
        host, path = (re.sub(r"[?#].*", "", rest) if is_web else rest).partition("/")[::2]
        require(host != "", f"{name}: names no {'server' if is_web else 'bucket'}")
        require(not (is_web and "*" in path), f"{name}: {_BRACES_REMEDY}")
    elif Path(path).is_dir():
        return Location(scheme, True, text)
    is_compressed = _COMPRESSED.search(path)
    require(not is_compressed, f"{name}: compressed tars have no random access; unpack them")
    is_folder = not path.endswith(".tar")
    is_pattern = _BRACES.search(path) or (_GLOB.search(path) and not is_web)
    require(
        not (is_folder and is_pattern),
        f"{name}: a pattern must name .tar files; end it with .tar, or name several sources",
    )
    return Location(scheme, is_folder, text)


def expand(spec: str | Path, patience: remote.Patience | None = None) -> list[str]:
    """The tars of a source: local paths, URLs, or ``pipe:`` commands, in their order.

    Args:
        spec: What the user named.
        patience: How long to try where a server must list (folders and globs).
    Returns:
        At least one; no two are the same. Local paths are not checked to exist unless a glob or a
        folder names them.
    Raises:
        UserError: If nothing fits, or a server cannot list.
    """
    location, patience = parse(spec), patience or remote.Patience()
    text, name = location.text, remote.displayed(location.text)
    remedy = "no file fits this pattern; check the folder and the name"
    texts = [text]
    if location.is_folder:
        # The tars of an index in its order, else all of the folder.
        url = join(text, "index.json")
        if location.scheme != "file":
            data = remote.read_if_there(url, patience)
        else:
            require(
                Path(text).is_dir(),
                no_such_file(
                    text, f"tools/make_shards.py PICTURES {text} makes it", "folder of shards"
                ),
            )
            data = read_or_refuse(url, MAX_JSON_BYTES) if Path(url).exists() else None
        if data is not None:
            names = [shard["name"] for shard in parse_index(data, remote.displayed(url))["shards"]]
            return [join(text, one) for one in names]
        is_web = location.scheme in ("http", "https")
        require(not is_web, f"{name}: there is no index.json, and {_BRACES_REMEDY}")
        remedy = (
            "holds neither index.json nor .tar files; pack pictures first: "
            f"tools/make_shards.py {name} SHARDS"
        )
        texts = [join(glob.escape(text) if location.scheme == "file" else text, "*.tar")]
    elif _BRACES.search(text) and not Path(text).exists():
        try:
            texts = list(itertools.islice(braceexpand(text), _MAX_SHARDS + 1))
        except ValueError:
            raise UserError(f"{name}: a brace is not closed; write \\{{ for a plain one") from None
        require(len(texts) <= _MAX_SHARDS, f"{name}: names more than {_MAX_SHARDS:,} shards")
    tars: list[str] = []
    for one in texts:
        named = [one]
        if _GLOB.search(one) and location.scheme in ("s3", "gs"):
            named = remote.find_tars(one, patience)
        elif _GLOB.search(one) and location.scheme == "file" and not Path(one).exists():
            named = sorted(glob.glob(one))
        require(bool(named), f"{name if location.is_folder else one}: {remedy}")
        tars += named
    for tar, count in Counter(tars).items():
        if count > 1:
            raise UserError(f"{name}: names {remote.displayed(tar)} more than once")
    return tars


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder; a query of the folder's URL (a token, say) is kept."""
    if urlsplit(folder).scheme not in ("http", "https"):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


# -- opening --------------------------------------------------------------------------------------


@dataclass
class Source:
    """An opened source; it travels to workers by pickling.

    Attributes:
        name: What the user called it, without secrets.
        folder: Where the tars are, if they are in one local folder; else where the index is.
        index_folder: Where index.json and samples.npy are.
        index: index.json.
        paths: Of local tars.
        shards: Remote ones.
        cache: Of remote tars; None if they are local.
    """

    name: str
    folder: Path
    index_folder: Path
    index: dict[str, Any] = field(repr=False)
    paths: Sequence[str] = ()
    shards: Sequence[RemoteShard] = ()
    cache: ShardCache | None = None

    def open(self, number: int) -> int:
        """A file descriptor that the caller closes; a remote shard is fetched first if need be.

        Raises:
            UserError: If a remote one cannot be fetched.
            OSError: If a local one cannot be opened.
        """
        if self.cache is None:
            require_regular(self.paths[number])
            return os.open(self.paths[number], os.O_RDONLY)
        return self.cache.open(self.shards[number])

    def name_of(self, number: int) -> str:
        """What to call a tar in messages: its path, or its URL and where the copy lies."""
        if self.cache is None:
            return self.paths[number]
        shard = self.shards[number]
        return f"{remote.displayed(shard.url)} (copy: {self.cache.path(shard)})"


def open_source(spec: str | Path, options: CacheOptions) -> Source:
    """Find the index of a source, or make it, and check that the shards are there.

    Raises:
        UserError: If anything is missing, damaged, stale, or not allowed.
    """
    location = parse(spec)
    name = remote.displayed(location.text)
    if location.scheme != "file":
        return _open_remote(location, name, options)
    paths = [Path(path) for path in expand(location.text)]
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    if has_index := location.is_folder and (Path(location.text) / "index.json").exists():
        folder = index_folder = Path(location.text)
    else:
        files = [
            remote.RemoteFile(str(path.absolute()), _size_of(path), str(path.stat().st_mtime_ns))
            for path in paths
        ]
        index_folder = _index_tars(files, options.place, name, lambda f: scan_file(Path(f.url)))
    index = read_index(index_folder)
    load_table(index_folder, index)

    # Every shard must be there in the size that the index says, and in a folder no other one.
    stale = f"the index is stale; delete {index_folder / 'index.json'} to index the tars again"
    for shard, path in zip(index["shards"], paths, strict=True):
        size, expected = _size_of(path), shard["bytes"]
        sizes = f"{size:,} bytes instead of {expected:,}"
        require(size >= expected, f"{path}: shard is cut short, {sizes}; copy or make it again")
        require(size == expected, f"{path}: {sizes}: {stale}")
    others = {*folder.glob("*.tar")} - {*paths} if has_index else ()
    for path in sorted(others):
        raise UserError(f"{path}: a shard that the index does not know: {stale}")
    return Source(location.text, folder, index_folder, index, [*map(str, paths)])


def _size_of(path: Path) -> int:
    try:
        require_regular(path)
        return path.stat().st_size
    except OSError as error:
        remedy = "copy it back or correct the pattern, and name a pipe as pipe:cat PIPE"
        raise UserError(f"{path}: no shard is there ({error.strerror}); {remedy}") from None


def _open_remote(location: Location, name: str, options: CacheOptions) -> Source:
    cache, patience = ShardCache(options), options.patience
    index_folder = _fetch_index(location, cache) if location.is_folder else None
    remedy = "upload the shards and index.json of one run of tools/make_shards.py again"
    urls = []
    if index_folder is None:

        def scan(file: remote.RemoteFile) -> ShardPart:
            descriptor, size, sha256 = cache.fetch_unknown(file)
            with os.fdopen(descriptor, "rb") as stream:
                entries, skipped = scan_shard(remote.displayed(file.url), stream)
            base = remote.displayed(file.url).rpartition("/")[2] or "shard.tar"
            return ShardPart.of(base, entries, skipped, size, sha256)

        urls = expand(location.text, patience)
        index_folder = _index_tars(remote.look_at_all(urls, patience), cache.folder, name, scan)
        remedy = f"run again: the shards are indexed anew (or delete {index_folder})"
    index = read_index(index_folder)
    load_table(index_folder, index)
    urls = urls or [join(location.text, shard["name"]) for shard in index["shards"]]
    shards = [
        RemoteShard(url, shard["bytes"], shard["sha256"])
        for url, shard in zip(urls, index["shards"], strict=True)
    ]
    cache.check_bound([shard.size for shard in shards])
    return Source(name, index_folder, index_folder, index, (), shards, ShardCache(options, remedy))


def _index_tars(
    files: list[remote.RemoteFile],
    place: Path,
    name: str,
    scan: Callable[[remote.RemoteFile], ShardPart],
) -> Path:
    """Index tars that have no index: each is read once, some side by side.

    A killed run goes on where it was. Of several processes one works, the others wait.

    Args:
        files: The tars, in the order of the index.
        place: The cache's folder.
        name: What the progress bar calls them.
        scan: Reads one; after a failure no further scan begins.
    Returns:
        The folder of the index; it depends on the tars' places, sizes and versions.
    Raises:
        UserError: If one cannot be read or is damaged, or none holds a picture.
    """
    tars = (f"{file.url}\n{file.size}\n{file.version}" for file in files)
    key = stable_hash(f"rules {RULES}", *tars).hex()
    target, locks = place / "indexes" / key, place / "locks"

    def part_of(file: remote.RemoteFile) -> ShardPart:
        saved = target / "parts" / stable_hash(file.url, file.version).hex()
        part = ShardPart.load(saved)
        if part is None:
            part = scan(file)
            part.save(saved)
        return part

    make_folder(locks)
    with locked(locks / f"index-{key}", patience=math.inf):
        if (target / "index.json").exists():
            return target
        make_folder(target / "parts")
        with ThreadPoolExecutor(NUM_FETCHERS) as pool:
            futures = [pool.submit(part_of, file) for file in files]
            try:
                bar = tqdm(futures, desc=f"indexing {name}", unit="shard")
                parts = [future.result() for future in bar]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        require(
            any(len(part.table) for part in parts),
            f"{name}: {len(parts)} tars without a single picture; are they WebDataset shards?",
        )
        write_index(target, parts, classes=None, options={"external": True})
        shutil.rmtree(target / "parts")
    return target


def _fetch_index(location: Location, cache: ShardCache) -> Path | None:
    """Bring index.json and its table into the cache; None if the folder has no index.json.

    The index is fetched at every opening. Its shards are looked at when this version of it is
    seen for the first time; later each is checked when it is fetched.
    """
    url, patience = join(location.text, "index.json"), cache.options.patience
    data = remote.read_if_there(url, patience)
    if data is None:
        return None
    key = hashlib.sha256(location.text.encode() + b"\n" + data).hexdigest()
    target = cache.folder / "indexes" / key
    with cache.lock(f"index-{key}"):
        if (target / "index.json").exists():
            return target
        make_folder(target)
        index = parse_index(data, remote.displayed(url))
        table_url = join(location.text, index["samples"])
        limit = index["num_samples"] * SAMPLE_DTYPE.itemsize + 4096  # a header is 128 bytes
        table = remote.read_small(table_url, patience, limit)
        stale = "index.json or the file is stale; upload both again"
        require(
            hashlib.sha256(table).hexdigest() == index["samples_sha256"],
            f"{remote.displayed(table_url)}: its SHA-256 is not the one in index.json: {stale}",
        )
        write_bytes(target / index["samples"], table)
        urls = [join(location.text, shard["name"]) for shard in index["shards"]]
        for shard, file in zip(index["shards"], remote.look_at_all(urls, patience), strict=True):
            name, expected = remote.displayed(file.url), shard["bytes"]
            sizes = f"{file.size} bytes instead of {expected}"
            require(file.size in (None, expected), f"{name}: {sizes}: {stale}")
        write_bytes(target / "index.json", data)
    return target
