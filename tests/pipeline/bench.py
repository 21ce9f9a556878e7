"""Stages that wait for files of each other or of the test, as processes of their own."""

import io
import sys
from pathlib import Path

from pipeline.plan import Stage, read_run
from pipeline.run import Limits, Progress, Runner

# A stage: says that it has begun, waits for files of others or of the test, leaves its output.
SCRIPT = """
import os, pathlib, sys, time
out, name, wait = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
with (out.parent / "begun.txt").open("a") as stream:
    stream.write(name + "\\n")
(out.parent / (name + ".begun")).write_text(str(os.getpid()))
deadline = time.monotonic() + 40
while not all((out.parent / file).exists() for file in wait):
    time.sleep(0.02)
    if time.monotonic() > deadline:
        sys.exit("waited in vain for " + " ".join(wait))
if (out.parent / (name + ".breaks")).exists():
    sys.exit(3)
print(name, "threads", os.environ.get("OMP_NUM_THREADS"))
(out / name).write_text(name)
"""


class Bench:
    """Stages a, b, ... of one group; each begins, waits for files, and leaves one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.out.mkdir()
        self.script = folder / "stage.py"
        self.script.write_text(SCRIPT)
        self.shown = io.StringIO()

    def stage(self, name: str, *wait: str, group: str = "detection") -> Stage:
        command = (sys.executable, "-S", str(self.script), str(self.out), name, *wait)
        return Stage(
            name=name, command=command, outputs=(name,), owns=(name,), resumable=True, group=group
        )

    def run(self, stages: list[Stage], parallel: int, *, threads=None, minutes=None, **options):
        limits = Limits(parallel, threads, minutes=minutes)
        runner = Runner(self.folder, self.out, ["again"], limits)
        runner.run(stages, Progress(len(stages), self.shown), **options)
        return runner

    def begun(self) -> list[str]:
        return (self.folder / "begun.txt").read_text().split()

    def records(self) -> dict[str, dict]:
        return read_run(self.out)["stages"]

    def states(self) -> dict[str, str]:
        return {name: record["status"] for name, record in self.records().items()}
