"""Write WebDataset shards: parallel, restartable, the same bytes for any number of workers.

A set is made by this command's processes, or in tasks through submitit: on a Slurm cluster, or as
processes here. Each task makes a run of neighbouring shards as a command without a cluster would,
so what is there already is kept. submitit hands a task its work as a pickle in OUT/.parts/tasks,
beside the logs; OUT/.parts goes when the set is complete.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from common.errors import RunFailed, UserError, require
from common.files import DiskFullError, lock_file, locked, remove_partial_files, write_json
from pretrain.data.index import ShardPart, read_index, write_index
from pretrain.data.pack.job import (
    PARTS,
    check_bad,
    disk_error,
    map_unordered,
    read_part,
    write_shard,
)
from pretrain.data.pack.plan import ShardOptions, ShardPlan, SourcePicture, make_plan

PLAN_FILE = "plan.json"
_TASKS = "tasks.lock"
_PATIENCE_SECONDS = 5.0  # for tasks that were cancelled
_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local tasks after a time; here there is no limit
_VISIBLE_SECONDS = 60  # after which a network file system shows what another machine has written
_POLL_SECONDS = 0.5


# -- who may write --------------------------------------------------------------------------------


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one command.

    Raises:
        UserError: If another command, or a task of an earlier one, is writing there.
    """
    with locked(folder / ".lock") as is_mine:
        require(
            is_mine, f"{folder}: another run is writing here; wait for it, or choose another folder"
        )
        with suppress(FileNotFoundError), open(folder / PARTS / _TASKS, "r+b") as tasks:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not lock_file(tasks, folder):
                require(
                    time.monotonic() < deadline,
                    f"{folder}: tasks of an earlier command are still writing here; wait for them "
                    "or cancel them, then give the command again: it goes on with what they made",
                )
                time.sleep(0.1)
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
        lock_file(tasks, folder, shared=True, wait=True)
        plan_file = folder / PARTS / PLAN_FILE
        if not plan_file.exists() or json.loads(plan_file.read_text())["run"] != run_id:
            raise replaced
        yield


# -- tasks ----------------------------------------------------------------------------------------


class TaskError(RunFailed):
    """A task did not finish its share; the same command goes on where the tasks stopped."""


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
        require(self.num_tasks >= 1, f"{self.num_tasks} tasks: must be at least 1")
        require(self.time_minutes >= 1, f"{self.time_minutes} minutes per task: must be at least 1")
        for text in (self.partition or "", *self.options, *self.options.values()):
            require(text.isprintable(), f"{text!r}: no line breaks in options of the cluster")


