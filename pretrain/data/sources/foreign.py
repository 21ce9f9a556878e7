"""Index shards that somebody else made, on first use."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import sha256_of
from pretrain.data.index import SAMPLE_DTYPE, scan_shard, to_table, write_index, write_json
from pretrain.data.order import stable_hash
from pretrain.data.sources.cache import NUM_FETCHERS, ShardCache
from pretrain.data.sources.remote import RemoteFile, shown


@dataclass(frozen=True)
class Scan:
    """What was found in one tar.

    Attributes:
        rows: SAMPLE_DTYPE [num_samples]; their shard number is not set yet.
        shard: Its entry in index.json.
        skipped: What is no sample: [{"file", "reason"}].
    """

    rows: np.ndarray
    shard: dict[str, Any]
    skipped: list[dict[str, str]]


def index_folder(folder: Path, cache_folder: Path) -> Path:
    """Write index.json and samples.npy for a local folder of WebDataset tars.

    Args:
        folder: Folder with .tar files and no index.json.
        cache_folder: Where indexes of read-only folders are kept.
    Returns:
        The folder that holds the index: `folder`, or one in the cache if `folder` is read-only.
    Raises:
        UserError: If there is no tar, or a tar is damaged or holds no picture at all.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(
            f"{folder}: holds neither index.json nor .tar files; make shards with "
            f"tools/make_shards.py SOURCE {folder}"
        )
    if not _is_writable(folder):
        return index_files(tars, cache_folder, folder.name)
    _index(map(_scan_task, tars), len(tars), folder, folder.name, min(8, os.cpu_count() or 1))
    return folder


def index_files(tars: list[Path], cache_folder: Path, name: str) -> Path:
    """Index local tars, wherever they lie; the index is kept in the cache.

    Args:
        tars: Their paths, in the order of the index.
        cache_folder: The cache's folder.
        name: What the progress bar calls them.
    Returns:
        The folder of the index; it depends on the tars' paths, sizes and times of change.
    Raises:
        UserError: If one is missing or damaged, or none holds a picture.
    """
    parts: list[int | str] = []
    for path in tars:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(
                f"{path}: shard is missing ({error.strerror}); check the pattern {name}, or copy "
                "the shard back"
            ) from None
        parts += [str(path.resolve()), status.st_size, status.st_mtime_ns]
    target = cache_folder / "indexes" / stable_hash(*parts).hex()
    if not (target / "index.json").exists():
        make_folder(target)
        _index(map(_scan_task, tars), len(tars), target, name, min(8, os.cpu_count() or 1))
    return target


def index_remote(files: list[RemoteFile], cache: ShardCache, name: str) -> Path:
    """Index shards behind URLs or commands: each passes through the cache once.

    A killed run goes on where it was. Of several processes one works, the others wait.

    Args:
        files: The shards, in the order of the index.
        cache: Where they pass through.
        name: What the progress bar calls them.
    Returns:
        The folder of the index; it depends on the shards' URLs, sizes and versions.
    Raises:
        UserError: If one cannot be fetched or is damaged, or none holds a picture.
    """
    parts = [f"{file.url}\n{file.size}\n{file.version}" for file in files]
    key = stable_hash(*parts).hex()
    target = cache.folder / "indexes" / key
    with cache.lock(f"index-{key}"):
        if not (target / "index.json").exists():
            make_folder(target / "parts")
            tasks = (_fetch_task(file, cache, target / "parts") for file in files)
            _index(tasks, len(files), target, name, NUM_FETCHERS)
            shutil.rmtree(target / "parts")
    return target


def make_folder(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: the cache cannot be written ({error.strerror}); put data.cache_dir "
            "elsewhere"
        ) from error


def _index(
    tasks: Iterable[Callable[[], Scan]], num: int, target: Path, name: str, num_threads: int
) -> None:
    """Scan all shards side by side and write the index; the first failure ends it."""
    scans = list(
        tqdm(_side_by_side(tasks, num_threads), total=num, desc=f"indexing {name}", unit="shard")
    )
    for number, scan in enumerate(scans):
        scan.rows["shard"] = number
    table = np.concatenate([scan.rows for scan in scans])
    if not len(table):
        raise UserError(f"{name}: {num} tars without a single picture; are they WebDataset shards?")
    shards, skipped = [s.shard for s in scans], [item for s in scans for item in s.skipped]
    write_index(target, table, shards, classes=None, options={"foreign": True}, skipped=skipped)


def _side_by_side(tasks: Iterable[Callable[[], Scan]], num_threads: int) -> Iterator[Scan]:
    """Results in the order of the tasks; after a failure no further task begins."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures: list[Future[Scan]] = [pool.submit(task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _scan_task(path: Path) -> Callable[[], Scan]:
    def scan() -> Scan:
        entries, skipped = scan_shard(path)
        shard = _shard_entry(path.name, len(entries), path.stat().st_size, sha256_of(path))
        return Scan(to_table([entries]), shard, skipped)

    return scan


def _shard_entry(name: str, num_samples: int, size: int, sha256: str) -> dict[str, Any]:
    return {"name": name, "num_samples": num_samples, "bytes": size, "sha256": sha256}


def _fetch_task(file: RemoteFile, cache: ShardCache, parts: Path) -> Callable[[], Scan]:
    def scan() -> Scan:
        part = parts / stable_hash(file.url, file.version).hex()
        if (known := _read_part(part)) is not None:
            return known
        descriptor, size, sha256 = cache.fetch_unknown(file)
        with os.fdopen(descriptor, "rb") as stream:
            entries, skipped = scan_shard(shown(file.url), stream)
        name = shown(file.url).rpartition("/")[2] or "shard.tar"
        shard = _shard_entry(name, len(entries), size, sha256)
        found = Scan(to_table([entries]), shard, skipped)
        np.save(part.with_suffix(".npy"), found.rows)
        write_json(part.with_suffix(".json"), {"shard": shard, "skipped": skipped})
        return found

    return scan


def _read_part(part: Path) -> Scan | None:
    """What an earlier, killed run found; None if it did not come so far, or is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(part.with_suffix(".json").read_bytes())
        rows = np.load(part.with_suffix(".npy"))
        if rows.dtype == SAMPLE_DTYPE and len(rows) == known["shard"]["num_samples"]:
            return Scan(rows, known["shard"], known["skipped"])
    return None


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            return True
    except OSError:
        return False
