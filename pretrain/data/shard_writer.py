"""Write WebDataset shards: parallel over shards, restartable, the same bytes for any number of workers."""

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pretrain.data.picture_bytes import prepare
from pretrain.data.process_pool import make_pool
from pretrain.data.shard_plan import ShardOptions, ShardPlan, SourcePicture, make_plan
from pretrain.data.tar_index import (
    Entry,
    read_index,
    to_table,
    write_bytes,
    write_index,
    write_json,
)
from pretrain.data.views import BadSample
from pretrain.errors import UserError

_PARTS = ".parts"  # what finished shards of an unfinished run left for the index
_TAR_BLOCK = 512


@dataclass(frozen=True)
class WriteReport:
    """What `write_shards` did."""

    num_samples: int
    num_shards: int
    num_shards_kept: int  # found finished from an earlier run
    num_bytes: int
    skipped: list[dict[str, str]]


def write_shards(
    pictures: Sequence[SourcePicture],
    out: str | Path,
    *,
    options: ShardOptions | None = None,
    classes: list[str] | None = None,
    num_workers: int = 0,
    max_bad: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> WriteReport:
    """Pack pictures into OUT/shard-*.tar with OUT/index.json and OUT/samples.npy.

    A killed run goes on where it stopped when it is called again: finished shards are kept, the one in work
    is made anew. A set that is complete already is left alone.

    Args:
        pictures: What to pack; names must be unique.
        out: Folder to write; made if missing.
        options: How shards are made.
        classes: Class names, or None.
        num_workers: Processes; 0 or 1 works in this one.
        max_bad: How many pictures may be left out because they do not decode.
        overwrite: Throw away other shards in `out` first.
        progress: Show a progress bar.
    Raises:
        UserError: If more pictures than allowed are bad, `out` holds other shards, or the disk is full.
    """
    folder, options = Path(out), options or ShardOptions()
    plans = make_plan(pictures, options)
    fingerprint = hashlib.sha256("".join(plan.fingerprint for plan in plans).encode()).hexdigest()
    finished = _finished_report(folder, fingerprint, overwrite, max_bad)
    if finished is not None:
        return finished
    try:
        parts = _prepare_folder(folder, fingerprint, overwrite)
        done = {plan.name: part for plan in plans if (part := _read_part(folder, plan)) is not None}
        num_kept = len(done)
        todo = [plan for plan in plans if plan.name not in done]
        _check_space(folder, sum(plan.estimated_bytes for plan in todo))
        with tqdm(total=len(pictures), desc="packing", unit="picture", disable=not progress) as bar:
            bar.update(sum(len(plan.pictures) for plan in plans if plan.name in done))
            _check_bad([item for part in done.values() for item in part["skipped"]], max_bad)
            for plan, part in _run(todo, folder, options, num_workers, max_bad):
                done[plan.name] = part
                bar.update(len(plan.pictures))
                _check_bad([item for part in done.values() for item in part["skipped"]], max_bad)
        return _finish(folder, plans, done, fingerprint, options, classes, num_kept, parts)
    except OSError as error:
        raise _disk_error(error, folder) from error


def _finished_report(
    folder: Path, fingerprint: str, overwrite: bool, max_bad: int
) -> WriteReport | None:
    path = folder / "index.json"
    if overwrite or not path.exists():
        return None
    index = read_index(path)
    if index["options"].get("fingerprint") != fingerprint:
        raise UserError(
            f"{folder}: holds shards of another source or of other options; choose another folder, or --overwrite"
        )
    _check_bad(index["skipped"], max_bad)
    for shard in index["shards"]:
        tar = folder / shard["name"]
        if not tar.exists() or tar.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{tar}: missing or changed since the index was written; --overwrite makes all shards again"
            )
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    num_bytes = sum(shard["bytes"] for shard in index["shards"])
    num_shards = len(index["shards"])
    return WriteReport(index["num_samples"], num_shards, num_shards, num_bytes, index["skipped"])


def _prepare_folder(folder: Path, fingerprint: str, overwrite: bool) -> Path:
    """Make or clear the folder; refuse to mix with shards that are not this run's."""
    parts = folder / _PARTS
    if overwrite and folder.exists():
        for path in [
            folder / "index.json",
            folder / "samples.npy",
            *sorted(folder.glob("shard-*.tar")),
        ]:
            path.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    plan_file = parts / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text())["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder}: an unfinished run with another source or other options is here; "
            "repeat that command, choose another folder, or --overwrite"
        )
    if not plan_file.exists() and (tars := sorted(folder.glob("*.tar"))):
        raise UserError(
            f"{tars[0]}: a tar that this run did not make; choose an empty folder, or --overwrite"
        )
    parts.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(".*.tmp"), *parts.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    write_json(plan_file, {"fingerprint": fingerprint})
    return parts


