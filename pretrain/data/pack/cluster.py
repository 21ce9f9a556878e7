"""Make shards in several tasks through submitit: on a Slurm cluster, or as processes here.

The command plans, gives each task a run of neighbouring shards, waits, and joins what they made.
Each task makes its shards as a command without a cluster would, so what is there already is kept.
submitit hands a task its work as a pickle in OUT/.parts/tasks, beside the logs; that folder is
written by the command itself and goes when the set is complete.
"""

import json
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import RunFailed, UserError, require
from common.files import DiskFullError, lock_file, locked
from pretrain.data.pack.job import PARTS, check_bad, map_unordered, read_part, write_shard
from pretrain.data.pack.plan import ShardOptions, ShardPlan

PLAN_FILE = "plan.json"
_TASKS = "tasks.lock"
_PATIENCE_SECONDS = 5.0  # for tasks that were told to end


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one command.

    Raises:
        UserError: If another command, or a task of an earlier one, is writing there.
    """
    with locked(folder / ".lock") as is_mine:
        if not is_mine:
            raise UserError(
                f"{folder}: another run is writing here; wait for it, or choose another folder"
            )
        _require_no_tasks(folder)
        yield


def offer_to_tasks(folder: Path) -> None:
    """Make the lock that tasks share; before they are started."""
    (folder / PARTS / _TASKS).touch()


@contextmanager
def shared_with_tasks(folder: Path, run_id: str) -> Iterator[None]:
    """Hold a folder as one task of the run `run_id`.

    Raises:
        UserError: If the run has ended, or another command has taken over.
    """
    try:  # the lock is never made here, so that a finished set stays clean
        descriptor = os.open(folder / PARTS / _TASKS, os.O_RDWR)
    except FileNotFoundError:
        raise _replaced(folder) from None
    try:
        lock_file(descriptor, folder, shared=True, wait=True)
        plan_file = folder / PARTS / PLAN_FILE
        if not plan_file.exists() or json.loads(plan_file.read_text())["run"] != run_id:
            raise _replaced(folder)
        yield
    finally:
        os.close(descriptor)


def _replaced(folder: Path) -> UserError:
    return UserError(f"{folder}: the command that started this task has ended or was replaced")


def _require_no_tasks(folder: Path) -> None:
    try:
        descriptor = os.open(folder / PARTS / _TASKS, os.O_RDWR)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while not lock_file(descriptor, folder):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: tasks of an earlier command are still writing here; wait for them "
                    "or cancel them, then give the command again: it goes on with what they made"
                )
            time.sleep(0.1)
    finally:
        os.close(descriptor)


_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local tasks after a time; here nobody asked for it
_VISIBLE_SECONDS = 60  # after which a network file system shows what another machine has written
_POLL_SECONDS = 0.5


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
        words = [self.partition or "", *self.options, *self.options.values()]
        for word in words:
            require(word.isprintable(), f"{word!r}: no line breaks in options of the cluster")


@dataclass(frozen=True)
class _Outcome:
    """How a task ended by itself."""

    error: str | None = None
    disk_full: bool = False


@dataclass(frozen=True)
class ShareOfShards:
    """The work of one task; submitit calls it."""

    folder: Path
    run_id: str
    plans: Sequence[ShardPlan]
    options: ShardOptions
    max_bad: int
    num_workers: int

    def __call__(self) -> _Outcome:
        """Make the shards that are not there yet."""
        try:
            with shared_with_tasks(self.folder, self.run_id):
                self._make()
        except (UserError, DiskFullError) as error:
            return _Outcome(str(error), isinstance(error, DiskFullError))
        return _Outcome()

    def _make(self) -> None:
        todo = [plan for plan in self.plans if read_part(self.folder, plan) is None]
        print(f"{len(todo)} of {len(self.plans)} shards to make", flush=True)
        skipped: list[dict[str, str]] = []
        arguments = (self.folder, self.options, self.max_bad)
        with closing(map_unordered(write_shard, todo, self.num_workers, *arguments)) as made:
            for plan, part in made:
                print(f"{plan.name}: {part['num_samples']} samples", flush=True)
                skipped += part["skipped"]
                check_bad(skipped, self.max_bad)

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
) -> Generator[tuple[ShardPlan, dict[str, Any]]]:
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
        DiskFullError: If a task found the disk full.
        UserError: If tasks cannot be started.
    """
    num_tasks = min(cluster.num_tasks, len(todo))
    bounds = [number * len(todo) // num_tasks for number in range(num_tasks + 1)]
    shares = [todo[bounds[k] : bounds[k + 1]] for k in range(num_tasks)]
    calls = [
        ShareOfShards(folder, run_id, share, options, max_bad, num_workers) for share in shares
    ]
    offer_to_tasks(folder)
    jobs = _submit(cluster, calls, folder / PARTS / "tasks", num_workers)
    try:
        yield from _collect(jobs, shares, folder)
    finally:
        for job in jobs:
            if not job.done():
                job.cancel(check=False)


def _submit(
    cluster: Cluster, calls: list[ShareOfShards], logs: Path, num_workers: int
) -> list[Any]:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--submitit needs the package submitit ({error}); pip install it"
        ) from error
    logging.getLogger("submitit").setLevel(logging.WARNING)
    minutes = cluster.time_minutes if cluster.kind == "slurm" else _LOCAL_MINUTES
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster.kind)
        executor.update_parameters(
            name="make_shards",
            timeout_min=minutes,
            cpus_per_task=max(1, num_workers),
            mem_gb=cluster.mem_gb,
            slurm_partition=cluster.partition,
            slurm_additional_parameters=cluster.options or None,
        )
        with executor.batch():
            return [executor.submit(call) for call in calls]
    except (RuntimeError, OSError) as error:  # no srun, sbatch refuses, too large a pickle
        raise UserError(f"submitit cannot start tasks: {error}") from error


