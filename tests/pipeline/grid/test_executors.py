"""Submitit's part: what is refused, and one job from the harness's side."""

import signal
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.grid.jobs import CommandJob, Step, SubmititExecutor, read_result
from tests.slurm.tiny_run import wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor sets what its jobs inherit."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_no_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(UserError, match="submitit cannot use --cluster slurm"):
        SubmititExecutor(tmp_path, ROOT, cluster="slurm")


def test_a_local_job_is_stopped_and_says_so(tmp_path: Path) -> None:
    """Ctrl-C does not reach it; a request to stop does, and its command can save."""
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: (folder / 'saved').touch() or sys.exit(143))\n"
        "(folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
        "(folder / 'ready').touch(); time.sleep(60)"
    )
    job = CommandJob(
        (Step("one", (sys.executable, "-S", "-c", code), tmp_path / "product"),),
        tmp_path / "cell", tmp_path,
    )  # fmt: skip
    before = signal.getsignal(signal.SIGINT)
    handle = SubmititExecutor(tmp_path / "submitit/%j", ROOT, cpus=3).submit(job)
    assert signal.getsignal(signal.SIGINT) is before
    wait_until((tmp_path / "ready").exists, 60, "the command")
    assert not handle.done()
    handle.stop()
    wait_until(handle.done, 60, "the end")
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "threads").read_text() == "3"
    assert read_result(tmp_path / "cell")["status"] == "stopped"
    handle.stop()  # too late, and harmless
