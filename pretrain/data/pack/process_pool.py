"""A pool of worker processes that never outlive their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from common.errors import RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_unordered(
    function: Callable[..., Result], items: Sequence[Item], num_workers: int, *rest: Any
) -> Generator[tuple[Item, Result]]:
    """Call `function(item, *rest)` for each item; yields (item, result) as they are finished.

    At most two items per worker are on their way, so that memory does not grow with the items.

    Args:
        function: Importable by name where there are several workers.
        items: What to work through.
        num_workers: Processes; 0 or 1 works in this one, in order.
        rest: Further arguments, the same for all.
    """
    if num_workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, function(item, *rest)
        return
    pool = make_pool(min(num_workers, len(items)))
    pending: dict[Future[Result], Item] = {}
    waiting = iter(items)
    try:
        while True:
            while len(pending) < 2 * num_workers and (item := next(waiting, None)) is not None:
                pending[pool.submit(function, item, *rest)] = item
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RunFailed(
            "a worker was killed, perhaps for want of memory; give the same command again with a "
            "smaller --num-workers: it goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def make_pool(num_workers: int) -> ProcessPoolExecutor:
    """Fresh processes (no copies of this one's threads) that leave Ctrl-C to the parent."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
