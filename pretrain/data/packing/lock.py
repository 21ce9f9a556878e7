"""Who may write into a folder of shards: one command at a time, and the tasks it has started.

The command holds `.lock` alone. Each of its tasks on a cluster shares a second lock while it works,
and works only as long as `plan.json` names the run that started it. So a command that is given
again meets neither a living command nor living tasks, and tasks that a cluster starts late, after
their command has gone, end at once.

The locks are flock(2): the system frees them when a process ends, however it ends. On NFS, Linux
turns them into locks at the server, so that they hold between machines; that needs NFSv4, or NFSv3
with its lock service, and no `nolock` or `local_lock`. Other cluster file systems need flock to be
switched on for all nodes (Lustre: the mount option `flock`).
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.packing.job import PARTS
from pretrain.errors import UserError

PLAN_FILE = "plan.json"
_TASKS = "tasks.lock"
_PATIENCE_SECONDS = 5.0  # for tasks that were told to end


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one command.

    Raises:
        UserError: If another command, or a task of an earlier one, is writing there.
    """
    path = folder / ".lock"
    descriptor = _lock_alone(path, folder)
    try:
        _require_no_tasks(folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody else's is taken away
        os.close(descriptor)


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
        _flock(descriptor, fcntl.LOCK_SH, folder)
        plan_file = folder / PARTS / PLAN_FILE
        if not plan_file.exists() or json.loads(plan_file.read_text())["run"] != run_id:
            raise _replaced(folder)
        yield
    finally:
        os.close(descriptor)


def _replaced(folder: Path) -> UserError:
    return UserError(f"{folder}: the command that started this task has ended or was replaced")


def _lock_alone(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder):
                raise UserError(
                    f"{folder}: another run is writing here; wait for it, or choose another folder"
                )
        except BaseException:
            os.close(descriptor)
            raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # its holder ended and took the file away: lock the new one


def _require_no_tasks(folder: Path) -> None:
    try:
        descriptor = os.open(folder / PARTS / _TASKS, os.O_RDWR)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: tasks of an earlier command are still writing here; wait for them "
                    "or cancel them, then give the command again: it goes on with what they made"
                )
            time.sleep(0.1)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, folder: Path) -> bool:
    """Lock a file; False if somebody else holds it."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(
                f"{folder}: its file system offers no locks ({error.strerror}), so that two runs "
                "could mix; mount it with locks, or choose another folder"
            ) from error
        raise
    return True
