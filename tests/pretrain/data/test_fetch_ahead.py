import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from common.errors import UserError
from pretrain.data.loader import FetchAhead


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait until the condition holds; False if it never does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def batches(num: int, size: int = 4) -> list[np.ndarray]:
    return [np.arange(i * size, (i + 1) * size) for i in range(num)]


def test_stays_within_its_lead_and_follows() -> None:
    fetched: list[list[int]] = []
    with FetchAhead(lambda ids: fetched.append(ids.tolist()), iter(batches(10)), 3) as ahead:
        assert until(lambda: len(fetched) == 3)
        time.sleep(0.05)
        assert len(fetched) == 3
        for number in range(1, 8):
            ahead.advance()
            assert until(lambda number=number: len(fetched) == 3 + number)
    assert fetched == [ids.tolist() for ids in batches(10)]


def test_an_error_is_left_to_the_worker_that_needs_the_shard() -> None:
    tried = []

    def fetch(ids: np.ndarray) -> None:
        tried.append(int(ids[0]))
        raise UserError("the server is away")

    with FetchAhead(fetch, iter(batches(5)), 5):
        assert until(lambda: tried == [0])
    assert tried == [0]


def test_leaving_by_an_error_does_not_wait_for_a_fetch() -> None:
    release = threading.Event()
    with (
        pytest.raises(RuntimeError, match="left early"),
        FetchAhead(lambda ids: release.wait(10) and None, iter(batches(5)), 1),
    ):
        raise RuntimeError("left early")
    assert not release.is_set()
    release.set()
