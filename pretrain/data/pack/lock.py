"""Who may write into a folder of shards: one command at a time, and the tasks it has started.

The command holds `.lock` alone. Each of its tasks on a cluster shares a second lock while it works,
and works only as long as `plan.json` names the run that started it. So a command that is given
again meets neither a living command nor living tasks, and tasks that a cluster starts late, after
their command has gone, end at once.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import lock_file, locked
from pretrain.data.pack.job import PARTS

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
