"""Where cells run: processes on this machine or a SLURM cluster, both through submitit."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from pipeline.grid.jobs import CommandJob

_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local tasks after a time; here nobody asked for it


class Handle(Protocol):
    """A job that was submitted."""

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...


class Executor(Protocol):
    """Takes jobs."""

    def submit(self, job: CommandJob) -> Handle:
        """Start a job, or queue it."""
        ...


@dataclass(frozen=True)
class Resources:
    """What each cell is given.

    Attributes:
        cluster: "local" or "slurm".
        gpus: Of a cell.
        cpus: Of a cell.
        minutes: SLURM's time limit; then the job saves and is queued again.
        partition: Of SLURM.
        slurm_options: Further lines for sbatch.
    """

    cluster: str = "local"
    gpus: int = 0
    cpus: int = 1
    minutes: int = 240
    partition: str | None = None
    slurm_options: Mapping[str, str] = field(default_factory=dict)


class SubmititExecutor:
    """Cells as submitit jobs."""

    def __init__(self, folder: Path, resources: Resources, root: Path) -> None:
        """Get ready.

        Args:
            folder: Of submitit's files.
            resources: Of each cell.
            root: The repository; jobs find their code there.
        Raises:
            UserError: If there is no such cluster.
        """
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
        os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus))  # runs inherit it
        path = os.environ.get("PYTHONPATH")
        if str(root) not in (path or "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), path]))
        import submitit

        logging.getLogger("submitit").setLevel(
            logging.ERROR
        )  # without accounting it warns for ever
        is_local = resources.cluster == "local"
        extra = {"signal": "USR1@120", "requeue": True, **resources.slurm_options}
        try:
            self._executor = submitit.AutoExecutor(
                folder=folder, cluster=resources.cluster,
                slurm_max_num_timeout=100, local_max_num_timeout=100,
            )  # fmt: skip
            self._executor.update_parameters(
                name="cell", nodes=1, tasks_per_node=1, cpus_per_task=resources.cpus,
                gpus_per_node=resources.gpus,
                timeout_min=_LOCAL_MINUTES if is_local else resources.minutes,
                slurm_partition=resources.partition, slurm_additional_parameters=extra,
            )  # fmt: skip
        except RuntimeError as error:  # no srun
            raise UserError(
                f"submitit cannot use --cluster {resources.cluster}: {error}"
            ) from error
        self._is_local = is_local

    def submit(self, job: CommandJob) -> Handle:
        """Start a job, or queue it.

        Raises:
            UserError: If the cluster refuses it.
        """
        # Ctrl-C is for the harness, which tells its cells; what it starts inherits the deafness.
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _Submitted(self._executor.submit(job), self._is_local)
        except (RuntimeError, OSError) as error:
            raise UserError(f"submitit cannot submit a cell: {error}") from error
        finally:
            signal.signal(signal.SIGINT, old)


class _Submitted:
    def __init__(self, job: Any, is_local: bool) -> None:
        self._job, self._is_local = job, is_local

    def done(self) -> bool:
        return self._job.done()

    def stop(self) -> None:
        if self.done():
            return
        if self._is_local:
            os.kill(int(self._job.job_id), signal.SIGTERM)  # submitit's controller passes it on
        else:
            self._job.cancel(check=False)  # scancel: SIGTERM, later SIGKILL
