"""Bring remote shards into the cache before the workers ask for them."""

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from common.errors import UserError


class FetchAhead:
    """A thread that walks along the coming batches and fetches their shards.

    The order of an epoch is known in advance, so nothing is guessed. The thread stays at most
    `num_samples_ahead` samples in front of the batches that were taken. What it cannot fetch it
    leaves to the worker that needs it, which tells the user.

    Args:
        fetch: Makes sure that the shards of some samples are in the cache.
        batches: Sample numbers of the coming batches, int64 [n] each.
        num_samples_ahead: How far to run ahead, in samples.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray], None],
        batches: Iterator[np.ndarray],
        num_samples_ahead: int,
    ) -> None:
        self._fetch, self._batches, self._num_ahead = fetch, batches, num_samples_ahead
        self._num_taken = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)

    def __enter__(self) -> "FetchAhead":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if kind is None:  # a shard in flight is finished, or given up by its own time limit
            self._thread.join()

    def advance(self) -> None:
        """One more batch was taken."""
        with self._changed:
            self._num_taken += 1
            self._changed.notify()

    def _run(self) -> None:
        for number, sample_ids in enumerate(self._batches):
            num_ahead = max(1, self._num_ahead // max(1, len(sample_ids)))
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or number < self._num_taken + num_ahead  # noqa: B023
                )
                if self._is_closed:
                    return
            try:
                self._fetch(sample_ids)
            except UserError:
                return
