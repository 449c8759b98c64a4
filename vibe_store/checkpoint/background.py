"""One save at a time in a thread of its own, whose failure surfaces at the next call."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from vibe_store.deadline import within
from vibe_store.errors import (
    SaveFailedError,
    SaveTimeoutError,
    StepAlreadyExistsError,
    WriterSupersededError,
)

__all__ = ["BackgroundSave"]

_TO_GIVE_UP_SECS = 5.0


class BackgroundSave:
    """The save that is under way, or that failed and was not yet told of.

    The executor's one thread stays up between saves, so that handing a save over waits for nothing. It ends
    with the manager; and the interpreter, when it ends, waits for a save that is under way.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._executor: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._save: Future[None] | None = None
        self._step = 0
        self._deadline = 0.0
        self._error: BaseException | None = None
        self.untold: list[str] = []
        """What nobody was told of yet, as text: it outlives a manager that is no longer used."""

    @property
    def step(self) -> int | None:
        """The step that is being saved now, or None."""
        self._leave_parent()
        return None if self._save is None or self._save.done() else self._step

    def start(self, step: int, work: Callable[[], None]) -> None:
        """Run ``work`` in the thread; the save before has to be settled."""
        self._leave_parent()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="vibe_store save")
        self._step = step
        self._deadline = time.monotonic() + self._timeout
        self._save = self._executor.submit(self._run, step, work)

    def _run(self, step: int, work: Callable[[], None]) -> None:
        try:
            # A storage that gives up in time says more than that the save took too long.
            early = min(_TO_GIVE_UP_SECS, self._timeout / 10)
            with within(self._deadline - time.monotonic() - early):
                work()
        except BaseException as error:  # noqa: BLE001 - it is raised again by the next call
            self._error = error
            told = error if isinstance(error, SaveFailedError) else failure_of(step, error)
            self.untold.append(str(told))

    def settle(self) -> None:
        """Wait for the save under way, without raising what went wrong in it.

        Raises:
            SaveTimeoutError: it takes longer than it may; it goes on all the same.
        """
        self._leave_parent()
        if self._save is None or self._save.done():
            self._save = None
            return
        left = min(max(0.0, self._deadline - time.monotonic()), threading.TIMEOUT_MAX)
        if wait([self._save], left).not_done:
            raise SaveTimeoutError(
                f"The save of step {self._step} has not finished within {self._timeout:g} seconds "
                "(async_timeout_secs). It goes on in the background; check the storage, or allow more time."
            )
        self._save = None

    def end(self) -> None:
        """Let the thread end; the last save has to be settled."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    def _leave_parent(self) -> None:
        """In a forked child, forget the parent's thread and its save: the child has neither."""
        if self._pid != os.getpid():
            self._pid, self._executor, self._save = os.getpid(), None, None

    def raise_failure(self) -> None:
        """Raise what went wrong in the last save, once.

        Raises:
            StepAlreadyExistsError: another writer committed that step first.
            WriterSupersededError: another process has become the writer.
            SaveFailedError: anything else; the cause says what.
        """
        error, self._error = self._error, None
        self.untold.clear()
        if isinstance(error, SaveFailedError):
            raise error
        if error is not None:
            raise failure_of(self._step, error) from error


def failure_of(
    step: int, error: BaseException
) -> StepAlreadyExistsError | WriterSupersededError | SaveFailedError:
    """Return the exception that tells the user of ``error`` in the save of ``step``."""
    if isinstance(error, StepAlreadyExistsError | WriterSupersededError):
        return type(error)(str(error))
    return SaveFailedError(
        f"The save of step {step} failed: {error or type(error).__name__} "
        f"({type(error).__name__}). What was saved before is untouched; training can go on.",
        step=step,
    )