def _collect(
    jobs: list[Any], shares: list[Sequence[ShardPlan]], folder: Path
) -> Generator[tuple[ShardPlan, dict[str, Any]]]:
    """Yield shards as they appear, until all tasks have ended and all shards are there."""
    waiting = {plan.name: plan for share in shares for plan in share}
    deadline = None
    while True:
        all_ended = all(job.done() for job in jobs)
        for plan, part in _appeared(waiting, folder):
            del waiting[plan.name]
            yield plan, part
        if not waiting and all_ended:
            return
        if all_ended:
            outcomes = [_outcome(job) for job in jobs]
            deadline = deadline or time.monotonic() + _VISIBLE_SECONDS
            if any(outcome.error for outcome in outcomes) or time.monotonic() > deadline:
                _fail(jobs, shares, outcomes, waiting)
        time.sleep(_POLL_SECONDS)


def _appeared(
    waiting: dict[str, ShardPlan], folder: Path
) -> list[tuple[ShardPlan, dict[str, Any]]]:
    """Finished shards among those waited for.

    The folder's mode is set to what it is, which makes an NFS client ask the server for the
    folder's content instead of trusting what it remembers.
    """
    parts = folder / PARTS
    with suppress(PermissionError):  # somebody else's folder: then its content comes later
        parts.chmod(parts.stat().st_mode & 0o7777)
    names = {name.removesuffix(".json") for name in os.listdir(parts) if name.endswith(".json")}
    found = [(plan, read_part(folder, plan)) for name, plan in waiting.items() if name in names]
    return [(plan, part) for plan, part in found if part is not None]


def _outcome(job: Any) -> _Outcome:
    """How a task ended; one that left no word was killed."""
    if not job.paths.result_pickle.exists():
        return _Outcome(f"was killed, or never ran (state {job.state})")
    error = job.exception()
    if error is None:
        return job.result()
    lines = [line for line in str(error).split("-" * 22)[1:2] for line in line.split("\n") if line]
    return _Outcome(f"failed ({lines[-1].strip() if lines else error})")


def _fail(
    jobs: list[Any],
    shares: list[Sequence[ShardPlan]],
    outcomes: list[_Outcome],
    waiting: dict[str, ShardPlan],
) -> None:
    """Say what went wrong in each task that did not finish.

    Raises:
        UserError: Always; the kind tells the remedy.
    """
    told = []
    for number, (job, share, outcome) in enumerate(zip(jobs, shares, outcomes, strict=True), 1):
        missing = sum(plan.name in waiting for plan in share)
        if missing or outcome.error:
            told.append(
                f"task {number} of {len(jobs)} (job {job.job_id}), {missing} of {len(share)} "
                f"shards missing: {outcome.error or 'its shards are not to be seen here'}\n"
                f"  log: {job.paths.stderr}"
            )
    message = "\n".join([*told, "the same command goes on with what the tasks have made"])
    if any(outcome.disk_full for outcome in outcomes):
        raise DiskFullError(message)
    raise TaskError(message)