@dataclass(frozen=True)
class ShareOfShards:
    """The work of one task; submitit calls it."""

    folder: Path
    run_id: str
    plans: Sequence[ShardPlan]
    options: ShardOptions
    max_bad: int
    num_workers: int

    def __call__(self) -> str | None:
        """Make the shards that are not there yet; return why the task gave up, if it did."""
        try:
            with shared_with_tasks(self.folder, self.run_id):
                todo = [plan for plan in self.plans if read_part(self.folder, plan) is None]
                print(f"{len(todo)} of {len(self.plans)} shards to make", flush=True)
                skipped: list[dict[str, str]] = []
                rest = (self.folder, self.options, self.max_bad)
                with closing(map_unordered(write_shard, todo, self.num_workers, *rest)) as made:
                    for plan, part in made:
                        print(f"{plan.name}: {len(part.table)} samples", flush=True)
                        skipped += part.skipped
                        check_bad(skipped, self.max_bad)
        except (UserError, DiskFullError) as error:
            return str(error)
        return None

    def checkpoint(self) -> Any:
        """What submitit queues when the task's time is up: the same again, which goes on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_tasks(
    cluster: Cluster,
    run_id: str,
    todo: Sequence[ShardPlan],
    num_workers: int,
    folder: Path,
    options: ShardOptions,
    max_bad: int,
) -> Generator[tuple[ShardPlan, ShardPart]]:
    """Make shards in tasks; yields each as it is finished. Closing it cancels the tasks.

    Args:
        cluster: Where and in how many tasks.
        run_id: Of the command, as in plan.json.
        todo: Shards to make, at least one.
        num_workers: Processes of each task.
        folder: Of the shards; the command holds its lock.
        options: How shards are made.
        max_bad: How many pictures a task may leave out; the caller counts them over all tasks.
    Raises:
        TaskError: If a task was killed or failed; the message names its log.
        UserError: If tasks cannot be started.
    """
    num_tasks = min(cluster.num_tasks, len(todo))
    bounds = [number * len(todo) // num_tasks for number in range(num_tasks + 1)]
    shares = [
        ShareOfShards(
            folder, run_id, todo[bounds[k] : bounds[k + 1]], options, max_bad, num_workers
        )
        for k in range(num_tasks)
    ]
    (folder / PARTS / _TASKS).touch()  # the lock that tasks share; before they are started
    jobs = _submit(cluster, shares)
    waiting = {plan.name: plan for plan in todo}
    deadline = None
    try:
        while True:
            all_ended = all(job.done() for job in jobs)
            for plan, part in _finished(waiting, folder):
                del waiting[plan.name]
                yield plan, part
            if all_ended:
                if not waiting:
                    return
                reasons = [_why_ended(job) for job in jobs]
                deadline = deadline or time.monotonic() + _VISIBLE_SECONDS
                if any(reasons) or time.monotonic() > deadline:
                    break
            time.sleep(_POLL_SECONDS)

        # What went wrong in each task that did not finish.
        lines = []
        for number, (job, share, reason) in enumerate(zip(jobs, shares, reasons, strict=True), 1):
            missing = sum(plan.name in waiting for plan in share.plans)
            if missing or reason:
                lines.append(
                    f"task {number} of {len(jobs)} (job {job.job_id}), {missing} of "
                    f"{len(share.plans)} shards missing: "
                    f"{reason or 'its shards are not to be seen here'}\n  log: {job.paths.stderr}"
                )
        lines.append("the same command goes on with what the tasks have made")
        raise TaskError("\n".join(lines))
    finally:
        for job in jobs:
            if not job.done():
                job.cancel(check=False)


def _submit(cluster: Cluster, shares: list[ShareOfShards]) -> list[Any]:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--submitit needs the package submitit ({error}); pip install it"
        ) from error
    logging.getLogger("submitit").setLevel(logging.WARNING)
    try:
        logs = shares[0].folder / PARTS / "tasks"
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster.kind)
        executor.update_parameters(
            name="make_shards",
            timeout_min=cluster.time_minutes if cluster.kind == "slurm" else _LOCAL_MINUTES,
            cpus_per_task=max(1, shares[0].num_workers),
            mem_gb=cluster.mem_gb,
            slurm_partition=cluster.partition,
            slurm_additional_parameters=cluster.options or None,
        )
        with executor.batch():
            return [executor.submit(share) for share in shares]
    except (RuntimeError, OSError) as error:  # no srun, sbatch refuses, too large a pickle
        raise UserError(f"submitit cannot start tasks: {error}") from error


def _finished(waiting: dict[str, ShardPlan], folder: Path) -> Iterator[tuple[ShardPlan, ShardPart]]:
    """Finished shards among those waited for.

    The folder's mode is set to what it is, which makes an NFS client ask the server for the
    folder's content instead of trusting what it remembers.
    """
    parts = folder / PARTS
    with suppress(PermissionError):  # somebody else's folder: then its content comes later
        parts.chmod(parts.stat().st_mode & 0o7777)
    for name in {name.removesuffix(".json") for name in os.listdir(parts)} & waiting.keys():
        plan = waiting[name]
        if (part := read_part(folder, plan)) is not None:
            yield plan, part


def _why_ended(job: Any) -> str | None:
    """Why a task did not finish; None if it did."""
    if not job.paths.result_pickle.exists():
        return f"was killed, or never ran (state {job.state})"
    error = job.exception()
    if error is None:
        return job.result()
    # submitit's message holds the task's traceback between two lines of dashes.
    lines = [line for line in str(error).split("-" * 22)[1:2] for line in line.split("\n") if line]
    return f"failed ({lines[-1].strip() if lines else error})"


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
        num_bytes = sum(shard["bytes"] for shard in index["shards"])
        num_shards = len(index["shards"])
        return cls(index["num_samples"], num_shards, num_shards_kept, num_bytes, index["skipped"])


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
        progress: Show a progress bar.
        cluster: Where to make the shards; None: here.
    Raises:
        UserError: If more pictures than allowed are bad, `out` holds other shards or is being
            written by another run, or the disk is full.
        TaskError: If a task on the cluster did not finish its share.
    """
    folder, options = Path(out), options or ShardOptions()
    plans, run_id = make_plan(pictures, options), secrets.token_hex(8)
    joined = "".join(plan.fingerprint for plan in plans) + repr(classes)
    fingerprint = hashlib.sha256(joined.encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            if not overwrite and (folder / "index.json").exists():
                index = _finished_index(folder, fingerprint)
                check_bad(index["skipped"], max_bad)
                shutil.rmtree(folder / PARTS, ignore_errors=True)
                return WriteReport.of(index, len(plans))
            _prepare_folder(folder, fingerprint, run_id, overwrite)

            # What an earlier run has finished is kept.
            kept = {plan.name: read_part(folder, plan) for plan in plans}
            done = {name: part for name, part in kept.items() if part is not None}
            num_kept, todo = len(done), [plan for plan in plans if plan.name not in done]
            needed = sum(plan.estimated_bytes for plan in todo)
            free = shutil.disk_usage(folder).free
            require(
                needed <= free,
                f"{folder}: the shards need about {needed / 1e6:,.1f} MB, only {free / 1e6:,.1f} "
                "MB are free; free some space, choose another disk, or shrink pictures with "
                "--resize-short",
            )

            # The rest is made here or in tasks; bad pictures count over all shards.
            rest = (todo, num_workers, folder, options, max_bad)
            if cluster is None or not todo:
                made = map_unordered(write_shard, *rest)
            else:
                made = run_tasks(cluster, run_id, *rest)
            num_done = len(pictures) - sum(len(plan.pictures) for plan in todo)
            bar = tqdm(
                total=len(pictures), initial=num_done, desc="packing", unit="picture",
                disable=not progress,
            )  # fmt: skip
            skipped = [item for part in done.values() for item in part.skipped]
            check_bad(skipped, max_bad)
            with bar, closing(made):
                for plan, part in made:
                    done[plan.name] = part
                    bar.update(len(plan.pictures))
                    skipped += part.skipped
                    check_bad(skipped, max_bad)
            if not any(len(part.table) for part in done.values()):
                raise UserError(f"none of {len(skipped)} pictures decodes; {skipped[0]['reason']}")

            # The set counts as complete from the rename of index.json.
            stored_options = {**asdict(options), "fingerprint": fingerprint}
            parts = [done[plan.name] for plan in plans]
            index = write_index(folder, parts, classes=classes, options=stored_options)
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            return WriteReport.of(index, num_kept)
    except OSError as error:
        raise disk_error(error, folder) from error


def _finished_index(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The index of an earlier run that made exactly these shards; others are refused."""
    index = read_index(folder)
    require(
        index["options"].get("fingerprint") == fingerprint,
        f"{folder}: holds shards of another source or of other options; choose another folder, or "
        "--overwrite",
    )
    for shard in index["shards"]:
        tar = folder / shard["name"]
        require(
            tar.exists() and tar.stat().st_size == shard["bytes"],
            f"{tar}: missing or changed since the index was written; --overwrite makes all shards "
            "again",
        )
    return index


def _prepare_folder(folder: Path, fingerprint: str, run_id: str, overwrite: bool) -> None:
    """Clear the folder with `overwrite`, and refuse to mix with shards that are not this run's."""
    parts = folder / PARTS
    if overwrite:
        for path in (folder / "index.json", folder / "samples.npy", *folder.glob("shard-*.tar")):
            path.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    plan_file = parts / PLAN_FILE
    if plan_file.exists():
        require(
            json.loads(plan_file.read_text())["fingerprint"] == fingerprint,
            f"{folder}: an unfinished run with another source or other options is here; repeat "
            "that command, choose another folder, or --overwrite",
        )
    elif tars := sorted(folder.glob("*.tar")):
        raise UserError(
            f"{tars[0]}: a tar that this run did not make; choose an empty folder, or --overwrite "
            "(which deletes shard-*.tar only)"
        )
    parts.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder)
    remove_partial_files(parts)
    write_json(plan_file, {"fingerprint": fingerprint, "run": run_id})
