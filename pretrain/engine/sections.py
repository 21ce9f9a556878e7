"""Named parts of a training step: labels for a profiler, and a timer that adds them up.

``with section(FORWARD): ...`` is a label in any PyTorch profiler trace and costs a few microseconds
(docs/performance.md). While a ``SectionTimer`` is active the part is timed as well: by the host's
clock, and on a GPU by events on the stream, so that nothing is waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch.profiler import record_function

LOADER, TRANSFER, AUGMENTATION, WAIT = "loader", "transfer", "augmentation", "wait for views"
EMA_FORWARD, FORWARD, FA, LOSS = "EMA forward", "forward", "FA", "loss"
BACKWARD, GUARDS, OPTIMIZER = "backward", "guards", "optimiser"
EMA_UPDATE, QUEUE, LOGGING = "EMA update", "queue", "logging"

_timer: SectionTimer | None = None


def section(name: str) -> contextlib.AbstractContextManager:
    """The part of a step that has this name; inside compiled code it is no part of its own."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    timer = _timer
    if timer is None or not timer.takes_part():
        return record_function(name)
    return _Timed(name, timer)


@dataclass
class Stamp:
    """A moment: on the host's clock, and where the stream stands on a GPU."""

    host: float
    event: torch.cuda.Event | None

    def seconds_until(self, later: Stamp) -> float:
        """On the device's own clock where there is one."""
        if self.event is None or later.event is None:
            return later.host - self.host
        return self.event.elapsed_time(later.event) / 1e3


@dataclass
class Mark:
    """A finished section.

    Attributes:
        name: Which.
        step: In which step, from 0.
        parent: Number of the section around it; None if none is on the same stream.
        is_beside: Whether it ran on another stream than the steps, beside them.
    """

    name: str
    step: int
    parent: int | None
    is_beside: bool
    start: Stamp
    end: Stamp


@dataclass
class Cost:
    """What a section cost over all steps, seconds.

    Attributes:
        total: From its begin to its end.
        own: Without the sections inside it.
        host: As total, on the host's clock; on a GPU the time to launch the work.
        by_parent: ``own`` of it, by the name of the section around it ("" for none).
        is_beside: Whether it ran beside the steps, on a stream of its own.
        num_calls: How often it was entered.
    """

    total: float = 0.0
    own: float = 0.0
    host: float = 0.0
    by_parent: dict[str, float] = field(default_factory=dict)
    is_beside: bool = False
    num_calls: int = 0


class SectionTimer:
    """Times the sections of one thread, and whole steps, while its context is open.

    Args:
        device: Of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._thread = device, threading.get_ident()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[Mark | None] = []
        self._open: list[tuple[int, str, bool, Stamp]] = []  # number, name, is beside, start
        self._bounds: list[Stamp] = []

    def __enter__(self) -> SectionTimer:
        global _timer
        assert _timer is None, "one section timer at a time"
        _timer = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        global _timer
        _timer = None

    def takes_part(self) -> bool:
        """Whether sections can be timed here: in this thread, and outside a graph's capture."""
        if threading.get_ident() != self._thread:
            return False
        return self._stream is None or not torch.cuda.is_current_stream_capturing()

    def bound(self) -> None:
        """A step ends here and the next begins; the first call begins the first."""
        self._bounds.append(self._stamp())

    def begin(self, name: str) -> None:
        """A section begins."""
        number, is_beside = len(self._marks), self._is_beside()
        self._marks.append(None)
        self._open.append((number, name, is_beside, self._stamp()))

    def end(self) -> None:
        """The section that began last ends."""
        number, name, is_beside, start = self._open.pop()
        outer = self._open[-1] if self._open else None
        parent = outer[0] if outer is not None and outer[2] == is_beside else None
        step = len(self._bounds) - 1
        self._marks[number] = Mark(name, step, parent, is_beside, start, self._stamp())

    def step_seconds(self) -> list[float]:
        """Time of each whole step; waits for the device."""
        self._synchronise()
        return [a.seconds_until(b) for a, b in zip(self._bounds, self._bounds[1:], strict=False)]

    def costs(self) -> dict[str, Cost]:
        """What each section cost in the whole steps; waits for the device."""
        self._synchronise()
        num_steps = len(self._bounds) - 1
        inside = [0.0] * len(self._marks)
        for mark in self._finished():
            if mark.parent is not None:
                inside[mark.parent] += mark.start.seconds_until(mark.end)
        costs: dict[str, Cost] = {}
        for number, mark in enumerate(self._marks):
            if mark is None or not 0 <= mark.step < num_steps:
                continue
            cost = costs.setdefault(mark.name, Cost(is_beside=mark.is_beside))
            seconds = mark.start.seconds_until(mark.end)
            parent = None if mark.parent is None else self._marks[mark.parent]
            outer = "" if parent is None else parent.name
            own = seconds - inside[number]
            cost.by_parent[outer] = cost.by_parent.get(outer, 0.0) + own
            cost.total += seconds
            cost.own += own
            cost.host += mark.end.host - mark.start.host
            cost.num_calls += 1
        return costs

    def _finished(self) -> Iterator[Mark]:
        return (mark for mark in self._marks if mark is not None)

    def _stamp(self) -> Stamp:
        event = None
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        return Stamp(time.perf_counter(), event)

    def _is_beside(self) -> bool:
        return self._stream is not None and (
            torch.cuda.current_stream(self._device) != self._stream
        )

    def _synchronise(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._device)


class _Timed:
    """A label that a timer listens to."""

    def __init__(self, name: str, timer: SectionTimer) -> None:
        self._name, self._timer, self._label = name, timer, record_function(name)

    def __enter__(self) -> None:
        self._label.__enter__()
        self._timer.begin(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._timer.end()
        self._label.__exit__(kind, error, trace)
