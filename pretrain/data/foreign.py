"""Index shards that somebody else made, on first use."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.data.order import stable_hash
from pretrain.data.tar_index import Entry, file_sha256, scan_shard, to_table, write_index
from pretrain.errors import UserError


def index_foreign(folder: Path) -> Path:
    """Write index.json and samples.npy for a folder of WebDataset tars.

    Args:
        folder: Folder with .tar files and no index.json.
    Returns:
        The folder that holds the index: `folder`, or one in the user's cache if `folder` is
        read-only.
    Raises:
        UserError: If there is no tar, or a tar is damaged or holds no picture at all.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(
            f"{folder}: holds neither index.json nor .tar files; make shards with "
            f"tools/make_shards.py SOURCE {folder}"
        )
    target = folder if _is_writable(folder) else _cache_folder(folder, tars)
    if target != folder and (target / "index.json").exists():
        return target
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        scans = pool.map(_scan, tars)
        results = list(tqdm(scans, total=len(tars), desc=f"indexing {folder.name}", unit="shard"))
    skipped = [item for result in results for item in result[2]]
    table = to_table([entries for entries, _, _ in results])
    if not len(table):
        raise UserError(
            f"{folder}: {len(tars)} tars without a single picture; are they WebDataset shards?"
        )
    shards = [shard for _, shard, _ in results]
    write_index(target, table, shards, classes=None, options={"foreign": True}, skipped=skipped)
    return target


def _scan(path: Path) -> tuple[list[Entry], dict[str, Any], list[dict[str, str]]]:
    entries, skipped = scan_shard(path)
    size, digest = path.stat().st_size, file_sha256(path)
    return (
        entries,
        {"name": path.name, "num_samples": len(entries), "bytes": size, "sha256": digest},
        skipped,
    )


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            return True
    except OSError:
        return False


def _cache_folder(folder: Path, tars: list[Path]) -> Path:
    """A folder in the user's cache that depends on the shards' place, names, sizes and times."""
    parts: list[int | str] = [str(folder.resolve())]
    for path in tars:
        status = path.stat()
        parts += [path.name, status.st_size, status.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "fa-shards" / stable_hash(*parts).hex()
    target.mkdir(parents=True, exist_ok=True)
    return target
