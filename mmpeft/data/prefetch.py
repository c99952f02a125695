"""Prefetch: threads make the next batches while one is in use; in order, whatever takes how long."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
MOST_WORKERS = 8
"""Threads that hold Python's lock part of the time gain nothing beyond some number."""


def default_workers() -> int:
    """Threads that begin batches: one for every second core that this process may use, the others are the step's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // 2))


def ahead(
    begin: Callable[[int], Callable[[], Item]], numbers: Iterable[int], workers: int = 1
) -> Generator[Item]:
    """``begin(number)()`` of every number, in order. As many as there are workers, and one more, are ahead of who asks.

    Args:
        begin: what several threads may do at once, for different numbers; what it gives ends the item, in a thread of
            its own that takes one number after the other: there a number finds what the one before it left.
        numbers: of the items.
        workers: threads that begin. What comes does not depend on it.

    Raises:
        Exception: whatever making an item raised, when it is that item's turn.
    """
    beginners = ThreadPoolExecutor(workers, thread_name_prefix="begin batches")
    ender = ThreadPoolExecutor(1, thread_name_prefix="end batches")
    try:
        coming = deque()
        for number in numbers:
            begun = beginners.submit(begin, number)
            coming.append(ender.submit(lambda begun=begun: begun.result()()))
            if len(coming) > workers + 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:  # those that were begun when nobody wants more are ended first
        ender.shutdown(wait=False, cancel_futures=True)
        beginners.shutdown(cancel_futures=True)
        ender.shutdown()
