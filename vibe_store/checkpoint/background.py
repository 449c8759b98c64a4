"""One save at a time in a thread of its own, whose failure surfaces at the next call."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from vibe_store.errors import SaveFailedError, SaveTimeoutError, StepAlreadyExistsError

__all__ = ["SAVE_THREAD", "BackgroundSave"]

SAVE_THREAD = "vibe_store save"
"""How the names of the threads begin that save in the background."""


class BackgroundSave:
    """The save that is under way, or that failed and was not yet told of.

    A thread for each save rather than one for all: nothing idles, a forked child starts its own, and a
    manager that was never closed still finishes its last save before the interpreter ends.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._step = 0
        self._deadline = 0.0
        self._error: BaseException | None = None
        self.untold: list[str] = []
        """What nobody was told of yet, as text: it outlives a manager that is no longer used."""

    @property
    def step(self) -> int | None:
        """The step that is being saved now, or None."""
        return self._step if self._thread is not None and self._thread.is_alive() else None

    def start(self, step: int, prepare: Callable[[], Callable[[], None]]) -> None:
        """Call ``prepare`` here, and what it returns in a thread; the save before has to be settled.

        The thread is up before there is work for it, so handing over waits for nothing.
        """
        handed_over: SimpleQueue[Callable[[], None]] = SimpleQueue()
        thread = threading.Thread(
            target=self._run, args=(step, handed_over), name=f"{SAVE_THREAD} of step {step}"
        )
        thread.start()
        try:
            work = prepare()
        except BaseException:
            handed_over.put(_nothing)
            raise
        self._step = step
        self._deadline = time.monotonic() + (self._timeout or 0.0)
        self._thread = thread
        handed_over.put(work)

    def _run(self, step: int, handed_over: SimpleQueue[Callable[[], None]]) -> None:
        try:
            handed_over.get()()
        except BaseException as error:  # noqa: BLE001 - it is raised again by the next call
            self._error = error
            told = error if isinstance(error, SaveFailedError) else failure_of(step, error)
            self.untold.append(str(told))

    def settle(self) -> None:
        """Wait for the save under way, without raising what went wrong in it.

        Raises:
            SaveTimeoutError: it takes longer than it may; it goes on all the same.
        """
        if self._thread is None:
            return
        if self._thread.is_alive():
            self._thread.join(min(max(0.0, self._deadline - time.monotonic()), threading.TIMEOUT_MAX))
        if self._thread.is_alive():
            raise SaveTimeoutError(
                f"The save of step {self._step} has not finished within {self._timeout:g} seconds "
                "(async_timeout_secs). It goes on in the background; check the storage, or allow more time."
            )
        self._thread = None

    def raise_failure(self) -> None:
        """Raise what went wrong in the last save, once.

        Raises:
            StepAlreadyExistsError: another writer committed that step first.
            SaveFailedError: anything else; the cause says what.
        """
        error, self._error = self._error, None
        self.untold.clear()
        if isinstance(error, SaveFailedError):
            raise error
        if error is not None:
            raise failure_of(self._step, error) from error


def failure_of(step: int, error: BaseException) -> StepAlreadyExistsError | SaveFailedError:
    """Return the exception that tells the user of ``error`` in the save of ``step``."""
    if isinstance(error, StepAlreadyExistsError):
        return StepAlreadyExistsError(str(error))
    return SaveFailedError(
        f"The save of step {step} failed: {error or type(error).__name__} "
        f"({type(error).__name__}). What was saved before is untouched; training can go on.",
        step=step,
    )


def _nothing() -> None:
    """What a thread does whose save was given up before it began."""
