"""A signal is noted; echoes within 5 s are the same request; a later one has its usual effect."""

import contextlib
import os
import signal
import threading
from unittest.mock import Mock

import pytest

from common.errors import StoppedBySignal
from pretrain.engine import guards
from pretrain.engine.guards import SIGNALS, StopOnSignal


class Clock:
    """Stands in for the module's `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(guards, "time", clock)
    return clock


@pytest.fixture
def outside():
    """Signals that reach the handlers that were there before a request's own."""
    reached = []
    old = {n: signal.signal(n, lambda number, frame: reached.append(number)) for n in SIGNALS}
    yield reached
    for number, handler in old.items():
        signal.signal(number, handler)


def stopper(checkpoints=None):
    """Of a run of one process, after step 12."""
    request = StopOnSignal(Mock(), checkpoints or Mock())
    request.trainer = Mock()
    request.trainer.position.step = 12
    return request


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_noted_and_goes_no_further(clock, outside, number):
    checkpoints = Mock()
    with stopper(checkpoints) as request:
        request.on_step_end(Mock(), Mock())
        os.kill(os.getpid(), number)
        message = rf"stopped by {signal.Signals(number).name} after step 12; .*--resume"
        with pytest.raises(StoppedBySignal, match=message) as caught:
            request.on_step_end(Mock(), Mock())
    assert caught.value.number == number
    checkpoints.save.assert_called_once_with(waits=True)
    assert outside == []


def test_echoes_within_five_seconds_are_one_request(clock, outside):
    """As SLURM, its plugins and torchrun send them: several, of several kinds, to each process."""
    with stopper() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        for seconds, number in ((0.0, signal.SIGTERM), (2.0, signal.SIGUSR1), (3.0, signal.SIGINT)):
            clock.now += seconds
            os.kill(os.getpid(), number)
        assert request.number == signal.SIGUSR1  # the first one gives the exit status
    assert outside == []


def test_later_signal_has_its_usual_effect(clock, outside):
    with stopper() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        clock.now += 5.1
        os.kill(os.getpid(), signal.SIGINT)
        assert outside == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)  # from now on nothing is noted
        assert outside == [signal.SIGINT, signal.SIGTERM]
        assert request.number == signal.SIGTERM


def test_echoes_do_not_prolong_the_five_seconds(clock, outside):
    with stopper():
        os.kill(os.getpid(), signal.SIGTERM)
        clock.now += 4.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert outside == []
        clock.now += 1.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert outside == [signal.SIGTERM]


def test_handlers_are_restored_also_after_an_error(outside):
    before = [signal.getsignal(number) for number in SIGNALS]
    request = stopper()
    with contextlib.suppress(KeyError), request:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise KeyError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_set_no_handlers(outside):
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def inside():
        with stopper() as request:
            seen.append([signal.getsignal(number) for number in SIGNALS])
            seen.append(request.number)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before, 0]
