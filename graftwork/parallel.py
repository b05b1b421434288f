"""Mapping in threads, in order, in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

WORKERS = os.cpu_count() or 1
AHEAD_BYTES = 64 * 2**20  # of results that wait
T = TypeVar("T")
R = TypeVar("R")


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], workers: int = WORKERS, size: Callable[[R], int] = lambda result: 0
) -> Iterator[R]:
    """Map in threads, in order; the results that wait are bounded in number and, by the mean of their sizes, in bytes.

    ``size`` returns the bytes that a result holds.
    """
    iterator = iter(items)
    mean = 0.0
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        try:
            while True:
                ahead = min(64 * workers, max(workers, int(AHEAD_BYTES / max(mean, 1.0))))
                while len(pending) < ahead:
                    try:
                        pending.append(pool.submit(function, next(iterator)))
                    except StopIteration:
                        break
                    if not mean and len(pending) >= 4 * workers:  # nothing is known of the sizes yet
                        break
                if not pending:
                    return
                result = pending.popleft().result()
                mean = 0.95 * mean + 0.05 * size(result) if mean else max(float(size(result)), 1.0)
                yield result
        finally:
            for future in pending:
                future.cancel()
