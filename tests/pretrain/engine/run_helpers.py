"""What tests of whole runs and of several processes share."""

import subprocess

import torch


def assert_same_state(a, b, where=""):
    """Equal bit for bit, through dicts and lists; `where` says in which part they differ."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def wait_for_workers(workers: list[subprocess.Popen], timeout: float) -> None:
    """All must end well; none outlives the first that does not."""
    try:
        for worker in workers:
            printed, _ = worker.communicate(timeout=timeout)
            assert worker.returncode == 0, printed
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.communicate()
