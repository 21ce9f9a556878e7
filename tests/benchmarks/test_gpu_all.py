"""The one call for a GPU machine: its parts at tiny sizes, a part that fails, the table."""

import contextlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

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


def test_its_tests_are_all_marked_ones():
    marked = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")
              if "pytest.mark." + "gpu" in file.read_text()}  # fmt: skip
    assert marked == set(gpu_all.GPU_TESTS)


def installed_with(names):
    """These distributions, and all that pip installs beside them."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower()
        if name in found:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):  # of another platform
            requirements = [
                text for text in metadata.requires(name) or [] if "extra ==" not in text
            ]
            todo += [text for one in requirements for text in re.findall(r"^[\w.-]+", one)]
            found.add(name)
    return found


@pytest.mark.slow
def test_its_tests_need_only_what_the_bundle_brings_and_the_machine_has(tmp_path):
    """pytest stops at a file that cannot be imported, and none of the tests would run."""
    script = (ROOT / "benchmarks/gpu_all.sh").read_text()
    expected, wheels = (
        match.split()
        for match in re.findall(r'^(?:expected|wheels)="([^"]*)"', script, re.MULTILINE)
    )
    modules = {"cv2": "opencv-python", "PIL": "pillow"}
    there = installed_with(modules.get(name, name) for name in expected) | set(wheels)
    for name in there:
        site = Path(str(metadata.distribution(name).locate_file("")))
        for top in {file.parts[0] for file in metadata.files(name) or []} - {".."}:
            with contextlib.suppress(FileExistsError):
                (tmp_path / top).symlink_to(site / top)
    command = [sys.executable, "-S", "-m", "pytest", "--collect-only", "-q", "-m", "gpu",
               "-p", "no:cacheprovider", *gpu_all.GPU_TESTS]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for file in gpu_all.GPU_TESTS:
        assert f"{file}::" in done.stdout


def test_figures_go_where_the_caller_stands(tmp_path):
    """From a bundle too, which may be lost with the machine."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) exit 0;; esac\necho "$PWD $*"\n')
    python.chmod(0o755)
    script = str(ROOT / "benchmarks/gpu_all.sh")
    done = subprocess.run(
        ["bash", script, "--out", "figures"], env=os.environ | {"PYTHON": str(python)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split()[::2] == [str(tmp_path), "--out"]


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
