"""Ctrl-C and SIGTERM during training: noticed between two chunks and answered with a checkpoint."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["SignalWatch", "TrainingInterrupted"]


class TrainingInterrupted(SystemExit):
    """A signal ended the training early.

    It derives from ``SystemExit``, so that a script that does not catch it ends with the status that shells
    expect (130 after Ctrl-C, 143 after SIGTERM), and neither goes on as if the training had finished nor
    swallows it in an ``except Exception``.

    Attributes:
        signum: the signal.
        step: the step at which training stopped.
        saved: whether a checkpoint of that very step is committed.
        overdue: whether its save was still under way at the deadline. The interpreter would wait for it, so a
            program that has to end in time ends by ``os._exit``.
    """

    def __init__(self, message: str, *, signum: int, step: int, saved: bool, overdue: bool = False) -> None:
        super().__init__(128 + signum)
        self.message = message
        self.signum = signum
        self.step = step
        self.saved = saved
        self.overdue = overdue

    def __str__(self) -> str:
        return self.message


class SignalWatch:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one ends the process at once.

    Signals are left alone outside the main thread, where Python cannot catch them, and a signal that the
    process was told to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def seconds_since(self) -> float:
        """Return how long ago the signal came."""
        return time.monotonic() - self._received_at

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(signum)
                # None stands for a handler that was not installed from Python and could not be put back.
                if previous is not None and previous != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.received = signum
        self._received_at = time.monotonic()
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
