"""Damaged inputs of every kind through the readers of the programs, each in a process of its own.

    .venv/bin/python -m tests.fuzz.run --mutations 10000 --seed 1 [--kinds tar,yaml]

A case is a function of (seed, kind, number). It must end within a time limit and below 2 GiB, as a
refusal (UserError, OSError or RunFailed, as the programs report them) or as a success in which an
independent reader finds nothing lost; and it writes nothing outside its own folder.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from random import Random
from typing import Any

from common.errors import UserError, run_command
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.mutate import OUTSIDE

MAX_SECONDS, MAX_CPU_SECONDS = 12.0, 6.0  # of the wall: the machine may be busy
MAX_BYTES, KILLED_ABOVE = 2 << 30, 3 << 30  # resident, with all libraries
COMMAND_SHARE = 0.12  # of the cases, through a whole command line
GOOD = {"refused", "accepted"}
MAX_MESSAGE = 10_000  # characters


def case(kind: Kind, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """Damage an input, read it; runs in a process of its own."""
    rng = Random(f"{seed}/{kind.name}/{number}")
    result: dict[str, Any] = {"what": "", "command": None}
    given = folder / "in"
    shutil.copytree(kind.base, given, symlinks=True)
    (folder / "in" / OUTSIDE).mkdir(exist_ok=True)
    (folder / OUTSIDE).mkdir()
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    faults: list[str] = []
    try:
        result["what"] = kind.mutate(given, rng)
    except Exception:
        return result | {"outcome": "died", "detail": "harness: " + traceback.format_exc()}
    if rng.random() < COMMAND_SHARE:
        result["command"] = kind.command(given, rng)
    (folder / "result.json").write_text(json.dumps(result))  # for one that is killed

    def work() -> int:
        if result["command"] is not None:
            program, *words = result["command"]
            return importlib.import_module(program).main(words)
        faults.extend(kind.read(given))
        return 0

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            status = run_command(work)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and "/lib/" not in f.filename]
        places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in own[:-4:-1])
        name = f"{type(error).__name__}: {error!s:.150} at {places}"
        is_user = isinstance(error, UserError)
        return result | {"outcome": "traceback", "detail": ("printing " if is_user else "") + name}
    if any((folder / OUTSIDE).iterdir()) or any((given / OUTSIDE).iterdir()):
        return result | {"outcome": "outside", "detail": "something was written outside"}
    message = said.getvalue()
    if faults:
        return result | {"outcome": "silent", "detail": "; ".join(faults)[:500]}
    if "Traceback" in message or (status and len(message) > MAX_MESSAGE):
        return result | {"outcome": "traceback", "detail": f"message: {message[-300:]}"}
    outcome = "refused" if status else "accepted"
    return result | {"outcome": outcome, "detail": f"{status}: {message.strip()[:300]}"}


def in_child(kind: Kind, number: int, seed: int, folder: Path) -> None:
    """Run a case in a forked process and leave its result in a file."""
    os.setsid()
    folder.mkdir()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
    result = case(kind, number, seed, folder)
    (folder / "result.json").write_text(json.dumps(result, default=str))


def resident(process: int) -> int:
    """Bytes that a process holds in memory."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def finish(folder: Path, status: int, usage: Any, killed: str) -> dict[str, Any]:
    """The result of a process that has ended."""
    result: dict[str, Any] = {"what": "", "outcome": "died", "detail": f"status {status}"}
    with contextlib.suppress(OSError, ValueError):
        result |= json.loads((folder / "result.json").read_text())
    seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
    if killed or peak > MAX_BYTES or seconds > MAX_CPU_SECONDS:
        result["outcome"] = killed or ("memory" if peak > MAX_BYTES else "slow")
        result["detail"] = f"{seconds:.1f} s, {peak >> 20} MiB; {result['detail']}"
    return result


def run(names: Sequence[str], num_each: int, seed: int) -> Counter[str]:
    """Run the cases of some kinds, two at a time, and tell what went wrong; counts by outcome."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as text:
        place = Path(text)
        kinds = [KINDS[name](place / "base" / name) for name in names]
        waiting = [(kind, number) for number in range(num_each) for kind in kinds][::-1]
        running: dict[int, tuple[Kind, int, Path, float]] = {}
        while waiting or running:
            while waiting and len(running) < 2:
                kind, number = waiting.pop()
                folder = place / f"{kind.name}-{number}"
                process = os.fork()
                if not process:
                    try:
                        in_child(kind, number, seed, folder)
                    finally:
                        os._exit(0)
                running[process] = (kind, number, folder, time.monotonic())
            time.sleep(0.004)
            for process, (kind, number, folder, started) in list(running.items()):
                killed = "memory" if resident(process) > KILLED_ABOVE else ""
                killed = "hang" if time.monotonic() - started > MAX_SECONDS else killed
                if killed:
                    os.killpg(process, 9)
                done, status, usage = os.wait4(process, 0 if killed else os.WNOHANG)
                if done:
                    del running[process]
                    result = finish(folder, status, usage, killed)
                    counts[result["outcome"]] += 1
                    if result["outcome"] not in GOOD:
                        how = " by command" * bool(result.get("command"))
                        print(f"{kind.name} {number}: {result['outcome']}{how}:",
                              f"[{result['what']}] {result['detail']}", flush=True)  # fmt: skip
                    shutil.rmtree(folder, ignore_errors=True)
    return counts


def main() -> int:
    """Print what went wrong, and counts; exit status 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=600, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    names = options.kinds.split(",")
    counts = run(names, -(-options.mutations // len(names)), options.seed)
    print(f"{counts.total()} cases:", dict(counts))
    return int(bool(counts.keys() - GOOD))


if __name__ == "__main__":
    sys.exit(main())
