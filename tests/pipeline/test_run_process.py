"""Runs that are killed or stopped, as real processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
resumed = (out / "starts.txt").exists()
with (out / "starts.txt").open("a") as stream:
    stream.write(("resumed" if resumed else "fresh") + "\\n")
while not (out.parent / "release").exists():
    time.sleep(0.05)
(out / "done").write_text("x")
"""
DRIVER = """
import sys
from pathlib import Path
from pipeline.stages import Stage
from pipeline.run import Progress, Runner
script, out = sys.argv[1], Path(sys.argv[2])
stage = Stage(name="slow", command=(sys.executable, script, str(out / "slow")),
              outputs=("slow/done",), owns=("slow",),
              resumable=sys.argv[3] == "True")
Runner(Path(script).parent, out, ["again"]).run([stage], Progress(1))
"""


def start_slow(tmp_path: Path, *, resumable: bool, expected: list[str]) -> subprocess.Popen:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, "-c", DRIVER, str(script), str(tmp_path / "out"), str(resumable)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    starts = tmp_path / "out/slow/starts.txt"
    deadline = time.monotonic() + 60
    while not starts.exists() or starts.read_text().split() != expected:
        assert time.monotonic() < deadline, "the stage did not start"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("resumable", [True, False])
def test_killed_run_goes_on(tmp_path, resumable):
    process = start_slow(tmp_path, resumable=resumable, expected=["fresh"])
    process.kill()
    process.communicate()
    expected = ["fresh", "resumed"] if resumable else ["fresh"]
    (tmp_path / "out/slow/starts.txt").write_text("fresh\n")
    process = start_slow(tmp_path, resumable=resumable, expected=expected)
    (tmp_path / "out/release").write_text("")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert ("continues where it stopped" in output) == resumable
    assert ("did not finish last time" in output) != resumable
