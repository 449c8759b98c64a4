"""Calls that are made at the same moment, to see what they do to each other."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

__all__ = ["at_once", "switching_often"]


def at_once(count: int, action: Callable[[int], object]) -> list[object]:
    """Call ``action(i)`` in ``count`` threads that start together; return what each returned or raised."""
    barrier = threading.Barrier(count)

    def call(index: int) -> object:
        barrier.wait()
        try:
            return action(index)
        except Exception as error:  # noqa: BLE001 - the caller looks at whatever was raised
            return error

    with switching_often(), ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@contextmanager
def switching_often() -> Iterator[None]:
    """Let threads take turns so often that they meet where they seldom do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
