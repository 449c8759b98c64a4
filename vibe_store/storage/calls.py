"""The requests to an object store: tried again when that may help, interruptible, and with a deadline.

This is the one place where requests are tried again; the clients' own retries, which know no deadline, are
turned off where the user did not set them.
"""

import asyncio
import contextvars
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_random_exponential,
)

from vibe_store.deadline import is_cancelled, remaining
from vibe_store.errors import InvalidValueError

__all__ = ["AT_ONCE", "Calls", "GaveUpError", "check_retries", "together"]

_logger = logging.getLogger("vibe_store")
_T = TypeVar("_T")

AT_ONCE = 8
"""How many transfers of one storage run at once, of all the files that its callers put and get together."""

_FEW_BYTES = 1 << 20
_LONGEST_WAIT_SECS = 20.0
_PATIENCE_SECS = 60.0
"""How long a request may take beside the time that its bytes may take."""

_SLOWEST = 128 << 10
"""Bytes a second: a transfer that is slower on average counts as stuck, and is begun anew."""

_TIDY_SECS = 3.0
"""How long the tidying up after a failure may take, whatever the deadline."""

_WAKE_SECS = 0.2
"""How often a thread that waits for an answer looks whether it was interrupted."""


class GaveUpError(Exception):
    """No attempt at a request succeeded, or there was no time for one.

    Attributes:
        attempts: how many there were.
        in_time: whether another attempt would have been made, had there been time.
    """

    def __init__(self, attempts: int, *, in_time: bool) -> None:
        super().__init__(f"{attempts} attempts failed")
        self.attempts = attempts
        self.in_time = in_time


class Calls:
    """Runs coroutines on the event loop of a client, for callers in any thread.

    Args:
        loop: returns the event loop, which another thread runs.
        attempts: how often a request is tried, 1 or more.
        backoff_secs: how long at most to wait before the second attempt; this doubles from one attempt to the
            next, up to 20 s. Each wait is a random part of that, so that many writers do not return together.
        is_transient: whether what a request raised may pass.

    Attributes:
        slots: held by each transfer while it holds bytes in memory.
    """

    def __init__(
        self,
        loop: Callable[[], asyncio.AbstractEventLoop],
        *,
        attempts: int,
        backoff_secs: float,
        is_transient: Callable[[BaseException], bool],
    ) -> None:
        check_retries(attempts, backoff_secs)
        self._loop = loop
        self._attempts = attempts
        self._backoff_secs = backoff_secs
        self._is_transient = is_transient
        self.slots = asyncio.Semaphore(AT_ONCE)

    def run(self, action: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Return what a coroutine returns, or raise what it raises.

        When this thread is interrupted, or what it does is cancelled, so is the coroutine, which has a few
        seconds to tidy up.

        Raises:
            GaveUpError: the deadline has passed before anything was done, or what this thread does was
                cancelled.
        """
        if remaining() == 0:
            raise GaveUpError(0, in_time=False)
        loop = self._loop()
        outcome: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []  # for the loop itself keeps none alive
        context = contextvars.copy_context()

        def start() -> None:
            tasks.append(loop.create_task(action(), context=context))
            tasks[0].add_done_callback(finish)

        def finish(task: asyncio.Task[_T]) -> None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())

        loop.call_soon_threadsafe(start)
        try:
            while not outcome.done():
                # The system may give Ctrl-C to another thread, and then only waking up lets this one see it.
                wait([outcome], _WAKE_SECS)
                if is_cancelled():
                    raise GaveUpError(0, in_time=False)
            return outcome.result()
        except BaseException:
            if not outcome.done():
                loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                wait([outcome], 2 * _TIDY_SECS)
            raise

    @asynccontextmanager
    async def slot_for(self, size: int) -> AsyncIterator[None]:
        """Hold a slot while so many bytes are in memory; few of them need none."""
        if size < _FEW_BYTES:
            yield
            return
        async with self.slots:
            yield

    async def request(
        self, send: Callable[[], Awaitable[_T]], *, size: int = 0, attempts: int | None = None
    ) -> _T:
        """Return what one request returns, sending it again as long as what goes wrong may pass.

        Args:
            send: sends it, each time anew.
            size: how many bytes it transfers, which decides how long each attempt may take.
            attempts: how often it is tried, where that is not as often as any; 1 where ``send`` itself tries
                again.

        Raises:
            GaveUpError: it never succeeded, or there is no time left; raised from the last failure.
        """
        patience = _PATIENCE_SECS + size / _SLOWEST
        most = self._attempts if attempts is None else attempts
        retrying = AsyncRetrying(
            stop=lambda state: _is_over(state, most),
            wait=wait_random_exponential(multiplier=self._backoff_secs, max=_LONGEST_WAIT_SECS),
            retry=retry_if_exception(self._is_transient),
            before_sleep=_log,
            reraise=True,
        )

        async def attempt() -> _T:
            left = remaining()
            async with asyncio.timeout(patience if left is None else min(patience, left)):
                return await send()

        try:
            return await retrying(attempt)
        except Exception as error:
            if not self._is_transient(error):
                raise
            made = int(retrying.statistics["attempt_number"])
            raise GaveUpError(made, in_time=made == most and remaining() != 0) from error

    async def tidy(self, send: Callable[[], Awaitable[object]], what: str) -> None:
        """Undo something after a failure, for a few seconds at most, whatever the deadline; log a failure."""
        request = asyncio.create_task(self.request(send), context=contextvars.Context())
        try:
            async with asyncio.timeout(_TIDY_SECS):
                await request
        except Exception as error:  # noqa: BLE001 - what went wrong first is the error to raise
            _logger.warning("%s (%s)", what, type(error.__cause__ or error).__name__)


def check_retries(attempts: object, backoff_secs: object) -> None:
    """Check the two options of every object store that say how requests are tried again.

    Raises:
        InvalidValueError: one of them is no such number.
    """
    if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
        raise InvalidValueError(f"retry_attempts is a whole number, 1 or more; got {attempts!r}.")
    if (
        not isinstance(backoff_secs, int | float)
        or isinstance(backoff_secs, bool)
        or not 0 <= backoff_secs < math.inf
    ):
        raise InvalidValueError(
            f"retry_backoff_secs is a number of seconds, 0 or more; got {backoff_secs!r}."
        )


async def together(actions: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run coroutines at once; return what they return. When one fails, stop the rest and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(action) for action in actions]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
    return [task.result() for task in tasks]


def _is_over(state: RetryCallState, attempts: int) -> bool:
    left = remaining()
    return state.attempt_number >= attempts or (left is not None and state.upcoming_sleep >= left)


def _log(state: RetryCallState) -> None:
    # The type alone: texts of clients hold URLs, and these may hold what is to be kept secret.
    error = state.outcome.exception() if state.outcome else None
    _logger.info(
        "Attempt %d at a request to an object store failed (%s); the next is in %.1f s.",
        state.attempt_number,
        type(error).__name__,
        state.upcoming_sleep,
    )
