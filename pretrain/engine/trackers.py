"""Weights & Biases and MLflow, through their own clients, for who has them installed.

Where the figures go (a server, or a folder where there is no network) is for the clients' own
environment variables to say: ``WANDB_MODE``, ``WANDB_BASE_URL``, ``MLFLOW_TRACKING_URI``, ..
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import TrackingConfig
from pretrain.errors import require

FILE = "tracking.json"
"""In the run folder: under which id each service knows the run, so that a resume goes on there."""
_MLFLOW_MOST_PARAMS = 100  # in one call
_MLFLOW_LONGEST_VALUE = 500  # characters


class Tracker(Protocol):
    """A service that is told the figures."""

    name: str
    run_id: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of one row."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        ...


def check_installed(config: TrackingConfig) -> None:
    """Refuse a service whose client is missing.

    Raises:
        UserError: Naming the command that installs it.
    """
    for name in _wanted(config):
        require(
            importlib.util.find_spec(name) is not None,
            f"tracking.{name}=true, but its client is not installed: run "
            f"`{sys.executable} -m pip install {name}`, or set tracking.{name}=false",
        )


def _wanted(config: TrackingConfig) -> list[str]:
    wanted = {"wandb": config.wandb, "mlflow": config.mlflow}
    return [name for name, is_wanted in wanted.items() if is_wanted]


class WandbTracker:
    """Weights & Biases; a resumed run goes on under its id.

    Rows of steps that were told before a kill are told again; the service keeps the first.
    """

    name = "wandb"

    def __init__(
        self, project: str, folder: Path, config: dict[str, Any], run_id: str | None
    ) -> None:
        client = importlib.import_module("wandb")
        self._run = client.init(
            project=project, name=folder.name, dir=str(folder), config=config, id=run_id,
            resume="allow",
        )  # fmt: skip
        self.run_id: str = self._run.id

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of one row."""
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        """Send what is left; marks the run as finished or failed."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """MLflow: the project is the experiment, the config the parameters.

    Rows of steps that were told before a kill are told again and stand there twice.
    """

    name = "mlflow"

    def __init__(
        self, project: str, folder: Path, config: dict[str, Any], run_id: str | None
    ) -> None:
        self._client = importlib.import_module("mlflow")
        self._client.set_experiment(project)
        run = self._client.start_run(run_id=run_id, run_name=folder.name)
        self.run_id: str = run.info.run_id
        if run_id is None:  # parameters cannot be told twice
            items = list(flat(config).items())
            for start in range(0, len(items), _MLFLOW_MOST_PARAMS):
                self._client.log_params(dict(items[start : start + _MLFLOW_MOST_PARAMS]))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of one row."""
        self._client.log_metrics(values, step=step)

    def close(self, *, failed: bool) -> None:
        """Marks the run as finished or failed."""
        self._client.end_run("FAILED" if failed else "FINISHED")


class Trackers:
    """The services of the config. One that fails on the way is left out; the run goes on.

    Nothing is lost then: ``metrics.jsonl`` has every row.

    Args:
        config: Which ones.
        folder: Of the run.
        plain: The whole config as plain types.
        is_new: The run starts from nothing: earlier ids are not gone on with.

    Raises:
        UserError: If a client is missing.
    """

    def __init__(
        self, config: TrackingConfig, folder: Path, plain: dict[str, Any], *, is_new: bool
    ) -> None:
        check_installed(config)
        path = folder / FILE
        known = {} if is_new or not path.exists() else json.loads(path.read_text("utf-8"))
        kinds = {"wandb": WandbTracker, "mlflow": MlflowTracker}
        self._open: list[Tracker] = [
            kinds[name](config.project, folder, plain, known.get(name)) for name in _wanted(config)
        ]
        if self._open:
            ids = known | {tracker.name: tracker.run_id for tracker in self._open}
            temporary = path.with_name(path.name + ".partial")
            temporary.write_text(json.dumps(ids) + "\n", encoding="utf-8")
            os.replace(temporary, path)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> list[str]:
        """Tell the numbers of a row, as ``kind/name``.

        Returns:
            What to tell of services that failed, a line each.
        """
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if not numbers:
            return []
        notes = []
        for tracker in list(self._open):
            try:
                tracker.log(step, numbers)
            except Exception as error:  # a client raises what its network raises
                self._open.remove(tracker)
                notes.append(_told(tracker, error))
        return notes

    def close(self, *, failed: bool) -> list[str]:
        """Let every service finish; returns what to tell of those that could not."""
        notes = []
        for tracker in self._open:
            try:
                tracker.close(failed=failed)
            except Exception as error:  # as above
                notes.append(_told(tracker, error))
        self._open = []
        return notes


def _told(tracker: Tracker, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"tracking.{tracker.name} failed ({type(error).__name__}: {reason}); the run goes on "
        "without it, metrics.jsonl has every row"
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value)[:_MLFLOW_LONGEST_VALUE]
    return found
