"""Several calls to a storage under way at once, where each of them waits for a network."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vibe_store.deadline import until
from vibe_store.interfaces import StorageBackend

__all__ = ["Requests", "at_once"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_TO_STOP_SECS = 1.0


class Requests(Generic[_R]):
    """Calls that go on while the caller does something else; all are over when the block ends.

    Where the storage says that it is not worth it, each is made by :meth:`begin` itself. When a call or the
    block fails, calls that did not begin are dropped, and the first failure is raised once the others ended.
    When Ctrl-C ends the block, those under way are cancelled, and waited for no more than a moment.
    """

    def __init__(self, storage: StorageBackend) -> None:
        count = storage.concurrency
        self._threads = (
            ThreadPoolExecutor(count, thread_name_prefix="vibe_store request") if count > 1 else None
        )
        self._begun: list[Future[_R]] = []
        self._cancel = threading.Event()

    def begin(self, call: Callable[..., _R], *arguments: Any) -> None:
        """Make a call; its result is one of :meth:`results`."""
        if self._threads is not None:
            with until(self._cancel):
                self._begun.append(self._threads.submit(copy_context().run, call, *arguments))
            return
        done: Future[_R] = Future()
        done.set_result(call(*arguments))
        self._begun.append(done)

    def results(self) -> list[_R]:
        """Wait for all calls, and return what they returned, in the order in which they were made."""
        return [each.result() for each in self._begun]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        if self._threads is None:
            return
        over = False
        try:
            if error is None:
                wait(self._begun, return_when=FIRST_EXCEPTION)
            if error is None or isinstance(error, Exception):
                self._threads.shutdown(wait=True, cancel_futures=True)
                over = True
        finally:
            if not over:
                self._cancel.set()
                self._threads.shutdown(wait=False, cancel_futures=True)
                wait(self._begun, _TO_STOP_SECS)
        if error is None:
            self.results()


def at_once(storage: StorageBackend, call: Callable[[_T], _R], arguments: Iterable[_T]) -> list[_R]:
    """Return what ``call`` returns for each of the arguments, in their order."""
    listed = list(arguments)
    if len(listed) < 2:
        return [call(argument) for argument in listed]
    with Requests[_R](storage) as requests:
        for argument in listed:
            requests.begin(call, argument)
        return requests.results()
