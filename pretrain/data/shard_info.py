"""What a shard set holds, and whether it is whole."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError, require
from common.pictures import BadPicture, read_header
from pretrain.data.index import NO_LABEL, load_table, read_index, scan_file
from pretrain.data.random_numbers import counter_rng
from pretrain.data.shards import ShardIndex

MAX_LOOKED_AT = 1000  # pictures whose headers are read
MAX_SHARDS_LOOKED_AT = 16  # a remote shard must be fetched whole
MAX_NAMED = 30  # classes, and pictures that were left out


def verify_shards(folder: Path, *, num_workers: int = 2) -> list[str]:
    """Check every shard against the index: size, SHA-256, samples; and tars that nobody listed.

    Args:
        folder: Of the shards and index.json.
        num_workers: Threads; hashing is bound by the disk or one core each.
    Returns:
        What is wrong, a text for each fault.
    Raises:
        UserError: If there is no readable index at all.
    """
    index = read_index(folder)
    shards, table, problems = index["shards"], None, []
    try:
        table = load_table(folder, index)
    except UserError as error:
        problems.append(str(error))
    listed = {folder / shard["name"] for shard in shards}
    for tar in sorted({*folder.glob("*.tar")} - listed):
        problems.append(f"{tar}: not in the index; take it away")

    def problem_of(number: int) -> str | None:
        path, shard = folder / shards[number]["name"], shards[number]
        again = "copy it again or make the shards again"
        if not path.exists():
            return f"{path}: missing; {again}"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path}: {size:,} bytes, the index says {shard['bytes']:,}; {again}"
        try:
            part = scan_file(path)
        except UserError as error:
            return str(error)
        if part.shard["sha256"] != shard["sha256"]:
            return f"{path}: its SHA-256 is not the one in the index; {again}"
        part.table["shard"] = number
        if table is not None and not np.array_equal(part.table, table[table["shard"] == number]):
            return f"{path}: samples lie elsewhere than samples.npy says; {again}"
        return None

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = pool.map(problem_of, range(len(shards)))
        bar = tqdm(found, "verifying", len(shards), unit="shard", disable=None)  # on a terminal
        return problems + [problem for problem in bar if problem is not None]


def gather_info(index: ShardIndex, *, seed: int = 0) -> dict[str, Any]:
    """Describe a shard set from its index, and from the headers of some pictures.

    Args:
        index: The set.
        seed: Of the choice of pictures: MAX_LOOKED_AT at most, from MAX_SHARDS_LOOKED_AT shards.
    Returns:
        A value for each fact. Three numbers are the least, the median and the largest.
    Raises:
        UserError: If the set is empty, or a shard cannot be read.
    """
    require(index.num_samples > 0, f"{index.name}: holds no samples")
    rng = counter_rng("samples to show", seed)
    shards = rng.permutation(np.flatnonzero(index.shard_sizes))[:MAX_SHARDS_LOOKED_AT]
    samples = np.flatnonzero(np.isin(index.samples["shard"], shards))
    chosen = np.sort(rng.permutation(samples)[:MAX_LOOKED_AT])
    headers = []
    for i in chosen.tolist():
        with suppress(BadPicture):
            headers.append(read_header(index.read_bytes(i), where="picture"))

    # Classes without samples are named too, and two of one name kept apart.
    labels, counts = np.unique(index.samples["label"], return_counts=True)
    count_of = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    num_unlabelled = count_of.pop(NO_LABEL, 0)
    names = {**{label: str(label) for label in count_of}, **dict(enumerate(index.classes or []))}
    if len(set(names.values())) < len(names):
        names = {label: f"{name} ({label})" for label, name in names.items()}
    return {
        "name": index.name,
        "num_samples": index.num_samples,
        "num_shards": len(index.shard_names),
        "num_bytes": sum(index.shard_bytes),
        "samples_per_shard": _spread(index.shard_sizes),
        "picture_bytes": _spread(index.samples["size"]),  # as stored
        "num_looked_at": len(chosen),  # headers that were read
        "num_unreadable": len(chosen) - len(headers),  # of these
        # Pixels, of the others; empty if there are none.
        "widths": _spread([header.width for header in headers]),
        "heights": _spread([header.height for header in headers]),
        "class_counts": {names[label]: count_of.get(label, 0) for label in sorted(names)},
        "num_unlabelled": num_unlabelled,
        # Files that are no samples, or pictures that could not be packed; "skipped" names them,
        # and with "kept" what is missing from samples.
        "num_left_out": sum("kept" not in item for item in index.skipped),
        "skipped": index.skipped,
        "options": index.options,
    }


def _spread(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.quantile(values, (0, 0.5, 1)).tolist() if len(values) else []


def format_info(info: dict[str, Any]) -> str:
    """The description as text for a terminal, a line for each fact; long lists are cut."""

    def named(item: Any) -> str:
        if not isinstance(item, dict):
            return f"{item}"
        file, reason = item["file"], item["reason"]
        return reason if file in reason else f"{file}: {reason}"

    def text(value: Any) -> str:
        if isinstance(value, dict):
            value = [f"{name} {one}" for name, one in value.items()]
        if not isinstance(value, list):
            return f"{value}"
        rest = [f"and {len(value) - MAX_NAMED} more"] if len(value) > MAX_NAMED else []
        return ", ".join([*map(named, value[:MAX_NAMED]), *rest]) or "none"

    facts = info | {"class_counts": dict(Counter(info["class_counts"]).most_common())}
    return "\n".join(f"{name.replace('_', ' ')}: {text(value)}" for name, value in facts.items())
