"""Damaged inputs of every kind are refused, or read whole, within bounds: tests/fuzz/run.py."""

import subprocess
import sys

import pytest

NUM_MUTATIONS = 400


@pytest.mark.slow
def test_damaged_inputs_are_refused_or_read_whole() -> None:
    words = ["-m", "tests.fuzz.run", "--mutations", str(NUM_MUTATIONS), "--seed", "1"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert f"{NUM_MUTATIONS} cases" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
