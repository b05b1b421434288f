"""Mapping in threads, in order, in bounded memory; and how many cores there are for it."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

AHEAD_BYTES = 64 * 2**20  # of results that wait
T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Return how many CPU cores this process may use: the affinity, and the quota of a container's cgroup.

    torch counts the machine's: a pod limited to 2 cores of 64 would run 64 threads that wait for each other.
    """
    # Not every system has affinities; none but Linux has cgroups.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return allowed


WORKERS = cores()


def bounded_map(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int = WORKERS,
    size: Callable[[R], int] = lambda result: 0,
    most: int = 64,
) -> Iterator[R]:
    """Map in threads, in order; the results that wait are bounded in number and, by the mean of their sizes, in bytes.

    ``size`` returns the bytes that a result holds; at most ``most`` results a thread wait.
    """
    iterator = iter(items)
    mean = 0.0
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        try:
            while True:
                ahead = min(most * workers, max(workers, int(AHEAD_BYTES / max(mean, 1.0))))
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
