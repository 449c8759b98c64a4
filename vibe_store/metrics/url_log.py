"""A metrics log at a URL: lines are kept in memory, and a thread stores them at intervals."""

import atexit
import errno
import logging
import os
import threading
import warnings
import weakref

from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.metrics.lines import is_object
from vibe_store.metrics.segments import Segments
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath

__all__ = ["UrlLog"]

_log = logging.getLogger("vibe_store")

_SEGMENT_BYTES = 1 << 20
"""How long a segment may get, as each flush writes one whole; only a single line can be longer."""


class UrlLog:
    """Lines on their way into segments.

    One thread does all the writing, so that :meth:`append` never waits for the network.

    Args:
        url: where the log is.
        resume_step: drop every line past this step first; None keeps all.
        flush_secs: how long a line may wait in memory.

    Raises:
        OSError: what is there cannot be read or written.
    """

    def __init__(self, url: UrlPath, resume_step: int | None, flush_secs: float) -> None:
        self._where = without_credentials(url.url)
        self._segments = Segments.at(url)
        self._flush_secs = flush_secs
        try:
            self._number, self._stored = self._opened(resume_step)
        except OSError as error:
            message = f"The metrics log {self._where} cannot be opened for writing: {_reason(error)}"
            raise OSError(error.errno or errno.EIO, message) from error
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._asked = self._served = 0
        self._failure: Exception | None = None
        self._closed = False
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="vibe_store metrics", daemon=True).start()
        _open_logs.add(self)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def append(self, line: bytes) -> None:
        """Keep a line for the next flush.

        Raises:
            InvalidValueError: this is a forked child, which has no thread that could store it.
            OSError: the last flush failed; this line waits for the next one all the same.
        """
        if not self._is_ours:
            raise InvalidValueError(
                f"The metrics log {self._where} is that of process {self._pid}, from which this one was "
                "forked. Open a log of another name in this process."
            )
        with self._changed:
            self._waiting.append(line)
            self._changed.notify_all()
            failure, self._failure = self._failure, None
            waiting = len(self._waiting)
        if failure is not None:
            raise self._unstored(failure, f"{waiting} lines wait for the next flush") from failure

    def flush(self) -> None:
        """Store what waits, and return when that is done.

        Raises:
            OSError: it failed; the lines wait for the next flush.
        """
        ticket = self._ask()
        if ticket is not None:
            self._settle(ticket, None, "{} lines wait for the next flush")

    def close(self, *, patience_secs: float | None = None) -> None:
        """Store what waits and end the thread.

        Args:
            patience_secs: how long to wait for that; None waits as long as the storage does.

        Raises:
            OSError: it failed, or took longer.
        """
        ticket = self._ask(last=True)
        if ticket is not None:
            self._settle(ticket, patience_secs, "{} lines are lost")

    def let_go(self) -> None:
        """Have the thread store what waits and end, without waiting for it."""
        self._ask(last=True)

    def say_what_is_lost(self) -> None:
        """Log that lines are lost, where some still wait as the program ends."""
        if self._is_ours and not self._closed and self._waiting:
            _log.error(
                "%d lines are lost, because the metrics log %s was not closed before the program ended. "
                "Close it, or use it in a `with` block.",
                len(self._waiting),
                self._where,
            )

    @property
    def _is_ours(self) -> bool:
        return os.getpid() == self._pid

    def _ask(self, *, last: bool = False) -> int | None:
        """Ask the thread to store what waits; None where there is no thread, any more or in this process."""
        if not self._is_ours:
            return None
        with self._changed:
            if self._closed:
                return None
            self._closed = last
            self._asked += 1
            self._changed.notify_all()
            return self._asked

    def _settle(self, ticket: int, patience_secs: float | None, consequence: str) -> None:
        with self._changed:
            served = self._changed.wait_for(lambda: self._served >= ticket, patience_secs)
            failure, self._failure = self._failure, None
            waiting = len(self._waiting)
        if not served:
            failure = TimeoutError(errno.ETIMEDOUT, f"it took longer than {patience_secs:g} s")
        if failure is not None:
            raise self._unstored(failure, consequence.format(waiting)) from failure

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._asked > self._served)
                self._changed.wait_for(lambda: self._asked > self._served, self._flush_secs)
                ticket, ended = self._asked, self._closed
            failure = self._store()
            with self._changed:
                self._served, self._failure = ticket, failure
                self._changed.notify_all()

    def _store(self) -> Exception | None:
        """Store every line that waits; return what went wrong."""
        try:
            while lines := self._copy_of_waiting():
                taken, body = _fill(self._stored, lines)
                if taken:
                    self._segments.write(self._number, body)
                    self._stored = body
                    with self._changed:
                        del self._waiting[:taken]
                else:
                    self._number = self._segments.begin(after=self._number)
                    self._stored = b""
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised in the writer's thread
            _log.info("A flush of the metrics log %s failed: %s", self._where, _reason(error))
            return error
        return None

    def _copy_of_waiting(self) -> list[bytes]:
        with self._changed:
            return self._waiting.copy()

    def _opened(self, resume_step: int | None) -> tuple[int, bytes]:
        """Return the segment to go on in, and what it holds."""
        numbers = self._segments.numbers()
        last = numbers[-1] if numbers else 0
        if resume_step is not None:
            # The writer before this one may still be alive, on a machine that was taken for dead, and write
            # its segment again: no line of this one is in there.
            self._segments.drop_past(numbers, resume_step)
        elif numbers:
            (stored,) = self._segments.read([last])
            if len(stored) < _SEGMENT_BYTES:
                return last, self._with_an_end(last, stored)
        return self._segments.begin(after=last), b""

    def _with_an_end(self, number: int, stored: bytes) -> bytes:
        """Make a segment that somebody cut end with a line's end; no writer of ours leaves such a one."""
        head, newline, last = stored.rpartition(b"\n")
        if not last:
            return stored
        whole = is_object(last)
        ended = stored + b"\n" if whole else head + newline
        self._segments.write(number, ended)
        if not whole:
            warnings.warn(
                f"The last line of the metrics log {self._where} was cut short and has been dropped: "
                f"{last[:80]!r}.",
                VibeStoreWarning,
                stacklevel=5,
            )
        return ended

    def _unstored(self, error: Exception, consequence: str) -> OSError:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        return OSError(
            number, f"Metrics could not be stored in {self._where}, so {consequence}: {_reason(error)}"
        )


def _fill(stored: bytes, lines: list[bytes]) -> tuple[int, bytes]:
    """Return how many of the lines still go into a segment, and what it holds then."""
    body, taken = bytearray(stored), 0
    for line in lines:
        if body and len(body) + len(line) > _SEGMENT_BYTES:
            break
        body += line
        taken += 1
    return taken, bytes(body)


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


_open_logs: "weakref.WeakSet[UrlLog]" = weakref.WeakSet()


@atexit.register
def _say_what_is_lost() -> None:
    """Name the logs that nobody closed. (It is too late to close them: clients of stores need threads.)"""
    for log in _open_logs:
        log.say_what_is_lost()
