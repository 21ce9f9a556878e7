"""The one call for a GPU machine: its parts at tiny sizes, a part that fails, the table."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import gpu_all
from benchmarks.gpu_all import Part
from benchmarks.harness import ROOT


@pytest.mark.slow
def test_dry_run_on_the_cpu_writes_one_json_and_one_table(tmp_path):
    """Without the tests marked gpu: they would be skipped one by one."""
    command = [
        "bash", str(ROOT / "benchmarks/gpu_all.sh"), "--out", str(tmp_path / "out"), "--tiny",
        "--only", "train_step", "--only", "fa_overhead",
    ]  # fmt: skip
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {name: one["status"] for name, one in found["parts"].items()} == {
        "train_step": "done", "fa_overhead": "done"
    }  # fmt: skip
    assert "CPU, tiny sizes" in found["device"]
    table = (tmp_path / "out/gpu.md").read_text()
    assert table == done.stdout
    assert "| - |" not in table  # every row has its figure
    rate = found["parts"]["train_step"]["figures"]["images_per_second"]["ours"]
    assert f"| {rate:.4g} |" in table


def test_its_tests_are_all_marked_ones_and_need_no_detectron2():
    """A bare machine has none, and pytest stops at a file that cannot be imported."""
    places = [ROOT / place for place in gpu_all.GPU_TESTS]
    files = {
        file
        for place in places
        for file in (place.rglob("test_*.py") if place.is_dir() else [place])
    }
    marked = {file for file in (ROOT / "tests").rglob("test_*.py")
              if "pytest.mark." + "gpu" in file.read_text()}  # fmt: skip
    assert marked <= files
    importing = re.compile(
        r"^(from|import) (detection|detectron2|tests\.detection)\b", re.MULTILINE
    )
    assert [file.name for file in files if importing.search(file.read_text())] == []


def test_the_whole_call_is_planned_within_eight_minutes():
    assert sum(part.limit for part in gpu_all.parts(is_tiny=False, num_workers=15)) <= 8 * 60 - 20


@pytest.mark.parametrize(
    ("code", "limit", "status", "last"),
    [
        ("print('12 passed in 3 s')", 60, "done", "12 passed in 3 s"),
        ("raise SystemExit('no memory')", 60, "failed with status 1", "no memory"),
        ("import time; time.sleep(60)", 1, "stopped after 1 s", ""),
    ],
)
def test_a_part_that_fails_is_told_and_leaves_no_figures(tmp_path, code, limit, status, last):
    (tmp_path / "one.json").write_text('{"speed": 1}')  # of an earlier call
    part = Part("one", ["-c", code], limit, {"speed": (["speed"], ">= 1")})
    result = gpu_all.run_part(part, tmp_path)
    assert (result["status"], result["last"], result["figures"]) == (status, last, None)
    assert f"| {status} |" in gpu_all.table({"one": result}, [part], "a card")


def test_what_the_machine_lacks_is_named(tmp_path):
    script = str(ROOT / "benchmarks/gpu_all.sh")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *find_spec*cv2*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    command, environment = ["bash", script, "--out", "x"], os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot import: cv2; install them" in done.stderr
