"""Commit, versions, machine, memory."""

import multiprocessing
import subprocess

import numpy as np

from common import provenance


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_commit_tells_of_changes(tmp_path):
    assert provenance.commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    clean = provenance.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert provenance.commit(tmp_path) == f"{clean}+changes"


def hold(megabytes, ready, done):
    block = np.ones(megabytes << 20, np.uint8)
    ready.set()
    done.wait(60)
    assert block[0] == 1


def test_peak_memory_counts_live_workers_only():
    subprocess.run(["true"], check=True)  # an ended child counts for nothing
    before = provenance.peak_memory_bytes()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    worker = context.Process(target=hold, args=(64, ready, done))
    worker.start()
    try:
        assert ready.wait(60)
        grown = provenance.peak_memory_bytes() - before
    finally:
        done.set()
        worker.join()
    assert 60 << 20 < grown < 160 << 20
    assert provenance.peak_memory_bytes() - before < 32 << 20
