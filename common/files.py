"""Files: written whole or not at all, read within bounds and with a clear error, hashed, locked.

A name may come from a data set or a run folder of somebody else. What reads it opens it with
`open_regular`, which never waits on a pipe or a device, and reads no more than a bound.

The locks are those of fcntl(2), of a process or of an open file; both kinds see each other. The
system frees them when their owner ends, however it ends. They hold between machines on NFSv4, or
NFSv3 with its lock service, without `nolock` or `local_lock`. Other cluster file systems need locks
to be switched on for all nodes (Lustre: the mount option `flock`).
"""

import codecs
import contextlib
import datetime
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TypeGuard

from common.errors import UserError

# Keys that a JSON object must have, and the types of their values.
Form = Mapping[str, type | tuple[type, ...]]
NUMBER = (int, float)
# In a folder while a program works there; a killed one leaves the file, but holds no lock.
LOCK = ".lock"
TEMPORARY_SUFFIX = ".partial"
MAX_TEXT_BYTES = 256 << 20  # a list of ImageNet's 1.3 million pictures has 50 MB
MAX_JSON_BYTES = 2 << 30  # COCO's instances_train2017.json has 450 MB
MAX_JSON_DEPTH = 50  # nested lists and objects; ours and COCO's have fewer than ten
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# How long `held` waits: a process that was killed may still be going.
HOLD_SECONDS = 5.0
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class DiskFullError(OSError):
    """A file could not be written for want of space; the one before it is whole."""


# -- writing --------------------------------------------------------------------------------------


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, remedy: str = "run the same command again"
) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: Final name; its folder is made.
        write: Called with a binary file that is open for writing.
        remedy: What to do once a full disk has room again.

    Raises:
        DiskFullError: If the disk is full.
        OSError: If the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        # Looked at before the partial file makes room again.
        is_full = isinstance(error, OSError | RuntimeError) and _is_full(error, path.parent)
        with contextlib.suppress(OSError):
            partial.unlink()
        if not is_full:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"disk full while writing {path} ({free / 1e6:.0f} MB free without it); free some "
            f"space and {remedy}"
        ) from error
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, too, survives a loss of power
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Let what was appended to a file, if it is there, survive a loss of power."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether a write failed for want of space; torch's writer hides the OSError that said so."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20


def remove_partial_files(folder: Path) -> None:
    """Delete what killed writers left behind."""
    for partial in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if partial.is_file():
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda file: file.write(data))


def write_text(path: Path, text: str) -> None:
    r"""Write UTF-8 text atomically; bytes of a name that are no UTF-8 become \udcXX."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in their order; NaN and infinities become null."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)  # \udcXX is JSON, and comes back as it was


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def finite(value: Any) -> Any:
    """Return `value` with every non-finite float, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


# -- reading --------------------------------------------------------------------------------------


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (NaN is written as text or null)."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def require_regular(path: str | Path) -> None:
    """Check that a path is a file with an end, before a library opens it.

    Raises:
        OSError: If it is missing, a folder, or a pipe, device or socket, on which a reader waits.
    """
    _check_kind(os.stat(path), path)