def _run(
    plans: list[ShardPlan], folder: Path, options: ShardOptions, num_workers: int, max_bad: int
) -> Iterator[tuple[ShardPlan, dict[str, Any]]]:
    """Make shards in this process or several; yields each as it is finished."""
    if num_workers <= 1 or len(plans) <= 1:
        for plan in plans:
            yield plan, write_shard(plan, folder, options, max_bad)
        return
    pool = make_pool(min(num_workers, len(plans)))
    try:
        yield from _run_parallel(pool, plans, folder, options, num_workers, max_bad)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_parallel(
    pool: ProcessPoolExecutor,
    plans: list[ShardPlan],
    folder: Path,
    options: ShardOptions,
    num_workers: int,
    max_bad: int,
) -> Iterator[tuple[ShardPlan, dict[str, Any]]]:
    pending: dict[Future[dict[str, Any]], ShardPlan] = {}
    waiting = iter(plans)
    while True:
        while len(pending) < 2 * num_workers and (plan := next(waiting, None)) is not None:
            pending[pool.submit(write_shard, plan, folder, options, max_bad)] = plan
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            yield pending.pop(future), future.result()


def write_shard(
    plan: ShardPlan, folder: Path, options: ShardOptions, max_bad: int
) -> dict[str, Any]:
    """Make one shard and leave its part of the index; both appear by rename.

    Raises:
        UserError: If more than `max_bad` of its pictures are bad, or the disk is full.
    """
    temporary = folder / f".{plan.name}.{os.getpid()}.tmp"
    skipped: list[dict[str, str]] = []
    try:
        with open(temporary, "wb") as stream:
            hashing = _HashingStream(stream)
            entries = _write_tar(hashing, plan, options, max_bad, skipped)
            stream.flush()
            os.fsync(stream.fileno())
        part = {
            "fingerprint": plan.fingerprint,
            "name": plan.name,
            "num_samples": len(entries),
            "bytes": hashing.num_bytes,
            "sha256": hashing.digest.hexdigest(),
            "skipped": skipped,
        }
        buffer = io.BytesIO()
        np.save(buffer, to_table([entries]))
        write_bytes(folder / _PARTS / f"{plan.name}.npy", buffer.getvalue())
        os.replace(temporary, folder / plan.name)
        write_json(folder / _PARTS / f"{plan.name}.json", part)
        return part
    except OSError as error:
        raise _disk_error(error, folder) from error
    finally:
        temporary.unlink(missing_ok=True)


class _HashingStream:
    """A file that only grows, with its SHA-256."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.num_bytes


def _write_tar(
    stream: _HashingStream,
    plan: ShardPlan,
    options: ShardOptions,
    max_bad: int,
    skipped: list[dict[str, str]],
) -> list[Entry]:
    entries = []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for picture, key in zip(plan.pictures, plan.keys, strict=True):
            try:
                suffix, data = prepare(picture.path, options.resize_short, options.quality)
            except BadSample as error:
                skipped.append({"file": picture.name, "reason": str(error)})
                _check_bad(skipped, max_bad)
                continue
            _add(tar.addfile, f"{key}.{suffix}", data)
            padded = -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK
            entries.append(Entry(key, stream.num_bytes - padded, len(data), picture.label))
            if picture.label >= 0:
                _add(tar.addfile, f"{key}.cls", str(picture.label).encode())
    return entries


def _add(addfile: Callable[[tarfile.TarInfo, BinaryIO], None], name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    addfile(member, io.BytesIO(data))


def _read_part(folder: Path, plan: ShardPlan) -> dict[str, Any] | None:
    """The part of a finished shard, if it is this plan's and its tar is whole."""
    try:
        part = json.loads((folder / _PARTS / f"{plan.name}.json").read_text(encoding="utf-8"))
        whole = (folder / plan.name).stat().st_size == part["bytes"]
    except (OSError, ValueError):
        return None
    return part if whole and part["fingerprint"] == plan.fingerprint else None


def _finish(
    folder: Path,
    plans: list[ShardPlan],
    done: dict[str, dict[str, Any]],
    fingerprint: str,
    options: ShardOptions,
    classes: list[str] | None,
    num_kept: int,
    parts: Path,
) -> WriteReport:
    tables = []
    for number, plan in enumerate(plans):
        table = np.load(parts / f"{plan.name}.npy")
        table["shard"] = number
        tables.append(table)
    skipped = [item for plan in plans for item in done[plan.name]["skipped"]]
    table = np.concatenate(tables)
    if not len(table):
        raise UserError(
            f"none of {len(skipped)} pictures decodes; the first: {skipped[0]['reason']}"
        )
    fields = ("name", "num_samples", "bytes", "sha256")
    shards = [{name: done[plan.name][name] for name in fields} for plan in plans]
    stored = {**asdict(options), "fingerprint": fingerprint}
    write_index(folder, table, shards, classes=classes, options=stored, skipped=skipped)
    shutil.rmtree(parts, ignore_errors=True)
    return WriteReport(
        len(table), len(plans), num_kept, sum(shard["bytes"] for shard in shards), skipped
    )


def _check_bad(skipped: list[dict[str, str]], max_bad: int) -> None:
    if len(skipped) > max_bad:
        shown = "\n".join(f"  {item['reason']}" for item in skipped[:10])
        raise UserError(
            f"{len(skipped)} pictures cannot be used, allowed are {max_bad}:\n{shown}\n"
            f"repair or remove them, or allow more with --max-bad N to leave them out; then run the command again"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the shards need about {needed / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free; "
            "free some space, choose another disk, or shrink the pictures with --resize-short"
        )


def _disk_error(error: OSError, folder: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{folder}: the disk is full; free some space and run the same command again: it goes on"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another folder"
        )
    return error
