"""Is an index what it should be, and are its shards there?"""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import sha256_of
from pretrain.data.index.tar_index import SAMPLE_DTYPE
from pretrain.data.sources.locations import check_name

_REMEDY = "delete index.json and run again to index the tars, or make the shards again"


def check_index(index: dict[str, Any], where: str) -> None:
    """Refuse an index whose entries are missing, of another kind, or lead out of the folder.

    Raises:
        UserError: Naming the first such entry.
    """
    try:
        for shard in index["shards"]:
            check_name(shard["name"], where)
            is_hash = len(shard["sha256"]) == 64 and set(shard["sha256"]) <= set("0123456789abcdef")
            if not is_hash or int(shard["bytes"]) < 0:
                raise ValueError(f"shard {shard['name']!r}: bytes or sha256 are impossible")
        total = sum(int(shard["num_samples"]) for shard in index["shards"])
        if total != int(index["num_samples"]):
            raise ValueError(f"{total} samples in the shards, num_samples {index['num_samples']}")
        if "/" in check_name(index["samples"], where):
            raise ValueError("samples must be a file beside index.json")
        for name in ("classes", "skipped", "samples_sha256"):
            if name not in index:
                raise KeyError(name)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: damaged index ({type(error).__name__}: {error}); make the shards again"
        ) from None


def check_table(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a table of samples that does not fit its index.

    Raises:
        UserError: If it is missing, unreadable, of another length, or of another hash.
    """
    path = folder / index["samples"]
    if not path.exists():
        raise UserError(f"{path}: missing; {_REMEDY}")
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if table.dtype != SAMPLE_DTYPE or len(table) != index["num_samples"]:
        raise UserError(
            f"{path}: does not fit index.json ({index['num_samples']} samples); {_REMEDY}"
        )
    if sha256_of(path) != index["samples_sha256"]:
        raise UserError(f"{path}: its SHA-256 is not the one in index.json; {_REMEDY}")
    sizes = [shard["num_samples"] for shard in index["shards"]]
    is_inside = not len(table) or int(table["shard"].max()) < len(sizes)
    if not is_inside or (np.bincount(table["shard"], minlength=len(sizes)) != sizes).any():
        raise UserError(f"{path}: its shards are not those of index.json; {_REMEDY}")


def check_local_shards(paths: list[Path], index_folder: Path, index: dict[str, Any]) -> None:
    """Refuse shards that are missing, or of another size than the index says.

    Raises:
        UserError: Naming the first such shard.
    """
    for shard, path in zip(index["shards"], paths, strict=True):
        try:
            size = path.stat().st_size
        except OSError:
            raise UserError(
                f"{path}: shard is missing; copy it back, or make the shards again with "
                "tools/make_shards.py"
            ) from None
        if size < shard["bytes"]:
            raise UserError(
                f"{path}: shard is cut short, {size:,} of {shard['bytes']:,} bytes; copy or make "
                "it again"
            )
        if size > shard["bytes"]:
            raise stale(path, index_folder, f"{size:,} bytes instead of {shard['bytes']:,}")


def check_no_others(folder: Path, index_folder: Path, index: dict[str, Any]) -> None:
    """Refuse tars in the folder that the index does not know.

    Raises:
        UserError: Naming the first such tar.
    """
    known = {shard["name"] for shard in index["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            raise stale(path, index_folder, "a shard that the index does not know")


def stale(path: Path, index_folder: Path, what: str) -> UserError:
    """The error about an index that no longer fits its shards."""
    return UserError(
        f"{path}: {what}: the index is stale; delete {index_folder / 'index.json'} to index the "
        "tars again"
    )
