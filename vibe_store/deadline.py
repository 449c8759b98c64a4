"""How long what is under way may still take, for every layer below to see without being passed it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["is_cancelled", "remaining", "until", "within"]

_deadline: ContextVar[float | None] = ContextVar("vibe_store_deadline", default=None)
"""By the clock of :func:`time.monotonic`."""

_cancels: ContextVar[tuple[threading.Event, ...]] = ContextVar("vibe_store_cancels", default=())


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give the body so long; inside another :func:`within` the earlier of the two deadlines holds.

    Nothing is cut off by this alone: storages whose requests can take long ask :func:`remaining`, and raise
    ``TimeoutError``. A thread that the body starts sees the deadline only if it runs in a copy of the body's
    context.

    Args:
        seconds: from now on; 0 or less is a deadline that has passed.
    """
    own, outer = time.monotonic() + seconds, _deadline.get()
    token = _deadline.set(own if outer is None else min(own, outer))
    try:
        yield
    finally:
        _deadline.reset(token)


@contextmanager
def until(cancel: threading.Event) -> Iterator[None]:
    """Let the body go on until another thread sets an event, as when Ctrl-C ends what the body is part of.

    As with :func:`within`, nothing is cut off by this alone: storages that wait ask :func:`is_cancelled`.
    """
    token = _cancels.set((*_cancels.get(), cancel))
    try:
        yield
    finally:
        _cancels.reset(token)


def is_cancelled() -> bool:
    """Whether an event of :func:`until` is set, so that nobody wants what is under way any more."""
    return any(cancel.is_set() for cancel in _cancels.get())


def remaining() -> float | None:
    """Return how many seconds are left, 0 when the deadline has passed; None where there is none."""
    if is_cancelled():
        return 0.0
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())
