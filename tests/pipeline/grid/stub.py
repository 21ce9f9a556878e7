"""Stands in for submitit: jobs 'run' when they are looked at, by a function of the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import write_json
from pipeline.grid.jobs import CommandJob, Handle


@dataclass
class StubHandle(Handle):
    effect: Callable[[CommandJob], dict[str, Any]]
    polls: int
    stopped: bool = False
    ended: bool = False

    def done(self) -> bool:
        if self.ended:
            return True
        self.polls -= 1
        if self.stopped:
            result = {"status": "stopped", "error": "asked to"}
        elif self.polls <= 0:
            result = self.effect(self.job)
        else:
            return False
        write_json(self.job.folder / "job.json", {"seconds": 1.0, "error": None, **result})
        self.ended = True
        return True

    def stop(self) -> None:
        self.stopped = True


@dataclass
class StubExecutor:
    """Notes what it was given, and how many jobs it held at once."""

    effect: Callable[[CommandJob], dict[str, Any]]
    polls: int = 1
    handles: list[StubHandle] = field(default_factory=list)
    most_at_once: int = 0

    def submit(self, job: CommandJob) -> StubHandle:
        self.handles.append(StubHandle(job, True, self.effect, self.polls))
        at_once = sum(not handle.ended for handle in self.handles)
        self.most_at_once = max(self.most_at_once, at_once)
        return self.handles[-1]


def finished(product: Path, value: Any) -> dict[str, Any]:
    """Leave a product and a good end."""
    write_json(product, value)
    return {"status": "finished"}


def make_index(folder: Path, digit: str) -> Path:
    """As much of a shard set as a study reads before a run."""
    folder.mkdir(parents=True)
    index = {"shards": [{"name": "shard-000000.tar", "sha256": digit * 64}]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
