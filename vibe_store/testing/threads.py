"""Calls that are made at the same moment, to see what they do to each other."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["at_once"]


def at_once(count: int, action: Callable[[int], object]) -> list[object]:
    """Call ``action(i)`` in ``count`` threads that start together; return what each returned or raised."""
    barrier = threading.Barrier(count)

    def call(index: int) -> object:
        barrier.wait()
        try:
            return action(index)
        except Exception as error:  # noqa: BLE001 - the caller looks at whatever was raised
            return error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet where they seldom do
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(call, range(count)))
    finally:
        sys.setswitchinterval(interval)