def _check_kind(facts: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder where a file is expected", str(path))
    if not stat.S_ISREG(facts.st_mode):
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "no regular file")
        raise OSError(errno.EINVAL, f"is {kind} where a file is expected", str(path))


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a user's file for reading.

    Raises:
        OSError: See `require_regular`; or if it cannot be opened.
    """
    require_regular(path)  # opening a device may already do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor), path)  # it may have been exchanged
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a user's file.

    Raises:
        OSError: See `open_regular`.
        UserError: If it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(
                f"{path}: has {size:,} bytes, at most {max_bytes:,} are read; is it the right file?"
            )
        return file.read()


def read_or_refuse(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a user's file, see `read_regular`.

    Raises:
        UserError: If it cannot be read, or is larger than `max_bytes`.
    """
    try:
        return read_regular(path, max_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode_text(data: bytes, name: str | Path, *, encoding: str = "utf-8") -> str:
    """Text of a user's file: what its byte order mark says, or else `encoding`; lines end in LF.

    UTF-16 without a mark is known by its zero bytes.

    Raises:
        UserError: If it is not in that encoding; the message names the byte.
    """
    marked = next((encoding for bom, encoding in _BOMS if data.startswith(bom)), None)
    if marked is None and b"\0" in data[:200]:
        marked = "utf-16-be" if data[0] == 0 else "utf-16-le"
    encoding = marked or encoding
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"is no {encoding.upper()} text ({error.reason} at byte {error.start})"
        raise UserError(f"{name}: {reason}; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a user's text file, see `decode_text`.

    Raises:
        UserError: If it cannot be read or decoded, or is larger than `max_bytes`.
    """
    return decode_text(read_or_refuse(path, max_bytes), path)


def read_json(path: Path, *, remedy: str = "delete it and go on") -> Any:
    """Read JSON, by default a file of our own.

    Args:
        path: The file; UTF-8, UTF-16 or UTF-32, with or without byte order mark.
        remedy: What to do if it is damaged.

    Raises:
        UserError: If the file is missing, damaged, larger than MAX_JSON_BYTES, or nests deeper
            than MAX_JSON_DEPTH.
    """
    data = read_or_refuse(path, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
        if _is_deeper(value, MAX_JSON_DEPTH):
            raise RecursionError(f"it nests deeper than {MAX_JSON_DEPTH}")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged, no JSON ({error}); {remedy}") from None


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects nest deeper; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    while level and depth:
        depth -= 1
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, (dict, list))
        ]
    return bool(level)


def read_json_or_none(path: Path) -> Any | None:
    """The JSON in `path`, or None where the file is missing or does not parse."""
    try:
        return read_json(path)
    except UserError:
        return None


def has_form(value: Any, form: Form) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object with these keys."""
    return isinstance(value, dict) and all(isinstance(value.get(k), form[k]) for k in form)


def read_record(path: Path, form: Form, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object of our own.

    Args:
        path: Its file.
        form: What it must have.
        remedy: What to do where it has not.

    Raises:
        UserError: If the file is missing, damaged, or of another form.
    """
    value = read_record_or_none(path, form)
    if value is None:
        state = "is damaged" if path.exists() else "is missing"
        raise UserError(f"{path}: {state}; {remedy}")
    return value


def read_record_or_none(path: Path, form: Form | None = None) -> dict[str, Any] | None:
    """The JSON object in `path`; None where it is missing, damaged, or of another form."""
    value = read_json_or_none(path)
    return value if has_form(value, form or {}) else None


def is_whole(path: Path) -> bool:
    """Whether what a program left is there and, as far as a glance tells, not cut by a crash.

    A file is not empty; one of JSON holds an object.
    """
    if path.is_dir():
        return True
    if path.suffix == ".json":
        return isinstance(read_json_or_none(path), dict)
    return path.is_file() and path.stat().st_size > 0


def read_json_lines(
    path: Path, form: Form | None = None, *, report: Callable[[str], object] = lambda message: None
) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that a kill cut off is left out.

    Args:
        path: Of the file.
        form: What each must have.
        report: Called once if other lines are damaged: says which, they are left out too.

    Returns:
        The rows, empty if there is no such file.
    """
    try:
        *lines, last = read_regular(path, MAX_JSON_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    rows, damaged = [], []
    for number, line in enumerate([*lines, last], 1):
        row, is_cut = None, number > len(lines)
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode())
            is_cut = False
        if has_form(row, form or {}):
            rows.append(row)
        elif not (is_cut and line[:1] in (b"", b"{")):
            damaged.append(number)
    if damaged:
        listed = ", ".join(map(str, damaged[:5])) + ", .." * (len(damaged) > 5)
        lines = f"{len(damaged)} damaged line" + "s" * (len(damaged) > 1)
        report(f"{path} has {lines}, left out: {listed}")
    return rows


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows; after a line that a kill cut off they begin a new one."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted, through links, each real folder once; hidden ones left out.

    Raises:
        UserError: If a folder cannot be read. A `root` that is not there has no files.
    """

    def refuse(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); allow it, "
                            "or move the folder away")  # fmt: skip

    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(f for f in subfolders if not f.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- removing inside one folder ------------------------------------------------------------------


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path is a folder's, or in it, links followed; links in a circle raise nothing."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def inside(folder: Path, relative: str) -> Path:
    """Return `folder/relative` after checking that it lies within `folder`, links followed.

    Raises:
        UserError: For `folder` itself, an absolute path, a `..`, or a link that leads out.
    """
    parts, path = PurePosixPath(relative).parts, folder / relative
    if not parts or ".." in parts or not is_below(path.parent, folder):
        raise UserError(f"{relative!r} is not a path below {folder}; move links away")
    return path


def remove(folder: Path, relative: str) -> None:
    """Remove `folder/relative` (file, tree or link, links are not followed) if it is there."""
    path = inside(folder, relative)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def cache_folder(root: Path) -> Path:
    """Where fetched files and kept checks lie: $FA_CACHE, else .cache in the repository `root`."""
    return Path(os.environ.get("FA_CACHE") or root / ".cache")


def check_out_folder(folder: Path) -> None:
    """Refuse a folder to write to that holds links out of it, or what a writer would wait on.

    The folder may come from somebody else, and a program that goes on with what it holds follows
    such names. The folder itself may be a link. Folders that links lead to are not looked into.

    Raises:
        UserError: Naming the link, pipe, device or socket.
    """
    root = folder.resolve()
    waiting = [root] if root.is_dir() else []
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    try:
                        with contextlib.suppress(FileNotFoundError, PermissionError):
                            os.stat(entry.path)  # fails for links in a circle
                        is_inside = Path(entry.path).resolve().is_relative_to(root)
                    except OSError:
                        is_inside = False
                    if not is_inside:
                        raise UserError(f"{entry.path}: is a link out of {folder}; remove it")
                elif entry.is_dir():
                    waiting.append(Path(entry.path))
                elif not entry.is_file():
                    raise UserError(f"{entry.path}: is a pipe, device or socket; remove it")


# -- locks ----------------------------------------------------------------------------------------


def lock_file(
    file: int | IO[Any],
    folder: Path,
    *,
    shared: bool = False,
    wait: bool = False,
    of_process: bool = False,
) -> bool:
    """Lock an open file.

    Args:
        file: Open for writing; where the lock is shared, for reading.
        folder: Where it lies, for messages.
        shared: Others may share the lock.
        wait: Until it is free.
        of_process: The lock is this process's own (POSIX): its children do not inherit it. Else it
            belongs to the open file, and ends with the last process that holds it open.
    Returns:
        False if somebody else holds it.
    Raises:
        UserError: If the file system offers no locks.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        _set_lock(file, kind, of_process=of_process)
    except (BlockingIOError, PermissionError):  # lockf may say EACCES
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"{folder}: its file system offers no locks; choose another") from error
        raise
    return True


def unlock(file: int | IO[Any]) -> None:
    """Free the lock of an open file, also for a forked process that holds the same open file."""
    _set_lock(file, fcntl.LOCK_UN)


def _set_lock(file: int | IO[Any], kind: int, *, of_process: bool = False) -> None:
    if of_process or not hasattr(fcntl, "F_OFD_SETLK"):  # macOS: its flock sees lockf
        (fcntl.lockf if of_process else fcntl.flock)(file, kind)
        return
    mode = kind & ~fcntl.LOCK_NB
    is_waiting = mode == kind != fcntl.LOCK_UN
    kinds = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK}
    whole_file = struct.pack("hhqqi4x", kinds.get(mode, fcntl.F_UNLCK), os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW if is_waiting else fcntl.F_OFD_SETLK, whole_file)


@contextmanager
def locked(path: Path, *, patience: float = 0.0, of_process: bool = False) -> Iterator[int | None]:
    """Hold a lock by name; the file is there only while somebody holds or wants it.

    Args:
        path: Of the lock file, in a folder that is there.
        patience: Seconds to wait for it; `math.inf` for ever.
        of_process: As in `lock_file`.
    Yields:
        The file descriptor of the lock, None if somebody else holds it.
    """
    deadline = time.monotonic() + patience
    descriptor = None
    while descriptor is None:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            is_locked = lock_file(
                opened, path.parent, wait=patience == math.inf, of_process=of_process
            )
            # The last holder removes the name before it unlocks: then there is a newer file.
            with contextlib.suppress(FileNotFoundError):
                if is_locked and os.path.samestat(os.fstat(opened), os.stat(path)):
                    descriptor = opened
        finally:
            if descriptor is None:
                os.close(opened)
        if descriptor is None and not is_locked:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
    try:
        if descriptor is not None:
            note_holder(descriptor)
        yield descriptor
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            unlock(descriptor)
            os.close(descriptor)


@contextmanager
def held(path: Path, *, patience: float | None = None, of_process: bool = True) -> Iterator[int]:
    """Hold a lock by name, as `locked`, or refuse to go on.

    The lock is this process's own: loaders' workers do not inherit it, and the system frees it
    however the process ends.

    Args:
        path: Of the lock file, in a folder that is there.
        patience: Seconds to wait for it; None: `HOLD_SECONDS`.
        of_process: As in `lock_file`.
    Yields:
        The file descriptor of the lock; a child that inherits it holds the lock as well, unless it
        is the process's own.
    Raises:
        UserError: If somebody else holds it; says who.
    """
    patience = HOLD_SECONDS if patience is None else patience
    with locked(path, patience=patience, of_process=of_process) as descriptor:
        if descriptor is None:
            place = path.parent if path.name == LOCK else path.with_suffix("")
            raise UserError(f"{place}: {holder(path)}; wait for it, stop it, or choose another out")
        yield descriptor


def note_holder(descriptor: int) -> None:
    """Write into a lock file who holds it: process, machine, since when, command."""
    record = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join(sys.argv)[:300],
    }
    with contextlib.suppress(OSError):  # a full disk; the lock holds without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)


def holder(path: Path) -> str:
    """Who works under a lock that is held, as a clause for messages."""
    note = read_record_or_none(path, {"pid": int, "host": str, "since": str, "command": str})
    if note is None:
        return "another process is at work here"
    return (
        f"process {note['pid']} on {note['host']} is at work here since {note['since']} "
        f"({note['command']})"
    )
