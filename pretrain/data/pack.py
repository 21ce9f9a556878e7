"""Write WebDataset shards: parallel, restartable, the same bytes for any number of workers.

A set is made by this command's processes, or in tasks through submitit: on a Slurm cluster, or as
processes here. Each task makes a run of neighbouring shards as a command without a cluster would,
so what is there already is kept. submitit hands a task its work as a pickle in OUT/.parts/tasks,
beside the logs; OUT/.parts goes when the set is complete.
"""

import hashlib
import io
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import simplejpeg
from tqdm import tqdm

from common import files
from common.errors import RunFailed, UserError, at_least, positive, printable, require
from common.parent_death import exit_with_parent
from common.pictures import BadPicture, decode, read_file
from pretrain.data.index import ShardPart, TarSample, load_table, read_index, write_index
from pretrain.data.random_numbers import stable_hash

_KEPT = {  # what may be stored as it is, by its suffix
    "jpg": re.compile(rb"\xff\xd8"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_RATIO_SAMPLES = 16  # pictures that are shrunk on trial to plan the sizes of shards
_UNSAFE = re.compile(r"[^A-Za-z0-9_/+=-]")
_MAX_KEY_LENGTH = 90  # with a suffix, a plain tar header holds 100 characters
_OVERHEAD = 2048  # bytes of tar headers and padding per sample, at most
_STAT_THREADS = 16  # a network file system answers many at once
_STAT_CHUNK = 4096  # files per thread and turn
_MORE_SHARDS = 12  # attempts, each with a percent more shards, to keep all below their limits


def prepare(path: str, resize_short: int | None, quality: int) -> tuple[str, bytes]:
    """Read, check and perhaps shrink a picture.

    Every picture is decoded, so that a shard never holds one that does not decode.

    Args:
        path: The file.
        resize_short: Short side in pixels; smaller pictures keep their bytes. None: never shrink.
        quality: JPEG quality of shrunk pictures.
    Returns:
        Suffix and bytes. Formats other than JPEG, PNG and WebP become PNG.
    Raises:
        BadPicture: If the file cannot be read, or does not decode.
    """
    data = read_file(path)
    image = decode(data, where=path)
    import cv2  # not needed to parse a command line

    height, width = image.shape[:2]
    if resize_short is not None and min(height, width) > resize_short:
        scale = resize_short / min(height, width)
        size = max(resize_short, round(width * scale)), max(resize_short, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # area averaging
        return "jpg", simplejpeg.encode_jpeg(small, quality, "RGB", "420", fastdct=False)
    for suffix, first_bytes in _KEPT.items():
        if first_bytes.match(data):
            return suffix, data
    return "png", cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def shrink_ratio(paths: Sequence[str], resize_short: int | None, quality: int) -> float:
    """Stored bytes per source byte, measured on some pictures evenly spread over `paths`."""
    if resize_short is None:
        return 1.0
    before = after = 0
    for path in paths[:: max(1, len(paths) // _RATIO_SAMPLES)][:_RATIO_SAMPLES]:
        try:
            after += len(prepare(path, resize_short, quality)[1])
            before += Path(path).stat().st_size
        except BadPicture:
            continue
    return after / before if before else 1.0


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """A picture to pack.

    Attributes:
        path: Where the file is.
        name: Its path relative to the source, with slashes; the sample's key is made of it.
        label: Class number, -1 for none.
    """

    path: str
    name: str
    label: int = -1


@dataclass(frozen=True)
class ShardOptions:
    """How shards are made; everything here changes their bytes.

    Attributes:
        max_samples_per_shard: Most samples in one shard.
        shard_size_mb: Most bytes in one shard (10^6), judged by the sources' sizes; a single
            larger picture gets a shard of its own.
        resize_short: Shrink pictures to this short side in pixels; None keeps the bytes as they
            are.
        quality: JPEG quality of shrunk pictures.
        shuffle_seed: Seed of the order of samples over all shards; None keeps the order of names.
    """

    max_samples_per_shard: int = 1000
    shard_size_mb: float = 256.0
    resize_short: int | None = None
    quality: int = 90
    shuffle_seed: int | None = 0

    def __post_init__(self) -> None:
        at_least(self, "shards", max_samples_per_shard=1, resize_short=1)
        positive(self, "shards", "shard_size_mb")
        require(1 <= self.quality <= 100, f"JPEG quality {self.quality}: must be from 1 to 100")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard to make.

    Attributes:
        name: File name of the tar.
        pictures: What goes in, in this order.
        keys: WebDataset key of each.
        fingerprint: Hash of all that decides the shard's bytes, judged by names and sizes.
        estimated_bytes: About how large the tar becomes.
    """

    name: str
    pictures: tuple[SourcePicture, ...]
    keys: tuple[str, ...]
    fingerprint: str
    estimated_bytes: int


def make_plan(pictures: Sequence[SourcePicture], options: ShardOptions) -> list[ShardPlan]:
    """Divide pictures into shards of nearly equal size.

    Args:
        pictures: With unique names; their order does not matter.
        options: How shards are made.
    Raises:
        UserError: If there is no picture, or a name occurs twice.
    """
    require(bool(pictures), "no pictures to pack")
    ordered = sorted(pictures, key=lambda picture: picture.name)
    keys = make_keys([picture.name for picture in ordered])
    if options.shuffle_seed is not None:  # over all shards, by hashes of the names
        hashes = [stable_hash("shard order", options.shuffle_seed, p.name) for p in ordered]
        first, second = np.frombuffer(b"".join(hashes), dtype=">u8").reshape(-1, 2).T
        order = np.lexsort((second, first)).tolist()
        ordered, keys = [ordered[i] for i in order], [keys[i] for i in order]
    sizes = _file_sizes([picture.path for picture in ordered])
    ratio = shrink_ratio([p.path for p in ordered], options.resize_short, options.quality)
    stored = (sizes * ratio).astype(np.int64) + _OVERHEAD
    plans, option_bytes = [], repr(sorted(asdict(options).items())).encode()
    for number, (start, end) in enumerate(pairwise(split_evenly(stored, options))):
        own, digest = ordered[start:end], hashlib.sha256(option_bytes)
        for picture, size in zip(own, sizes[start:end].tolist(), strict=True):
            digest.update(stable_hash(picture.name, picture.label, size))
        name, num_bytes = f"shard-{number:06d}.tar", int(stored[start:end].sum())
        own_keys = tuple(keys[start:end])
        plans.append(ShardPlan(name, tuple(own), own_keys, digest.hexdigest(), num_bytes))
    return plans


def split_evenly(stored_bytes: np.ndarray, options: ShardOptions) -> list[int]:
    """Where shards begin and end, so that all are about equally full and none is over a limit.

    A sample fills a shard by the larger of its share of the bytes and of the number allowed. That
    many shards as all samples together fill are taken, and their bounds are put at equal steps of
    the filling. Where chance still lifts a shard over a limit a few more shards are taken; where
    that does not help (pictures that are not much smaller than a shard) such a shard is halved.

    Args:
        stored_bytes: int64 [n] bytes that each sample takes, in order; n > 0.
        options: The two limits.
    Returns:
        Bounds 0 = b_0 < b_1 < .. < n; shard k holds samples b_k to b_(k+1) - 1.
    """
    limit = options.shard_size_mb * 1e6
    filling = np.maximum(stored_bytes / limit, 1 / options.max_samples_per_shard)
    filled = np.cumsum(filling)  # one after the other, so the same on every machine; sum() is not
    middle, total = filled - filling / 2, float(filled[-1])
    num_shards, bounds = max(1, int(np.ceil(total - 1e-6))), [0]
    for _ in range(_MORE_SHARDS):
        number = np.floor(middle * (num_shards / total))
        bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(filling)]
        if not _too_full(bounds, stored_bytes, limit, options.max_samples_per_shard):
            return bounds
        num_shards += max(1, num_shards // 100)
    while full := _too_full(bounds, stored_bytes, limit, options.max_samples_per_shard):
        halves = [(bounds[k] + bounds[k + 1]) // 2 for k in full]
        bounds = sorted([*bounds, *halves])
    return bounds


def _too_full(bounds: list[int], stored_bytes: np.ndarray, limit: float, most: int) -> list[int]:
    """Numbers of the shards above a limit that could be made smaller."""
    counts = np.diff(bounds)
    totals = np.add.reduceat(stored_bytes, bounds[:-1])
    return np.flatnonzero((counts > most) | ((totals > limit) & (counts > 1))).tolist()


def _file_sizes(paths: list[str]) -> np.ndarray:
    """Bytes of each file, int64; 0 for one that is not there: reported when its turn comes."""

    def size_of(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return 0

    def sizes_of(start: int) -> np.ndarray:
        chunk = paths[start : start + _STAT_CHUNK]
        return np.fromiter(map(size_of, chunk), np.int64, len(chunk))

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return np.concatenate(list(pool.map(sizes_of, range(0, len(paths), _STAT_CHUNK))))


def make_keys(names: Sequence[str]) -> list[str]:
    """WebDataset keys for relative paths: the path without its suffix, in safe characters.

    A name that had to be changed or shortened, or whose key another one would share (a.jpg and
    a.png), gets a hash of the whole name appended.

    Raises:
        UserError: If a name occurs twice.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    plain = [_UNSAFE.sub("_", stem) for stem in stems]
    shared = Counter(key.lower() for key in plain)  # must differ where file systems ignore case
    keys = []
    for name, stem, key in zip(names, stems, plain, strict=True):
        is_changed = key != stem or len(key) > _MAX_KEY_LENGTH or key.startswith("/")
        if is_changed or shared[key.lower()] > 1:
            tail = key.strip("/")[-(_MAX_KEY_LENGTH - 17) :].lstrip("/")
            key = f"{tail}-{stable_hash(name, num_bytes=8).hex()}"
        keys.append(key)
    if len(set(keys)) != len(keys):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{twice}: listed twice; each picture may occur once")
    return keys


PARTS = ".parts"  # folder for what finished shards of an unfinished run leave for the index
PLAN_FILE = "plan.json"
_TASKS = "tasks.lock"
_REMEDY = "choose another folder, or --overwrite (which deletes shard-*.tar only)"
_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local tasks after a time; here there is no limit
_POLL_SECONDS = 0.5


# -- one shard, and several in processes here -----------------------------------------------------


def write_shard(plan: ShardPlan, folder: Path, options: ShardOptions, max_bad: int) -> ShardPart:
    """Make one shard and leave its part of the index; both appear by rename.

    Raises:
        UserError: If more than `max_bad` of its pictures are bad.
        OSError: If it cannot be written; DiskFullError if the disk is full.
    """
    path = folder / plan.name
    skipped: list[dict[str, str]] = []
    entries: list[TarSample] = []

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for picture, key in zip(plan.pictures, plan.keys, strict=True):
                try:
                    suffix, data = prepare(picture.path, options.resize_short, options.quality)
                except BadPicture as error:
                    reason = printable(str(error))
                    skipped.append({"file": printable(picture.name), "reason": reason})
                    check_bad(skipped, max_bad)
                    continue
                offset = file.tell() + tarfile.BLOCKSIZE
                entries.append(TarSample(key, offset, len(data), picture.label))
                members = [(suffix, data)]
                if picture.label >= 0:
                    members.append(("cls", str(picture.label).encode()))
                for suffix, data in members:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))

    files.write_atomically(path, write)
    part = ShardPart.of(plan.name, entries, skipped, path.stat().st_size, files.sha256_of(path))
    part.save(folder / PARTS / plan.name, plan.fingerprint)
    return part


def read_part(folder: Path, plan: ShardPlan) -> ShardPart | None:
    """The part that `write_shard` left, if it is this plan's and its tar is whole; else None."""
    part = ShardPart.load(folder / PARTS / plan.name, plan.fingerprint)
    with suppress(OSError):
        if part is not None and files.sha256_of(folder / plan.name) == part.shard["sha256"]:
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
            "repair or remove them, or leave out up to N with --max-bad N"
        )


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


# -- who may write --------------------------------------------------------------------------------


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one command.

    Raises:
        UserError: If another command, or a task of an earlier one, is writing there.
    """
    with files.held(folder / files.LOCK, patience=0.0, of_process=False):
        with suppress(FileNotFoundError), open(folder / PARTS / _TASKS, "r+b") as tasks:
            require(
                files.lock_file(tasks, folder),
                f"{folder}: tasks of an earlier command are still writing here; wait for them or "
                "cancel them, then give the command again",
            )
        yield


@contextmanager
def shared_with_tasks(folder: Path, run_id: str) -> Iterator[None]:
    """Hold a folder as one task of the run `run_id`.

    Raises:
        UserError: If the run has ended, or another command has taken over.
    """
    replaced = UserError(f"{folder}: the command that started this task has ended or was replaced")
    try:  # the lock is never made here, so that a finished set stays clean
        tasks = open(folder / PARTS / _TASKS, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        raise replaced from None
    with tasks:
        files.lock_file(tasks, folder, shared=True, wait=True)
        plan_file = folder / PARTS / PLAN_FILE
        if (files.read_record_or_none(plan_file) or {}).get("run") != run_id:
            raise replaced
        yield


# -- several shards -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShareOfShards:
    """Shards to make in one folder, by this command or by one of its tasks.

    Attributes:
        folder: Of the shards.
        run_id: Of the command, as in plan.json.
        plans: The shards.
        options: How they are made.
        max_bad: How many pictures may be left out.
        num_workers: Processes; 0 or 1 works in this one, in order.
    """

    folder: Path
    run_id: str
    plans: Sequence[ShardPlan]
    options: ShardOptions
    max_bad: int
    num_workers: int

    def make(self) -> Generator[ShardPart]:
        """Make the shards; yields the part of each as it is finished.

        Raises:
            UserError: If too many pictures of a shard are bad; the caller counts them over all.
            RunFailed: If a process was killed.
        """
        rest = (self.folder, self.options, self.max_bad)
        num_workers = min(self.num_workers, len(self.plans))
        if num_workers <= 1:
            for plan in self.plans:
                yield write_shard(plan, *rest)
            return
        context = multiprocessing.get_context("spawn")  # no copies of this process's threads
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
        try:
            futures = [pool.submit(write_shard, plan, *rest) for plan in self.plans]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "a worker was killed, perhaps for want of memory; give the same command again with "
                "a smaller --num-workers: it goes on"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self) -> list[ShardPart] | str:
        """As a task: the parts of all shards, made where need be; or why the task gave up."""
        try:
            with shared_with_tasks(self.folder, self.run_id):
                found = {plan.name: read_part(self.folder, plan) for plan in self.plans}
                parts = [part for part in found.values() if part is not None]
                todo = [plan for plan in self.plans if found[plan.name] is None]
                with closing(replace(self, plans=todo).make()) as made:
                    for part in made:
                        print(f"{part.shard['name']}: {len(part.table)} samples", flush=True)
                        parts.append(part)
                        check_bad([item for one in parts for item in one.skipped], self.max_bad)
                return parts
        except (UserError, RunFailed, OSError) as error:
            return str(error)

    def checkpoint(self) -> Any:
        """What submitit queues when the task's time is up: the same again, which goes on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class Cluster:
    """Where tasks run; the names are submitit's.

    Attributes:
        kind: "slurm", or "local" for processes on this machine.
        num_tasks: Most tasks at once; each makes a share of the shards.
        partition: Slurm partition.
        time_minutes: Time limit of a task. One that reaches it is queued again by submitit, three
            times at most, and goes on.
        mem_gb: Memory of a task, GiB.
        options: Further lines for sbatch, such as {"account": "vision"}.
    """

    kind: Literal["local", "slurm"]
    num_tasks: int
    partition: str | None = None
    time_minutes: int = 240
    mem_gb: float | None = None
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, "cluster", num_tasks=1, time_minutes=1)


def run_tasks(cluster: Cluster, whole: ShareOfShards) -> Generator[ShardPart]:
    """Make shards in tasks; yields their parts, task by task. Closing it cancels the tasks.

    Args:
        cluster: Where and in how many tasks.
        whole: At least one shard; each task may leave out `max_bad` pictures, and the caller counts
            them over all tasks. The command holds the folder's lock.
    Raises:
        RunFailed: If a task was killed or failed; the message names its log.
        UserError: If tasks cannot be started.
    """
    import submitit  # slow, and most runs have no tasks

    logging.getLogger("submitit").setLevel(logging.WARNING)
    parts = whole.folder / PARTS
    (parts / _TASKS).touch()  # the lock that tasks share; before they are started
    num_tasks = min(cluster.num_tasks, len(whole.plans))
    bounds = [number * len(whole.plans) // num_tasks for number in range(num_tasks + 1)]
    try:
        executor = submitit.AutoExecutor(folder=parts / "tasks", cluster=cluster.kind)
        executor.update_parameters(
            name="make_shards",
            timeout_min=cluster.time_minutes if cluster.kind == "slurm" else _LOCAL_MINUTES,
            cpus_per_task=max(1, whole.num_workers),
            mem_gb=cluster.mem_gb,
            slurm_partition=cluster.partition,
            slurm_additional_parameters=cluster.options or None,
        )
        with executor.batch():
            jobs = [
                executor.submit(replace(whole, plans=whole.plans[start:end]))
                for start, end in pairwise(bounds)
            ]
    except (RuntimeError, OSError) as error:  # no srun, sbatch refuses, too large a pickle
        raise UserError(f"submitit cannot start tasks: {error}") from error
    failed = []
    try:
        for number, job in enumerate(jobs, 1):
            while not job.done():
                time.sleep(_POLL_SECONDS)
            error = job.exception()  # waits for a network file system to show the result
            made = job.result() if error is None else f"was killed or failed (state {job.state})"
            if isinstance(made, str):
                of = f"task {number} of {len(jobs)} (job {job.job_id})"
                failed.append(f"{of}: {made}\n  log: {job.paths.stderr}")
            else:
                yield from made
        if failed:
            again = "the same command goes on with what the tasks have made"
            raise RunFailed("\n".join([*failed, again]))
    finally:
        for job in jobs:
            if not job.done():
                job.cancel(check=False)


# -- the whole set --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteReport:
    """What `write_shards` did."""

    num_samples: int
    num_shards: int
    num_shards_kept: int  # finished by an earlier run
    num_bytes: int
    skipped: list[dict[str, str]]

    @classmethod
    def of(cls, index: dict[str, Any], num_shards_kept: int) -> "WriteReport":
        """The report of a set with this index.json."""
        sizes = [shard["bytes"] for shard in index["shards"]]
        return cls(index["num_samples"], len(sizes), num_shards_kept, sum(sizes), index["skipped"])


def write_shards(
    pictures: Sequence[SourcePicture],
    out: str | Path,
    *,
    options: ShardOptions | None = None,
    classes: list[str] | None = None,
    num_workers: int = 0,
    max_bad: int = 0,
    overwrite: bool = False,
    cluster: Cluster | None = None,
) -> WriteReport:
    """Pack pictures into OUT/shard-*.tar with OUT/index.json and OUT/samples.npy.

    A killed run goes on where it stopped when it is called again: finished shards are kept, the one
    in work is made anew. A set that is complete already is left alone.

    Args:
        pictures: What to pack; names must be unique.
        out: Folder to write; made if missing.
        options: How shards are made.
        classes: Class names, or None.
        num_workers: Processes, of each task if there is a cluster; 0 or 1 works in one.
        max_bad: How many pictures may be left out because they do not decode.
        overwrite: Throw away other shards in `out` first.
        cluster: Where to make the shards; None: here.
    Raises:
        UserError: If more pictures than allowed are bad, `out` holds other shards or is being
            written by another run, or the disk has no room.
        OSError: If `out` cannot be written.
        RunFailed: If a task on the cluster did not finish its share, or a process was killed.
    """
    folder, options = Path(out), options or ShardOptions()
    plans, run_id = make_plan(pictures, options), secrets.token_hex(8)
    joined = "".join(plan.fingerprint for plan in plans) + repr(classes)
    fingerprint = hashlib.sha256(joined.encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        if not overwrite and (folder / "index.json").exists():
            index = _finished_index(folder, fingerprint)
            check_bad(index["skipped"], max_bad)
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            return WriteReport.of(index, len(plans))
        _begin(folder, fingerprint, run_id, overwrite=overwrite)

        # What an earlier run has finished is kept.
        kept = {plan.name: read_part(folder, plan) for plan in plans}
        done = {name: part for name, part in kept.items() if part is not None}
        num_kept, todo = len(done), [plan for plan in plans if plan.name not in done]
        needed = sum(plan.estimated_bytes for plan in todo)
        free = shutil.disk_usage(folder).free
        require(
            needed <= free,
            f"{folder}: the shards need about {needed / 1e6:,.1f} MB, only {free / 1e6:,.1f} "
            "MB are free; free some space, or shrink pictures with --resize-short",
        )

        # The rest is made here or in tasks; bad pictures count over all shards.
        share = ShareOfShards(folder, run_id, todo, options, max_bad, num_workers)
        made = run_tasks(cluster, share) if cluster and todo else share.make()
        num_done = len(pictures) - sum(len(plan.pictures) for plan in todo)
        total = len(pictures)  # shown on a terminal
        bar = tqdm(None, "packing", total, unit="picture", initial=num_done, disable=None)
        skipped = [item for part in done.values() for item in part.skipped]
        check_bad(skipped, max_bad)
        with bar, closing(made):
            for part in made:
                done[part.shard["name"]] = part
                bar.update(len(part.table) + len(part.skipped))
                skipped += part.skipped
                check_bad(skipped, max_bad)
        if not any(len(part.table) for part in done.values()):
            raise UserError(f"none of {len(skipped)} pictures decodes; {skipped[0]['reason']}")

        # The set counts as complete from the rename of index.json.
        stored_options = {**asdict(options), "fingerprint": fingerprint}
        of_plans = [done[plan.name] for plan in plans]
        index = write_index(folder, of_plans, classes=classes, options=stored_options)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return WriteReport.of(index, num_kept)


def _begin(folder: Path, fingerprint: str, run_id: str, *, overwrite: bool) -> None:
    """Write down which run this is; an earlier one must have been of the same plan.

    Raises:
        UserError: If other shards are there, or another plan was begun.
    """
    parts, plan_file = folder / PARTS, folder / PARTS / PLAN_FILE
    if overwrite:
        for path in (folder / "index.json", folder / "samples.npy", *folder.glob("shard-*.tar")):
            path.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    if plan_file.exists():
        remedy = f"what was made here is not known; {_REMEDY}"
        found = files.read_record(plan_file, {"fingerprint": str}, remedy=remedy)
        other = f"{folder}: an unfinished run with another source or other options is here"
        require(found["fingerprint"] == fingerprint, f"{other}; {_REMEDY}")
    elif tars := sorted(folder.glob("*.tar")):
        raise UserError(f"{tars[0]}: a tar that this run did not make; {_REMEDY}")
    parts.mkdir(parents=True, exist_ok=True)
    files.remove_partial_files(folder)
    files.remove_partial_files(parts)
    files.write_json(plan_file, {"fingerprint": fingerprint, "run": run_id})


def _finished_index(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The index of an earlier run that made exactly these shards; others are refused."""
    index = read_index(folder)
    other = f"{folder}: holds shards of another source or of other options; {_REMEDY}"
    require(index["options"].get("fingerprint") == fingerprint, other)
    load_table(folder, index)
    for shard in index["shards"]:
        tar = folder / shard["name"]
        is_whole = tar.exists() and tar.stat().st_size == shard["bytes"]
        require(is_whole, f"{tar}: missing or changed since the index was written; {_REMEDY}")
    return index
