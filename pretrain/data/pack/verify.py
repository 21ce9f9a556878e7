"""Compare shards with their index: sizes, hashes, and where each sample lies."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import sha256_of
from pretrain.data.index.tar_index import SAMPLE_DTYPE, read_index, scan_shard, to_table


@dataclass
class VerifyReport:
    """What a check of a shard set found; empty `problems` means that all is well."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


def verify_shards(
    path: str | Path, *, num_workers: int = 2, progress: bool = False
) -> VerifyReport:
    """Check every shard against the index: size, SHA-256, samples; and tars that nobody listed.

    Args:
        path: Folder with index.json.
        num_workers: Threads; hashing is bound by the disk or one core each.
        progress: Show a progress bar.
    Raises:
        UserError: If there is no readable index at all.
    """
    folder = Path(path)
    if not (folder / "index.json").exists():
        raise UserError(
            f"{folder / 'index.json'}: missing, so there is nothing to verify against; make the "
            "shards first"
        )
    index = read_index(folder / "index.json")
    report = VerifyReport(
        len(index["shards"]), index["num_samples"], sum(s["bytes"] for s in index["shards"])
    )
    table = _load_table(folder, index, report)
    listed = {shard["name"] for shard in index["shards"]}
    for tar in sorted(folder.glob("*.tar")):
        if tar.name not in listed:
            report.problems.append(
                f"{tar}: not in the index; take it away, or make the index again"
            )
    if sum(s["num_samples"] for s in index["shards"]) != index["num_samples"]:
        report.problems.append(
            f"{folder / 'index.json'}: the shards' counts do not add up to num_samples"
        )

    def check(item: tuple[int, dict[str, Any]]) -> str | None:
        return _check_shard(folder, item[0], item[1], table)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(check, enumerate(index["shards"]))
        for problem in tqdm(
            results, total=len(listed), desc="verifying", unit="shard", disable=not progress
        ):
            if problem is not None:
                report.problems.append(problem)
    return report


def _load_table(folder: Path, index: dict[str, Any], report: VerifyReport) -> np.ndarray | None:
    path = folder / index["samples"]
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        report.problems.append(
            f"{path}: cannot be read ({error}); delete index.json to index the tars again"
        )
        return None
    if (
        table.dtype != SAMPLE_DTYPE
        or len(table) != index["num_samples"]
        or sha256_of(path) != index["samples_sha256"]
    ):
        report.problems.append(
            f"{path}: differs from what index.json says; delete index.json to index the tars again"
        )
        return None
    return table


def _check_shard(
    folder: Path, number: int, shard: dict[str, Any], table: np.ndarray | None
) -> str | None:
    path = folder / shard["name"]
    if not path.exists():
        return f"{path}: missing; copy it back or make the shards again"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return (
            f"{path}: {size:,} bytes, the index says {shard['bytes']:,}; copy it again or make "
            "the shards again"
        )
    if sha256_of(path) != shard["sha256"]:
        return (
            f"{path}: its SHA-256 is not the one in the index; copy it again or make the shards "
            "again"
        )
    try:
        entries, _ = scan_shard(path)
    except UserError as error:
        return str(error)
    if len(entries) != shard["num_samples"]:
        return (
            f"{path}: {len(entries)} samples, the index says {shard['num_samples']}; make the "
            "index again"
        )
    if table is not None:
        found = to_table([entries])
        found["shard"] = number
        if not np.array_equal(found, table[table["shard"] == number]):
            return (
                f"{path}: samples lie elsewhere than samples.npy says; delete index.json to index "
                "the tars again"
            )
    return None
