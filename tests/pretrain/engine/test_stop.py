"""A signal is noted; echoes within 5 s are the same request; a later one has its usual effect."""

import contextlib
import os
import signal
import threading
from unittest.mock import Mock

import pytest

from common.errors import StoppedBySignal
from pretrain.data.loader import SIGNALS
from pretrain.engine import guards
from pretrain.engine.guards import StopOnSignal


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the module's `time`; its `now` is set by the test."""
    clock = Mock(now=1000.0)
    clock.monotonic = lambda: clock.now
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


def test_echoes_within_five_seconds_are_one_request_and_a_later_signal_has_its_effect(
    clock, outside
):
    """As SLURM, its plugins and torchrun send them: several, of several kinds, to each process."""
    with stopper() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        for seconds, number in ((0.0, signal.SIGTERM), (2.0, signal.SIGUSR1), (2.9, signal.SIGINT)):
            clock.now += seconds
            os.kill(os.getpid(), number)
        assert outside == []
        clock.now += 0.2  # echoes do not prolong the five seconds
        os.kill(os.getpid(), signal.SIGINT)
        assert outside == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)  # from now on nothing is noted
        assert outside == [signal.SIGINT, signal.SIGTERM]
        assert request.number == signal.SIGUSR1  # the first one gives the exit status


def test_handlers_are_restored_also_after_an_error(outside):
    before = [signal.getsignal(number) for number in SIGNALS]
    request = stopper()
    with contextlib.suppress(KeyError), request:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise KeyError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_set_no_handlers(outside):
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def inside():
        with stopper():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == before
