"""Make one shard: the job of one worker process."""

import contextlib
import errno
import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from common.errors import RunFailed, UserError, printable
from common.files import write_atomically
from common.pictures import BadPicture
from pretrain.data.index import Entry, ShardPart
from pretrain.data.pack.plan import ShardOptions, ShardPlan, prepare

Item = TypeVar("Item")
Result = TypeVar("Result")
PARTS = ".parts"  # folder for what finished shards of an unfinished run leave for the index


def map_unordered(
    function: Callable[..., Result], items: Sequence[Item], num_workers: int, *rest: Any
) -> Generator[tuple[Item, Result]]:
    """Call `function(item, *rest)` for each item; yields (item, result) as they are finished.

    At most two items per worker are on their way, so that memory does not grow with the items.

    Args:
        function: Importable by name where there are several workers.
        items: What to work through.
        num_workers: Processes; 0 or 1 works in this one, in order.
        rest: Further arguments, the same for all.
    """
    if num_workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, function(item, *rest)
        return
    context = multiprocessing.get_context("spawn")  # no copies of this process's threads
    num_workers = min(num_workers, len(items))
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    pending: dict[Future[Result], Item] = {}
    waiting = iter(items)
    try:
        while True:
            while len(pending) < 2 * num_workers and (item := next(waiting, None)) is not None:
                pending[pool.submit(function, item, *rest)] = item
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RunFailed(
            "a worker was killed, perhaps for want of memory; give the same command again with a "
            "smaller --num-workers: it goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it."""

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


class _HashingStream:
    """A file that only grows, with its SHA-256."""

    file: BinaryIO

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.num_bytes


def write_shard(plan: ShardPlan, folder: Path, options: ShardOptions, max_bad: int) -> ShardPart:
    """Make one shard and leave its part of the index; both appear by rename.

    Raises:
        UserError: If more than `max_bad` of its pictures are bad, or the disk is full.
    """
    skipped: list[dict[str, str]] = []
    entries: list[Entry] = []
    stream = _HashingStream()

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        tar.addfile(member, io.BytesIO(data))

    def write(file: BinaryIO) -> None:
        stream.file = file
        kind = tarfile.USTAR_FORMAT
        with tarfile.open(fileobj=cast(BinaryIO, stream), mode="w", format=kind) as tar:
            for picture, key in zip(plan.pictures, plan.keys, strict=True):
                try:
                    suffix, data = prepare(picture.path, options.resize_short, options.quality)
                except BadPicture as error:
                    reason = printable(str(error))
                    skipped.append({"file": printable(picture.name), "reason": reason})
                    check_bad(skipped, max_bad)
                    continue
                add(tar, f"{key}.{suffix}", data)
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                entries.append(Entry(key, stream.num_bytes - padded, len(data), picture.label))
                if picture.label >= 0:
                    add(tar, f"{key}.cls", str(picture.label).encode())

    try:
        write_atomically(folder / plan.name, write)
        part = ShardPart.of(
            plan.name, entries, skipped, stream.num_bytes, stream.digest.hexdigest()
        )
        part.save(folder / PARTS / plan.name, plan.fingerprint)
        return part
    except OSError as error:
        raise disk_error(error, folder) from error


def read_part(folder: Path, plan: ShardPlan) -> ShardPart | None:
    """The part that `write_shard` left, if it is this plan's and its tar is whole; else None."""
    part = ShardPart.load(folder / PARTS / plan.name, plan.fingerprint)
    with contextlib.suppress(OSError):
        if part is not None and (folder / plan.name).stat().st_size == part.shard["bytes"]:
            return part
    return None


def check_bad(skipped: list[dict[str, str]], max_bad: int) -> None:
    """Stop if more pictures were left out than allowed.

    Raises:
        UserError: Naming up to ten of them, and the remedy.
    """
    if len(skipped) > max_bad:
        reasons = "\n".join(f"  {item['reason']}" for item in skipped[:10])
        raise UserError(
            f"{len(skipped)} pictures cannot be used, allowed are {max_bad}:\n{reasons}\n"
            "repair or remove them, or allow more with --max-bad N to leave them out; then run "
            "the command again"
        )


def disk_error(error: OSError, folder: Path) -> Exception:
    """What to raise for an OSError while writing: a UserError where the user can do something."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another "
            "folder"
        )
    return error
