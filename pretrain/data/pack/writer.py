"""Write WebDataset shards: parallel, restartable, the same bytes for any number of workers."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import remove_partial_files, write_json
from pretrain.data.index import read_index, write_index
from pretrain.data.pack.cluster import PLAN_FILE, Cluster, only_writer, run_tasks
from pretrain.data.pack.job import (
    PARTS,
    check_bad,
    disk_error,
    map_unordered,
    read_part,
    write_shard,
)
from pretrain.data.pack.plan import ShardOptions, ShardPlan, SourcePicture, make_plan


@dataclass(frozen=True)
class WriteReport:
    """What `write_shards` did."""

    num_samples: int
    num_shards: int
    num_shards_kept: int  # found finished from an earlier run
    num_bytes: int
    skipped: list[dict[str, str]]


@dataclass(frozen=True)
class _Task:
    """A set of shards to make in a folder."""

    folder: Path
    plans: list[ShardPlan]
    options: ShardOptions
    classes: list[str] | None
    max_bad: int
    cluster: Cluster | None
    run_id: str

    @property
    def parts(self) -> Path:
        return self.folder / PARTS

    @property
    def fingerprint(self) -> str:
        joined = "".join(plan.fingerprint for plan in self.plans) + repr(self.classes)
        return hashlib.sha256(joined.encode()).hexdigest()


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
    options = options or ShardOptions()
    plans, run_id = make_plan(pictures, options), secrets.token_hex(8)
    task = _Task(Path(out), plans, options, classes, max_bad, cluster, run_id)
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        with only_writer(task.folder):
            finished = None if overwrite else _finished_report(task)
            if finished is not None:
                return finished
            _prepare_folder(task, overwrite)
            return _make_all(task, num_workers, progress)
    except OSError as error:
        raise disk_error(error, task.folder) from error


def _finished_report(task: _Task) -> WriteReport | None:
    """The report of an earlier run that made exactly these shards; None if there is no index."""
    path = task.folder / "index.json"
    if not path.exists():
        return None
    index = read_index(path)
    if index["options"].get("fingerprint") != task.fingerprint:
        raise UserError(
            f"{task.folder}: holds shards of another source or of other options; choose another "
            "folder, or --overwrite"
        )
    check_bad(index["skipped"], task.max_bad)
    for shard in index["shards"]:
        tar = task.folder / shard["name"]
        if not tar.exists() or tar.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{tar}: missing or changed since the index was written; --overwrite makes all "
                "shards again"
            )
    shutil.rmtree(task.parts, ignore_errors=True)
    num_bytes = sum(shard["bytes"] for shard in index["shards"])
    num_shards = len(index["shards"])
    return WriteReport(index["num_samples"], num_shards, num_shards, num_bytes, index["skipped"])


def _prepare_folder(task: _Task, overwrite: bool) -> None:
    """Clear the folder if asked, and refuse to mix with shards that are not this run's."""
    folder, parts = task.folder, task.parts
    if overwrite:
        (folder / "index.json").unlink(missing_ok=True)
        (folder / "samples.npy").unlink(missing_ok=True)
        for path in sorted(folder.glob("shard-*.tar")):
            path.unlink()
        shutil.rmtree(parts, ignore_errors=True)
    plan_file = parts / PLAN_FILE
    if plan_file.exists():
        if json.loads(plan_file.read_text())["fingerprint"] != task.fingerprint:
            raise UserError(
                f"{folder}: an unfinished run with another source or other options is here; repeat "
                "that command, choose another folder, or --overwrite"
            )
    elif tars := sorted(folder.glob("*.tar")):
        raise UserError(
            f"{tars[0]}: a tar that this run did not make; choose an empty folder, or --overwrite "
            "(which deletes shard-*.tar only)"
        )
    parts.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder)
    remove_partial_files(parts)
    write_json(plan_file, {"fingerprint": task.fingerprint, "run": task.run_id})


def _make_all(task: _Task, num_workers: int, progress: bool) -> WriteReport:
    """Make the shards that are not there yet, then the index."""
    done = {
        plan.name: part for plan in task.plans if (part := read_part(task.folder, plan)) is not None
    }
    num_kept = len(done)
    todo = [plan for plan in task.plans if plan.name not in done]
    _check_space(task.folder, sum(plan.estimated_bytes for plan in todo))
    total = sum(len(plan.pictures) for plan in task.plans)
    with tqdm(total=total, desc="packing", unit="picture", disable=not progress) as bar:
        bar.update(total - sum(len(plan.pictures) for plan in todo))
        check_bad(_skipped(task, done), task.max_bad)
        with closing(_run(task, todo, num_workers)) as finished:
            for plan, part in finished:
                done[plan.name] = part
                bar.update(len(plan.pictures))
                check_bad(_skipped(task, done), task.max_bad)
    return _finish(task, done, num_kept)


def _skipped(task: _Task, done: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    names = [plan.name for plan in task.plans if plan.name in done]
    return [item for name in names for item in done[name]["skipped"]]


def _run(
    task: _Task, todo: list[ShardPlan], num_workers: int
) -> Generator[tuple[ShardPlan, dict[str, Any]]]:
    """Make shards here or on a cluster; yields each as it is finished."""
    arguments = (task.folder, task.options, task.max_bad)
    if task.cluster is None:
        yield from map_unordered(write_shard, todo, num_workers, *arguments)
    elif todo:
        yield from run_tasks(task.cluster, task.run_id, todo, num_workers, *arguments)


def _finish(task: _Task, done: dict[str, dict[str, Any]], num_kept: int) -> WriteReport:
    """Join the parts into the index; the set counts as complete from the rename of index.json."""
    tables = []
    for number, plan in enumerate(task.plans):
        table = np.load(task.parts / f"{plan.name}.npy")
        table["shard"] = number
        tables.append(table)
    table, skipped = np.concatenate(tables), _skipped(task, done)
    if not len(table):
        raise UserError(f"none of {len(skipped)} pictures decodes; {skipped[0]['reason']}")
    fields = ("name", "num_samples", "bytes", "sha256")
    shards = [{name: done[plan.name][name] for name in fields} for plan in task.plans]
    options = {**asdict(task.options), "fingerprint": task.fingerprint}
    write_index(task.folder, table, shards, classes=task.classes, options=options, skipped=skipped)
    shutil.rmtree(task.parts, ignore_errors=True)
    num_bytes = sum(shard["bytes"] for shard in shards)
    return WriteReport(len(table), len(shards), num_kept, num_bytes, skipped)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the shards need about {needed / 1e6:,.1f} MB, only {free / 1e6:,.1f} MB "
            "are free; free some space, choose another disk, or shrink pictures with --resize-short"
        )
