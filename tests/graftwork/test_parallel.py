"""Mapping in threads: in order, bounded in number and bytes, and nothing goes on after an error."""

import itertools

import pytest

from graftwork.parallel import AHEAD_BYTES, WORKERS, bounded_map


def test_bounded_map_keeps_order_and_does_not_run_ahead() -> None:
    """A user's memory would fill with a source's images, or their rows be mixed up."""
    taken = itertools.count()
    results = bounded_map(lambda n: n * n, taken)
    assert [next(results) for _ in range(300)] == [n * n for n in range(300)]
    results.close()
    assert next(taken) <= 300 + 64 * WORKERS + 1


def test_bounded_map_hands_on_what_was_raised() -> None:
    """A user's failing disk would pass unseen, and examples be missing."""
    results = bounded_map(lambda n: 1 // (n - 3), range(10_000))
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_large_results_do_not_wait_in_numbers() -> None:
    """A user's photographs of ten megabytes each would fill the memory, 128 of them waiting to be written."""
    taken = itertools.count()
    results = bounded_map(lambda n: n, taken, 2, lambda n: AHEAD_BYTES // 4)
    for _ in range(40):
        next(results)
    results.close()
    assert next(taken) <= 40 + 4 * 2 + 1
